//! Which files lie in an archive, remembered in a plain text file.
//!
//! The archive of ImageNet's training images is a tar of 1000 tars with 1.28 million headers spread
//! over 138 GB; reading them all takes minutes, reading the index less than a second. The first
//! lines of an index say its version and the archive's size and time of change, the last one that it
//! is whole; an index that does not fit is made again.
//!
//! ```text
//! isqrt-cov tar index 1
//! <bytes of the archive> <time of change in nanoseconds since 1970> <entries>
//! <offset> <length> <name>
//! ...
//! end
//! ```

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;

use super::tar::{Entry, walk};
use crate::sample::below_root;
use crate::set::hex;
use crate::sources::IndexCache;
use crate::{Error, Result};

const VERSION: &str = "isqrt-cov tar index 1";
/// Ending of an index beside its archive.
pub(crate) const ENDING: &str = ".isqrt-index";
/// Largest index that is read: 20 million entries.
const MAX_INDEX_BYTES: u64 = 2 << 30;
static WARNED: AtomicBool = AtomicBool::new(false);

/// The files in an archive, in its order, from its index or from the archive itself. A tar in the
/// archive is read as a folder of its name without `.tar`; tars within that are plain files.
///
/// # Errors
/// [`Error::Io`] and [`Error::Layout`] with the archive's path.
pub(crate) fn entries(archive: &Path, cache: &IndexCache) -> Result<Vec<Entry>> {
    let meta = std::fs::metadata(archive).map_err(Error::io(archive, "read the archive"))?;
    let index = match cache {
        IndexCache::Off => None,
        IndexCache::Beside => Some(beside(archive)),
        IndexCache::Folder(folder) => Some(in_folder(folder, archive)?),
    };
    if let Some(index) = &index
        && let Some(entries) = read(index, &meta)
    {
        tracing::debug!(index = %index.display(), entries = entries.len(), "index read");
        return Ok(entries);
    }
    let entries = scan(archive, meta.len())?;
    if let Some(index) = index {
        match write(&index, &meta, &entries) {
            Ok(()) => tracing::debug!(index = %index.display(), "index written"),
            Err(error) if *cache == IndexCache::Beside => {
                // Once, and not for each of a thousand shards.
                if !WARNED.swap(true, Ordering::Relaxed) {
                    let folder = index.parent().unwrap_or(Path::new("")).display();
                    tracing::warn!(
                        "no index can be kept beside archives in {folder} ({}), so they will be read \
                         through again the next time: --cache DIR keeps indices elsewhere",
                        error.kind()
                    );
                }
            }
            Err(error) => return Err(Error::io(&index, "write the index")(error)),
        }
    }
    Ok(entries)
}

fn beside(archive: &Path) -> PathBuf {
    let mut path = archive.as_os_str().to_owned();
    path.push(ENDING);
    path.into()
}

/// Archives of the same name in different folders have different indices.
fn in_folder(folder: &Path, archive: &Path) -> Result<PathBuf> {
    use sha2::{Digest, Sha256};
    let real = archive
        .canonicalize()
        .map_err(Error::io(archive, "look at the archive"))?;
    let hash = Sha256::digest(real.as_os_str().as_encoded_bytes());
    let mut name = real.file_name().unwrap_or_default().to_owned();
    name.push(format!("-{}", hex(&hash[..4])));
    name.push(ENDING);
    Ok(folder.join(name))
}

/// Reads the archive through: the outer one first, then those in it in parallel.
fn scan(archive: &Path, size: u64) -> Result<Vec<Entry>> {
    let broken = |within: Option<&str>, problem: String| {
        let problem = match within {
            Some(name) => format!("{name} in it: {problem}"),
            None => problem,
        };
        Error::layout(
            archive,
            problem,
            "a whole tar archive, not compressed: fetch it or pack it again",
        )
    };
    let open = || File::open(archive).map_err(Error::io(archive, "read the archive"));
    let mut outer = Vec::new();
    walk(&mut open()?, (0, size), &mut |entry| {
        outer.push(entry);
        Ok(())
    })
    .map_err(|problem| broken(None, problem))?;
    last_of_each_name(&mut outer);
    if !outer.iter().any(|entry| is_tar(&entry.name)) {
        return Ok(outer);
    }
    let inner: Vec<Vec<Entry>> = outer
        .into_par_iter()
        .map(|entry| {
            if !is_tar(&entry.name) {
                return Ok(vec![entry]);
            }
            let folder = &entry.name[..entry.name.len() - 4];
            let mut found = Vec::new();
            let range = (entry.offset, entry.offset + entry.length);
            walk(&mut open()?, range, &mut |file| {
                let name = below_root(&format!("{folder}/{}", file.name))?;
                found.push(Entry { name, ..file });
                Ok(())
            })
            .map_err(|problem| broken(Some(&entry.name), problem))?;
            last_of_each_name(&mut found);
            if found.is_empty() {
                return Err(broken(Some(&entry.name), "no files".to_owned()));
            }
            Ok(found)
        })
        .collect::<Result<_>>()?;
    Ok(inner.into_iter().flatten().collect())
}

/// A file that was added again replaces the one before, as when an archive is unpacked.
fn last_of_each_name(entries: &mut Vec<Entry>) {
    let mut later = HashSet::with_capacity(entries.len());
    let kept: Vec<bool> = entries
        .iter()
        .rev()
        .map(|e| later.insert(&*e.name))
        .collect();
    let mut kept = kept.into_iter().rev();
    entries.retain(|_| kept.next().unwrap_or(true));
}

pub(crate) fn is_tar(name: &str) -> bool {
    let ending = Path::new(name).extension();
    ending.is_some_and(|ending| ending.eq_ignore_ascii_case("tar"))
}

/// Nanoseconds since 1970; 0 where the system does not know.
fn changed(meta: &Metadata) -> u128 {
    let time = meta.modified().ok();
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |time| time.as_nanos())
}

/// The entries of an index, if it is one, whole, and of this archive.
fn read(index: &Path, meta: &Metadata) -> Option<Vec<Entry>> {
    if std::fs::metadata(index).ok()?.len() > MAX_INDEX_BYTES {
        return None;
    }
    let text = std::fs::read_to_string(index).ok()?;
    let found = parse(&text, meta.len(), changed(meta));
    if found.is_none() {
        tracing::debug!(index = %index.display(), "not of this archive, or not whole");
    }
    found
}

pub(crate) fn parse(text: &str, size: u64, changed: u128) -> Option<Vec<Entry>> {
    let mut lines = text.strip_suffix("\nend\n")?.split('\n');
    if lines.next()? != VERSION {
        return None;
    }
    let mut head = lines.next()?.splitn(3, ' ');
    if head.next()?.parse() != Ok(size) || head.next()?.parse() != Ok(changed) {
        return None;
    }
    let count: usize = head.next()?.parse().ok()?;
    // An entry takes at least six bytes of text: no more is set aside than there can be.
    let mut entries = Vec::with_capacity(count.min(text.len() / 6));
    for line in lines {
        let mut fields = line.splitn(3, ' ');
        let mut number = || fields.next()?.parse::<u64>().ok();
        let (offset, length) = (number()?, number()?);
        let name = fields.next()?;
        if offset.checked_add(length)? > size || below_root(name).ok()? != name {
            return None;
        }
        entries.push(Entry {
            name: name.to_owned(),
            offset,
            length,
        });
    }
    (entries.len() == count).then_some(entries)
}

fn write(index: &Path, meta: &Metadata, entries: &[Entry]) -> std::io::Result<()> {
    let folder = match index.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder)?;
    // Under its name only when it is whole.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    let (size, changed) = (meta.len(), changed(meta));
    let mut text = format!("{VERSION}\n{size} {changed} {}\n", entries.len());
    for entry in entries {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} {} {}", entry.offset, entry.length, entry.name);
        if text.len() > 1 << 20 {
            file.write_all(text.as_bytes())?;
            text.clear();
        }
    }
    text.push_str("end\n");
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    // Readable by whoever may read the archive.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = meta.permissions().mode() & 0o666 | 0o600;
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode))?;
    }
    file.persist(index).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tar;
    use super::*;

    fn of_two_tars() -> Vec<u8> {
        let inner = |class: &str| {
            let file = |i: usize| (format!("{class}_{i}.JPEG"), vec![i as u8; 300 * i]);
            (
                format!("{class}.tar"),
                tar::write(&[file(1), file(2)]).unwrap(),
            )
        };
        tar::write(&[
            inner("n01"),
            inner("n02"),
            ("notes.txt".into(), b"hi".to_vec()),
        ])
        .unwrap()
    }

    fn names(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|e| &*e.name).collect()
    }

    #[test]
    fn a_tar_of_tars_is_read_in_place_and_once() {
        let home = tempfile::tempdir().unwrap();
        let archive = home.path().join("train.tar");
        std::fs::write(&archive, of_two_tars()).unwrap();
        let first = entries(&archive, &IndexCache::Beside).unwrap();
        assert_eq!(
            names(&first),
            [
                "n01/n01_1.JPEG",
                "n01/n01_2.JPEG",
                "n02/n02_1.JPEG",
                "n02/n02_2.JPEG",
                "notes.txt"
            ]
        );
        let bytes = std::fs::read(&archive).unwrap();
        let second = &first[1];
        assert_eq!(bytes[second.offset as usize..][..600], [2; 600]);
        assert_eq!(second.length, 600);

        // From the index: a change to it shows.
        let index = home.path().join("train.tar.isqrt-index");
        let text = std::fs::read_to_string(&index).unwrap();
        std::fs::write(&index, text.replace("notes.txt", "other.txt")).unwrap();
        let again = entries(&archive, &IndexCache::Beside).unwrap();
        assert_eq!(names(&again)[4], "other.txt");
        // An index that does not fit is made again.
        for spoilt in [
            text.replace("index 1", "index 9"),
            text[..text.len() - 3].to_owned(),
            text.replace(" 600 ", " 99999999 "),
            text.replace("notes.txt", "../notes.txt"),
            text.replacen(" 5\n", " 6\n", 1),
            String::new(),
        ] {
            assert_ne!(spoilt, text);
            std::fs::write(&index, spoilt).unwrap();
            assert_eq!(entries(&archive, &IndexCache::Beside).unwrap(), first);
            assert_eq!(std::fs::read_to_string(&index).unwrap(), text);
        }
        // So is one of an archive that has changed since.
        let longer = [bytes, vec![0; 512]].concat();
        std::fs::write(&archive, longer).unwrap();
        assert_eq!(entries(&archive, &IndexCache::Beside).unwrap(), first);
        assert_ne!(std::fs::read_to_string(&index).unwrap(), text);
    }

    #[test]
    fn the_index_can_lie_elsewhere_or_nowhere() {
        let home = tempfile::tempdir().unwrap();
        let archive = home.path().join("train.tar");
        std::fs::write(&archive, of_two_tars()).unwrap();
        let cache = IndexCache::Folder(home.path().join("cache/deep"));
        assert_eq!(entries(&archive, &IndexCache::Off).unwrap().len(), 5);
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
        assert_eq!(entries(&archive, &cache).unwrap().len(), 5);
        let files = std::fs::read_dir(home.path().join("cache/deep")).unwrap();
        assert_eq!(files.count(), 1);
    }

    #[test]
    fn a_damaged_archive_is_named() {
        let home = tempfile::tempdir().unwrap();
        let archive = home.path().join("train.tar");
        let mut bytes = of_two_tars();
        bytes[512..600].fill(b'x');
        std::fs::write(&archive, bytes).unwrap();
        let error = entries(&archive, &IndexCache::Beside)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("train.tar") && error.contains("n01.tar"),
            "{error}"
        );
        assert!(!home.path().join("train.tar.isqrt-index").exists());
        assert!(entries(&home.path().join("none"), &IndexCache::Off).is_err());
    }
}
