//! Half precision in the file: ranges, conversion, and the simulation that proves it.

mod before_choices;
mod culprit;
mod load;

use super::{Job, Outcome, Prepared as Start, lines};
use crate::{
    Failure, PassRecord,
    compress::{Exact, Finish, Fitted, Half, Written},
    pipeline::{node_count, weight_bytes},
    report::{KeptNode, PrecisionReport},
};
use anyhow::{Context as _, anyhow};
use lathe_ir::{DataType, Model, NodeId};
use lathe_passes::precision::{
    self, Choices, Converted, Magnitudes, Precision, Prepared, Simulation, check_types, convert, reads_codes, simulate,
    watch,
};
use lathe_runtime::{Claim, Fault, Inputs, Verdict};
use std::{collections::BTreeMap, path::Path, time::Instant};

/// What `--dtype` asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionOptions {
    /// The type, and whether inputs and outputs change too.
    pub precision: Precision,
    /// The relative L2 error that an output may have; `None` for that of the type.
    pub rtol: Option<f64>,
}

impl PrecisionOptions {
    fn tolerance(&self) -> f64 {
        self.rtol.unwrap_or_else(|| self.precision.tolerance())
    }

    /// What is asked of a model that rounds activations to codes: rounding before them moves codes by a step.
    fn beside_codes(self, model: &Model) -> PrecisionOptions {
        let wider = reads_codes(model).then(|| AROUND_CODES * self.precision.tolerance());
        PrecisionOptions { rtol: self.rtol.or(wider), ..self }
    }
}

/// How many times as far outputs may be off where activations are rounded to codes.
const AROUND_CODES: f64 = 10.0;

/// Places that are taken back to float32 one after another before the tool gives up.
const MOST_CULPRITS: usize = 8;

/// A claim that holds for all finite outputs: what is wanted is the numbers.
const ANYTHING: Claim = Claim::Within { rtol: f64::MAX };

const ON_CALIBRATION: &str = "proven on the calibration set";
const NOT_PROVEN: &str = "not proven";

/// The model in the form that is converted, and what the values inside are like.
struct Form {
    prepared: Prepared,
    magnitudes: Magnitudes,
    /// Where that was seen, as the report says it.
    origin: &'static str,
}

/// Half precision for every result of a budget.
pub(super) struct Halving<'a> {
    pub job: &'a Job<'a>,
    pub asked: PrecisionOptions,
    pub exact: &'a Exact<'a>,
}

impl Finish for Halving<'_> {
    /// The simulation is held against the result before it is converted: what that loses is another matter.
    fn finish(&self, model: &Model) -> Result<Written, Failure> {
        let Halving { job, exact, .. } = *self;
        let begin = Instant::now();
        let _span = job.options.run.progress.span("half precision");
        let asked = self.asked.beside_codes(model);
        require_opset(model, asked.precision)?;
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let (float, simulation) = (folder.path().join("float.onnx"), folder.path().join("simulation.onnx"));
        model.write_linked(&float)?;
        let mut warnings = Vec::new();
        let (form, attempt) = job.proven(model, &float, asked, &mut warnings)?;
        let Attempt { converted, simulation: simulated, report: found } = attempt;
        simulated.model.write_linked(&simulation)?;
        let mut report = report_of(&converted, asked, &form);
        if converted.nodes.is_empty() && !asked.precision.interface {
            warnings.push(nothing_converted(&converted, asked.precision));
        }
        report.simulated_error = found.and_then(|found| found.comparison.worst().map(|output| output.rel_l2));
        let record = PassRecord { error: report.simulated_error, ..record_of(&converted, model, asked, begin) };
        let choices = Choices::of(&form.prepared.model);
        let model = converted.model;
        let staged = model.stage(exact.target, exact.write)?;
        let half = Half { model, simulation, float, folder, report, record, warnings, choices };
        Ok(Written { staged, half: Some(Box::new(half)) })
    }
}

/// A conversion, and what its simulation came to.
struct Attempt {
    converted: Converted,
    simulation: Simulation,
    /// `None` where nothing was run.
    report: Option<lathe_runtime::Report>,
}

impl Attempt {
    fn holds(&self) -> bool {
        self.report.as_ref().is_none_or(|report| report.comparison.holds())
    }

    fn error(&self) -> f64 {
        self.report.as_ref().map_or(0.0, Attempt::error_of)
    }

    /// The worst relative error of an output; infinite where one differs in another way.
    fn error_of(report: &lathe_runtime::Report) -> f64 {
        let faults = report.comparison.faults.iter().map(|fault| match fault {
            Fault::TooFar { error, .. } if !error.is_nan() => *error,
            _ => f64::INFINITY,
        });
        let within = report.comparison.worst().map_or(0.0, |output| output.rel_l2);
        faults.reduce(f64::max).unwrap_or(within)
    }
}

impl Job<'_> {
    /// The result in half precision where that is allowed and the simulation agrees.
    pub(super) fn to_half(
        &self,
        start: &Start<'_>,
        exact: Outcome,
        asked: PrecisionOptions,
        warnings: &mut Vec<String>,
    ) -> Result<Outcome, Failure> {
        let begin = Instant::now();
        let asked = asked.beside_codes(&exact.model);
        require_opset(&exact.model, asked.precision)?;
        let original = self.reference;
        let (form, attempt) = self.proven(&exact.model, original, asked, warnings)?;
        let Attempt { converted, report: simulated, .. } = attempt;
        let mut report = report_of(&converted, asked, &form);
        if converted.nodes.is_empty() && !asked.precision.interface {
            warnings.push(nothing_converted(&converted, asked.precision));
            return Ok(Outcome { precision: Some(report), ..exact });
        }
        let mut record = record_of(&converted, &exact.model, asked, begin);
        let model = converted.model;
        let staged = model.stage(&start.target, &start.write)?;
        let mut verify = exact.verify;
        if let Some(simulated) = simulated {
            let claim = Claim::Within { rtol: asked.tolerance() };
            let mut found = lines::verify(simulated, claim, self.set_name());
            found.runtime = format!("{}, {} simulated in float32", found.runtime, asked.precision.dtype);
            report.simulated_error = found.worst.is_some().then_some(found.after);
            let choices = Choices::of(&form.prepared.model);
            self.load([original, staged.path()], asked, &choices, &mut report, warnings)?;
            record.error = report.simulated_error;
            verify = Some(found);
        }
        record.time = begin.elapsed();
        let records = exact.records.into_iter().chain([record]).collect();
        Ok(Outcome { model, staged, verify, records, precision: Some(report), ..exact })
    }

    /// Loads what a budget has come to as it is written, and gives `fitted` the model that is.
    pub(super) fn judge_half(
        &self,
        fitted: &mut Fitted,
        half: Half,
        warnings: &mut Vec<String>,
    ) -> Result<PrecisionReport, Failure> {
        let Half { model, float, folder, mut report, record, warnings: said, choices, .. } = half;
        warnings.extend(said);
        let asked = self.options.precision.expect("half precision was asked for").beside_codes(&fitted.model);
        if self.options.verify && report.nodes > 0 {
            self.load([&float, fitted.staged.path()], asked, &choices, &mut report, warnings)?;
        }
        drop(folder);
        if let Some(verify) = &mut fitted.verify {
            verify.runtime = format!("{}, {} simulated in float32", verify.runtime, report.dtype);
        }
        fitted.records.push(record);
        fitted.model = model;
        Ok(report)
    }

    /// What can be converted such that the simulation keeps to the tolerance beside the file of a reference.
    fn proven(
        &self,
        model: &Model,
        reference: &Path,
        asked: PrecisionOptions,
        warnings: &mut Vec<String>,
    ) -> Result<(Form, Attempt), Failure> {
        let mut kept: BTreeMap<NodeId, String> = BTreeMap::new();
        let mut form = self.form(model, asked.precision, true, warnings)?;
        let mut attempt = self.attempt(&form, reference, asked, &kept)?;
        let masks = !form.prepared.masks.is_empty();
        let holding = form.prepared.masks_hold(&form.magnitudes);
        if masks && !(holding && attempt.holds()) {
            // A row that is masked throughout is uniform only where the mask is so large that scores vanish beside it.
            let plain = self.form(model, asked.precision, false, &mut Vec::new())?;
            let other = self.attempt(&plain, reference, asked, &kept)?;
            if !holding || other.error() < attempt.error() {
                warnings
                    .push(format!("masks keep their numbers: {}", if holding { MASKED_ROWS } else { LARGE_SCORES }));
                (form, attempt) = (plain, other);
            }
        }
        for round in 0.. {
            Failure::if_stopped(&self.options.run.progress)?;
            if attempt.holds() {
                break;
            }
            let culprit = match round < MOST_CULPRITS {
                true => self.culprit(&form.prepared.model, reference, &attempt, asked)?,
                false => None,
            };
            let Some(culprit) = culprit else { return Err(refused(&attempt, round)) };
            let first = culprit.nodes.first().map_or(String::new(), |&id| form.prepared.model.graph.describe(id));
            let others = match culprit.nodes.len() {
                0 | 1 => String::new(),
                count => format!(" and {} near it", count - 1),
            };
            warnings.push(format!("{first}{others} kept in float32 because {}", culprit.reason));
            kept.extend(culprit.nodes.into_iter().map(|id| (id, culprit.reason.clone())));
            attempt = self.attempt(&form, reference, asked, &kept)?;
            if attempt.converted.nodes.is_empty() {
                return Err(Failure::Refused(format!(
                    "nothing can be {} within a relative error of {:.0e}: rounding in every node exceeds it",
                    asked.precision.dtype,
                    asked.tolerance()
                )));
            }
        }
        Ok((form, attempt))
    }

    /// Converts all but what is kept, and runs the simulation beside the reference.
    fn attempt(
        &self,
        form: &Form,
        reference: &Path,
        asked: PrecisionOptions,
        kept: &BTreeMap<NodeId, String>,
    ) -> Result<Attempt, Failure> {
        const FAULT: &str = "the conversion is wrong; this is a fault of this program";
        let converted = convert(&form.prepared, asked.precision, &form.magnitudes, kept);
        let converted = converted.map_err(anyhow::Error::from)?;
        converted.model.check().context(FAULT)?;
        check_types(&converted.model).context(FAULT)?;
        let simulation = simulate(&converted);
        let is_run = self.options.verify && (!converted.nodes.is_empty() || asked.precision.interface);
        let report = match is_run {
            true => Some(self.simulated(&form.prepared.model, reference, &simulation, asked.tolerance())?),
            false => None,
        };
        Ok(Attempt { converted, simulation, report })
    }

    /// The reference beside a simulation of the result, which was prepared in this form.
    fn simulated(
        &self,
        prepared: &Model,
        reference: &Path,
        simulation: &Simulation,
        rtol: f64,
    ) -> Result<lathe_runtime::Report, Failure> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let path = folder.path().join("simulation.onnx");
        simulation.model.write_linked(&path)?;
        match self.runner.compare_on_cpu(reference, &path, &self.inputs(), Claim::Within { rtol })? {
            Verdict::Compared(mut report) => {
                if !report.comparison.holds() {
                    self.compare_before_choices(prepared, simulation, rtol, &mut report)?;
                }
                Ok(report)
            }
            verdict => Err(Failure::Error(anyhow!("the simulation cannot be run: {}", verdict.describe()))),
        }
    }

    /// The form that is converted, and how large values get on the calibration set, or on the inputs that the result is
    /// verified on.
    fn form(
        &self,
        model: &Model,
        precision: Precision,
        masks: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Form, Failure> {
        let prepared = Prepared::new(model, precision, masks).map_err(anyhow::Error::from)?;
        let calibration = self.options.sets.calibration.clone();
        let origin = if calibration.is_some() { ON_CALIBRATION } else { NOT_PROVEN };
        let is_run = self.options.verify || calibration.is_some();
        let Some(watched) = watch(&prepared.model).filter(|_| is_run) else {
            return Ok(Form { prepared, magnitudes: Magnitudes::default(), origin: NOT_PROVEN });
        };
        let inputs = calibration.map_or_else(|| self.inputs(), Inputs::Set);
        Ok(match self.compare_on(&watched.model, &watched.zeros, &inputs, ANYTHING)? {
            Verdict::Compared(report) => {
                let compared = report.comparison.outputs.iter().filter(|output| output.uncompared.is_none());
                let magnitudes = watched.read(compared.map(|output| (output.name.as_str(), output.max_abs)));
                Form { prepared, magnitudes, origin }
            }
            verdict => {
                warnings.push(format!("the ranges of values could not be measured: {}", verdict.describe()));
                Form { prepared, magnitudes: Magnitudes::default(), origin: NOT_PROVEN }
            }
        })
    }

    /// Compares two models in memory on these inputs.
    fn compare_on(&self, a: &Model, b: &Model, inputs: &Inputs, claim: Claim) -> anyhow::Result<Verdict> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let paths = [folder.path().join("a.onnx"), folder.path().join("b.onnx")];
        a.write_linked(&paths[0])?;
        b.write_linked(&paths[1])?;
        self.runner.compare_on_cpu(&paths[0], &paths[1], inputs, claim)
    }
}

const MASKED_ROWS: &str = "rows that are masked throughout would change with smaller ones";
const LARGE_SCORES: &str = "what they are added to exceeds 1,000";

/// The oldest operator sets whose `Cast` names its type by number, and knows bfloat16.
fn require_opset(model: &Model, precision: Precision) -> Result<(), Failure> {
    let least = if precision.dtype == DataType::Bfloat16 { 13 } else { 9 };
    let found = model.opset();
    if found >= least {
        return Ok(());
    }
    let dtype = precision.dtype;
    Err(Failure::Error(anyhow!(
        "{dtype} needs operator set {least}, and the model has {found}; --opset {least} upgrades"
    )))
}

fn refused(attempt: &Attempt, rounds: usize) -> Failure {
    let reason = attempt.report.as_ref().map_or(String::new(), |report| report.comparison.describe_faults());
    let kept = if rounds > 0 { format!(", with {rounds} places kept in float32 for it") } else { String::new() };
    Failure::Refused(format!("the simulation of half precision does not keep to the tolerance{kept}: {reason}"))
}

fn nothing_converted(converted: &Converted, precision: Precision) -> String {
    let dtype = precision.dtype;
    match precision::by_reason(&converted.kept).into_iter().max_by_key(|(_, (count, _))| *count) {
        None => format!("nothing was converted: no node computes in float32, so there is nothing to make {dtype}"),
        Some((reason, (count, first))) => {
            format!("nothing was converted to {dtype}: of {count} nodes, first {first}, because {reason}")
        }
    }
}

/// What the report says of the conversion as of a pass.
fn record_of(converted: &Converted, before: &Model, asked: PrecisionOptions, begin: Instant) -> PassRecord {
    let mut record = PassRecord::new(&precision::INFO);
    for &id in &converted.nodes {
        record.outcome.change(asked.precision.dtype.name(), converted.model.graph.describe(id));
    }
    converted.kept.iter().for_each(|kept| record.outcome.refuse(kept.reason.clone(), kept.node.clone()));
    record.nodes_delta = node_count(&converted.model) as i64 - node_count(before) as i64;
    record.weight_bytes_delta = weight_bytes(&converted.model) as i64 - weight_bytes(before) as i64;
    record.time = begin.elapsed();
    record
}

fn report_of(converted: &Converted, asked: PrecisionOptions, form: &Form) -> PrecisionReport {
    PrecisionReport {
        dtype: asked.precision.dtype.name().to_owned(),
        interface: asked.precision.interface,
        nodes: converted.nodes.len(),
        kept: converted.kept.iter().map(|k| KeptNode { node: k.node.clone(), reason: k.reason.clone() }).collect(),
        casts: converted.casts,
        dropped_casts: converted.dropped_casts,
        masks: form.prepared.masks.clone(),
        ranges: form.origin.to_owned(),
        simulated_error: None,
        limit: asked.tolerance(),
        loaded: None,
        refused_by_runtime: None,
    }
}
