//! `optimize cache`: what is kept between runs, and how to have less of it.

use super::Answer;
use crate::{Failure, quantities, runner};
use anyhow::{Context as _, anyhow};
use clap::Args;
use lathe_runtime::{KeptKind, KeptResults};
use serde_json::json;
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// What to do with what is kept.
#[derive(Debug, Args)]
pub(crate) struct CacheArgs {
    /// The folder, if not in the user's data folder.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Remove what was not used for longest until no more than this is left (2GB).
    #[arg(long, value_name = "SIZE", conflicts_with = "clear")]
    limit: Option<String>,
    /// Remove everything.
    #[arg(long)]
    clear: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &CacheArgs) -> Result<(), Failure> {
    let limit = if args.clear { Some(0) } else { args.limit.as_deref().map(quantities::size).transpose()? };
    let folder = args.store.clone().or_else(runner::data_dir);
    let folder = folder.ok_or_else(|| anyhow!("there is no data folder: HOME is not set; --store DIR names one"))?;
    if args.store.is_some() && !folder.is_dir() {
        return Err(Failure::Error(anyhow!("the store `{}` is not a folder", folder.display())));
    }
    let removed = match limit {
        Some(limit) => Some(shrink(&folder, limit).with_context(|| format!("cannot clear `{}`", folder.display()))?),
        None => None,
    };
    found(&folder, removed).show(args.json);
    Ok(())
}

/// What is kept in a folder: results by kind, and statistics.
fn kinds(folder: &Path) -> Vec<KeptKind> {
    let mut kinds = KeptResults::new(folder.join("kept"), runner::VERSION).kinds();
    let statistics = statistics(folder);
    if !statistics.is_empty() {
        let bytes = statistics.iter().map(|(_, bytes)| bytes).sum();
        kinds.push(KeptKind { kind: "statistics".to_owned(), results: statistics.len(), bytes });
    }
    kinds
}

/// Folders of statistics, with the bytes that they take.
fn statistics(folder: &Path) -> Vec<(PathBuf, u64)> {
    let inside = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |folder: &Path| inside(folder).filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    inside(&folder.join("statistics")).map(|entry| entry.path()).map(|path| (path.clone(), size(&path))).collect()
}

/// Removes results until at most `limit` bytes are left, statistics first: they take most, and are soon collected again.
fn shrink(folder: &Path, limit: u64) -> std::io::Result<u64> {
    let total = |kinds: &[KeptKind]| kinds.iter().map(|kind| kind.bytes).sum::<u64>();
    let before = total(&kinds(folder));
    let mut statistics = statistics(folder);
    let used =
        |path: &Path| fs::metadata(path.join("used")).or_else(|_| fs::metadata(path)).and_then(|m| m.modified()).ok();
    statistics.sort_by_key(|(path, _)| used(path));
    let mut left = before;
    for (path, bytes) in statistics {
        if left > limit {
            fs::remove_dir_all(&path)?;
            left -= bytes;
        }
    }
    let kept = KeptResults::new(folder.join("kept"), runner::VERSION);
    kept.limit(limit);
    if limit == 0 {
        // What files are is known again as soon as they are read.
        for name in ["files", "scratch"] {
            match fs::remove_dir_all(folder.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(before - total(&kinds(folder)))
}

fn found(folder: &Path, removed: Option<u64>) -> Answer {
    let kinds = kinds(folder);
    let mut text = String::new();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for KeptKind { kind, results, bytes } in &kinds {
        let _ = writeln!(text, "{kind:14} {results:7} {:10.1} MiB", mib(*bytes));
    }
    let all: u64 = kinds.iter().map(|kind| kind.bytes).sum();
    let _ = writeln!(text, "{:.1} MiB in `{}`", mib(all), folder.display());
    if let Some(removed) = removed {
        let _ = writeln!(text, "{:.1} MiB were removed", mib(removed));
    }
    let kind = |kind: &KeptKind| json!({"kind": kind.kind, "results": kind.results, "bytes": kind.bytes});
    let json = json!({
        "folder": folder, "bytes": all, "removed_bytes": removed, "kinds": kinds.iter().map(kind).collect::<Vec<_>>(),
    });
    Answer::new(&json, text, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_is_shown_limited_and_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let kept = KeptResults::new(folder.path().join("kept"), runner::VERSION);
        kept.write("trials", &[1; 32], &[0; 1000]).unwrap();
        let statistics = folder.path().join("statistics/abc");
        fs::create_dir_all(&statistics).unwrap();
        fs::write(statistics.join("x.stat"), [0; 3000]).unwrap();
        let names = || kinds(folder.path()).into_iter().map(|k| (k.kind, k.results)).collect::<Vec<_>>();
        assert_eq!(names(), [("trials".to_owned(), 1), ("statistics".to_owned(), 1)]);
        assert_eq!(shrink(folder.path(), 2000).unwrap(), 3000);
        assert_eq!(names(), [("trials".to_owned(), 1)]);
        assert_eq!(shrink(folder.path(), 0).unwrap(), 1040);
        assert!(names().is_empty());
        assert_eq!(shrink(&folder.path().join("nothing"), 0).unwrap(), 0);
    }
}
