//! Measured sensitivities on disk: a checksum and the bits of every number, so that a later run gives the same bytes.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
};

const FILE: &str = "sensitivity.json";

/// What was kept in a folder; `None` if nothing was, or if it is damaged.
pub(super) fn read(folder: &Path) -> Option<Vec<Option<f64>>> {
    let bytes = fs::read(folder.join(FILE)).ok()?;
    let (checksum, body) = bytes.split_at_checked(64)?;
    if blake3::hash(body).to_hex().as_bytes() != checksum {
        return None;
    }
    let bits: Vec<Option<u64>> = serde_json::from_slice(body).ok()?;
    // The folder counts as used now, for the order in which folders are removed.
    let _ = fs::write(folder.join("used"), b"");
    Some(bits.into_iter().map(|bits| bits.map(f64::from_bits)).collect())
}

/// Keeps what was measured: written aside, then put in place whole.
pub(super) fn write(folder: &Path, found: &[Option<f64>]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let bits: Vec<Option<u64>> = found.iter().map(|x| x.map(f64::to_bits)).collect();
    let body = serde_json::to_vec(&bits)?;
    lathe_ir::write_whole(&folder.join(FILE), |out| {
        out.write_all(blake3::hash(&body).to_hex().as_bytes())?;
        out.write_all(&body)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_numbers_come_back_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let found = [Some(0.1), None, Some(f64::MIN_POSITIVE), Some(0.0)];
        assert_eq!(read(folder.path()), None);
        write(folder.path(), &found).unwrap();
        assert_eq!(read(folder.path()).as_deref(), Some(&found[..]));
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert_eq!(read(folder.path()), None, "byte {at}");
        }
    }
}
