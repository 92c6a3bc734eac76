//! One image of a set: what it is called, where its bytes lie, what it shows.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::decode::{Image, MAX_FILE_BYTES, decode};
use crate::{Error, Result};

/// One image of a set. 72 bytes and its name: 1.3 million of them take about 150 MB.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Path below the root of the set with `/` between the parts: the same on every machine, and the
    /// same whether the image lies in a folder or in an archive.
    pub name: Box<str>,
    /// Index into the class list.
    pub label: u32,
    /// Box and parts, where the data set has them.
    pub annotation: Option<Box<Annotation>>,
    place: Place,
}

/// Where the bytes of an image lie.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    /// A file below the root; its path there is the sample's name if there is no other.
    File { root: Root, below: Option<Box<str>> },
    /// A piece of an archive.
    Piece {
        archive: Arc<Path>,
        offset: u64,
        length: u64,
    },
    /// An encoded image in memory.
    Memory(Arc<[u8]>),
}

/// The folder that the files of a set lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root(Arc<Folder>);

#[derive(Debug, PartialEq, Eq)]
struct Folder {
    path: PathBuf,
    /// Its real path, where no link may lead out of it.
    confined: Option<PathBuf>,
}

impl Root {
    /// A folder whose owner decides what lies in it: links may lead anywhere.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(Arc::new(Folder {
            path: path.to_path_buf(),
            confined: None,
        }))
    }

    /// A folder whose files are named by a list from somebody else: reading a file that lies outside,
    /// through a link, is an error.
    ///
    /// # Errors
    /// [`Error::Io`] where there is no such folder.
    pub fn confined(path: &Path) -> Result<Self> {
        let real = path
            .canonicalize()
            .map_err(Error::io(path, "look at the folder"))?;
        Ok(Self(Arc::new(Folder {
            path: path.to_path_buf(),
            confined: Some(real),
        })))
    }

    /// Checks that a file may be read, for paths from somebody else's list.
    fn holds(&self, path: &Path) -> Result<()> {
        let Some(real_root) = &self.0.confined else {
            return Ok(());
        };
        let real = path
            .canonicalize()
            .map_err(Error::io(path, "read the file"))?;
        if real.starts_with(real_root) {
            return Ok(());
        }
        Err(Error::layout(
            path,
            format!("a link leads to {}", real.display()),
            "files below the folder of the list: put the list into the folder that the link leads to",
        ))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }
}

/// What some data sets tell about an image beside its class. Nothing uses it unless asked to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Annotation {
    /// Where the object is.
    pub bounding_box: Option<BoundingBox>,
    /// Named points of the object (CUB-200-2011: 15 parts of a bird), in the data set's order.
    pub parts: Vec<Part>,
}

/// A box in pixels of the image as it lies on disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundingBox {
    /// Columns left of it.
    pub left: f32,
    /// Rows above it.
    pub top: f32,
    /// Columns in it.
    pub width: f32,
    /// Rows in it.
    pub height: f32,
}

impl BoundingBox {
    /// From the columns and rows of two corners, which count from 1 and are both in the box.
    pub(crate) fn of_corners([left, right]: [f32; 2], [top, bottom]: [f32; 2]) -> Self {
        Self {
            left: left - 1.0,
            top: top - 1.0,
            width: right - left + 1.0,
            height: bottom - top + 1.0,
        }
    }
}

impl From<BoundingBox> for Annotation {
    fn from(found: BoundingBox) -> Self {
        Self {
            bounding_box: Some(found),
            parts: Vec::new(),
        }
    }
}

/// A named point of an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// Its number in the data set (from 1).
    pub id: u32,
    /// Column in pixels.
    pub x: f32,
    /// Row in pixels.
    pub y: f32,
    /// Whether it can be seen.
    pub visible: bool,
}

impl Sample {
    /// An image in the file `root/name`.
    #[must_use]
    pub fn file(root: &Root, name: impl Into<Box<str>>, label: u32) -> Self {
        let place = Place::File {
            root: root.clone(),
            below: None,
        };
        Self {
            name: name.into(),
            label,
            annotation: None,
            place,
        }
    }

    /// An image in the file `root/below` that is called `name`.
    #[must_use]
    pub fn file_at(root: &Root, below: &str, name: impl Into<Box<str>>, label: u32) -> Self {
        let name = name.into();
        let below = (*name != *below).then(|| below.into());
        let place = Place::File {
            root: root.clone(),
            below,
        };
        Self {
            name,
            label,
            annotation: None,
            place,
        }
    }

    /// An image in `length` bytes of an archive, from `offset`.
    #[must_use]
    pub fn piece(
        archive: &Arc<Path>,
        (offset, length): (u64, u64),
        name: impl Into<Box<str>>,
        label: u32,
    ) -> Self {
        let place = Place::Piece {
            archive: Arc::clone(archive),
            offset,
            length,
        };
        Self {
            name: name.into(),
            label,
            annotation: None,
            place,
        }
    }

    /// An encoded image in memory.
    #[must_use]
    pub fn memory(bytes: Arc<[u8]>, name: impl Into<Box<str>>, label: u32) -> Self {
        Self {
            name: name.into(),
            label,
            annotation: None,
            place: Place::Memory(bytes),
        }
    }

    /// With box and parts.
    #[must_use]
    pub fn annotated(mut self, annotation: Annotation) -> Self {
        self.annotation = Some(Box::new(annotation));
        self
    }

    /// The file to name in messages: that of the image, or `ARCHIVE!NAME` for one in an archive.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match &self.place {
            Place::File { root, below } => {
                root.path().join(&**below.as_ref().unwrap_or(&self.name))
            }
            Place::Piece { archive, .. } => {
                let mut path = archive.as_os_str().to_owned();
                path.push("!");
                path.push(&*self.name);
                path.into()
            }
            Place::Memory(_) => PathBuf::from(&*self.name),
        }
    }

    /// Whether its file is there, and where it may be. A piece of an archive is, since the archive was read to list it.
    pub(crate) fn is_there(&self) -> bool {
        match &self.place {
            Place::File { root, .. } => {
                let path = self.path();
                path.is_file() && root.holds(&path).is_ok()
            }
            Place::Piece { .. } | Place::Memory(_) => true,
        }
    }

    /// The file that the image is, if it is one and no piece of an archive.
    #[must_use]
    pub fn own_file(&self) -> Option<PathBuf> {
        matches!(self.place, Place::File { .. }).then(|| self.path())
    }

    /// Reads the bytes of the image into `bytes`, which is emptied first.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; [`Error::Decode`] for more than [`MAX_FILE_BYTES`];
    /// [`Error::Layout`] for a file that a list reaches through a link that leaves the root.
    pub fn read(&self, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        match &self.place {
            Place::File { root, .. } => {
                let path = self.path();
                match root.holds(&path).and_then(|()| read_file(&path, bytes)) {
                    // One file that is missing, and not the whole folder.
                    Err(Error::Io { source, .. })
                        if source.kind() == std::io::ErrorKind::NotFound
                            && root.path().is_dir() =>
                    {
                        let problem = "there is no such file".to_owned();
                        Err(Error::Decode { path, problem })
                    }
                    outcome => outcome,
                }
            }
            Place::Piece {
                archive,
                offset,
                length,
            } => {
                check_length(*length, || self.path())?;
                let read = |bytes: &mut Vec<u8>| {
                    let mut file = File::open(archive)?;
                    file.seek(SeekFrom::Start(*offset))?;
                    bytes.reserve(*length as usize);
                    file.take(*length).read_to_end(bytes)
                };
                let found = read(bytes).map_err(Error::io(archive, "read the archive"))?;
                if (found as u64) < *length {
                    return Err(Error::layout(
                        self.path(),
                        format!("the archive ends after {found} of its {length} bytes"),
                        "a whole archive: fetch it again",
                    ));
                }
                Ok(())
            }
            Place::Memory(image) => {
                bytes.extend_from_slice(image);
                Ok(())
            }
        }
    }
}

impl Sample {
    /// Reads and decodes the image.
    ///
    /// # Errors
    /// Those of [`Sample::read`]; [`Error::Decode`] with the path for what is no image.
    pub fn decode(&self) -> Result<Image> {
        let mut bytes = Vec::new();
        self.read(&mut bytes)?;
        decode(&bytes, &self.path())
    }
}

/// Reads a whole file of at most [`MAX_FILE_BYTES`].
pub(crate) fn read_file(path: &Path, bytes: &mut Vec<u8>) -> Result<()> {
    // Before it is opened, since opening a pipe would wait for somebody to write to it.
    let meta = std::fs::metadata(path).map_err(Error::io(path, "read the file"))?;
    if !meta.is_file() {
        return Err(Error::Decode {
            path: path.to_path_buf(),
            problem: "it is no file".to_owned(),
        });
    }
    let file = File::open(path).map_err(Error::io(path, "read the file"))?;
    check_length(meta.len(), || path.to_path_buf())?;
    bytes.reserve(meta.len() as usize + 1);
    // Whatever the system said of its size (a pipe says 0), no more than the limit is read.
    let mut file = file.take(MAX_FILE_BYTES + 1);
    let read = file.read_to_end(bytes);
    read.map_err(Error::io(path, "read the file"))?;
    check_length(bytes.len() as u64, || path.to_path_buf())
}

fn check_length(length: u64, path: impl FnOnce() -> PathBuf) -> Result<()> {
    if length <= MAX_FILE_BYTES {
        return Ok(());
    }
    Err(Error::Decode {
        path: path(),
        problem: format!(
            "the file has {} MiB and the limit is {} MiB",
            length >> 20,
            MAX_FILE_BYTES >> 20
        ),
    })
}

/// Checks a path that a list or an archive gives for a file below a root, and cleans it of `./`.
///
/// # Errors
/// A sentence for a path that could leave the root or that no system has: absolute, with `..`, with a
/// drive letter or a backslash, empty, longer than 4096 bytes.
pub(crate) fn below_root(path: &str) -> Result<String, String> {
    let shown = || path.chars().take(200).collect::<String>();
    if path.len() > 4096 {
        return Err(format!("a path of {} bytes", path.len()));
    }
    if path.starts_with('/') || path.get(1..2) == Some(":") {
        return Err(format!(
            "the absolute path {:?} (write it relative to this folder)",
            shown()
        ));
    }
    if path.contains(['\\', '\0']) {
        return Err(format!("the path {:?}", shown()));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err(format!("the path {:?}, which leaves the root", shown())),
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return Err(format!("the path {:?}", shown()));
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn samples_are_small() {
        assert!(size_of::<Sample>() <= 72, "{}", size_of::<Sample>());
    }

    #[test]
    fn paths_that_leave_the_root_are_refused() {
        for bad in [
            "",
            "/",
            ".",
            "..",
            "../a",
            "a/../../b",
            "a/..",
            "/etc/passwd",
            "C:/x",
            "a\\..\\b",
            "a\0b",
            "//x",
        ] {
            assert!(below_root(bad).is_err(), "{bad:?}");
        }
        assert!(below_root(&"a/".repeat(3000)).is_err());
        assert_eq!(below_root("./a//b.jpg").unwrap(), "a/b.jpg");
        assert_eq!(below_root("a/..b/c..jpg").unwrap(), "a/..b/c..jpg");
    }

    #[test]
    fn reads_files_and_pieces() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("x"), b"0123456789").unwrap();
        let root = Root::new(home.path());
        let mut bytes = vec![1, 2, 3];
        Sample::file_at(&root, "x", "train/a/x.jpg", 0)
            .read(&mut bytes)
            .unwrap();
        assert_eq!(bytes, b"0123456789");
        let archive: Arc<Path> = home.path().join("x").into();
        let piece = |offset, length| Sample::piece(&archive, (offset, length), "in/it", 0);
        piece(3, 4).read(&mut bytes).unwrap();
        assert_eq!(bytes, b"3456");
        let error = piece(8, 4).read(&mut bytes).unwrap_err().to_string();
        assert!(
            error.contains("x!in/it") && error.contains("2 of its 4"),
            "{error}"
        );
        let error = piece(0, MAX_FILE_BYTES + 1).read(&mut bytes).unwrap_err();
        assert!(error.to_string().contains("limit"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_list_reaches_nothing_outside_through_a_link() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("secret"), b"x").unwrap();
        let inside = home.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("a")).unwrap();
        let mut bytes = Vec::new();
        let read = |root: &Root, bytes: &mut Vec<u8>| Sample::file(root, "a", 0).read(bytes);
        read(&Root::new(&inside), &mut bytes).unwrap();
        let error = read(&Root::confined(&inside).unwrap(), &mut bytes).unwrap_err();
        assert!(error.to_string().contains("a link leads to"), "{error}");
    }
}
