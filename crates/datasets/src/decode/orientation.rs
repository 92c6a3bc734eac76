//! How the camera was held: tag 0x0112 of an EXIF block, a number from 1 (upright) to 8.

use super::{Image, Region};

/// The orientation in an EXIF block (the TIFF structure without the letters `Exif`). 1 where it is
/// broken or does not say, as viewers take it.
pub(super) fn from_tiff(tiff: &[u8]) -> u8 {
    find(tiff)
        .filter(|value| (1..=8).contains(value))
        .map_or(1, |value| value as u8)
}

fn find(tiff: &[u8]) -> Option<u32> {
    let little = match tiff.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let short = |at: usize| -> Option<u32> {
        let two: [u8; 2] = tiff.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(u32::from(match little {
            true => u16::from_le_bytes(two),
            false => u16::from_be_bytes(two),
        }))
    };
    let long = |at: usize| -> Option<u32> {
        let four: [u8; 4] = tiff.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(match little {
            true => u32::from_le_bytes(four),
            false => u32::from_be_bytes(four),
        })
    };
    let directory = long(4)? as usize;
    for entry in 0..short(directory)? as usize {
        let at = directory.checked_add(2 + 12 * entry)?;
        if short(at)? == 0x0112 {
            // Tag, type, count, value; the type is SHORT, and some writers use LONG.
            return match short(at + 2)? {
                3 => short(at + 8),
                4 => long(at + 8),
                _ => None,
            };
        }
    }
    None
}

/// Whether the upright image has the width of the stored one as its height.
pub(super) fn swaps_sides(orientation: u8) -> bool {
    orientation >= 5
}

/// Where the pixel (x, y) of the upright image lies in the stored one of `width` x `height`.
fn stored(
    orientation: u8,
    (x, y): (usize, usize),
    (width, height): (usize, usize),
) -> (usize, usize) {
    let (right, bottom) = (width - 1, height - 1);
    match orientation {
        2 => (right - x, y),
        3 => (right - x, bottom - y),
        4 => (x, bottom - y),
        5 => (y, x),
        6 => (y, bottom - x),
        7 => (right - y, bottom - x),
        8 => (right - y, x),
        _ => (x, y),
    }
}

/// The region of the stored image (of `size`) that a region of the upright one comes from.
pub(super) fn stored_region(orientation: u8, region: Region, size: (usize, usize)) -> Region {
    let (x, y) = (region.left, region.top);
    let last = (x + region.width - 1, y + region.height - 1);
    let (one, other) = (
        stored(orientation, (x, y), size),
        stored(orientation, last, size),
    );
    Region {
        left: one.0.min(other.0),
        top: one.1.min(other.1),
        width: one.0.abs_diff(other.0) + 1,
        height: one.1.abs_diff(other.1) + 1,
    }
}

/// The region of the upright image that a region of the stored one (of `size`) becomes.
pub(super) fn upright_region(
    orientation: u8,
    region: Region,
    (width, height): (usize, usize),
) -> Region {
    // Quarter turns undo each other, everything else undoes itself.
    let (back, size) = match orientation {
        6 => (8, (height, width)),
        8 => (6, (height, width)),
        5 | 7 => (orientation, (height, width)),
        _ => (orientation, (width, height)),
    };
    stored_region(back, region, size)
}

/// Turns a stored image upright.
pub(super) fn apply(orientation: u8, image: Image) -> Image {
    if orientation == 1 {
        return image;
    }
    let size = (image.width, image.height);
    let (width, height) = match swaps_sides(orientation) {
        true => (image.height, image.width),
        false => size,
    };
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (from_x, from_y) = stored(orientation, (x, y), size);
            let at = (from_y * image.width + from_x) * 3;
            pixels.extend_from_slice(&image.pixels[at..at + 3]);
        }
    }
    Image {
        width,
        height,
        pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An EXIF block whose first directory has one entry.
    fn tiff(little: bool, tag: u16, kind: u16, value: u16) -> Vec<u8> {
        let two = |n: u16| match little {
            true => n.to_le_bytes(),
            false => n.to_be_bytes(),
        };
        let four = |n: u32| match little {
            true => n.to_le_bytes(),
            false => n.to_be_bytes(),
        };
        let mut bytes = match little {
            true => b"II*\0".to_vec(),
            false => b"MM\0*".to_vec(),
        };
        bytes.extend(four(8));
        for n in [1, tag, kind] {
            bytes.extend(two(n));
        }
        bytes.extend(four(1));
        match kind {
            4 => bytes.extend(four(u32::from(value))),
            _ => bytes.extend([two(value), two(0)].concat()),
        }
        bytes
    }

    #[test]
    fn reads_the_tag_in_both_byte_orders_and_nothing_else() {
        for little in [true, false] {
            for value in 1..=8 {
                assert_eq!(from_tiff(&tiff(little, 0x0112, 3, value)), value as u8);
                assert_eq!(from_tiff(&tiff(little, 0x0112, 4, value)), value as u8);
            }
            for (tag, kind, value) in [
                (0x0112, 3, 0),
                (0x0112, 3, 9),
                (0x0112, 2, 6),
                (0x0113, 3, 6),
            ] {
                assert_eq!(from_tiff(&tiff(little, tag, kind, value)), 1);
            }
            let whole = tiff(little, 0x0112, 3, 6);
            for end in 0..whole.len() - 3 {
                assert_eq!(from_tiff(&whole[..end]), 1, "{end} bytes");
            }
        }
        assert_eq!(from_tiff(b"II*\0\xFF\xFF\xFF\xFF"), 1);
    }

    #[test]
    fn turns_upright_and_finds_regions() {
        // Pixels numbered row by row: 0 1 2 / 3 4 5.
        let image = Image {
            width: 3,
            height: 2,
            pixels: (0..6).flat_map(|n| [n; 3]).collect(),
        };
        let numbers =
            |image: &Image| -> Vec<u8> { image.pixels.iter().step_by(3).copied().collect() };
        let known: [(u8, usize, [u8; 6]); 8] = [
            (1, 3, [0, 1, 2, 3, 4, 5]),
            (2, 3, [2, 1, 0, 5, 4, 3]),
            (3, 3, [5, 4, 3, 2, 1, 0]),
            (4, 3, [3, 4, 5, 0, 1, 2]),
            (5, 2, [0, 3, 1, 4, 2, 5]),
            (6, 2, [3, 0, 4, 1, 5, 2]),
            (7, 2, [5, 2, 4, 1, 3, 0]),
            (8, 2, [2, 5, 1, 4, 0, 3]),
        ];
        for (orientation, width, pixels) in known {
            let upright = apply(orientation, image.clone());
            assert_eq!((upright.width, numbers(&upright)), (width, pixels.to_vec()));
            // A region cut out of the stored image and turned is the region of the turned image.
            for left in 0..upright.width {
                for top in 0..upright.height {
                    let region = Region {
                        left,
                        top,
                        width: upright.width - left,
                        height: upright.height - top,
                    };
                    let stored = stored_region(orientation, region, (3, 2));
                    let turned = apply(orientation, image.cut(stored));
                    assert_eq!(turned, upright.cut(region), "{orientation} {region:?}");
                    assert_eq!(upright_region(orientation, stored, (3, 2)), region);
                }
            }
        }
    }
}
