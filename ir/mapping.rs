//! Memory-mapped files whose pages can be let go: the one module with `unsafe`.
#![allow(unsafe_code)]

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};
use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

/// A file mapped read-only into memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    path: PathBuf,
    modified: Option<SystemTime>,
}

struct Owner(Arc<Mapping>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl Mapping {
    /// Maps the whole of the file at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<Arc<Mapping>> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the mapping is private and read-only. Nothing of this program writes to a file it maps:
        // results are written aside and renamed, which leaves the mapped file untouched.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Arc::new(Mapping { map, path: path.to_owned(), modified: metadata.modified().ok() }))
    }

    /// The contents, borrowed from the mapping and keeping it alive.
    pub(crate) fn bytes(self: &Arc<Mapping>) -> Bytes {
        Bytes::from_owner(Owner(Arc::clone(self)))
    }

    /// Where `slice` lies in this mapping, if it does.
    fn range_of(&self, slice: &[u8]) -> Option<Range<usize>> {
        let start = (slice.as_ptr() as usize).checked_sub(self.map.as_ptr() as usize)?;
        let end = start.checked_add(slice.len())?;
        (end <= self.map.len()).then_some(start..end)
    }

    /// Whether `slice` lies in this mapping.
    pub(crate) fn contains(&self, slice: &[u8]) -> bool {
        self.range_of(slice).is_some()
    }

    /// The file, unless something else has taken its place since it was mapped.
    fn file(&self) -> Option<&Path> {
        let now = std::fs::metadata(&self.path).ok()?;
        let same = now.len() == self.map.len() as u64 && now.modified().ok() == self.modified;
        same.then_some(self.path.as_path())
    }

    /// Lets go of the physical pages behind `slice`; they are read again from the file when next touched.
    pub(crate) fn release(&self, slice: &[u8]) {
        let Some(range) = self.range_of(slice) else { return };
        #[cfg(unix)]
        {
            // SAFETY: the mapping is file-backed, private and never written, so dropping its pages loses nothing.
            // Advice is only advice: where the system declines it, the pages simply stay.
            let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Bytes of a tensor: owned, or borrowed from a mapped file.
#[derive(Clone, Default)]
pub(crate) struct Buffer {
    bytes: Bytes,
    mapping: Option<Arc<Mapping>>,
}

impl Buffer {
    /// Bytes that may lie in `mapping`.
    pub(crate) fn new(bytes: Bytes, mapping: Option<&Arc<Mapping>>) -> Buffer {
        let mapping = mapping.filter(|m| m.contains(&bytes)).map(Arc::clone);
        Buffer { bytes, mapping }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The file these bytes are mapped from and where they lie in it.
    pub(crate) fn place(&self) -> Option<(&Path, u64)> {
        let mapping = self.mapping.as_ref()?;
        Some((mapping.file()?, mapping.range_of(&self.bytes)?.start as u64))
    }

    /// Lets go of the pages behind these bytes if they are mapped; owned bytes stay.
    pub(crate) fn release(&self) {
        if let Some(mapping) = &self.mapping {
            mapping.release(&self.bytes);
        }
    }

    /// Lets go of the pages behind a part of these bytes.
    pub(crate) fn release_part(&self, part: &[u8]) {
        if let Some(mapping) = &self.mapping {
            mapping.release(part);
        }
    }
}
