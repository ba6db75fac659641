//! What earlier runs found for models of a family: lines of JSON in the data folder.

use serde::{Deserialize, Serialize};
use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
};

/// Lines that are read at most, the latest.
const MOST: usize = 10_000;

/// One run of one recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// What the model is like.
    pub family: String,
    /// Where it ran: provider and threads.
    pub place: String,
    /// What was to be saved: `latency`.
    pub measure: String,
    pub metric: String,
    pub recipe: String,
    /// The share that was asked for, and what was measured.
    pub share: f64,
    pub ratio: f64,
    pub drop: f64,
    pub seconds: f64,
}

/// The file of all records.
pub(super) struct History {
    path: Option<PathBuf>,
    records: Vec<Record>,
}

impl History {
    /// Of a data folder; empty without one. Lines that cannot be read do not count.
    pub fn open(data: Option<&Path>) -> History {
        let path = data.map(|data| data.join("auto.jsonl"));
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let skipped = text.lines().count().saturating_sub(MOST);
        let records = text.lines().skip(skipped).filter_map(|line| serde_json::from_str(line).ok()).collect();
        History { path, records }
    }

    /// The record like `wanted`, whatever its recipe says else, that saved most with a drop within `limit`.
    pub fn best(&self, wanted: &Record, limit: Option<f64>) -> Option<&Record> {
        let alike = |r: &&Record| {
            (&r.family, &r.place, &r.measure, &r.metric, &r.recipe)
                == (&wanted.family, &wanted.place, &wanted.measure, &wanted.metric, &wanted.recipe)
        };
        let kept = self.records.iter().filter(alike).filter(|r| limit.is_none_or(|limit| r.drop <= limit));
        kept.min_by(|a, b| a.ratio.total_cmp(&b.ratio))
    }

    /// Adds a record for later runs. Where it cannot be kept, a later run starts without it.
    pub fn add(&mut self, record: Record) {
        if let (Some(path), Ok(line)) = (&self.path, serde_json::to_string(&record)) {
            let folder = path.parent().map(fs::create_dir_all);
            let file = OpenOptions::new().append(true).create(true).open(path);
            if let (Some(Ok(())), Ok(mut file)) = (folder, file) {
                let _ = file.write_all(format!("{line}\n").as_bytes());
            }
        }
        self.records.push(record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(recipe: &str, ratio: f64, drop: f64) -> Record {
        let text = |text: &str| text.to_owned();
        Record {
            family: text("layers"),
            place: text("cpu, 1 threads"),
            measure: text("latency"),
            metric: text("rel-l2"),
            recipe: text(recipe),
            share: ratio,
            ratio,
            drop,
            seconds: 1.0,
        }
    }

    #[test]
    fn later_runs_find_what_earlier_ones_kept_and_ignore_broken_lines() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let mut history = History::open(Some(&data));
        assert_eq!(history.best(&record("a", 0.0, 0.0), None), None);
        for (ratio, drop) in [(0.8, 0.0), (0.5, 0.01), (0.3, 0.2)] {
            history.add(record("a", ratio, drop));
        }
        fs::write(data.join("auto.jsonl"), fs::read_to_string(data.join("auto.jsonl")).unwrap() + "{broken\n").unwrap();
        history = History::open(Some(&data));
        assert_eq!(history.records.len(), 3);
        assert_eq!(history.best(&record("a", 0.0, 0.0), Some(0.05)).map(|r| r.ratio), Some(0.5));
        assert_eq!(history.best(&record("b", 0.0, 0.0), Some(0.05)), None);
        assert_eq!(History::open(None).records.len(), 0);
    }
}
