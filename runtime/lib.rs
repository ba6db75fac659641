//! Running models: ONNX Runtime or the embedded engine, in this process or in a child; inputs, comparison, discovery.
//!
//! Nothing here changes a model, reads the environment or prints.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bench;
mod child;
mod compare;
mod datum;
mod differences;
mod distribution;
mod doctor;
#[cfg(feature = "embedded")]
mod embedded;
mod engine;
mod inputs;
mod library;
mod measure;
mod metrics;
mod npz;
mod ort_engine;
mod paired;
mod profile;
mod progress;
mod random;
mod roles;
mod rounding;
mod seeding;
mod select;
mod sensitivity;
mod serve;
mod sets;
mod statistics;
#[cfg(test)]
mod testing;
mod trials;
mod verify;
mod wire;

pub use bench::{BenchError, BenchInputs, BenchResult, BenchTask, Loading, Series, Timings, bench};
pub use child::{Child, Limits};
pub use compare::{Claim, Comparison, Excuse, Fault, OutputError, compare, default_rtol};
pub use datum::Datum;
pub use distribution::{FeatureError, Features, Kernel, frechet, kernel, sliced};
pub use doctor::{Diagnosis, InstallError, Library, diagnose, install};
#[cfg(feature = "embedded")]
pub use embedded::Embedded;
pub use engine::{Engine, InProcess, LoadOptions, RuntimeError, Session, Source, Timed, start};
pub use inputs::{InputError, InputSpec, Sizes, Style, classes, generate, required_inputs, sizes_to_try};
pub use library::{Discovery, Found, Place, Search, Tried};
pub use measure::{MeasureError, Measured, Scores};
pub use metrics::{Metric, Score, metrics};
pub use npz::NpzWriter;
pub use ort_engine::OrtEngine;
pub use paired::{Pair, bootstrap, feature_distances, pairs, quantile};
pub use profile::{NodeTime, Placement, Profile};
pub use progress::{Listener, Progress, Talk};
pub use random::Random;
pub use select::ChosenSamples;
pub use sensitivity::{Distance, Probe, ProbeOptions, sensitivities};
pub use serve::serve;
pub use sets::{Batch, Batches, Part, SampleSet, SetError, SetSpec};
pub use statistics::{
    CollectOptions, Counts, Cut, Field, MaskInput, Request, Skip, Statistics, StatisticsError, Work, quarter_of_memory,
};
pub use trials::{Gates, trials};
pub use verify::{Inputs, Report, Sample, Verdict, VerifyError, verify};
