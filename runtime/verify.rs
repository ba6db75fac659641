//! Whether a candidate still computes what its reference does: both are run on the same inputs and compared.

mod judge;
mod search;

pub(crate) use self::search::{AT_EDGE, Edges, LeftOut, RESULT_AT_EDGE};

use self::judge::Judge;
use crate::{
    Claim, Comparison, Datum, Engine, InputError, LoadOptions, RuntimeError, Sample, SampleSet, Session, SetError,
    SetSpec, Source, Talk, inputs::InputSpec, rounding::ModelCopy, seeding,
};
use bytes::Bytes;
use lathe_ir::Model;
use serde::{Deserialize, Serialize};

/// What to run both models on.
#[derive(Debug, Clone)]
pub enum Inputs {
    /// Random inputs, made for the reference: at two sizes of every open dimension, as large as an estimate of the work
    /// allows; then, where the reference runs on that, with sizes 1 and 0, with a row masked throughout, and with whole
    /// numbers at the ends of their types.
    Random(InputSpec),
    /// The samples of a set, read batch by batch.
    Set(SetSpec),
    /// These.
    Given(Vec<Sample>),
}

/// What a comparison of two models came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Verdict {
    /// Both ran, and this is how far apart they are; the claim holds if there are no failures.
    Compared(Report),
    /// The reference disagrees with itself, so that nothing can be measured on it.
    Nondeterministic {
        /// How two runs of the reference differ.
        failures: Vec<String>,
    },
    /// The runtime does not run the reference, so nothing can be said about the candidate.
    ReferenceRefused {
        /// What it says.
        message: String,
        /// Every assignment of sizes that was tried.
        tried: Vec<String>,
    },
    /// The runtime runs the reference but not the candidate.
    CandidateRefused {
        /// What it says.
        message: String,
        /// The sizes of the run that failed; empty if the candidate could not even be loaded.
        sizes: String,
    },
}

/// A comparison with what it was made on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The errors and failures.
    pub comparison: Comparison,
    /// How many sets of inputs were run.
    pub samples: usize,
    /// The sizes of symbolic dimensions in each run, where there are any, and what is unusual about its values.
    pub sizes: Vec<String>,
    /// Edges of sizes and types that were not compared, and why: most often the reference does not run there.
    pub left_out: Vec<String>,
    /// Who ran the models.
    pub engine: String,
}

impl Verdict {
    /// Whether both models ran and the claim holds.
    pub fn holds(&self) -> bool {
        matches!(self, Verdict::Compared(report) if report.comparison.holds())
    }

    /// One sentence.
    pub fn describe(&self) -> String {
        match self {
            Verdict::Compared(report) if report.comparison.holds() => {
                format!("equal within the claim on {} samples", report.samples)
            }
            Verdict::Compared(report) => {
                let last = report.sizes.last().filter(|sizes| !sizes.is_empty());
                let at = last.map_or(String::new(), |sizes| format!(" (run at {sizes})"));
                format!("the outputs differ: {}{at}", report.comparison.describe_faults())
            }
            Verdict::Nondeterministic { failures } => {
                format!("the model disagrees with itself from run to run: {}", failures.join("; "))
            }
            Verdict::ReferenceRefused { message, tried } => {
                const SHOWN: usize = 4;
                let tried: Vec<&str> = tried.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
                let shown = tried[..tried.len().min(SHOWN)].join("; ");
                let at = match tried.len() {
                    0 => String::new(),
                    count if count > SHOWN => format!(" (tried {shown}; and {} more)", count - SHOWN),
                    _ => format!(" (tried {shown})"),
                };
                format!("the original cannot be run: {message}{at}")
            }
            Verdict::CandidateRefused { message, sizes } => {
                let at = if sizes.is_empty() { String::new() } else { format!(" (at {sizes})") };
                format!("the original runs but the result does not: {message}{at}")
            }
        }
    }
}

/// Why two models could not be compared at all.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No inputs can be made.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The engine cannot be used; a model it refuses is a [`Verdict`] instead.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The set cannot be read.
    #[error(transparent)]
    Set(#[from] SetError),
}

/// Why a comparison ends before its end.
enum Stop {
    /// A model does not run, and that is the answer.
    Verdict(Box<Verdict>),
    /// Nothing can be said.
    Error(VerifyError),
}

impl From<Verdict> for Stop {
    fn from(verdict: Verdict) -> Stop {
        Stop::Verdict(Box::new(verdict))
    }
}

impl From<InputError> for Stop {
    fn from(error: InputError) -> Stop {
        Stop::Error(error.into())
    }
}

impl From<RuntimeError> for Stop {
    fn from(error: RuntimeError) -> Stop {
        Stop::Error(error.into())
    }
}

impl From<SetError> for Stop {
    fn from(error: SetError) -> Stop {
        Stop::Error(error.into())
    }
}

/// A run of the reference: inputs that it accepts, with the outputs it gives.
struct ReferenceRun {
    inputs: Sample,
    outputs: Vec<(String, Datum)>,
    sizes: String,
    /// Whether the inputs are at the edge of what a model takes, where an engine may crash.
    edge: bool,
}

/// Two models to compare, what to run them on, and what to hold the second one to.
#[derive(Debug, Clone, Copy)]
pub struct VerifyTask<'a> {
    /// The reference as read; random inputs are made from it.
    pub model: &'a Model,
    /// Where the reference is loaded from.
    pub reference: Source<'a>,
    /// Where the candidate is loaded from.
    pub candidate: Source<'a>,
    /// What both are run on. Under [`Claim::Identical`] random inputs include floats at the edges of their types too.
    pub inputs: &'a Inputs,
    /// What the candidate is held to.
    pub claim: Claim,
    /// How the reference is loaded, but with the engine's optimizations off.
    pub reference_options: &'a LoadOptions,
    /// How the candidate is loaded.
    pub options: &'a LoadOptions,
}

/// A comparison and how far it has prepared its models.
struct Verification<'a> {
    engine: &'a dyn Engine,
    task: VerifyTask<'a>,
    /// How the reference is loaded.
    reference_options: LoadOptions,
    edges: Edges<'a>,
    /// Copies of both whose random operators draw the same numbers; `None` where nothing is random.
    seeded: Option<SeededCopies>,
}

/// Two copies on disk that are seeded alike.
struct SeededCopies {
    reference: ModelCopy,
    candidate: ModelCopy,
}

/// Runs the reference (twice, but for edges) and the candidate on the same inputs and compares.
///
/// The first run in which the two differ is the last. Random operators are seeded alike in copies of both models; of an
/// output that still differs between two runs of the reference only type and shape are compared. An output beyond its
/// bound passes where rounding in the reference, which is measured then, accounts for it ([`crate::Excuse`]). `talk` hears
/// about what is to happen next.
///
/// Engines may crash where a size is 0, and this process with them: only [`crate::Child::verify`] runs there.
pub fn verify(engine: &dyn Engine, task: &VerifyTask<'_>, talk: &mut dyn Talk) -> Result<Verdict, VerifyError> {
    verify_at(Edges::Safe, engine, task, talk)
}

/// [`verify`] with these runs at edges.
pub(crate) fn verify_at(
    edges: Edges<'_>,
    engine: &dyn Engine,
    task: &VerifyTask<'_>,
    talk: &mut dyn Talk,
) -> Result<Verdict, VerifyError> {
    let reference_options = LoadOptions { optimize: false, ..task.reference_options.clone() };
    let mut verification = Verification { engine, task: *task, reference_options, edges, seeded: None };
    let mut judge = Judge::new(&verification);
    verification.seed(&mut judge);
    let compared = match task.inputs {
        Inputs::Set(spec) => verification.on_set(&SampleSet::open(spec, task.model)?, &mut judge, talk),
        Inputs::Given(_) | Inputs::Random(_) => verification.on_samples(&mut judge, talk),
    };
    match compared {
        Ok(()) => Ok(Verdict::Compared(judge.report)),
        Err(Stop::Verdict(verdict)) => Ok(*verdict),
        Err(Stop::Error(error)) => Err(error),
    }
}

impl Verification<'_> {
    fn is_on_two_providers(&self) -> bool {
        self.reference_options.provider != self.task.options.provider
    }

    /// Makes copies that are seeded alike where the reference is random. Without them outputs that differ from run to
    /// run are found all the same.
    fn seed(&mut self, judge: &mut Judge) {
        if !seeding::has_random(self.task.model) {
            return;
        }
        let read = match self.task.candidate {
            Source::Path(path) => Model::read(path),
            Source::Bytes(bytes) => Model::from_bytes(Bytes::copy_from_slice(bytes)),
        };
        // What cannot be read is not loaded either, which is told then.
        let Ok(candidate) = read else { return };
        let seeded = seeding::seeded(self.task.model, &candidate.model);
        let copies = ModelCopy::write(&seeded.reference).zip(ModelCopy::write(&seeded.candidate));
        if let Some((reference, candidate)) = copies {
            judge.random(&seeded.drawn, &seeded.loose);
            self.seeded = Some(SeededCopies { reference, candidate });
        }
    }

    /// A session of the reference whose random operators start from their seeds.
    fn load_reference(&self) -> Result<Box<dyn Session>, Stop> {
        let source = self.seeded.as_ref().map_or(self.task.reference, |seeded| seeded.reference.source());
        self.load(source, &self.reference_options, |message| Verdict::ReferenceRefused { message, tried: Vec::new() })
    }

    fn load_candidate(&self) -> Result<Box<dyn Session>, Stop> {
        let source = self.seeded.as_ref().map_or(self.task.candidate, |seeded| seeded.candidate.source());
        self.load(source, self.task.options, |message| Verdict::CandidateRefused { message, sizes: String::new() })
    }

    fn load(
        &self,
        source: Source<'_>,
        options: &LoadOptions,
        refused: impl Fn(String) -> Verdict,
    ) -> Result<Box<dyn Session>, Stop> {
        self.engine.load(source, options).map_err(|error| match error {
            RuntimeError::Load { message, .. } => refused(message).into(),
            error => error.into(),
        })
    }

    /// A session in which the reference runs a second time, in the state in which it was run first.
    fn load_again(&self, session: Box<dyn Session>) -> Result<Box<dyn Session>, Stop> {
        if self.seeded.is_none() {
            return Ok(session);
        }
        drop(session);
        self.load_reference()
    }

    /// Compares on samples that are in memory together; one model is loaded at a time.
    fn on_samples(&self, judge: &mut Judge, talk: &mut dyn Talk) -> Result<(), Stop> {
        let runs = self.run_reference(judge, talk)?;
        talk.stage("loading the result");
        let mut session = self.load_candidate()?;
        let mut last = None;
        for run in runs {
            talk.stage(&if run.edge {
                format!("{RESULT_AT_EDGE}{}", run.sizes)
            } else {
                "running the result".to_owned()
            });
            let outputs = match session.run(&run.inputs) {
                Ok(outputs) => outputs,
                // Many providers do not run on what is empty, which says nothing about the model.
                Err(lost @ RuntimeError::DeviceLost { .. }) => return Err(lost.into()),
                Err(error) if run.edge && self.is_on_two_providers() => {
                    judge.report.left_out.push(format!("{}: {}: {error}", run.sizes, self.task.options.provider));
                    continue;
                }
                Err(error) => return Err(candidate_refused(error, &run.sizes)),
            };
            judge.compare(&run.inputs, &run.outputs, &outputs, talk);
            judge.report.samples += 1;
            judge.report.sizes.push(run.sizes);
            if !judge.report.comparison.holds() {
                return Ok(());
            }
            if !run.edge {
                last = Some((run.inputs, outputs));
            }
        }
        if let Some((inputs, outputs)) = last {
            judge.still_random(session.as_mut(), &inputs, &outputs);
        }
        Ok(())
    }

    /// Runs of the reference, and what a second run of each says about it.
    fn run_reference(&self, judge: &mut Judge, talk: &mut dyn Talk) -> Result<Vec<ReferenceRun>, Stop> {
        talk.stage("loading the original");
        let mut session = self.load_reference()?;
        talk.stage("running the original");
        let mut runs = match self.task.inputs {
            Inputs::Random(spec) => {
                let task = &self.task;
                let accepted = search::run_random(session.as_mut(), task.model, spec, task.claim, self.edges, talk)?;
                let left_out = accepted.left_out.into_iter().map(|(at, why)| format!("{at}: {why}"));
                judge.report.left_out = left_out.collect();
                accepted.runs
            }
            Inputs::Given(samples) => {
                run_given(session.as_mut(), samples).map_err(|error| reference_refused(error, ""))?
            }
            Inputs::Set(_) => unreachable!("sets are read batch by batch"),
        };
        if self.seeded.is_some() {
            // The search for sizes has drawn numbers; the samples start over.
            session = self.load_again(session)?;
            for run in &mut runs {
                run.outputs = session.run(&run.inputs).map_err(|error| reference_refused(error, &run.sizes))?;
            }
        }
        session = self.load_again(session)?;
        for run in runs.iter().filter(|run| !run.edge) {
            let again = session.run(&run.inputs).map_err(|error| reference_refused(error, &run.sizes))?;
            judge.repeated(&run.outputs, &again);
        }
        if let (Some(_), Some(run)) = (&self.seeded, runs.iter().rfind(|run| !run.edge))
            && let Ok(further) = session.run(&run.inputs)
        {
            judge.redrawn(&run.outputs, &further);
        }
        Ok(runs)
    }

    /// Compares on a set, of which one batch is in memory at a time: both models stay loaded.
    fn on_set(&self, set: &SampleSet, judge: &mut Judge, talk: &mut dyn Talk) -> Result<(), Stop> {
        talk.stage("loading the original");
        let mut original = self.load_reference()?;
        talk.stage("loading the result");
        let mut result = self.load_candidate()?;
        for batch in set.batches() {
            let batch = batch?;
            let range = format!("samples {} to {} of {}", batch.first, batch.first + batch.samples - 1, set.len());
            talk.stage(&format!("running {range}"));
            let before = original.run(&batch.inputs).map_err(|error| reference_refused(error, &range))?;
            let first = judge.report.samples == 0;
            if first {
                let mut fresh = self.seeded.as_ref().map(|_| self.load_reference()).transpose()?;
                let session = fresh.as_mut().unwrap_or(&mut original);
                let again = session.run(&batch.inputs).map_err(|error| reference_refused(error, &range))?;
                judge.repeated(&before, &again);
                if let Some(session) = &mut fresh
                    && let Ok(further) = session.run(&batch.inputs)
                {
                    judge.redrawn(&before, &further);
                }
            }
            let after = result.run(&batch.inputs).map_err(|error| candidate_refused(error, &range))?;
            judge.compare(&batch.inputs, &before, &after, talk);
            judge.report.samples += batch.samples;
            talk.progress(judge.report.samples, set.len(), "samples");
            if !judge.report.comparison.holds() {
                judge.report.sizes.push(range);
                break;
            }
            if first && judge.has_random() {
                let mut fresh = self.load_candidate()?;
                judge.still_random(fresh.as_mut(), &batch.inputs, &after);
            }
        }
        Ok(())
    }
}

fn reference_refused(error: RuntimeError, at: &str) -> Stop {
    match error {
        RuntimeError::DeviceLost { .. } => error.into(),
        _ => Verdict::ReferenceRefused { message: error.to_string(), tried: vec![at.to_owned()] }.into(),
    }
}

fn candidate_refused(error: RuntimeError, at: &str) -> Stop {
    match error {
        RuntimeError::DeviceLost { .. } => error.into(),
        _ => Verdict::CandidateRefused { message: error.to_string(), sizes: at.to_owned() }.into(),
    }
}

fn run_given(session: &mut dyn Session, samples: &[Sample]) -> Result<Vec<ReferenceRun>, RuntimeError> {
    let run = |sample: &Sample| {
        let outputs = session.run(sample)?;
        Ok(ReferenceRun { inputs: sample.clone(), outputs, sizes: String::new(), edge: false })
    };
    samples.iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Build, engine, unary};
    use lathe_ir::{DataType, Node, Tensor, Type};

    fn check(reference: &Model, candidate: &Model, claim: Claim) -> Verdict {
        let (a, b) = (reference.to_bytes(), candidate.to_bytes());
        let inputs = Inputs::Random(InputSpec { seed: 1, ..InputSpec::default() });
        let options = LoadOptions { threads: 1, ..LoadOptions::default() };
        let (inputs, options) = (&inputs, &options);
        let (a, b) = (Source::Bytes(&a), Source::Bytes(&b));
        let reference_options = options;
        let task =
            VerifyTask { model: reference, reference: a, candidate: b, inputs, claim, reference_options, options };
        verify(engine(), &task, &mut |_: &str| {}).unwrap()
    }

    fn plus(value: f32) -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        let c = build.constant("c", Tensor::from_f32s(&[], &[value]));
        let y = build.node(Node::new("Add"), &[x, c], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    #[test]
    fn a_model_is_itself() {
        let Verdict::Compared(report) = check(&plus(1.0), &plus(1.0), Claim::Identical) else { panic!() };
        assert_eq!((report.samples, report.comparison.faults.len()), (10, 0));
        assert_eq!(report.sizes[..3], ["n = 1", "n = 3", "n = 3, values at the edges of their types"]);
        assert!(report.left_out[0].starts_with("n = 0: an engine may crash"), "{:?}", report.left_out);
    }

    #[test]
    fn adding_zero_is_equivalent_but_not_identical() {
        let identity = unary(Node::new("Identity"));
        assert!(check(&identity, &plus(0.0), Claim::Equivalent { rtol: None }).holds());
        assert!(!check(&identity, &plus(0.0), Claim::Identical).holds());
        assert!(check(&identity, &plus(-0.0), Claim::Identical).holds());
    }

    #[test]
    fn a_different_function_is_noticed() {
        let verdict = check(&plus(1.0), &plus(1.001), Claim::Equivalent { rtol: None });
        assert!(verdict.describe().contains("the relative L2 error is"), "{}", verdict.describe());
    }

    #[test]
    fn a_random_model_is_compared_on_equal_numbers() {
        let noise = || {
            let mut build = Build::new();
            let x = build.input("x", DataType::Float, &["n", "3"]);
            let noise = build.node(Node::new("RandomNormalLike"), &[x], "noise");
            let y = build.node(Node::new("Add"), &[x, noise], "y");
            build.output(y, Type::unshaped(DataType::Float)).model()
        };
        let Verdict::Compared(report) = check(&noise(), &noise(), Claim::Identical) else { panic!() };
        assert_eq!((report.comparison.holds(), &report.comparison.outputs[0].uncompared), (true, &None));
        assert!(!check(&noise(), &plus(0.0), Claim::Identical).holds());
    }

    #[test]
    fn refusals_say_whose_they_are() {
        let broken = unary(Node::new("NoSuchOperator"));
        assert!(matches!(check(&broken, &plus(1.0), Claim::Identical), Verdict::ReferenceRefused { .. }));
        assert!(matches!(check(&plus(1.0), &broken, Claim::Identical), Verdict::CandidateRefused { .. }));
    }

    #[test]
    fn sizes_are_searched_until_the_model_accepts_them() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "m"]);
        let shape = build.constant("shape", Tensor::int64s(&[4, 32]));
        let y = build.node(Node::new("Reshape"), &[x, shape], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let Verdict::Compared(report) = check(&model, &model, Claim::Identical) else { panic!() };
        assert_eq!(report.sizes[0], "m = 128, n = 1");
    }
}
