//! What files and models are, by their contents: large files are read once and then known by place, size and time.

use crate::{LoadOptions, SetSpec};
use lathe_ir::Model;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// Files below this are read every time: that takes no longer than finding out whether it is needed.
const SMALL: u64 = 1 << 20;

/// A file that changed less than this before it was read may change again without another time.
const RESTLESS: Duration = Duration::from_secs(3);

/// Enough of a hash to name a file with.
pub(crate) fn short(hash: &blake3::Hash) -> String {
    hash.to_hex()[..32].to_owned()
}

/// A file to be written aside in a folder and put in place whole, readable as files are that are made without further ado:
/// others may share the folder.
pub(crate) fn aside(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new();
    #[cfg(unix)]
    let file = {
        use std::os::unix::fs::PermissionsExt as _;
        file.permissions(fs::Permissions::from_mode(0o666))
    };
    file.prefix(".part-").tempfile_in(folder)
}

/// What tells a file from others without reading it: hard links to it are the same file.
pub(crate) fn place(path: &Path) -> io::Result<String> {
    let about = fs::metadata(path)?;
    let changed = about.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    #[cfg(unix)]
    let at = {
        use std::os::unix::fs::MetadataExt as _;
        format!("{} {}", about.dev(), about.ino())
    };
    #[cfg(not(unix))]
    let at = fs::canonicalize(path)?.display().to_string();
    Ok(format!("{at} {} {changed}", about.len()))
}

/// The hashes of files that were read before, in this process and, where there is a folder, by others.
#[derive(Debug, Default)]
pub struct ContentIds {
    folder: Option<PathBuf>,
    known: Mutex<BTreeMap<String, blake3::Hash>>,
}

impl ContentIds {
    /// Hashes that are kept in this folder too.
    pub fn kept_in(folder: impl Into<PathBuf>) -> ContentIds {
        ContentIds { folder: Some(folder.into()), known: Mutex::default() }
    }

    /// The hash of a file's bytes.
    pub fn of_file(&self, path: &Path) -> io::Result<blake3::Hash> {
        let about = fs::metadata(path)?;
        if about.len() < SMALL {
            return Ok(blake3::hash(&fs::read(path)?));
        }
        let place = place(path)?;
        let known = |place: &str| self.known.lock().unwrap_or_else(PoisonError::into_inner).get(place).copied();
        if let Some(hash) = known(&place).or_else(|| self.read(&place)) {
            self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(place, hash);
            return Ok(hash);
        }
        let mut hash = blake3::Hasher::new();
        hash.update_reader(fs::File::open(path)?)?;
        let hash = hash.finalize();
        let age = about.modified()?.elapsed().unwrap_or_default();
        if age >= RESTLESS && self::place(path)? == place {
            self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(place.clone(), hash);
            // What is not kept is read again.
            let _ = self.write(&place, &hash);
        }
        Ok(hash)
    }

    /// A hash of a model: of everything in it, with weights that are mapped from a file told by what that file is.
    pub fn of_model(&self, model: &Model) -> io::Result<blake3::Hash> {
        let mut hash = blake3::Hasher::new();
        model.write_referring(&mut hash, &|file| Ok(self.of_file(file)?.to_hex().to_string()))?;
        Ok(hash.finalize())
    }

    /// A hash of everything that results of runs depend on: who runs what on which samples, how, and what else there is.
    pub fn of_run(
        &self,
        engine: &str,
        model: &Model,
        set: &SetSpec,
        load: &LoadOptions,
        more: &impl Serialize,
    ) -> io::Result<blake3::Hash> {
        let mut hash = blake3::Hasher::new();
        hash.update(self.of_model(model)?.as_bytes());
        self.add_files(&set.path, &mut hash)?;
        let set = SetSpec { path: PathBuf::new(), ..set.clone() };
        let how = (engine, &load.provider, load.optimize, set, more);
        hash.update(&serde_json::to_vec(&how)?);
        Ok(hash.finalize())
    }

    /// Feeds the names and contents of a file, or of everything in a folder, to a hash.
    pub fn add_files(&self, path: &Path, hash: &mut blake3::Hasher) -> io::Result<()> {
        let mut pending = vec![path.to_owned()];
        while let Some(at) = pending.pop() {
            let name = at.strip_prefix(path).unwrap_or(&at).to_string_lossy().into_owned();
            hash.update(&(name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            if fs::metadata(&at)?.is_dir() {
                let mut inside: Vec<PathBuf> = fs::read_dir(&at)?.map(|e| Ok(e?.path())).collect::<io::Result<_>>()?;
                inside.sort();
                pending.extend(inside.into_iter().rev());
                continue;
            }
            hash.update(self.of_file(&at)?.as_bytes());
        }
        Ok(())
    }

    fn file(&self, place: &str) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(short(&blake3::hash(place.as_bytes()))))
    }

    fn read(&self, place: &str) -> Option<blake3::Hash> {
        let mut text = String::new();
        fs::File::open(self.file(place)?).ok()?.take(1 << 12).read_to_string(&mut text).ok()?;
        let (hash, rest) = text.split_once('\n')?;
        (rest == place).then(|| blake3::Hash::from_hex(hash).ok())?
    }

    fn write(&self, place: &str, hash: &blake3::Hash) -> io::Result<()> {
        let Some(file) = self.file(place) else { return Ok(()) };
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let aside = aside(folder)?;
        fs::write(aside.path(), format!("{}\n{place}", hash.to_hex()))?;
        aside.persist(file).map(drop).map_err(|failed| failed.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn aged(path: &Path, bytes: &[u8], seconds: u64) {
        fs::write(path, bytes).unwrap();
        let file = fs::File::options().append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }

    #[test]
    fn a_large_file_is_read_once_unless_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let mut bytes = vec![1u8; 2 << 20];
        aged(&path, &bytes, 100);
        let ids = ContentIds::kept_in(folder.path().join("files"));
        let first = ids.of_file(&path).unwrap();
        assert_eq!(first, blake3::hash(&bytes));
        let kept = fs::read_dir(folder.path().join("files")).unwrap().next().unwrap().unwrap().path();
        // Another process believes what was kept, so a lie shows that nothing was read.
        let lie = fs::read_to_string(&kept).unwrap().replacen(&first.to_hex().to_string(), &"ab".repeat(32), 1);
        fs::write(&kept, lie).unwrap();
        let other = ContentIds::kept_in(folder.path().join("files"));
        assert_eq!(other.of_file(&path).unwrap().to_hex().to_string(), "ab".repeat(32));
        assert_eq!(ids.of_file(&path).unwrap(), first);
        bytes[5] = 2;
        aged(&path, &bytes, 50);
        assert_eq!(other.of_file(&path).unwrap(), blake3::hash(&bytes));
    }

    #[test]
    fn a_file_that_was_just_written_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        aged(&path, &vec![1u8; 2 << 20], 0);
        let ids = ContentIds::kept_in(folder.path().join("files"));
        ids.of_file(&path).unwrap();
        assert!(ids.known.lock().unwrap().is_empty() && !folder.path().join("files").exists());
    }

    #[test]
    fn a_model_is_what_it_holds() {
        let parse = |w: &str| {
            let source = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 1] x) => (float[n, 1] y)";
            text::parse(&format!("{source} <float[1] w = {{{w}}}> {{ y = Mul (x, w) }}")).unwrap()
        };
        let ids = ContentIds::default();
        assert_eq!(ids.of_model(&parse("2")).unwrap(), ids.of_model(&parse("2")).unwrap());
        assert_ne!(ids.of_model(&parse("2")).unwrap(), ids.of_model(&parse("3")).unwrap());
    }
}
