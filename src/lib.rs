//! onnx-lathe: an ahead-of-time, training-free optimizer for ONNX models.
//!
//! This crate joins the parts: it reads a model, runs the passes, runs the result beside the original, writes it and
//! reports what happened. [`optimize`] is the main job; [`cli`] is the program around it, and a [`Call`] is a command
//! of the program for other programs.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod auto;
mod call;
pub mod cli;
mod commands;
mod compress;
mod diff;
mod failure;
mod html;
mod job;
mod kernels;
mod latency;
mod layers;
mod pipeline;
mod progress;
mod quantities;
mod recipe;
mod remote;
mod report;
mod run_options;
mod runner;
mod sampler;
mod similar;
mod summary;
mod terminal;
mod validate;

pub use auto::{AutoOptions, auto};
pub use call::{Call, Event};
pub use commands::{Answer, sets::Sets};
pub use compress::Budget;
pub use failure::Failure;
pub use job::{CacheOptions, Done, Interface, Options, PrecisionOptions, optimize};
pub use latency::{Latency, LatencySide};
pub use lathe_runtime::{PROVIDERS, Provider};
pub use layers::LayerLine;
pub use pipeline::{PassRecord, Selection, UnknownPass};
pub use report::{AutoPoint, AutoReport, Report};
pub use run_options::RunOptions;
pub use runner::{Host, set_host};
pub use sampler::{
    ImageReference, NegativeText, PipelineOptions, SamplerDone, SamplerOptions, SamplerReport, SamplerSide, Search,
    Tune, compile,
};
