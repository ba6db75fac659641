//! Memory-mapped files whose pages can be let go: the one module with `unsafe`.
#![allow(unsafe_code)]

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};
use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

/// Fewer bytes than this stay in memory: a file and a mapping of their own cost more than they free.
const SMALLEST_SPILLED: usize = 256 << 10;

/// A file mapped read-only into memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    /// Where the file is and when it was last written; `None` for a file without a name.
    named: Option<(PathBuf, Option<SystemTime>)>,
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
        Ok(Arc::new(Mapping { map, named: Some((path.to_owned(), metadata.modified().ok())) }))
    }

    /// Writes `bytes` to a file without a name, which ends with the mapping, and maps that.
    fn unnamed(bytes: &[u8]) -> io::Result<Arc<Mapping>> {
        let mut file = scratch_file()?;
        file.write_all(bytes)?;
        // SAFETY: the mapping is private and read-only, and nobody else can open a file without a name.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Arc::new(Mapping { map, named: None }))
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
        let (path, modified) = self.named.as_ref()?;
        let now = std::fs::metadata(path).ok()?;
        let same = now.len() == self.map.len() as u64 && now.modified().ok() == *modified;
        same.then_some(path.as_path())
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

/// A file without a name in the folder for temporary files.
fn scratch_file() -> io::Result<File> {
    let folder = std::env::temp_dir();
    // `/tmp` is memory on many systems, and what is large belongs into `/var/tmp`. Another folder is the user's choice.
    if folder == Path::new("/tmp")
        && let Ok(file) = tempfile::tempfile_in("/var/tmp")
    {
        return Ok(file);
    }
    tempfile::tempfile_in(folder)
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

    /// The same bytes on disk, where they are many and owned: their pages are read when they are touched and can be let
    /// go. They stay in memory where no file can be written, and on systems that cannot let pages go.
    pub(crate) fn spilled(self) -> Buffer {
        if !cfg!(unix) || self.mapping.is_some() || self.bytes.len() < SMALLEST_SPILLED {
            return self;
        }
        match Mapping::unnamed(&self.bytes) {
            Ok(mapping) => Buffer { bytes: mapping.bytes(), mapping: Some(mapping) },
            Err(_) => self,
        }
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use crate::{DataType, Tensor};

    const SIZE: usize = 32 << 20;

    /// MiB of files that are in the memory of this process.
    fn mapped() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
    }

    #[test]
    fn what_was_spilled_is_the_same_and_is_let_go_when_it_was_read() {
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
        let kept = Tensor::new(DataType::Uint8, vec![SIZE], bytes.clone()).unwrap();
        let [first, second] = [(); 2].map(|()| kept.clone().spilled());
        let before = mapped();
        assert!(first.bytes() == bytes, "read at once, pages stay");
        assert!(mapped() > before + 24, "{} MiB, {before} before", mapped());
        first.release();
        assert!(mapped() < before + 8, "{} MiB, {before} before", mapped());
        assert!(first.same_bits(&second) && first.same_bits(&kept));
        assert_eq!(first.to_i64s().unwrap()[251..254], [0, 1, 2]);
        assert!(mapped() < before + 8, "{} MiB, {before} before", mapped());
        assert!(first.place().is_none() && second.spilled().same_bits(&kept));
        let mut other = bytes;
        other[0] = 1;
        assert!(!first.same_bits(&Tensor::new(DataType::Uint8, vec![SIZE], other).unwrap().spilled()));
        assert!(mapped() < before + 8, "{} MiB, {before} before", mapped());
    }
}
