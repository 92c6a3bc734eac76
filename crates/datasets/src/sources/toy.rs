//! MNIST, Fashion-MNIST and CIFAR-10/100 in the binary files that their owners ship.
//!
//! Read by `candle-datasets` with the feature `toy` (CIFAR-100, which it lacks, here). Pictures are kept
//! in memory as PNG files, so that they take the way of every other image.

use std::path::{Path, PathBuf};

use super::{ListOptions, Listing, Source};
use crate::Result;

const LAYOUT: &str = "train-images-idx3-ubyte and the other three files of MNIST or Fashion-MNIST, \
                      unpacked; data_batch_1.bin of CIFAR-10; or train.bin and test.bin of CIFAR-100";

pub(crate) const SOURCE: Source = Source {
    name: "toy",
    layout: LAYOUT,
    recognises: |root| find(root).is_some(),
    list,
};

/// One of the sets, and the folder with its files.
#[derive(Debug, PartialEq)]
enum Found {
    Mnist(PathBuf),
    Cifar10(PathBuf),
    Cifar100(PathBuf),
}

/// Looks in the folder and where torchvision and the archives put the files.
fn find(root: &Path) -> Option<Found> {
    let with = |folder: &str, file: &str| {
        let folder = root.join(folder);
        folder.join(file).is_file().then_some(folder)
    };
    let mnist = ["", "raw", "MNIST/raw", "FashionMNIST/raw"];
    let mnist = mnist
        .into_iter()
        .find_map(|f| with(f, "train-images-idx3-ubyte"));
    let cifar10 = || {
        let folders = ["", "cifar-10-batches-bin"];
        folders
            .into_iter()
            .find_map(|f| with(f, "data_batch_1.bin"))
    };
    let cifar100 = || {
        let mut folders = ["", "cifar-100-binary"].into_iter();
        folders.find_map(|f| with(f, "train.bin").and_then(|_| with(f, "fine_label_names.txt")))
    };
    mnist
        .map(Found::Mnist)
        .or_else(|| cifar10().map(Found::Cifar10))
        .or_else(|| cifar100().map(Found::Cifar100))
}

#[cfg(not(feature = "toy"))]
fn list(root: &Path, _: &ListOptions) -> Result<Listing> {
    Err(crate::Error::layout(
        root,
        match find(root) {
            Some(_) => "MNIST and CIFAR are not read by this build",
            None => "none of the files of MNIST or CIFAR is here",
        },
        format!("{LAYOUT}; and a build with `--features toy`"),
    ))
}

#[cfg(feature = "toy")]
fn list(root: &Path, options: &ListOptions) -> Result<Listing> {
    super::one_kind_of_labels(options, SOURCE.name)?;
    read::list(root)
}

#[cfg(feature = "toy")]
mod read {
    use std::fs::File;
    use std::io::Read;
    use std::sync::Arc;

    use candle_core::{DType, Tensor};
    use candle_datasets::vision::{Dataset, cifar, mnist};

    use super::*;
    use crate::{Error, Sample};

    /// Bytes of one CIFAR picture.
    const CIFAR: usize = 32 * 32 * 3;

    pub(super) fn list(root: &Path) -> Result<Listing> {
        let found = find(root).ok_or_else(|| {
            Error::layout(root, "none of the files of MNIST or CIFAR is here", LAYOUT)
        })?;
        let listing = |classes, train, test| Listing {
            root: root.to_path_buf(),
            classes,
            train,
            val: None,
            test: Some(test),
        };
        match found {
            Found::Mnist(folder) => {
                for part in ["train", "t10k"] {
                    check_idx(&folder.join(format!("{part}-images-idx3-ubyte")), 3)?;
                    check_idx(&folder.join(format!("{part}-labels-idx1-ubyte")), 1)?;
                }
                let set = mnist::load_dir(&folder).map_err(|e| broken(&folder, e))?;
                let classes: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
                let (train, test) = both(&set, 1).map_err(|e| broken(&folder, e))?;
                Ok(listing(
                    classes,
                    samples("train", train, 1, 10)?,
                    samples("test", test, 1, 10)?,
                ))
            }
            Found::Cifar10(folder) => {
                for file in (1..=5).map(|i| format!("data_batch_{i}.bin")) {
                    check_size(&folder.join(file), 10_000 * (CIFAR as u64 + 1))?;
                }
                check_size(&folder.join("test_batch.bin"), 10_000 * (CIFAR as u64 + 1))?;
                let set = cifar::load_dir(&folder).map_err(|e| broken(&folder, e))?;
                let classes = names(&folder.join("batches.meta.txt"), 10)?;
                let (train, test) = both(&set, 3).map_err(|e| broken(&folder, e))?;
                Ok(listing(
                    classes,
                    samples("train", train, 3, 10)?,
                    samples("test", test, 3, 10)?,
                ))
            }
            Found::Cifar100(folder) => {
                let classes = names(&folder.join("fine_label_names.txt"), 100)?;
                let part = |name: &str, count: usize| -> Result<Vec<Sample>> {
                    let path = folder.join(format!("{name}.bin"));
                    // A coarse and a fine label before each picture.
                    check_size(&path, (count * (CIFAR + 2)) as u64)?;
                    let bytes = std::fs::read(&path).map_err(Error::io(&path, "read the file"))?;
                    let pictures = bytes.chunks_exact(CIFAR + 2);
                    let pictures = pictures.map(|p| (p[2..].to_vec(), u32::from(p[1]), (32, 32)));
                    samples(name, pictures.collect(), 3, 100)
                };
                Ok(listing(
                    classes,
                    part("train", 50_000)?,
                    part("test", 10_000)?,
                ))
            }
        }
    }

    fn broken(folder: &Path, error: impl std::fmt::Display) -> Error {
        Error::layout(folder, error.to_string(), LAYOUT)
    }

    /// A picture plane by plane, its class, its rows and columns.
    type Picture = (Vec<u8>, u32, (usize, usize));

    fn both(set: &Dataset, channels: usize) -> candle_core::Result<(Vec<Picture>, Vec<Picture>)> {
        let part = |images: &Tensor, labels: &Tensor| -> candle_core::Result<Vec<Picture>> {
            let count = images.dim(0)?;
            // As they come, images are divided by 255.
            let bytes = (images.flatten_all()? * 255.0)?
                .round()?
                .to_dtype(DType::U8)?;
            let bytes = bytes.to_vec1::<u8>()?;
            let labels = labels.to_dtype(DType::U32)?.to_vec1::<u32>()?;
            let size = bytes.len() / count.max(1);
            let side = (size / channels).isqrt();
            let pictures = bytes.chunks_exact(size.max(1)).zip(labels);
            Ok(pictures
                .map(|(p, label)| (p.to_vec(), label, (side, side)))
                .collect())
        };
        Ok((
            part(&set.train_images, &set.train_labels)?,
            part(&set.test_images, &set.test_labels)?,
        ))
    }

    fn samples(
        part: &str,
        pictures: Vec<Picture>,
        channels: usize,
        classes: u32,
    ) -> Result<Vec<Sample>> {
        let one = |(i, (planes, label, (height, width))): (usize, Picture)| {
            if label >= classes {
                return Err(Error::Config(format!(
                    "{part} image {i}: label {label} of {classes} classes"
                )));
            }
            let name = format!("{part}/{label:03}/{i:05}.png");
            let png = png_of(&planes, channels, height, width)
                .map_err(|problem| Error::Config(format!("{name}: {problem}")))?;
            Ok(Sample::memory(Arc::from(png), name, label))
        };
        pictures.into_iter().enumerate().map(one).collect()
    }

    fn png_of(
        planes: &[u8],
        channels: usize,
        height: usize,
        width: usize,
    ) -> Result<Vec<u8>, String> {
        let size = height * width;
        if planes.len() != channels * size || size == 0 {
            return Err(format!(
                "{} values for {channels} planes of {width}x{height}",
                planes.len()
            ));
        }
        let pixels: Vec<u8> = (0..size)
            .flat_map(|at| (0..channels).map(move |c| planes[c * size + at]))
            .collect();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
        encoder.set_color(match channels {
            1 => png::ColorType::Grayscale,
            _ => png::ColorType::Rgb,
        });
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
        writer
            .write_image_data(&pixels)
            .map_err(|e| e.to_string())?;
        writer.finish().map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn names(path: &Path, count: usize) -> Result<Vec<String>> {
        let text = match path.is_file() {
            true => crate::lines::read_list(path)?,
            false => String::new(),
        };
        let lines = crate::lines::lines(&text);
        let lines: Vec<String> = lines.map(|(_, line)| line.to_owned()).collect();
        Ok(match lines.len() == count {
            true => lines,
            false => (0..count).map(|class| class.to_string()).collect(),
        })
    }

    fn length(path: &Path) -> Result<u64> {
        let meta = std::fs::metadata(path).map_err(Error::io(path, "read the file"))?;
        Ok(meta.len())
    }

    fn check_size(path: &Path, expected: u64) -> Result<()> {
        let found = length(path)?;
        if found == expected {
            return Ok(());
        }
        let problem = format!("a file of {found} bytes");
        Err(Error::layout(
            path,
            problem,
            format!("{expected} bytes: fetch it again"),
        ))
    }

    /// The size that a header of `dimensions` numbers promises, before anything is allocated for it.
    fn check_idx(path: &Path, dimensions: usize) -> Result<()> {
        let mut header = vec![0; 4 + 4 * dimensions];
        File::open(path)
            .and_then(|mut file| file.read_exact(&mut header))
            .map_err(Error::io(path, "read the file"))?;
        let sizes = header[4..].chunks_exact(4);
        let mut sizes = sizes.map(|b| u64::from(u32::from_be_bytes([b[0], b[1], b[2], b[3]])));
        let content = sizes.try_fold(1_u64, |product, size| product.checked_mul(size));
        match content.and_then(|content| content.checked_add(header.len() as u64)) {
            Some(expected) => check_size(path, expected),
            None => Err(Error::layout(
                path,
                "an impossible size in the header",
                LAYOUT,
            )),
        }
    }

    #[cfg(test)]
    mod tests {
        #![allow(clippy::unwrap_used)]
        use super::*;

        fn idx(dimensions: &[u32], content: &[u8]) -> Vec<u8> {
            let mut bytes = vec![0, 0, 8, dimensions.len() as u8];
            bytes.extend(dimensions.iter().flat_map(|d| d.to_be_bytes()));
            bytes.extend(content);
            bytes
        }

        #[test]
        fn mnist_as_it_is_shipped() {
            let home = tempfile::tempdir().unwrap();
            let raw = home.path().join("MNIST/raw");
            std::fs::create_dir_all(&raw).unwrap();
            let pictures: Vec<u8> = (0..3 * 28 * 28).map(|i| (i * 7 % 251) as u8).collect();
            for part in ["train", "t10k"] {
                let put = |name: String, bytes| std::fs::write(raw.join(name), bytes).unwrap();
                put(
                    format!("{part}-images-idx3-ubyte"),
                    idx(&[3, 28, 28], &pictures),
                );
                put(format!("{part}-labels-idx1-ubyte"), idx(&[3], &[7, 0, 9]));
            }
            let found = crate::list(home.path()).unwrap();
            assert_eq!((found.classes.len(), found.train.len()), (10, 3));
            assert_eq!(found.train[2].label, 9);
            let image = found.train[1].decode().unwrap();
            assert_eq!((image.width, image.height), (28, 28));
            assert_eq!(image.pixels[..3], [(28 * 28 * 7 % 251) as u8; 3]);
            // A header that promises more than there is.
            std::fs::write(
                raw.join("t10k-images-idx3-ubyte"),
                idx(&[u32::MAX, 28, 28], &[]),
            )
            .unwrap();
            let error = crate::list(home.path()).unwrap_err().to_string();
            assert!(error.contains("t10k-images"), "{error}");
        }

        #[test]
        fn cifar_as_it_is_shipped() {
            let home = tempfile::tempdir().unwrap();
            let put = |name: &str, bytes: Vec<u8>| {
                let path = home.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, bytes).unwrap();
            };
            let record = |labels: &[u8], i: usize| -> Vec<u8> {
                let planes = (0..CIFAR).map(|at| (at / 1024 * 50 + i % 50) as u8);
                labels.iter().copied().chain(planes).collect()
            };
            let ten: Vec<u8> = (0..10_000)
                .flat_map(|i| record(&[(i % 10) as u8], i))
                .collect();
            for i in 1..=5 {
                put(
                    &format!("ten/cifar-10-batches-bin/data_batch_{i}.bin"),
                    ten.clone(),
                );
            }
            put("ten/cifar-10-batches-bin/test_batch.bin", ten);
            let found = crate::list(&home.path().join("ten")).unwrap();
            assert_eq!(
                (found.train.len(), found.test.unwrap().len()),
                (50_000, 10_000)
            );
            let image = found.train[13].decode().unwrap();
            assert_eq!(
                (found.train[13].label, &image.pixels[..3]),
                (3, &[13, 63, 113][..])
            );

            let hundred = |n: usize| {
                (0..n)
                    .flat_map(|i| record(&[0, (i % 100) as u8], i))
                    .collect()
            };
            put("hundred/train.bin", hundred(50_000));
            put("hundred/test.bin", hundred(10_000));
            put("hundred/fine_label_names.txt", b"apple\n".to_vec());
            let found = crate::list(&home.path().join("hundred")).unwrap();
            assert_eq!((found.classes.len(), found.train[199].label), (100, 99));
            assert_eq!(found.train[7].decode().unwrap().pixels[..3], [7, 57, 107]);
        }
    }
}

#[cfg(all(test, not(feature = "toy")))]
mod tests {
    #![allow(clippy::unwrap_used)]

    #[test]
    fn says_what_is_needed() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("data_batch_1.bin"), b"").unwrap();
        let error = crate::list(home.path()).unwrap_err().to_string();
        assert!(error.contains("--features toy"), "{error}");
    }
}
