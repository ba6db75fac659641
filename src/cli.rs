//! The command line: what is asked for, and the exit code that answers.

use crate::{
    Answer, Failure,
    commands::{self, optimize::args::OptimizeArgs},
    recipe, runner,
    terminal::{has_printed, print, say},
};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, parser::ValueSource};
use lathe_runtime::Listener;
use std::{
    ffi::OsString,
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
    after_help = "Examples:\n  \
                  optimize model.onnx -o out.onnx\n  \
                  optimize model.onnx -o out.onnx --calib calib.npz --size 0.3 --max-drop 0.01\n  \
                  optimize model.onnx -o out.onnx --calib labelled.npz --labels label --latency 0.7\n  \
                  optimize model.onnx -o out.onnx --dtype float16 --calib calib.npz\n  \
                  optimize sampler dit.onnx -o sampler.onnx --scheduler scheduler_config.json --steps 20\n\n\
                  `optimize explain PASS` describes a pass and its options.\n\
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
    #[command(
        after_help = "Examples:\n  optimize sampler dit.onnx -o sampler.onnx --scheduler scheduler_config.json --steps 20\n  optimize sampler FOLDER -o pipeline.onnx --steps 20 --guidance 7.5"
    )]
    Sampler(Box<commands::sampler::SamplerArgs>),
    /// What a model is: inputs, nodes, parameters, FLOPs, operators.
    #[command(after_help = "Examples:\n  optimize inspect model.onnx\n  optimize inspect model.onnx --ep webgpu")]
    Inspect(Box<commands::inspect::InspectArgs>),
    /// Compare two models on the same inputs.
    ///
    /// Without a set these are random: at two sizes of every open dimension, at sizes 1 and 0, with a row of every attention
    /// mask masked throughout, and with whole numbers at the ends of their types. What A does not run on is not compared and is
    /// named with --json (left_out). Sizes follow from an estimate of the work, so that a comparison takes seconds.
    #[command(
        after_help = "Examples:\n  optimize verify model.onnx out.onnx --layers\n  optimize verify model.onnx out.onnx --validate test.npz --labels label --max-drop 0.005\n  optimize verify model.onnx --ep webgpu --against cpu"
    )]
    Verify(Box<commands::verify::VerifyArgs>),
    /// What differs between two models: inputs and outputs, operators, nodes, weights. Nothing is run.
    #[command(
        after_help = "Examples:\n  optimize diff model.onnx out.onnx\n  optimize diff model.onnx out.onnx --html differences.html --exit-code"
    )]
    Diff(commands::diff::DiffArgs),
    /// Collect calibration statistics of tensors inside a model.
    #[command(after_help = "Examples:\n  optimize stats model.onnx --calib calib.npz -o statistics.npz")]
    Stats(Box<commands::stats::StatsArgs>),
    /// Time a model, or two in turns.
    #[command(
        after_help = "Examples:\n  optimize bench model.onnx out.onnx --threads 1\n  optimize bench model.onnx --profile --input-shape x:8,3,224,224"
    )]
    Bench(Box<commands::bench::BenchArgs>),
    /// Show what is kept between runs, and have less of it.
    #[command(after_help = "Examples:\n  optimize cache\n  optimize cache --limit 2GB")]
    Cache(commands::cache::CacheArgs),
    /// List the passes.
    #[command(after_help = "Examples:\n  optimize passes\n  optimize passes --json")]
    Passes(commands::catalogue::PassesArgs),
    /// Describe a pass: what it does, needs and declines, and its options.
    #[command(after_help = "Examples:\n  optimize explain fuse-layer-norm")]
    Explain(commands::catalogue::ExplainArgs),
    /// Print a model in the ONNX text form.
    #[command(after_help = "Examples:\n  optimize dump model.onnx")]
    Dump(commands::dump::DumpArgs),
    /// Show which runtime is used and what it offers; install one.
    #[command(
        after_help = "Examples:\n  optimize doctor\n  optimize doctor --install\n  optimize doctor --install webgpu"
    )]
    Doctor(commands::doctor::DoctorArgs),
    /// Print what completes these commands and options in a shell.
    #[command(
        after_help = "Examples:\n  optimize completions bash > ~/.local/share/bash-completion/completions/optimize\n  optimize completions zsh > ~/.zfunc/_optimize"
    )]
    Completions(commands::shell::CompletionsArgs),
    /// Print or write the manual pages.
    #[command(after_help = "Examples:\n  optimize man | man -l -\n  optimize man --dir ~/.local/share/man/man1")]
    Man(commands::shell::ManArgs),
    /// Run models for a parent process.
    #[command(name = runner::SERVE, hide = true)]
    Serve,
}

/// Runs the program on the arguments of this process.
pub fn main() -> ExitCode {
    ExitCode::from(run(std::env::args_os().collect()))
}

/// Runs the program on a command line, the name of the program included. Returns the exit code.
pub fn run(arguments: Vec<OsString>) -> u8 {
    if arguments.get(1).is_some_and(|a| a == runner::SERVE) {
        return commands::serve(&arguments[2..]);
    }
    stop_cleanly_on_interrupt();
    silence_panics();
    let as_json = arguments.iter().skip(1).take_while(|a| *a != "--").any(|a| a == "--json");
    match perform(arguments) {
        Ok(()) => 0,
        Err(failure) => {
            // What was compared and turned down has printed its numbers already.
            if as_json && !has_printed() {
                print(&failure.to_json());
            }
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
        Some(Command::Diff(args)) => commands::diff::answer(args),
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
        Some(Command::Diff(args)) => commands::diff::run(args),
        Some(Command::Stats(args)) => commands::stats::run(args),
        Some(Command::Bench(args)) => commands::bench::run(args),
        Some(Command::Cache(args)) => commands::cache::run(args),
        Some(Command::Passes(args)) => commands::catalogue::passes(args),
        Some(Command::Explain(args)) => commands::catalogue::explain(args),
        Some(Command::Dump(args)) => commands::dump::run(args),
        Some(Command::Doctor(args)) => commands::doctor::run(args),
        Some(Command::Completions(args)) => commands::shell::completions(args, Cli::command()),
        Some(Command::Man(args)) => commands::shell::man(args, Cli::command()),
        Some(Command::Serve) => Err(Failure::Usage("only the program itself starts this command".to_owned())),
        None => commands::optimize::run(&cli.optimize, &arguments),
    }
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
