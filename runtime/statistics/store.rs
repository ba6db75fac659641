//! Statistics on disk: one checked file per request, in a folder per model, set and way of running.

use super::request::Request;
use crate::content::short;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

/// Begins every file; the number changes when the contents mean something else.
const MAGIC: [u8; 8] = *b"LSTAT\0\0\x01";

/// A header holds names and sizes only.
const LARGEST_HEADER: u64 = 1 << 20;

/// Bytes of the checksum that ends a file.
const CHECKSUM: usize = 32;

/// What a file holds, before its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileHead {
    pub request: Request,
    pub arrays: Vec<StoredField>,
}

/// One array of float64 numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredField {
    /// `gram`.
    pub field: String,
    /// Its shape as a whole.
    pub dims: Vec<usize>,
    /// Whether only the upper triangle of the symmetric matrix is stored, row by row.
    pub triangle: bool,
    /// Numbers stored.
    pub len: usize,
}

/// The contents of a file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StatisticFile {
    pub head: FileHead,
    /// The numbers of each array.
    pub data: Vec<Vec<f64>>,
}

/// The file of a request in the folder of its model and set.
pub(crate) fn file_of(folder: &Path, request: &Request) -> PathBuf {
    let text = serde_json::to_vec(request).expect("only names and numbers");
    folder.join(format!("{}.stat", short(&blake3::hash(&text))))
}

/// Writes a file aside and puts it in place whole.
pub(crate) fn write(path: &Path, head: &FileHead, data: &[&[f64]]) -> io::Result<()> {
    lathe_ir::write_whole(path, |file| {
        let mut out = Hashing { out: file, hash: blake3::Hasher::new() };
        let header = serde_json::to_vec(head)?;
        out.write_all(&MAGIC)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        let mut bytes = Vec::with_capacity(1 << 16);
        for part in data.iter().flat_map(|array| array.chunks(1 << 13)) {
            bytes.clear();
            bytes.extend(part.iter().flat_map(|v| v.to_le_bytes()));
            out.write_all(&bytes)?;
        }
        let checksum = out.hash.finalize();
        out.out.write_all(checksum.as_bytes())
    })
}

struct Hashing<W> {
    out: W,
    hash: blake3::Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads a file; an error if it is not whole, was changed, or holds something else than `request`.
pub(crate) fn read(path: &Path, request: &Request) -> io::Result<StatisticFile> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "the file is damaged");
    let bytes = fs::read(path)?;
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or_else(bad)?;
    if blake3::hash(body) != *checksum {
        return Err(bad());
    }
    let mut body = body;
    let mut start = [0u8; 16];
    body.read_exact(&mut start)?;
    let length = u64::from_le_bytes(std::array::from_fn(|i| start[8 + i]));
    if start[..8] != MAGIC || length > LARGEST_HEADER {
        return Err(bad());
    }
    let (header, mut body) = usize::try_from(length).ok().and_then(|l| body.split_at_checked(l)).ok_or_else(bad)?;
    let head: FileHead = serde_json::from_slice(header)?;
    if head.request != *request {
        return Err(bad());
    }
    let mut data = Vec::with_capacity(head.arrays.len());
    for array in &head.arrays {
        let bytes = array.len.checked_mul(8).and_then(|l| body.split_at_checked(l));
        let (numbers, rest) = bytes.ok_or_else(bad)?;
        data.push(numbers.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect());
        body = rest;
    }
    Ok(StatisticFile { head, data })
}

/// Folders that this program has used. A run goes back to the statistics of several sets, which together may be more than
/// is to be kept.
static IN_USE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Removes the folders that were not used for longest until at most `limit` bytes are left; `current` stays, as does what
/// was current before.
///
/// What cannot be looked at or removed (another run may be removing it too) is left.
pub(crate) fn evict(cache: &Path, current: &Path, limit: u64) {
    let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
    in_use.insert(current.to_owned());
    let Ok(entries) = fs::read_dir(cache) else { return };
    let mut folders: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in entries.flatten().filter(|e| e.path().is_dir()) {
        let files: Vec<fs::Metadata> = fs::read_dir(entry.path())
            .map(|files| files.flatten().filter_map(|f| f.metadata().ok()).collect())
            .unwrap_or_default();
        let used = files.iter().filter_map(|m| m.modified().ok()).max().unwrap_or(SystemTime::UNIX_EPOCH);
        folders.push((used, files.iter().map(fs::Metadata::len).sum(), entry.path()));
    }
    folders.sort();
    let mut total: u64 = folders.iter().map(|f| f.1).sum();
    for (_, bytes, folder) in folders {
        if total > limit && !in_use.contains(&folder) && fs::remove_dir_all(&folder).is_ok() {
            total -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_analysis::Rows;
    use std::fs::File;

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let request = Request::Gram(Rows::last("x"));
        let path = file_of(folder.path(), &request);
        let arrays = vec![StoredField { field: "gram".into(), dims: vec![2, 2], triangle: true, len: 3 }];
        let head = FileHead { request: request.clone(), arrays };
        write(&path, &head, &[&[1.0, 0.5, 2.0]]).unwrap();
        assert_eq!(read(&path, &request).unwrap().data, [[1.0, 0.5, 2.0]]);
        assert!(read(&path, &Request::Columns(Rows::last("x"))).is_err());
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(read(&path, &request).is_err(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read(&path, &request).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn the_oldest_folder_goes_first() {
        let cache = tempfile::tempdir().unwrap();
        let folder = |name: &str, age: u64| {
            let path = cache.path().join(name);
            fs::create_dir(&path).unwrap();
            let file = File::create(path.join("a.stat")).unwrap();
            file.set_len(100).unwrap();
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
            path
        };
        let (old, new, current) = (folder("old", 20), folder("new", 10), folder("current", 30));
        evict(cache.path(), &current, 200);
        assert_eq!([old.exists(), new.exists(), current.exists()], [false, true, true]);
        // Another set of the same run: what both need is more than the limit.
        let next = folder("next", 0);
        evict(cache.path(), &next, 0);
        assert_eq!([new.exists(), current.exists(), next.exists()], [false, true, true]);
    }
}
