//! `optimize verify A B`: whether two models compute the same, or how much the second loses on a set or, of samplers, on
//! seeds. Without --metric, --max-drop and --labels the values of outputs are compared, on a set as on random inputs.

mod layers;

use super::{Answer, sets::SetArgs};
use crate::{
    Failure, Sets, job,
    latency::Measurement,
    progress::Meter,
    report::{OutputLine, Verify},
    run_options::RunArgs,
    runner::Runner,
    sampler::{self, ACTION_METRIC, LEAST_SEEDS, SamplerComparison},
    validate::{self, Bound, significant},
};
use anyhow::anyhow;
use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser},
};
use lathe_runtime::{
    BenchInputs, Claim, InputSpec, Inputs, LayersJob, Listener, LoadOptions, ModelOn, Verdict, metric_columns,
};
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// What to compare.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The reference.
    a: PathBuf,
    /// The candidate; with --against it may be left out: A on both providers.
    #[arg(required_unless_present = "against")]
    b: Option<PathBuf>,
    /// Run A on this execution provider and B on that of --ep, with the runtime's optimizations on as where it is deployed.
    #[arg(long, value_name = "PROVIDER", conflicts_with_all = ["metric", "max_drop", "labels", "seeds"])]
    against: Option<String>,
    /// Compare values inside the models too, in their order: which is the first that differs, and is it its node that
    /// computes something else?
    #[arg(long, conflicts_with_all = ["metric", "max_drop", "labels", "seeds"])]
    layers: bool,
    /// The largest relative L2 error of an output; by default 1e-4 for float32 and what other types allow, or what
    /// rounding that is measured in A accounts for.
    #[arg(long, conflicts_with_all = ["metric", "max_drop"])]
    rtol: Option<f64>,
    /// Expect equal bits.
    #[arg(long, conflicts_with_all = ["rtol", "metric", "max_drop"])]
    bits: bool,
    /// Measure this on a set, instead of comparing values. `auto` fits the model, and is what --max-drop and --labels
    /// mean without this. In brackets: how the drop is counted, positive where B is worse.
    #[arg(long, value_name = "METRIC", value_parser = all_metric_names())]
    metric: Option<String>,
    /// The largest drop of the metric that passes; a larger one ends with exit code 3. Without this a metric is only
    /// measured.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    max_drop: Option<f64>,
    /// Compare two samplers on so many seeds, by distances of pairs (values from −1 to 1): --max-drop bounds --metric,
    /// rel-l2, psnr, ssim or action-l2.
    #[arg(long, value_name = "N", conflicts_with_all = ["rtol", "bits", "calib", "validate", "labels", "batch"])]
    seeds: Option<usize>,
    /// With --seeds: a network that gives features of images; distances by what it sees are measured too.
    #[arg(long, value_name = "FEATURES", requires = "seeds")]
    features: Option<PathBuf>,
    /// As JSON, in the form of the report's `verify`; of samplers, every distance.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sets: SetArgs,
    #[command(flatten)]
    run: RunArgs,
}

impl VerifyArgs {
    /// The second model; where two providers are compared it may be the first.
    fn candidate(&self) -> &Path {
        self.b.as_ref().unwrap_or(&self.a)
    }
}

/// Those of sets, and what samplers of actions are held to.
fn all_metric_names() -> PossibleValuesParser {
    let of_sets = metric_values();
    let help = "with --seeds: the worst step of a chunk of actions, in shares of their range [drop: itself]";
    PossibleValuesParser::new(of_sets.into_iter().chain([PossibleValue::new(ACTION_METRIC).help(help)]))
}

pub(crate) fn metric_names() -> PossibleValuesParser {
    PossibleValuesParser::new(metric_values())
}

fn metric_values() -> Vec<PossibleValue> {
    let auto = PossibleValue::new("auto").help("what fits the model; the choice is explained");
    let named =
        |m: &lathe_runtime::Metric| PossibleValue::new(m.name).help(format!("{} [drop: {}]", m.summary, m.drop));
    std::iter::once(auto).chain(lathe_runtime::metrics().map(named)).collect()
}

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    let meter = Meter::new(if args.seeds.is_some() { "drawing" } else { "comparing" }, false);
    let found = answer(args, meter.listener())?;
    drop(meter);
    found.show(args.json);
    found.refused.map_or(Ok(()), |why| Err(Failure::Refused(why)))
}

/// The comparison, which may be one that does not pass.
pub(crate) fn answer(args: &VerifyArgs, progress: Listener) -> Result<Answer, Failure> {
    if let Some(seeds) = args.seeds {
        return samplers(args, seeds, progress);
    }
    let run = args.run.options(progress)?;
    let sets = sets(args, &run.inputs)?;
    let (model, b) = (super::read(&args.a)?.model, args.candidate());
    super::read(b)?;
    if args.b.is_none() && args.against.as_ref() == Some(&run.load.provider) {
        let message =
            format!("--against {0} beside --ep {0} would compare `{1}` with itself", run.load.provider, b.display());
        return Err(Failure::Usage(message));
    }
    let runner = Runner::new(&run)?.afresh();
    // Values are compared, on a set as on random inputs, unless something is to be measured.
    let measured = args.metric.is_some() || args.max_drop.is_some() || args.sets.labels.is_some();
    let set = sets.check(&model)?;
    let fed = match &set {
        Some((set, _)) => BenchInputs::Set(set.clone()),
        None => BenchInputs::Random(run.inputs.clone()),
    };
    let placed = Measurement { run: &run, models: &[b], inputs: &fed, seconds: 0.0 };
    let notes = placed.left_behind()?;
    let (inputs, set_name) = match set {
        Some((set, set_name)) if measured => {
            let metric = args.metric.clone().unwrap_or_else(|| "auto".to_owned());
            return measure(args, &runner, notes, &Bound { set, set_name, metric, max_drop: args.max_drop });
        }
        Some((set, set_name)) => (Inputs::Set(set), set_name),
        None => (Inputs::Random(run.inputs.clone()), "random"),
    };
    let claim = match args.rtol {
        _ if args.bits => Claim::Identical,
        Some(rtol) => Claim::Within { rtol },
        None => Claim::Equivalent { rtol: None },
    };
    let reference_options = LoadOptions {
        provider: args.against.clone().unwrap_or_else(|| run.load.provider.clone()),
        device: if args.against.is_some() { 0 } else { run.load.device },
        ..run.load.clone()
    };
    // A provider is judged as it will run.
    let options = LoadOptions { optimize: args.against.is_some(), ..run.load.clone() };
    let reference = ModelOn { path: &args.a, options: &reference_options };
    let verdict = runner.child().verify(reference, ModelOn { path: b, options: &options }, &inputs, claim)?;
    let sentence = verdict.describe();
    let report = match verdict {
        Verdict::Compared(report) => report,
        Verdict::ReferenceRefused { .. } => return Err(Failure::Error(anyhow!("{sentence}"))),
        _ => return Err(Failure::Refused(sentence)),
    };
    let passed = report.comparison.holds();
    let mut found = job::verify(report, claim, set_name);
    if let Some(against) = &args.against {
        found.runtime = format!("{} ({} against {against})", found.runtime, run.load.provider);
    }
    let mut answer = Answer::new(&found, text(&found, &sentence), notes);
    if args.against.is_some() {
        found.left_out.iter().for_each(|line| answer.text.push_str(&format!("  not run: {line}\n")));
    }
    if args.layers {
        let job = LayersJob {
            reference: args.a.clone(),
            candidate: b.to_owned(),
            set: if let Inputs::Set(set) = &inputs { Some(set.clone()) } else { None },
            inputs: run.inputs.clone(),
            rtol: if args.bits { Some(0.0) } else { args.rtol },
            bytes: layers::bytes(run.memory),
            reference_options,
            // Values inside are seen only where the runtime leaves them alone.
            options: LoadOptions { optimize: false, ..run.load.clone() },
        };
        let found = layers::compare(&runner, job)?;
        answer.json["layers"] = found.json;
        answer.text.push_str(&found.text);
        // Outputs may agree all the same: the CPU computes half precision in float32 where it may.
        answer.refused = found.culprit.map(|node| format!("the outputs agree, but {node} computes something else"));
    }
    if !passed {
        answer.refused = Some(sentence);
    }
    Ok(answer)
}

/// Compares two samplers.
fn samplers(args: &VerifyArgs, seeds: usize, progress: Listener) -> Result<Answer, Failure> {
    let usage = |message: String| Err(Failure::Usage(message));
    let metric = match args.metric.as_deref() {
        None | Some("auto") => "rel-l2",
        Some(metric @ ("rel-l2" | "psnr" | "ssim" | ACTION_METRIC)) => metric,
        Some(other) => {
            return usage(format!(
                "--metric {other} is about a set; samplers are held to rel-l2, psnr, ssim or {ACTION_METRIC}"
            ));
        }
    };
    let least = if args.features.is_some() { LEAST_SEEDS } else { 1 };
    if seeds < least {
        return usage(format!("--seeds is {seeds}, expected at least {least}"));
    }
    if args.max_drop.is_some_and(f64::is_nan) {
        return usage("--max-drop is no number".to_owned());
    }
    let pair = SamplerComparison {
        a: args.a.clone(),
        b: args.candidate().to_owned(),
        seeds,
        features: args.features.clone(),
        metric: metric.to_owned(),
        max_drop: args.max_drop,
        run: args.run.options(progress)?,
    };
    let found = sampler::compare_samplers(&pair)?;
    let answer = Answer::new(&found, found.text(), Vec::new());
    Ok(Answer { refused: (!found.passed).then(|| found.sentence()), ..answer })
}

/// The sets of the command line, where they go together with its other options.
fn sets(args: &VerifyArgs, inputs: &InputSpec) -> Result<Sets, Failure> {
    let usage = |message: &str| Err(Failure::Usage(message.to_owned()));
    if args.metric.as_deref() == Some(ACTION_METRIC) {
        return usage("--metric action-l2 is about samplers of actions, with --seeds");
    }
    let sets = args.sets.sets()?;
    sets.instead_of(inputs)?;
    if args.sets.calib.is_some() && args.sets.validate.is_some() {
        return usage("two models are compared on one set; leave --calib or --validate out");
    }
    if sets.validation.is_none() && (args.metric.is_some() || args.max_drop.is_some()) {
        return usage("--metric and --max-drop are about a set, and none is given; --calib or --validate");
    }
    if args.max_drop.is_some_and(f64::is_nan) {
        return usage("--max-drop is no number");
    }
    Ok(sets)
}

fn measure(args: &VerifyArgs, runner: &Runner, notes: Vec<String>, bound: &Bound) -> Result<Answer, Failure> {
    let found = validate::validate(runner, &args.a, args.candidate(), bound)?;
    let sentence = validate::describe(&found);
    let limit = if found.limit.is_finite() { "" } else { ", and no limit is set (--max-drop)" };
    let answer = Answer::new(&found, text(&found, &format!("{sentence}{limit}")), notes);
    let why = match &found.note {
        Some(note) => format!("{sentence}; {note}"),
        None => sentence,
    };
    Ok(Answer { refused: (!found.passed).then_some(why), ..answer })
}

fn text(found: &Verify, sentence: &str) -> String {
    let mut out = format!("{sentence} on {}\n", found.runtime);
    if let Some(detail) = &found.detail {
        let _ = writeln!(out, "{detail}");
    }
    if let Some(why) = &found.why {
        let _ = writeln!(out, "{} was chosen because {why}", found.metric);
    }
    if let Some(note) = &found.note {
        let _ = writeln!(out, "note: {note}");
    }
    for output in &found.outputs {
        let _ = writeln!(out, "  {}", line(output));
    }
    out
}

fn line(o: &OutputLine) -> String {
    if let Some(reason) = &o.uncompared {
        return format!("{}  type and shape only: {reason}", o.name);
    }
    let mut line = format!("{}  max abs {:.2e}  rel L2 {:.2e}", o.name, o.scores.max_abs(), o.scores.rel_l2());
    if let Some(limit) = o.limit {
        let _ = write!(line, " (limit {limit:.0e})");
    }
    let _ = write!(line, "  cosine {:.6}", o.scores.cosine());
    for (metric, column) in metric_columns().into_iter().filter(|(_, column)| column.order > 0) {
        if let Some(score) = o.scores.get(metric.name) {
            let unit = if column.unit.is_empty() { String::new() } else { format!(" {}", column.unit) };
            let _ = write!(line, "  {} {}{unit}", column.heading, significant(score));
        }
    }
    line
}
