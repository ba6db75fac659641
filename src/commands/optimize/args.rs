//! The options of the main job on the command line, which are those of a recipe too.

use crate::{
    commands::{sets::SetArgs, verify::metric_names},
    run_options::RunArgs,
    terminal::TalkArgs,
};
use clap::{Args, ValueEnum};
use lathe_passes::{Quantity, kv_cache::CacheType, precision::Precision};
use serde::Serialize;
use std::path::PathBuf;

// Headings of the help.
const PROOF: &str = "Files and proof";
const PASSES: &str = "Passes and operators";
const INTERFACE: &str = "Inputs and outputs";
const PRECISION: &str = "Precision";
const BUDGET: &str = "Budget";

/// Which operators a result may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TargetArg {
    /// Standard operators only.
    Portable,
    /// ONNX Runtime's `com.microsoft` operators too.
    Ort,
    /// Standard operators, with whole numbers as TensorRT reads them.
    Tensorrt,
    /// Standard operators, with whole numbers as OpenVINO reads them.
    Openvino,
    /// Standard operators, with whole numbers as Qualcomm's HTP reads them.
    Qnn,
}

/// Where weights go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ExternalArg {
    /// Beside the model where they are beside the input or exceed 1.9 GB.
    Auto,
    /// Beside the model.
    Always,
}

/// The options of the main job; the long names are also the keys of a recipe.
#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct OptimizeArgs {
    /// The model to optimize.
    #[serde(skip)]
    pub model: Option<PathBuf>,
    /// The same as --output.
    #[serde(skip)]
    #[arg(value_name = "OUT", conflicts_with = "output")]
    pub second: Option<PathBuf>,
    /// Where the result goes.
    #[serde(skip)]
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// Let the result replace the model itself.
    #[arg(help_heading = PROOF, long)]
    pub overwrite: bool,
    /// Run only these passes, comma-separated.
    #[arg(help_heading = PASSES, long, value_delimiter = ',', value_name = "PASS,...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passes: Option<Vec<String>>,
    /// Do not run these passes, comma-separated.
    #[arg(help_heading = PASSES, long, value_delimiter = ',', value_name = "PASS,...")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<String>,
    /// Set an option of a pass.
    #[arg(help_heading = PASSES, long = "set", value_name = "PASS.OPTION=VALUE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Which operators the result may use.
    #[arg(help_heading = PASSES, long, value_enum, default_value = "portable")]
    pub target: TargetArg,
    /// Upgrade the model to this standard operator set first.
    #[arg(help_heading = PASSES, long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opset: Option<i64>,
    /// Sizes of open dimensions, comma-separated: of a name, or INPUT[AXIS] where it has none.
    #[arg(help_heading = INTERFACE, long, value_delimiter = ',', value_name = "NAME=SIZE,...")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fix_dim: Vec<String>,
    /// The outputs of the result, comma-separated; any value that the model computes may be one.
    #[arg(help_heading = INTERFACE, long, value_delimiter = ',', value_name = "NAME,...")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// New names of inputs and outputs, comma-separated.
    #[arg(help_heading = INTERFACE, long, value_delimiter = ',', value_name = "OLD=NEW,...")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rename: Vec<String>,
    /// Let folding enlarge the model by this much (512MB); larger folds are skipped and named.
    #[arg(help_heading = PASSES, long, value_name = "SIZE", default_value = "0")]
    pub max_growth: String,
    /// Where weights go.
    #[arg(help_heading = PROOF, long, value_enum, default_value = "auto")]
    pub external_data: ExternalArg,
    /// Do everything but write.
    #[arg(help_heading = PROOF, long)]
    pub dry_run: bool,
    /// Write the result without running it.
    #[arg(help_heading = PROOF, long)]
    pub no_verify: bool,
    /// Time the result in turns with the original, and report the latency of both.
    #[arg(help_heading = PROOF, long)]
    pub bench: bool,
    /// Run the model after every pass.
    #[arg(help_heading = PROOF, long, conflicts_with = "no_verify")]
    pub paranoid: bool,
    /// Write a report: .html, .json or .md. May be given several times.
    #[arg(help_heading = PROOF, long, value_name = "FILE")]
    #[serde(skip)]
    pub report: Vec<PathBuf>,
    /// Take options from this file; those on the command line win.
    #[arg(help_heading = PROOF, long, value_name = "FILE")]
    #[serde(skip)]
    pub recipe: Option<PathBuf>,
    /// Write the options of this run to a file.
    #[arg(help_heading = PROOF, long, value_name = "FILE")]
    #[serde(skip)]
    pub save_recipe: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    pub sets: SetArgs,
    /// Compute in 16-bit floats wherever that is allowed: float16 or bfloat16; with :io inputs and outputs change too.
    #[arg(help_heading = PRECISION, long, value_name = "TYPE[:io]", value_parser = precision)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Keep the caches of GroupQueryAttention as int8 or int4, with scales per channel from --calib, or per tensor with :tensor;
    /// the inputs and outputs that hold them change. --target ort writes that operator where a decoder has caches.
    #[arg(help_heading = PRECISION, long, value_name = "TYPE[:tensor]", value_parser = cache)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<String>,
    /// The largest relative L2 error of an output under --dtype (2e-3 for float16 and 2e-2 for bfloat16 unless told) or
    /// --kv-cache (5e-2 for int8 and 5e-1 for int4).
    #[arg(help_heading = PRECISION, long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtol: Option<f64>,
    /// Share of the file's bytes to keep (0.5); lossy methods spend the rest where it hurts least. Needs --calib.
    #[arg(help_heading = BUDGET, long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<f64>,
    /// Share of the parameters to keep.
    #[arg(help_heading = BUDGET, long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub params: Option<f64>,
    /// Share of the floating-point operations to keep.
    #[arg(help_heading = BUDGET, long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops: Option<f64>,
    /// Share of the latency to keep, as measured beside the original on this machine (at --input-shape, if given).
    #[arg(help_heading = BUDGET, long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<f64>,
    /// The largest drop of the metric on held-out samples; a larger one ends with exit code 3. Without a share to keep,
    /// the least that keeps to the drop is found.
    #[arg(help_heading = BUDGET, long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_drop: Option<f64>,
    /// What becomes as little as --max-drop allows where no share to keep is given: latency unless told.
    #[arg(help_heading = BUDGET, long, value_name = "WHAT", conflicts_with_all = ["size", "params", "flops", "latency"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimize: Option<Minimize>,
    /// Ask every lossy method, even where rounding alone keeps to the budget and loses next to nothing.
    #[arg(help_heading = BUDGET, long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub thorough: bool,
    /// Where latency is not limited, take the plan that loses least even if the result is slower than the original.
    #[arg(help_heading = BUDGET, long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_slower: bool,
    /// Try the recipes that the model's features suggest, each as a job of its own, and write the best that --max-drop
    /// allows; what was found is remembered for models alike. Needs --calib.
    #[arg(help_heading = BUDGET, long, conflicts_with_all = ["size", "params", "flops", "latency", "no_verify", "dry_run"])]
    pub auto: bool,
    /// Time after which --auto starts no other recipe: 10m unless told (90s, 2h). Without --auto, time in which to look for
    /// a budget that --max-drop permits where it does not permit the one given: 60s unless told, 0s for none.
    #[arg(help_heading = BUDGET, long, value_name = "TIME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// Let --auto write every model that no other beats in both what is saved and what is lost to this folder, with reports.
    #[arg(help_heading = BUDGET, long, value_name = "DIR", requires = "auto")]
    #[serde(skip)]
    pub pareto: Option<PathBuf>,
    /// What is measured on held-out samples.
    #[arg(help_heading = BUDGET, long, value_name = "METRIC", value_parser = metric_names())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// Choose N samples of the calibration set: half for spanning what it holds, half at random.
    #[arg(help_heading = BUDGET, long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calib_select: Option<usize>,
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    #[serde(skip)]
    pub talk: TalkArgs,
}

/// A type of half precision.
fn precision(text: &str) -> Result<String, NoPrecision> {
    Precision::parse(text).map(|_| text.to_owned()).ok_or(NoPrecision)
}

/// A text that names no half precision.
#[derive(Debug, thiserror::Error)]
#[error("expected float16, bfloat16, float16:io or bfloat16:io")]
struct NoPrecision;

/// A type of caches.
fn cache(text: &str) -> Result<String, NoCache> {
    CacheType::parse(text).map(|_| text.to_owned()).ok_or(NoCache)
}

/// A text that names no type of caches.
#[derive(Debug, thiserror::Error)]
#[error("expected int8, int4, int8:tensor or int4:tensor")]
struct NoCache;

/// A share above 0 and at most 1.
fn share(text: &str) -> Result<f64, NoShare> {
    let share: f64 = text.parse().map_err(|_| NoShare::NoNumber)?;
    if share > 0.0 && share <= 1.0 { Ok(share) } else { Err(NoShare::Outside) }
}

/// Why a text is no share.
#[derive(Debug, thiserror::Error)]
enum NoShare {
    #[error("expected a number such as 0.5")]
    NoNumber,
    #[error("expected a share above 0 and at most 1")]
    Outside,
}

/// What becomes as little as the drop allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Minimize {
    /// The measured latency.
    #[default]
    Latency,
    /// Bytes of the file.
    Size,
    /// Stored numbers.
    Params,
    /// Floating-point operations.
    Flops,
}

impl From<Minimize> for Quantity {
    fn from(minimize: Minimize) -> Quantity {
        match minimize {
            Minimize::Latency => Quantity::Latency,
            Minimize::Size => Quantity::Size,
            Minimize::Params => Quantity::Parameters,
            Minimize::Flops => Quantity::Flops,
        }
    }
}
