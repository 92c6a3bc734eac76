//! A miniature while it is being written: its images, and the files around them.

use std::path::PathBuf;

use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress};

use super::Options;
use crate::e10::material::{self, Family};
use crate::e10::{self, IMAGE_SIDE, Part};
use crate::formats::matlab::Value;
use crate::formats::{matlab_writer, tar};
use crate::random::{Purpose, Stream};
use crate::{Error, Result};

/// A folder that is being written.
pub(super) struct Tree {
    pub(super) dir: PathBuf,
    pub(super) options: Options,
    /// Materials instead of E10's textures.
    pub(super) family: Option<&'static Family>,
    pub(super) held_out: Part,
}

/// One image of a miniature.
#[derive(Clone, Copy)]
pub(super) struct Shot {
    pub(super) part: Part,
    pub(super) class: usize,
    pub(super) index: usize,
}

/// Corners of a box in pixels; both count from 1 and are in the box.
pub(super) struct Corners {
    pub(super) x: [usize; 2],
    pub(super) y: [usize; 2],
}

impl Tree {
    /// All images: of train class after class, of the other part in turns, as numbered there.
    pub(super) fn shots(&self) -> Vec<Shot> {
        let Options {
            classes,
            train,
            held_out,
            ..
        } = self.options;
        let shot = |part, class, index| Shot { part, class, index };
        let trains = (0..classes * train).map(|i| shot(Part::Train, i / train, i % train));
        let others = (0..classes * held_out).map(|i| shot(self.held_out, i % classes, i / classes));
        trains.chain(others).collect()
    }

    pub(super) fn of(&self, part: Part) -> Vec<Shot> {
        self.shots()
            .into_iter()
            .filter(|shot| shot.part == part)
            .collect()
    }

    pub(super) fn bytes(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io(folder, "make the folder"))?;
        }
        std::fs::write(&path, bytes).map_err(Error::io(&path, "write the file"))
    }

    pub(super) fn lines(&self, path: &str, lines: impl IntoIterator<Item = String>) -> Result<()> {
        let text: String = lines.into_iter().map(|line| line + "\n").collect();
        self.bytes(path, text.as_bytes())
    }

    pub(super) fn mat(&self, path: &str, variables: &[(&str, &Value)]) -> Result<()> {
        self.bytes(
            path,
            &matlab_writer::write(variables, matlab_writer::Options::default())?,
        )
    }

    /// Width and height, and a box that leaves up to a quarter free on each side.
    fn geometry(&self, shot: Shot) -> ([usize; 2], Corners) {
        let group = (shot.part as usize * e10::CLASSES + shot.class) as u64;
        let seed = self.options.seed;
        let mut stream = Stream::new(seed, Purpose::Miniature, group, shot.index as u64);
        let (low, high) = self.options.sides;
        let size = [(); 2].map(|()| low + stream.below(high - low + 1));
        let [x, y] = size.map(|side| {
            let first = 1 + stream.below(side / 4);
            [first, side - stream.below(side / 4)]
        });
        (size, Corners { x, y })
    }

    pub(super) fn corners(&self, shot: Shot) -> Corners {
        self.geometry(shot).1
    }

    pub(super) fn image(&self, path: &str, shot: Shot) -> Result<()> {
        self.bytes(path, &self.jpeg(shot)?)
    }

    /// An archive of files.
    pub(super) fn tar(&self, path: &str, files: &[(String, Vec<u8>)]) -> Result<()> {
        let archive = tar::write(files).map_err(Error::Config)?;
        self.bytes(path, &archive)
    }

    /// The JPEG file of an image.
    pub(super) fn jpeg(&self, shot: Shot) -> Result<Vec<u8>> {
        let ([width, height], _) = self.geometry(shot);
        let (pixels, quality, colours) = match self.family {
            None => (self.tiles(shot, [width, height]), 90, Subsampling::S420),
            // Small images whose finest waves are coloured.
            Some(family) => {
                let key = (self.options.seed, shot.part);
                let size = [width, height];
                let pixels = material::image(family, key, shot.class, shot.index, size);
                (pixels, 95, Subsampling::S444)
            }
        };
        let encoded = compress(&pixels, width, height, PixelFormat::Rgb, quality, colours);
        encoded.map_err(|e| {
            let error = std::io::Error::other(e.to_string());
            Error::io(&self.dir, "encode an image for the folder")(error)
        })
    }

    /// Textures of E10 of the class beside each other, cut to the size.
    fn tiles(&self, shot: Shot, [width, height]: [usize; 2]) -> Vec<u8> {
        let (across, down) = (width.div_ceil(IMAGE_SIDE), height.div_ceil(IMAGE_SIDE));
        let mut pixels = vec![0; width * height * 3];
        for tile in 0..across * down {
            let (left, top) = (tile % across * IMAGE_SIDE, tile / across * IMAGE_SIDE);
            let number = shot.index << 10 | tile;
            let texture = e10::image(self.options.seed, shot.part, shot.class, number);
            let columns = IMAGE_SIDE.min(width - left) * 3;
            let rows = texture.chunks_exact(IMAGE_SIDE * 3).take(height - top);
            for (y, row) in rows.enumerate() {
                let at = ((top + y) * width + left) * 3;
                pixels[at..at + columns].copy_from_slice(&row[..columns]);
            }
        }
        pixels
    }
}
