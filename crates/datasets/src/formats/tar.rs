//! Headers of tar archives, read in place: where each file begins and how long it is.
//!
//! POSIX ustar with its prefix, GNU's long names and large numbers, and the path and size of pax
//! headers; old archives without a magic word too. Nothing is unpacked. Names that leave the root are
//! errors, and so are images that are links; what is no image is passed over.

use std::io::{Read, Seek, SeekFrom};

use crate::sample::below_root;
use crate::sources::is_image_name;

/// Headers and contents are padded to this many bytes.
const BLOCK: u64 = 512;
/// Most bytes of a long name or of a pax header: far more than any has, and all that is allocated.
const MAX_EXTRA: u64 = 1 << 16;
/// Most bytes after the last entry: programs fill archives up to some KB.
const MAX_TAIL: u64 = 4 << 20;

/// A file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its path in the archive, safe to join to a root.
    pub(crate) name: String,
    /// First byte of its content, counted from the start of the stream.
    pub(crate) offset: u64,
    /// Bytes of its content.
    pub(crate) length: u64,
}

/// Walks the archive in `start..end` of a stream and hands over every file in it, in order. Folders
/// are passed over. An archive may end with its blocks of zeros or without them.
///
/// Cost: one block read for each entry; contents are skipped by seeking.
///
/// # Errors
/// A sentence, without the path of the archive, with the place of the trouble.
pub(crate) fn walk<R: Read + Seek>(
    stream: &mut R,
    (start, end): (u64, u64),
    each: &mut dyn FnMut(Entry) -> Result<(), String>,
) -> Result<(), String> {
    let mut at = start;
    let mut header = [0; BLOCK as usize];
    // From headers that only describe the next one.
    let (mut name, mut size) = (None, None);
    while at < end {
        let place = at - start;
        let wrong = |what: &str| format!("{what} at byte {place}");
        if end - at < BLOCK {
            return Err(wrong("the archive ends within a header"));
        }
        read_at(stream, at, &mut header).map_err(|e| wrong(&format!("cannot read it ({e})")))?;
        if header.iter().all(|&b| b == 0) {
            return check_end(stream, (start, at, end));
        }
        if let Some(packer) = compressed(&header).filter(|_| place == 0) {
            return Err(format!(
                "it is compressed ({packer}): unpack it with {packer} first"
            ));
        }
        if !checksum_fits(&header) {
            return Err(wrong(
                "this is no tar archive, or a damaged one: bad header",
            ));
        }
        let kind = header[156];
        let describes_next = matches!(kind, b'L' | b'K' | b'x' | b'g' | b'V');
        let stated = number(&header[124..136]).ok_or_else(|| wrong("a size that is no number"))?;
        let length = match size {
            // Folders and links have no content, whatever their headers say.
            _ if matches!(kind, b'1' | b'2' | b'5') => 0,
            Some(size) if !describes_next => size,
            _ => stated,
        };
        let content = at + BLOCK;
        let next = length
            .checked_next_multiple_of(BLOCK)
            .and_then(|padded| content.checked_add(padded))
            .ok_or_else(|| wrong("an impossible size"))?;
        // The padding of the last file may be missing.
        if content + length.min(u64::MAX - content) > end {
            return Err(wrong(&format!(
                "the archive is cut short: a file of {length} bytes where {} are left,",
                end - content.min(end)
            )));
        }
        if describes_next {
            if matches!(kind, b'L' | b'x') {
                if length > MAX_EXTRA {
                    return Err(wrong(&format!("a header of {length} bytes")));
                }
                let mut extra = vec![0; length as usize];
                read_at(stream, content, &mut extra)
                    .map_err(|e| wrong(&format!("cannot read it ({e})")))?;
                match kind {
                    b'L' => name = Some(text(&extra).ok_or_else(|| wrong("a name not in UTF-8"))?),
                    _ => pax(&extra, &mut name, &mut size)
                        .ok_or_else(|| wrong("a broken pax header"))?,
                }
            }
            at = next;
            continue;
        }
        let name_here = match name.take() {
            Some(name) => name,
            None => short_name(&header).ok_or_else(|| wrong("a name not in UTF-8"))?,
        };
        size = None;
        match kind {
            b'0' | b'\0' | b'7' if name_here.ends_with('/') => {}
            b'0' | b'\0' | b'7' => {
                if name_here.contains(|c: char| c.is_control()) {
                    return Err(wrong(&format!("the name {name_here:?}")));
                }
                let name = below_root(&name_here).map_err(|e| wrong(&e))?;
                let entry = Entry {
                    name,
                    offset: content,
                    length,
                };
                each(entry)?;
            }
            b'5' => {}
            // What is no image is of no use either as a link.
            b'1' | b'2' if !is_image_name(&name_here) => {}
            b'1' | b'2' => {
                return Err(wrong(&format!(
                    "{name_here:?} is a link (pack the images themselves: tar --dereference \
                     --hard-dereference)"
                )));
            }
            b'S' => {
                return Err(wrong(&format!(
                    "{name_here:?} is stored with holes (sparse)"
                )));
            }
            other => {
                let kind = char::from(other);
                return Err(wrong(&format!("{name_here:?} is no file (type {kind:?})")));
            }
        }
        at = next;
    }
    Ok(())
}

/// What follows the first block of zeros: another one, and nothing that is an archive. A download that was
/// given its full size and stopped half way ends in far more zeros than any archive.
fn check_end<R: Read + Seek>(
    stream: &mut R,
    (start, at, end): (u64, u64, u64),
) -> Result<(), String> {
    let place = at - start;
    if end - at > MAX_TAIL {
        return Err(format!(
            "its entries end at byte {place} of {}: half a download, or damaged",
            end - start
        ));
    }
    let mut block = [0; BLOCK as usize];
    for (number, at) in (at..end).step_by(BLOCK as usize).enumerate() {
        if end - at < BLOCK {
            break;
        }
        read_at(stream, at, &mut block)
            .map_err(|e| format!("cannot read it ({e}) at byte {}", at - start))?;
        let is_empty = block.iter().all(|&b| b == 0);
        if !is_empty && (number == 1 || checksum_fits(&block)) {
            return Err(format!(
                "its end is marked at byte {place}, and more follows: damaged, or several archives in one"
            ));
        }
    }
    Ok(())
}

/// The program that unpacks a file that begins like this.
fn compressed(start: &[u8]) -> Option<&'static str> {
    match start {
        [0x1F, 0x8B, ..] => Some("gunzip"),
        [b'B', b'Z', b'h', ..] => Some("bunzip2"),
        [0xFD, b'7', b'z', b'X', b'Z', ..] => Some("unxz"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Some("unzstd"),
        _ => None,
    }
}

fn read_at<R: Read + Seek>(stream: &mut R, at: u64, bytes: &mut [u8]) -> std::io::Result<()> {
    stream.seek(SeekFrom::Start(at))?;
    stream.read_exact(bytes)
}

/// The sum of all bytes of a header, those of the sum itself counted as blanks. Some old programs took
/// the bytes as signed.
fn checksum_fits(header: &[u8; BLOCK as usize]) -> bool {
    let Some(stated) = number(&header[148..156]) else {
        return false;
    };
    let blanked = || {
        let bytes = header.iter().enumerate();
        bytes.map(|(i, &b)| if (148..156).contains(&i) { b' ' } else { b })
    };
    let unsigned: u64 = blanked().map(u64::from).sum();
    let signed: i64 = blanked().map(|b| i64::from(b as i8)).sum();
    stated == unsigned || i64::try_from(stated) == Ok(signed)
}

/// Octal digits between blanks and zero bytes, or GNU's base 256 for what needs more than them.
fn number(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        let mut value = u64::from(field[0] & 0x7F);
        for &byte in &field[1..] {
            value = value.checked_mul(256)? | u64::from(byte);
        }
        return Some(value);
    }
    let digits = std::str::from_utf8(field).ok()?;
    let digits = digits.trim_matches([' ', '\0']);
    if digits.is_empty() {
        return Some(0);
    }
    u64::from_str_radix(digits, 8).ok()
}

fn text(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.split(|&b| b == 0).next()?;
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

fn short_name(header: &[u8; BLOCK as usize]) -> Option<String> {
    let name = text(&header[..100])?;
    // Only POSIX archives have a prefix; GNU keeps other things there.
    if &header[257..263] == b"ustar\0" {
        let prefix = text(&header[345..500])?;
        if !prefix.is_empty() {
            return Some(format!("{prefix}/{name}"));
        }
    }
    Some(name)
}

/// Lines `LENGTH KEY=VALUE\n`, where LENGTH counts the whole line.
fn pax(mut bytes: &[u8], name: &mut Option<String>, size: &mut Option<u64>) -> Option<()> {
    while !bytes.is_empty() && bytes[0] != 0 {
        let blank = bytes.iter().position(|&b| b == b' ')?;
        let length: usize = std::str::from_utf8(&bytes[..blank]).ok()?.parse().ok()?;
        let line = bytes.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = line.iter().position(|&b| b == b'=')?;
        let (key, value) = (&line[..equals], &line[equals + 1..]);
        let value = || std::str::from_utf8(value).ok();
        match key {
            b"path" => *name = Some(value()?.to_owned()),
            b"size" => *size = Some(value()?.parse().ok()?),
            _ => {}
        }
        bytes = &bytes[length..];
    }
    Some(())
}

/// An archive (POSIX ustar) of files, given by name and content: for miniature sets and tests.
///
/// # Errors
/// A sentence for a name or a file that is too long for this kind of archive.
pub fn write(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>, String> {
    let mut archive = Vec::new();
    for (name, content) in files {
        archive.extend(header(name, content.len() as u64)?);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(BLOCK as usize), 0);
    }
    archive.resize(archive.len() + 2 * BLOCK as usize, 0);
    Ok(archive)
}

/// The header of a file of `length` bytes, which follow it, padded to 512.
///
/// # Errors
/// As [`write()`].
pub fn header(name: &str, length: u64) -> Result<[u8; BLOCK as usize], String> {
    let mut header = [0; BLOCK as usize];
    let (prefix, short) = match name.len() {
        0..=100 => ("", name),
        _ => name
            .match_indices('/')
            .map(|(at, _)| (&name[..at], &name[at + 1..]))
            .find(|(prefix, short)| prefix.len() <= 155 && short.len() <= 100)
            .ok_or_else(|| format!("the name {name:?} is too long for a tar archive"))?,
    };
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, short.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    let size = format!("{length:011o}\0");
    if size.len() > 12 {
        return Err(format!(
            "a file of {length} bytes is too large for a tar archive"
        ));
    }
    put(124, size.as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(345, prefix.as_bytes());
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn entries(archive: &[u8]) -> Result<Vec<Entry>, String> {
        let mut found = Vec::new();
        let range = (0, archive.len() as u64);
        walk(&mut Cursor::new(archive), range, &mut |entry| {
            found.push(entry);
            Ok(())
        })?;
        Ok(found)
    }

    fn raw(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
        let mut head = header(name, content.len() as u64).unwrap();
        head[156] = kind;
        head[148..156].copy_from_slice(b"        ");
        let sum: u32 = head.iter().map(|&b| u32::from(b)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut bytes = head.to_vec();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    #[test]
    fn finds_what_was_written() {
        let long = format!("{}/{}.jpg", "d".repeat(120), "n".repeat(90));
        let files = [
            ("a/1.jpg".to_owned(), vec![1; 700]),
            (long.clone(), vec![2; 512]),
            ("empty".to_owned(), vec![]),
        ];
        let archive = write(&files).unwrap();
        let found = entries(&archive).unwrap();
        for (entry, (name, content)) in found.iter().zip(&files) {
            assert_eq!(&entry.name, name);
            let at = entry.offset as usize;
            assert_eq!(&archive[at..at + entry.length as usize], &content[..]);
        }
        assert_eq!(found.len(), 3);
        // Without the blocks of zeros at the end, and in the middle of another stream.
        assert_eq!(entries(&archive[..archive.len() - 1024]).unwrap(), found);
        let mut shifted = vec![7; 100];
        shifted.extend(&archive);
        let mut names = 0;
        let range = (100, shifted.len() as u64);
        walk(&mut Cursor::new(&shifted), range, &mut |entry| {
            assert_eq!(entry.offset, found[names].offset + 100);
            names += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(names, 3);
    }

    #[test]
    fn long_names_and_pax_headers() {
        let long = "x/".repeat(150) + "y.jpg";
        let archive = [
            raw(b'L', "././@LongLink", format!("{long}\0").as_bytes()),
            raw(b'0', "cut", b"abc"),
            raw(b'g', "global", b"20 comment=something"),
            raw(b'x', "pax", b"16 path=z/p.jpg\n20 mtime=1234567.89\n"),
            raw(b'0', "other", b"def"),
            raw(b'5', "folder/", b""),
            raw(b'1', "hard link", b""),
            raw(b'0', "last", b"ghi"),
        ]
        .concat();
        let names: Vec<String> = entries(&archive)
            .unwrap()
            .into_iter()
            .map(|e| e.name)
            .collect();
        assert_eq!(names, [&long, "z/p.jpg", "last"]);
    }

    #[test]
    fn sizes_beyond_eight_gigabytes() {
        let mut field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&(1u64 << 40).to_be_bytes());
        assert_eq!(number(&field), Some(1 << 40));
        assert_eq!(number(&[0xFF; 12]), None);
        assert_eq!(number(b"00000001234\0"), Some(0o1234));
        assert_eq!(number(b"  12 \0\0\0\0\0\0\0"), Some(0o12));
        assert_eq!(number(b"00000009\0\0\0\0"), None);
    }

    #[test]
    fn an_end_that_is_none() {
        let files = [
            ("a.jpg".to_owned(), vec![1; 700]),
            ("b.jpg".to_owned(), vec![2; 9]),
        ];
        let archive = write(&files).unwrap();
        // Some garbage after the end is passed over, as tar does; half a record too.
        assert_eq!(
            entries(&[&archive[..], &[7; 300]].concat()).unwrap().len(),
            2
        );
        let half = [&archive[..1536], &vec![0; 8 << 20]].concat();
        assert!(entries(&half).unwrap_err().contains("half a download"));
        let one_zero = [&archive[..1536], &[0; 512], &archive[1536..]].concat();
        assert!(entries(&one_zero).unwrap_err().contains("more follows"));
        let two = [&archive[..], &archive].concat();
        assert!(entries(&two).unwrap_err().contains("several archives"));
        // A folder that claims a size, as some programs write it.
        let mut folder = header("folder/", 4096).unwrap();
        folder[156] = b'5';
        folder[148..156].copy_from_slice(b"        ");
        let sum: u32 = folder.iter().map(|&b| u32::from(b)).sum();
        folder[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert_eq!(entries(&[&folder[..], &archive].concat()).unwrap().len(), 2);
    }

    #[test]
    fn what_is_refused_says_why() {
        for (archive, part) in [
            (raw(b'2', "link.jpg", b""), "is a link"),
            (raw(b'3', "device", b""), "no file"),
            (raw(b'0', "../up", b""), "leaves the root"),
            (raw(b'0', "/etc/passwd", b""), "absolute"),
            (raw(b'0', "a\tb", b""), "name"),
            (raw(b'L', "x", &[b'a'; 70_000]), "a header of 70000"),
            (b"not a tar archive".repeat(100).to_vec(), "no tar archive"),
            (vec![1; 100], "within a header"),
            (header("cut", 5000).unwrap().to_vec(), "cut short"),
            (raw(b'x', "pax", b"99 path=x\n"), "broken pax"),
        ] {
            let error = entries(&archive).unwrap_err();
            assert!(
                error.contains(part) && error.contains("at byte 0"),
                "{error}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn damaged_archives_end(
            hits in proptest::collection::vec((0..4096usize, any::<u8>()), 1..8),
            cut in 0..4096usize,
        ) {
            let mut archive = [
                raw(b'L', "././@LongLink", b"some/long/name\0"),
                raw(b'0', "cut", &[3; 600]),
                raw(b'x', "pax", b"16 path=z/p.jpg\n"),
                raw(b'0', "other", b"def"),
            ]
            .concat();
            for (at, value) in hits {
                if let Some(byte) = archive.get_mut(at) {
                    *byte = value;
                }
            }
            archive.truncate(cut);
            if let Ok(found) = entries(&archive) {
                for entry in found {
                    prop_assert!(entry.offset + entry.length <= archive.len() as u64);
                }
            }
        }
    }
}
