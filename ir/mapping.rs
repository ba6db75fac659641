//! Memory-mapped files whose pages can be let go: the one module with `unsafe`.
#![allow(unsafe_code)]

use bytes::Bytes;
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};
use tempfile::TempPath;

/// Fewer bytes than this stay in memory: a file and a mapping of their own cost more than they free.
const SMALLEST_SPILLED: usize = 256 << 10;

/// A file mapped read-only into memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    path: PathBuf,
    modified: Option<SystemTime>,
    /// Removes the file with the mapping.
    _spilled: Option<Spilled>,
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
        Ok(Arc::new(Mapping { map, path: path.to_owned(), modified: metadata.modified().ok(), _spilled: None }))
    }

    /// Writes `bytes` to a temporary file, which goes with the mapping, and maps that.
    fn spilled(bytes: &[u8]) -> io::Result<Arc<Mapping>> {
        let (mut file, spilled) = Spilled::create()?;
        file.write_all(bytes)?;
        let modified = file.metadata()?.modified().ok();
        // SAFETY: the mapping is private and read-only, and nobody writes to a temporary file of this program.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Arc::new(Mapping { map, path: spilled.0.to_path_buf(), modified, _spilled: Some(spilled) }))
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
        let now = fs::metadata(&self.path).ok()?;
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

/// A temporary file that is there as long as this is.
#[derive(Debug)]
struct Spilled(TempPath);

/// The temporary files that are there; `None` once the program is ending and no more are made.
static SPILLED: Mutex<Option<BTreeSet<PathBuf>>> = Mutex::new(Some(BTreeSet::new()));

fn all_spilled() -> MutexGuard<'static, Option<BTreeSet<PathBuf>>> {
    SPILLED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spilled {
    fn create() -> io::Result<(File, Spilled)> {
        let create =
            |folder: &Path| tempfile::Builder::new().prefix(".optimize-").suffix(".weights").tempfile_in(folder);
        let folder = std::env::temp_dir();
        // An interrupt sees either no file or one that it knows of.
        let mut all = all_spilled();
        let all = all.as_mut().ok_or(io::ErrorKind::Interrupted)?;
        // `/tmp` is memory on many systems, and what is large belongs into `/var/tmp`. Another folder is the user's choice.
        let large = Some(Path::new("/var/tmp")).filter(|_| folder == Path::new("/tmp"));
        let (file, path) = large.and_then(|large| create(large).ok()).map_or_else(|| create(&folder), Ok)?.into_parts();
        all.insert(path.to_path_buf());
        Ok((file, Spilled(path)))
    }
}

impl Drop for Spilled {
    fn drop(&mut self) {
        if let Some(all) = all_spilled().as_mut() {
            all.remove::<Path>(&self.0);
        }
    }
}

/// Removes all temporary files, for a program about to end. What is mapped stays readable.
pub(crate) fn remove_spilled() {
    for path in all_spilled().take().into_iter().flatten() {
        // The program is ending; a file that cannot be removed is only litter.
        let _ = fs::remove_file(path);
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

    /// The same bytes on disk, where they are many and owned: their pages are read when they are touched and can be let
    /// go. They stay in memory where no file can be written, and on systems that cannot let pages go.
    pub(crate) fn spilled(self) -> Buffer {
        if !cfg!(unix) || self.mapping.is_some() || self.bytes.len() < SMALLEST_SPILLED {
            return self;
        }
        match Mapping::spilled(&self.bytes) {
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
    use std::{fs, path::PathBuf};

    const SIZE: usize = 32 << 20;

    fn file(tensor: &Tensor) -> PathBuf {
        tensor.place().unwrap().0.to_owned()
    }

    /// MiB of the file behind a tensor that are in the memory of this process.
    fn resident(tensor: &Tensor) -> usize {
        let (all, file) = (fs::read_to_string("/proc/self/smaps").unwrap(), file(tensor));
        let mapping = all.split_once(file.to_str().unwrap()).unwrap().1;
        let line = mapping.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
    }

    #[test]
    fn what_was_spilled_is_the_same_and_is_let_go_when_it_was_read() {
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
        let kept = Tensor::new(DataType::Uint8, vec![SIZE], bytes.clone()).unwrap();
        let [first, second] = [(); 2].map(|()| kept.clone().spilled());
        assert!(first.bytes() == bytes);
        assert!(resident(&first) > 24, "read at once, pages stay");
        first.release();
        assert_eq!(resident(&first), 0);
        assert!(first.same_bits(&second) && first.same_bits(&kept) && kept.same_bits(&second));
        assert_eq!(first.to_i64s().unwrap()[251..254], [0, 1, 2]);
        let mut other = bytes;
        other[0] = 1;
        let other = Tensor::new(DataType::Uint8, vec![SIZE], other).unwrap().spilled();
        assert!(!first.same_bits(&other));
        assert_eq!([&first, &second, &other].map(resident), [0; 3]);
    }

    #[test]
    fn the_file_goes_with_the_last_tensor_that_needs_it() {
        let first = Tensor::new(DataType::Uint8, vec![1 << 20], vec![1; 1 << 20]).unwrap().spilled();
        let (copy, file) = (first.clone().spilled(), file(&first));
        drop(first);
        assert!(file.exists() && copy.bytes()[1] == 1);
        drop(copy);
        assert!(!file.exists());
    }
}
