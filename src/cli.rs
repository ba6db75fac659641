//! The command line: what is asked for, and the exit code that answers.

use crate::{Answer, Failure, commands, recipe, run_options::RunArgs, runner};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};
use lathe_passes::Quantity;
use lathe_runtime::Listener;
use serde::Serialize;
use std::{
    ffi::OsString,
    io::Write,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

/// Ahead-of-time, training-free optimizer for ONNX models.
#[derive(Debug, Parser)]
#[command(
    name = "optimize",
    version,
    args_conflicts_with_subcommands = true,
    args_override_self = true,
    after_help = "`optimize explain PASS` describes a pass and its options.\n\
                  Exit codes: 0 written and verified, 1 error, 2 usage, 3 verification refused (nothing written)."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    optimize: OptimizeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compile a whole diffusion sampling loop into one model: noise in, sample out.
    Sampler(Box<commands::sampler::SamplerArgs>),
    /// What a model is: inputs, nodes, parameters, FLOPs, operators.
    Inspect(commands::inspect::InspectArgs),
    /// Compare two models on the same inputs.
    ///
    /// Without a set these are random: at two sizes of every open dimension, at sizes 1 and 0, with a row of every attention
    /// mask masked throughout, and with whole numbers at the ends of their types. What A does not run on is not compared and is
    /// named with --json (left_out). Sizes follow from an estimate of the work, so that a comparison takes seconds.
    Verify(Box<commands::verify::VerifyArgs>),
    /// Collect calibration statistics of tensors inside a model.
    Stats(Box<commands::stats::StatsArgs>),
    /// Time a model, or two in turns.
    Bench(Box<commands::bench::BenchArgs>),
    /// List the passes.
    Passes(commands::catalogue::PassesArgs),
    /// Describe a pass: what it does, needs and declines, and its options.
    Explain(commands::catalogue::ExplainArgs),
    /// Print a model in the ONNX text form.
    Dump(commands::dump::DumpArgs),
    /// Show which runtime is used and what it offers; install one.
    Doctor(commands::doctor::DoctorArgs),
    /// Run models for a parent process.
    #[command(name = runner::SERVE, hide = true)]
    Serve,
}

/// Which operators a result may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TargetArg {
    /// Standard operators only.
    Portable,
    /// ONNX Runtime's `com.microsoft` operators too.
    Ort,
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
    #[arg(long)]
    pub overwrite: bool,
    /// Run only these passes, comma-separated.
    #[arg(long, value_delimiter = ',', value_name = "PASS,...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passes: Option<Vec<String>>,
    /// Do not run these passes, comma-separated.
    #[arg(long, value_delimiter = ',', value_name = "PASS,...")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip: Vec<String>,
    /// Set an option of a pass.
    #[arg(long = "set", value_name = "PASS.OPTION=VALUE")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Which operators the result may use.
    #[arg(long, value_enum, default_value = "portable")]
    pub target: TargetArg,
    /// Upgrade the model to this standard operator set first.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opset: Option<i64>,
    /// Let folding enlarge the model by this much (512MB); larger folds are skipped and named.
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub max_growth: String,
    /// Where weights go.
    #[arg(long, value_enum, default_value = "auto")]
    pub external_data: ExternalArg,
    /// Do everything but write.
    #[arg(long)]
    pub dry_run: bool,
    /// Write the result without running it.
    #[arg(long)]
    pub no_verify: bool,
    /// Time the result in turns with the original, and report the latency of both.
    #[arg(long)]
    pub bench: bool,
    /// Run the model after every pass.
    #[arg(long, conflicts_with = "no_verify")]
    pub paranoid: bool,
    /// Write a report: .html, .json or .md. May be given several times.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub report: Vec<PathBuf>,
    /// Take options from this file; those on the command line win.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub recipe: Option<PathBuf>,
    /// Write the options of this run to a file.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub save_recipe: Option<PathBuf>,
    #[command(flatten)]
    #[serde(flatten)]
    pub sets: commands::sets::SetArgs,
    /// Share of the file's bytes to keep (0.5); lossy methods spend the rest where it hurts least. Needs --calib.
    #[arg(long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<f64>,
    /// Share of the parameters to keep.
    #[arg(long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub params: Option<f64>,
    /// Share of the floating-point operations to keep.
    #[arg(long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops: Option<f64>,
    /// Share of the latency to keep, as measured beside the original on this machine (at --input-shape, if given).
    #[arg(long, value_name = "R", value_parser = share)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<f64>,
    /// The largest drop of the metric on held-out samples; a larger one ends with exit code 3. Without a share to keep,
    /// the least that keeps to the drop is found.
    #[arg(long, value_name = "X")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_drop: Option<f64>,
    /// What becomes as little as --max-drop allows where no share to keep is given: latency unless told.
    #[arg(long, value_name = "WHAT", conflicts_with_all = ["size", "params", "flops", "latency"])]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimize: Option<Minimize>,
    /// Try the recipes that the model's features suggest, each as a job of its own, and write the best that --max-drop
    /// allows; what was found is remembered for models alike. Needs --calib.
    #[arg(long, conflicts_with_all = ["size", "params", "flops", "latency", "no_verify", "dry_run"])]
    pub auto: bool,
    /// Time after which --auto starts no other recipe: 10m unless told (90s, 2h).
    #[arg(long, value_name = "TIME", requires = "auto")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// Let --auto write every model that no other beats in both what is saved and what is lost to this folder, with reports.
    #[arg(long, value_name = "DIR", requires = "auto")]
    #[serde(skip)]
    pub pareto: Option<PathBuf>,
    /// What is measured on held-out samples.
    #[arg(long, value_name = "METRIC", value_parser = commands::verify::metric_names())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// Choose N samples of the calibration set: half for spanning what it holds, half at random.
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calib_select: Option<usize>,
    #[command(flatten)]
    #[serde(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    #[serde(skip)]
    pub talk: TalkArgs,
}

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

/// How much is said.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct TalkArgs {
    /// Say more: every pass and every refusal.
    #[arg(short, long, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Say only what went wrong.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Runs the program on the arguments of this process.
pub fn main() -> ExitCode {
    ExitCode::from(run(std::env::args_os().collect()))
}

/// Runs the program on a command line, the name of the program included. Returns the exit code.
pub fn run(arguments: Vec<OsString>) -> u8 {
    if arguments.get(1).is_some_and(|a| a == runner::SERVE) {
        return commands::serve(arguments.get(2).map(PathBuf::from));
    }
    stop_cleanly_on_interrupt();
    silence_panics();
    match perform(arguments) {
        Ok(()) => 0,
        Err(failure) => {
            say(&format!("error: {failure}"));
            failure.exit_code()
        }
    }
}

/// The command line, with the options of its recipe where it does not say otherwise.
fn parse(arguments: &[OsString]) -> Result<Result<Cli, clap::Error>, Failure> {
    let command = Cli::command();
    let read = |arguments: &[OsString]| {
        let matches = command.clone().try_get_matches_from(arguments)?;
        Cli::from_arg_matches(&matches).map(|cli| (cli, matches))
    };
    let (cli, matches) = match read(arguments) {
        Ok(found) => found,
        Err(error) => return Ok(Err(error)),
    };
    let Some(path) = cli.optimize.recipe.as_ref().filter(|_| cli.command.is_none()) else { return Ok(Ok(cli)) };
    let given = |key: &str| {
        let id = command.get_arguments().find(|a| a.get_long() == Some(key)).map(|a| a.get_id().as_str());
        // Settings of passes add up; the last one of an option counts.
        key != "set" && id.is_some_and(|id| matches.value_source(id) == Some(ValueSource::CommandLine))
    };
    let mut all: Vec<OsString> = arguments.first().cloned().into_iter().collect();
    let options = recipe::read(path, &command)?;
    all.extend(options.into_iter().filter(|(key, _)| !given(key)).flat_map(|(_, arguments)| arguments));
    all.extend(arguments.iter().skip(1).cloned());
    Ok(read(&all).map(|(cli, _)| cli))
}

/// What a command line without a terminal asks for: errors are values, and nothing is printed.
///
/// Commands that only print have no answer; `--json`, `--quiet` and `--verbose` make no difference.
pub(crate) fn answer(arguments: &[OsString], progress: Listener) -> Result<Answer, Failure> {
    let usage = |error: clap::Error| {
        let text = error.render().to_string();
        // How to use the command line is said to those who sit at one.
        let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|rest| text.find(rest)).min();
        let sentence = &text[..end.unwrap_or(text.len())];
        let words: Vec<&str> = sentence.trim_start_matches("error: ").split_whitespace().collect();
        Failure::Usage(words.join(" "))
    };
    let cli = parse(arguments)?.map_err(usage)?;
    match &cli.command {
        Some(Command::Sampler(args)) => commands::sampler::answer(args, arguments, progress),
        Some(Command::Inspect(args)) => commands::inspect::answer(args, progress),
        Some(Command::Verify(args)) => commands::verify::answer(args, progress),
        Some(Command::Bench(args)) => commands::bench::answer(args, progress),
        Some(Command::Passes(_)) => Ok(commands::catalogue::answer()),
        Some(_) => Err(Failure::Usage("only the command line has this command".to_owned())),
        None => commands::optimize::answer(&cli.optimize, arguments, progress),
    }
}

fn perform(arguments: Vec<OsString>) -> Result<(), Failure> {
    let cli = parse(&arguments)?.unwrap_or_else(|error| error.exit());
    match &cli.command {
        Some(Command::Sampler(args)) => commands::sampler::run(args, &arguments),
        Some(Command::Inspect(args)) => commands::inspect::run(args),
        Some(Command::Verify(args)) => commands::verify::run(args),
        Some(Command::Stats(args)) => commands::stats::run(args),
        Some(Command::Bench(args)) => commands::bench::run(args),
        Some(Command::Passes(args)) => commands::catalogue::passes(args),
        Some(Command::Explain(args)) => commands::catalogue::explain(args),
        Some(Command::Dump(args)) => commands::dump::run(args),
        Some(Command::Doctor(args)) => commands::doctor::run(args),
        Some(Command::Serve) => Err(Failure::Usage("only the program itself starts this command".to_owned())),
        None => commands::optimize::run(&cli.optimize, &arguments),
    }
}

/// Data for standard output. A closed pipe ends the program quietly.
#[allow(clippy::print_stdout)] // The one place that prints data.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        lathe_ir::remove_staged();
        std::process::exit(1);
    }
}

/// Talk for standard error.
#[allow(clippy::print_stderr)] // The one place that talks.
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}

/// A panic inside a pass is reported as a sentence by the pipeline; its trace would only hide that.
pub(crate) fn silence_panics() {
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
}

/// Ctrl-C removes what is not yet in place.
fn stop_cleanly_on_interrupt() {
    static STOPPING: AtomicBool = AtomicBool::new(false);
    let stop = || {
        if !STOPPING.swap(true, Ordering::SeqCst) {
            lathe_ir::remove_staged();
            say("\ninterrupted; nothing was written");
            std::process::exit(130);
        }
    };
    // Without the handler an interrupt still stops the program; only a temporary folder would stay.
    let _ = ctrlc::set_handler(stop);
}

/// What becomes as little as the drop allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Minimize {
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
