//! Results on disk by what they depend on: one checked file each, which runs on several hosts may read and write at once.

use crate::content::{aside, short};
use lathe_analysis::Keep;
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Begins every file; the number changes when the contents mean something else.
const MAGIC: [u8; 8] = *b"LKEPT\0\0\x01";

/// Bytes of the checksum that ends a file.
const CHECKSUM: usize = 32;

/// A folder of results, each in a folder of its kind.
#[derive(Debug, Clone)]
pub struct KeptResults {
    folder: PathBuf,
    /// Who computes them: results of another version are others.
    version: String,
}

/// What a folder of results holds of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptKind {
    /// What they are: `trials`.
    pub kind: String,
    /// How many there are.
    pub results: usize,
    /// The bytes they take.
    pub bytes: u64,
}

impl KeptResults {
    /// Results of a version of the program in this folder, which is made when the first is kept.
    pub fn new(folder: impl Into<PathBuf>, version: &str) -> KeptResults {
        KeptResults { folder: folder.into(), version: version.to_owned() }
    }

    fn file(&self, kind: &str, key: &[u8; 32]) -> PathBuf {
        let mut hash = blake3::Hasher::new();
        hash.update(self.version.as_bytes()).update(key);
        self.folder.join(kind).join(short(&hash.finalize()))
    }

    /// Keeps bytes: written aside, then put in place whole. Two that write the same keep the same.
    pub fn write(&self, kind: &str, key: &[u8; 32], bytes: &[u8]) -> io::Result<()> {
        let file = self.file(kind, key);
        let folder = file.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder)?;
        let mut aside = aside(folder)?;
        let checksum = blake3::hash(bytes);
        for part in [&MAGIC[..], bytes, checksum.as_bytes()] {
            aside.write_all(part)?;
        }
        aside.persist(file).map_err(|failed| failed.error)?;
        Ok(())
    }

    /// What was kept; `None` if nothing was, or if it is damaged.
    pub fn read(&self, kind: &str, key: &[u8; 32]) -> Option<Vec<u8>> {
        let file = self.file(kind, key);
        let mut bytes = fs::read(&file).ok()?;
        let (body, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
        let body = body.strip_prefix(&MAGIC)?;
        if blake3::hash(body) != *checksum {
            return None;
        }
        // It counts as used now, for the order in which results are removed.
        if let Ok(opened) = fs::File::options().append(true).open(&file) {
            let _ = opened.set_modified(SystemTime::now());
        }
        bytes.truncate(bytes.len() - CHECKSUM);
        bytes.drain(..MAGIC.len());
        Some(bytes)
    }

    /// What there is, by kind.
    pub fn kinds(&self) -> Vec<KeptKind> {
        let mut kinds: Vec<KeptKind> = Vec::new();
        for (_, bytes, path) in files_below(&self.folder) {
            let kind = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
            match kinds.iter_mut().find(|k| k.kind == kind) {
                Some(known) => (known.results, known.bytes) = (known.results + 1, known.bytes + bytes),
                None => kinds.push(KeptKind { kind, results: 1, bytes }),
            }
        }
        kinds.sort_by(|a, b| a.kind.cmp(&b.kind));
        kinds
    }

    /// Removes what was not used for longest until at most `limit` bytes are left, and says how many bytes went.
    ///
    /// What cannot be removed (another run may be removing it too) is left.
    pub fn limit(&self, limit: u64) -> u64 {
        let mut files = files_below(&self.folder);
        files.sort();
        let mut total: u64 = files.iter().map(|file| file.1).sum();
        let before = total;
        for (_, bytes, path) in files {
            if total > limit && fs::remove_file(&path).is_ok() {
                total -= bytes;
            }
        }
        before - total
    }
}

/// When they were last used, bytes and paths of the results below a folder.
fn files_below(folder: &Path) -> Vec<(SystemTime, u64, PathBuf)> {
    let inside = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let files = inside(folder).flat_map(|kind| inside(&kind.path()));
    let about = |file: fs::DirEntry| {
        let about = file.metadata().ok().filter(fs::Metadata::is_file)?;
        Some((about.modified().unwrap_or(SystemTime::UNIX_EPOCH), about.len(), file.path()))
    };
    files.filter_map(about).collect()
}

impl Keep for KeptResults {
    fn get(&self, kind: &str, key: &[u8; 32]) -> Option<Vec<u8>> {
        self.read(kind, key)
    }

    fn put(&self, kind: &str, key: &[u8; 32], bytes: &[u8]) {
        // What cannot be kept is computed again.
        let _ = self.write(kind, key, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{thread, time::Duration};

    #[test]
    fn damage_is_noticed_and_versions_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptResults::new(folder.path().join("kept"), "1");
        let key = [7; 32];
        assert_eq!(kept.read("options", &key), None);
        kept.write("options", &key, b"four bits").unwrap();
        assert_eq!(kept.read("options", &key).as_deref(), Some(&b"four bits"[..]));
        assert_eq!(kept.read("trials", &key), None);
        assert_eq!(KeptResults::new(folder.path().join("kept"), "2").read("options", &key), None);
        let file = kept.file("options", &key);
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&file, &damaged).unwrap();
            assert_eq!(kept.read("options", &key), None, "byte {at}");
            fs::write(&file, &whole[..at]).unwrap();
            assert_eq!(kept.read("options", &key), None, "cut at {at}");
        }
    }

    #[test]
    fn writers_of_one_result_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptResults::new(folder.path(), "1");
        let body = vec![5u8; 1 << 18];
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..8).for_each(|_| kept.write("options", &[1; 32], &body).unwrap()));
            }
        });
        assert_eq!(kept.read("options", &[1; 32]), Some(body));
        assert_eq!(kept.kinds().iter().map(|k| k.results).sum::<usize>(), 1, "nothing stays aside");
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptResults::new(folder.path(), "1");
        for at in 0..3u8 {
            kept.write(["a", "b", "a"][usize::from(at)], &[at; 32], &[0; 100]).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        kept.read("a", &[0; 32]).unwrap();
        let kinds: Vec<(String, usize)> = kept.kinds().into_iter().map(|k| (k.kind, k.results)).collect();
        assert_eq!(kinds, [("a".to_owned(), 2), ("b".to_owned(), 1)]);
        assert_eq!(kept.limit(300), 140);
        assert_eq!((kept.read("a", &[0; 32]).is_some(), kept.read("b", &[1; 32]).is_some()), (true, false));
        assert_eq!((kept.limit(0), kept.kinds().len()), (280, 0));
    }
}
