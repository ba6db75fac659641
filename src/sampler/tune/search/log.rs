//! The file that remembers scores, so that a search goes on where it was interrupted.

use crate::Failure;
use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
};

/// The scores that a log holds, and the log to write on. A torn last line is dropped; a log of another setting is an error.
pub(super) fn open(path: &Path, setting: &Value) -> Result<(BTreeMap<String, f64>, File), Failure> {
    let cannot = |what: &str| format!("the log `{}` cannot be {what}", path.display());
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Failure::Error(anyhow!(e).context(cannot("read")))),
    };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut known = BTreeMap::new();
    let mut lines = text[..whole].lines();
    let first = lines.next();
    if let Some(first) = first {
        let found: Value = serde_json::from_str(first).unwrap_or_default();
        if found != *setting {
            let message = format!("{}: it is of another search; --search-log FILE names another", cannot("continued"));
            return Err(Failure::Usage(message));
        }
    }
    for line in lines {
        let line: Value = serde_json::from_str(line).with_context(|| cannot("understood"))?;
        if let Some(key) = line["candidate"].as_str() {
            known.insert(key.to_owned(), line["score"].as_f64().unwrap_or(f64::INFINITY));
        }
    }
    let mut file =
        OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(|| cannot("written"))?;
    let opened = file.set_len(whole as u64).and_then(|()| file.seek(SeekFrom::End(0)).map(drop));
    opened.with_context(|| cannot("written"))?;
    if first.is_none() {
        file.write_all(format!("{setting}\n").as_bytes()).with_context(|| cannot("written"))?;
    }
    Ok((known, file))
}

/// Writes a score into the log at once.
pub(super) fn keep(log: &mut File, key: &str, score: f64) -> Result<(), Failure> {
    let line = json!({"candidate": key, "score": if score.is_finite() { json!(score) } else { Value::Null }});
    // One write per line: a kill leaves at most one line torn, which is dropped when the log is read.
    let written = log.write_all(format!("{line}\n").as_bytes()).and_then(|()| log.sync_data());
    written.map_err(|e| Failure::Error(anyhow!("the log of the search cannot be written: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_up_to_a_torn_line_and_belongs_to_its_setting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let setting = json!({"seed": 1});
        let (known, mut file) = open(&path, &setting).unwrap();
        assert!(known.is_empty());
        file.write_all(b"{\"candidate\":\"9 3\",\"score\":0.5}\n{\"candidate\":\"9 4\",\"score\":null}\n{\"candid")
            .unwrap();
        drop(file);
        let (known, mut file) = open(&path, &setting).unwrap();
        assert_eq!(known, BTreeMap::from([("9 3".to_owned(), 0.5), ("9 4".to_owned(), f64::INFINITY)]));
        file.write_all(b"{\"candidate\":\"9 5\",\"score\":0.25}\n").unwrap();
        drop(file);
        assert_eq!(open(&path, &setting).unwrap().0.len(), 3);
        let other = open(&path, &json!({"seed": 2})).unwrap_err();
        assert!(other.to_string().contains("another search"));
    }
}
