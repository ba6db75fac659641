//! Files that appear whole.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

/// Writes a file so that readers see what was there before or all of the new, on a folder that hosts share too.
///
/// It is written aside under a name that was free, reached the disk when it takes the place of `path`, and is removed
/// if `write` fails. A link at `path` stays, and what it points to is replaced; a device or a pipe is written to.
pub fn write_whole<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&target).is_ok_and(|found| !found.is_file()) {
        let mut out = BufWriter::new(File::create(&target)?);
        write(&mut out)?;
        return Ok(out.flush()?);
    }
    let name = target.file_name().ok_or(io::ErrorKind::InvalidFilename).map_err(io::Error::from)?;
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut prefix = name.to_owned();
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".part");
    // Others may read the file as they may any that this program writes.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let (file, aside) = builder.tempfile_in(folder)?.into_parts();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    write(&mut out)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(aside.persist(&target).map_err(|failed| failed.error)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_whole_and_what_fails_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_whole(&path, |out| out.write_all(b"first")).unwrap();
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let failed = write_whole(&path, |out| {
            out.write_all(b"half")?;
            out.flush()?;
            assert_eq!(names(folder.path()).len(), 2, "the new file is written aside");
            Err(full())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!((fs::read(&path).unwrap().as_slice(), names(folder.path())), (&b"first"[..], vec!["a.json".into()]));
    }

    #[test]
    fn many_writers_of_one_file_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::thread::scope(|scope| {
            for writer in 0..8u8 {
                let path = &path;
                let write = move |out: &mut BufWriter<File>| out.write_all(&[writer; 1 << 16]);
                scope.spawn(move || (0..20).for_each(|_| write_whole(path, write).unwrap()));
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() == 1 << 16 && bytes.iter().all(|&b| b == bytes[0]));
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_devices_stay_what_they_are() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        write_whole(&link, |out| out.write_all(b"new")).unwrap();
        assert!(link.is_symlink() && fs::read(&file).unwrap() == b"new");
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&file), mode(&plain));
        write_whole(Path::new("/dev/null"), |out| out.write_all(b"nothing")).unwrap();
        let full = write_whole(Path::new("/dev/full"), |out| out.write_all(b"more than there is room for"));
        assert!(!cfg!(target_os = "linux") || full.unwrap_err().kind() == io::ErrorKind::StorageFull);
    }
}
