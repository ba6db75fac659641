//! Running models: ONNX Runtime or the embedded engine, in this process or in a child; inputs, comparison, discovery.
//!
//! Nothing here changes a model, reads the environment or prints.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bench;
mod child;
mod compare;
mod content;
mod datum;
mod differences;
mod distribution;
mod divergence;
mod doctor;
mod elements;
#[cfg(feature = "embedded")]
mod embedded;
mod engine;
mod executor;
mod in_process;
mod inputs;
mod json_float;
mod kept;
mod layers;
mod library;
mod machine;
mod measure;
mod metrics;
mod npz;
mod ort_engine;
mod paired;
mod profile;
mod progress;
mod quantile;
mod roles;
mod rounding;
mod seeding;
mod select;
mod sensitivity;
mod serve;
mod sessions;
mod sets;
mod similarity;
mod statistics;
#[cfg(test)]
mod testing;
mod trace;
mod trials;
mod verify;
mod wire;

pub use bench::{BenchError, BenchInputs, BenchResult, BenchTask, Loading, SITTINGS, Series, Timings, bench};
pub use child::{Child, Limits};
pub use compare::{Claim, Comparison, Excuse, Fault, OutputError, compare, default_rtol};
pub use content::ContentIds;
pub use datum::{Datum, Sample};
pub use distribution::{FeatureError, Features, Kernel, frechet, kernel, sliced};
pub use doctor::{Diagnosis, InstallError, Kind, Library, devices_of, diagnose, install};
pub use engine::{Engine, LoadOptions, ModelOn, RuntimeError, Session, Source, Timed};
pub use executor::{Executor, ExecutorError, Task};
pub use in_process::{InProcess, start};
pub use inputs::{InputError, InputSpec, Sizes, Style, classes, generate, required_inputs, sizes_to_try};
pub use kept::{KeptKind, KeptResults};
pub use layers::{Alone, Culprit, LayersError, LayersJob, LayersReport, ValueLine, compare_layers};
pub use library::{FoundLibrary, LibrarySearch, SearchPlace};
pub use machine::{adds_bytes_in_32_bits, machine};
pub use measure::{MeasureError, Measured, Scores};
pub use metrics::{Column, Metric, MetricError, Score, metric_columns, metrics};
pub use npz::NpzWriter;
pub use ort_engine::{InstalledPlugin, OrtEngine, PROVIDERS, Provider, provider_name};
pub use paired::{Pair, bootstrap, feature_distances, pairs};
pub use profile::{LeftNode, NodeTime, Placement, Profile, ProfileError};
pub use progress::{Listener, Progress, RunEvent, Talk};
pub use quantile::quantile;
pub use select::ChosenSamples;
pub use sensitivity::{Probe, ProbeOptions, sensitivities};
pub use serve::serve;
pub use sets::{Batch, Batches, Part, SampleSet, SetError, SetSpec};
pub use statistics::{
    CollectOptions, Counts, Cut, Field, MaskInput, Request, Skip, Statistics, StatisticsError, Work, quarter_of_memory,
};
pub use trace::{Span, Trace};
pub use trials::Trials;
pub use verify::{Inputs, Report, Verdict, VerifyError, VerifyTask, verify};
pub use wire::{Distance, Gates};
