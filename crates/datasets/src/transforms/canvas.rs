//! An image on its way through the steps: pixels, or a file whose pixels are not decoded yet, with the
//! part of it that counts and whether that part is seen mirrored.

use crate::decode::{Encoded, Region};
use crate::{Error, Result};

use super::Filter;
use super::scratch::Scratch;

enum Source<'a> {
    Encoded(Encoded<'a>),
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
}

pub(super) struct Canvas<'a> {
    source: Source<'a>,
    /// Width and height of the source.
    whole: (usize, usize),
    /// The part of the source that counts. All of it inside.
    region: Region,
    /// That part is seen mirrored.
    pub(super) flip: bool,
}

/// What lies outside of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Border {
    Black,
    /// The image mirrored at its outermost pixels, again and again.
    Reflect,
}

impl<'a> Canvas<'a> {
    pub(super) fn encoded(encoded: Encoded<'a>) -> Self {
        let size = encoded.size();
        Self::new(Source::Encoded(encoded), size)
    }

    /// `pixels`: height x width x 3 bytes.
    pub(super) fn borrowed(pixels: &'a [u8], size: (usize, usize)) -> Self {
        Self::new(Source::Borrowed(pixels), size)
    }

    fn new(source: Source<'a>, whole: (usize, usize)) -> Self {
        Self {
            source,
            whole,
            region: Region::whole(whole.0, whole.1),
            flip: false,
        }
    }

    /// Width and height of the part that counts.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.region.width, self.region.height)
    }

    /// Width and height of the image as the file has it.
    pub(super) fn stored_size(&self) -> (usize, usize) {
        match &self.source {
            Source::Encoded(encoded) => encoded.stored_size(),
            _ => self.whole,
        }
    }

    /// Of a file: where a region of the pixels as they are stored lies in the upright image.
    pub(super) fn upright(&self, stored: Region) -> Region {
        match &self.source {
            Source::Encoded(encoded) => encoded.upright_region(stored),
            _ => stored,
        }
    }

    /// Where a part of what is seen lies in the source.
    fn locate(&self, part: Region) -> Region {
        let left = match self.flip {
            true => self.region.width - part.left - part.width,
            false => part.left,
        };
        Region {
            left: self.region.left + left,
            top: self.region.top + part.top,
            ..part
        }
    }

    /// Keeps a part of what is seen.
    pub(super) fn crop(&mut self, part: Region) {
        self.region = self.locate(part);
    }

    /// Keeps `width` x `height` pixels from column `left` and row `top`, which may lie outside.
    pub(super) fn crop_with_border(
        &mut self,
        (left, top): (isize, isize),
        (width, height): (usize, usize),
        border: Border,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (seen_width, seen_height) = self.size();
        let fits = |start: isize, length: usize, size: usize| {
            usize::try_from(start).is_ok_and(|start| start + length <= size)
        };
        if fits(left, width, seen_width) && fits(top, height, seen_height) {
            self.crop(Region {
                left: left as usize,
                top: top as usize,
                width,
                height,
            });
            return Ok(());
        }
        self.decode()?;
        let columns: Vec<Option<usize>> = (0..width)
            .map(|x| {
                let seen = border.inside(left + x as isize, seen_width)?;
                Some(match self.flip {
                    true => self.region.width - 1 - seen,
                    false => seen,
                })
            })
            .collect();
        let mut target = scratch.take();
        target.reserve(width * height * 3);
        for y in 0..height {
            let Some(row) = border.inside(top + y as isize, seen_height) else {
                target.resize(target.len() + width * 3, 0);
                continue;
            };
            let row = self.row(self.region, row);
            for column in &columns {
                match column {
                    Some(x) => target.extend_from_slice(&row[x * 3..x * 3 + 3]),
                    None => target.extend([0; 3]),
                }
            }
        }
        self.replace(target, (width, height), scratch);
        Ok(())
    }

    /// Resizes what is seen.
    pub(super) fn resize(
        &mut self,
        to: (usize, usize),
        filter: Filter,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if self.size() == to {
            return Ok(());
        }
        self.decode()?;
        if self.flip || self.size() != self.whole {
            self.settle(scratch)?;
        }
        let resized = scratch.resize(self.bytes(), self.whole, to, filter);
        self.replace(resized.map_err(Error::Config)?, to, scratch);
        Ok(())
    }

    /// What is seen, as pixels that can be changed (mirrored if `flip` says so).
    pub(super) fn pixels(&mut self, scratch: &mut Scratch) -> Result<&mut [u8]> {
        self.decode()?;
        if self.size() != self.whole || !matches!(self.source, Source::Owned(_)) {
            let flip = std::mem::take(&mut self.flip);
            self.settle(scratch)?;
            self.flip = flip;
        }
        match &mut self.source {
            Source::Owned(pixels) => Ok(pixels),
            _ => Ok(&mut []),
        }
    }

    /// Decodes the part that counts, if it is not decoded yet.
    pub(super) fn decode(&mut self) -> Result<()> {
        if let Source::Encoded(_) = self.source {
            let source = std::mem::replace(&mut self.source, Source::Borrowed(&[]));
            if let Source::Encoded(encoded) = source {
                let image = encoded.decode(Some(self.region))?;
                self.whole = (image.width, image.height);
                self.region = Region::whole(image.width, image.height);
                self.source = Source::Owned(image.pixels);
            }
        }
        Ok(())
    }

    /// Appends a part of what is seen, mirrored once more if `flip`. Of decoded images only.
    pub(super) fn write(&self, part: Region, flip: bool, out: &mut Vec<u8>) {
        let part = self.locate(part);
        for y in 0..part.height {
            let row = self.row(part, y);
            match flip != self.flip {
                true => out.extend(row.as_chunks::<3>().0.iter().rev().flatten()),
                false => out.extend_from_slice(row),
            }
        }
    }

    /// Gives its buffer back.
    pub(super) fn finish(self, scratch: &mut Scratch) {
        if let Source::Owned(pixels) = self.source {
            scratch.give(pixels);
        }
        scratch.trim();
    }

    fn bytes(&self) -> &[u8] {
        match &self.source {
            Source::Encoded(_) => &[],
            Source::Borrowed(pixels) => pixels,
            Source::Owned(pixels) => pixels,
        }
    }

    /// Row `y` of a region of the source.
    fn row(&self, region: Region, y: usize) -> &[u8] {
        let start = ((region.top + y) * self.whole.0 + region.left) * 3;
        &self.bytes()[start..start + region.width * 3]
    }

    /// Makes what is seen the whole of a buffer of its own, not mirrored any more.
    fn settle(&mut self, scratch: &mut Scratch) -> Result<()> {
        self.decode()?;
        let (width, height) = self.size();
        let mut target = scratch.take();
        target.reserve(width * height * 3);
        self.write(Region::whole(width, height), false, &mut target);
        self.replace(target, (width, height), scratch);
        Ok(())
    }

    fn replace(&mut self, pixels: Vec<u8>, size: (usize, usize), scratch: &mut Scratch) {
        let old = std::mem::replace(&mut self.source, Source::Owned(pixels));
        if let Source::Owned(old) = old {
            scratch.give(old);
        }
        self.whole = size;
        self.region = Region::whole(size.0, size.1);
        self.flip = false;
    }
}

impl Border {
    /// Position in an image of `size` pixels that shows at `at`; None for black.
    fn inside(self, at: isize, size: usize) -> Option<usize> {
        let last = size as isize - 1;
        if (0..=last).contains(&at) {
            return Some(at as usize);
        }
        match self {
            Self::Black => None,
            Self::Reflect if last == 0 => Some(0),
            Self::Reflect => {
                let at = at.rem_euclid(2 * last);
                Some(at.min(2 * last - at) as usize)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_mirror_again_and_again() {
        let seen: Vec<_> = (-5..8).map(|at| Border::Reflect.inside(at, 3)).collect();
        let known = [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1];
        assert_eq!(seen, known.map(Some));
        assert_eq!(Border::Reflect.inside(-7, 1), Some(0));
        assert_eq!(Border::Black.inside(-1, 3), None);
        assert_eq!(Border::Black.inside(2, 3), Some(2));
    }
}
