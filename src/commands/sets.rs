//! The options that name calibration and validation sets, and what they come to.

use crate::Failure;
use clap::Args;
use lathe_ir::Model;
use lathe_runtime::{InputSpec, Part, SampleSet, SetSpec};
use serde::Serialize;
use std::path::PathBuf;

/// Sets: a .npz, a folder of .npz or .npy files, or ONNX test_data_set_* folders.
#[derive(Debug, Clone, Default, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(next_help_heading = "Data")]
pub(crate) struct SetArgs {
    /// Calibration set: a .npz (one array per input, samples along the first axis), a folder of .npz or .npy files, or
    /// ONNX test_data_set_* folders. Its last quarter is held out for the comparison unless --validate is given.
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calib: Option<PathBuf>,
    /// Validation set: what the comparison is made on.
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validate: Option<PathBuf>,
    /// The array that holds labels. The comparison reads them; a calibration set need not have them.
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// Samples run at a time where the model leaves the choice.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
}

/// The sets of a run, not opened yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sets {
    /// What statistics are taken on.
    pub calibration: Option<SetSpec>,
    /// What a result is compared on; random inputs without it.
    pub validation: Option<SetSpec>,
}

impl SetArgs {
    /// The sets these options name: without `--validate` the last quarter of the calibration set is held out.
    pub(crate) fn sets(&self) -> Result<Sets, Failure> {
        let none = self.calib.is_none() && self.validate.is_none();
        for (given, name) in [(self.labels.is_some(), "--labels"), (self.batch.is_some(), "--batch")] {
            if given && none {
                return Err(Failure::Usage(format!(
                    "{name} says how a set is read, and none is given; --calib or --validate"
                )));
            }
        }
        if self.batch == Some(0) {
            return Err(Failure::Usage("--batch is 0, expected at least 1".to_owned()));
        }
        let spec = |path: &PathBuf, part: Part| SetSpec { part, batch: self.batch, ..SetSpec::all(path) };
        let measured = |path: &PathBuf, part: Part| SetSpec { labels: self.labels.clone(), ..spec(path, part) };
        let seen =
            |part: Part| self.calib.as_ref().map(|path| SetSpec { unread: self.labels.clone(), ..spec(path, part) });
        Ok(match &self.validate {
            Some(path) => Sets { calibration: seen(Part::All), validation: Some(measured(path, Part::All)) },
            None => Sets {
                calibration: seen(Part::Calibration),
                validation: self.calib.as_ref().map(|path| measured(path, Part::Validation)),
            },
        })
    }
}

impl Sets {
    /// Shapes are for made-up inputs; a set has its own.
    pub(crate) fn instead_of(&self, inputs: &InputSpec) -> Result<(), Failure> {
        if self.validation.is_some() && !inputs.shapes.is_empty() {
            let message = "--input-shape is for random inputs, and a set is given; leave one of them out";
            return Err(Failure::Usage(message.to_owned()));
        }
        Ok(())
    }

    /// Opens every set and reads it once, so that what is wrong with it is known before any work.
    ///
    /// Returns what the comparison runs on, and whether that is the `calibration` or the `validation` set.
    pub(crate) fn check(&self, model: &Model) -> Result<Option<(SetSpec, &'static str)>, Failure> {
        let open = |spec: &SetSpec| -> Result<SampleSet, Failure> {
            let set = SampleSet::open(spec, model)?;
            set.check_values()?;
            Ok(set)
        };
        if let Some(spec) = &self.calibration {
            open(spec)?;
        }
        let Some(spec) = &self.validation else { return Ok(None) };
        let set = open(spec)?;
        // A single run cannot be divided, so nothing of it was held out.
        let undivided = spec.part == Part::Validation && set.part() == Part::All;
        Ok(Some((spec.clone(), if undivided { "calibration" } else { "validation" })))
    }
}
