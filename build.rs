//! Tells the program what it was built from: results that it keeps on disk are those of this very code.

use std::{
    fs,
    hash::{DefaultHasher, Hasher as _},
    path::{Path, PathBuf},
};

/// Folders whose code results depend on; a packaged crate has only the first, and its dependencies by the lock file.
const SOURCES: [&str; 7] = ["src", "ir", "analysis", "passes", "runtime", "Cargo.toml", "Cargo.lock"];

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let mut hash = DefaultHasher::new();
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
        add(&root.join(source), &mut hash);
    }
    println!("cargo:rustc-env=LATHE_SOURCES={:016x}", hash.finish());
}

/// Feeds files of code in the order of their names to a hash.
fn add(path: &Path, hash: &mut DefaultHasher) {
    if path.is_dir() {
        let mut inside: Vec<PathBuf> = fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect();
        inside.sort();
        inside.iter().for_each(|path| add(path, hash));
    } else if path.extension().is_some_and(|e| e == "rs" || e == "txt" || e == "toml" || e == "lock") {
        let bytes = fs::read(path).unwrap_or_default();
        hash.write_usize(bytes.len());
        hash.write(&bytes);
    }
}
