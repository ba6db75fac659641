//! What happens in the plain loop on noise that no plan is judged by, run when it is first asked for.

use crate::sampler::{Error, Roles, Table};
use lathe_ir::Tensor;
use std::cell::OnceCell;

/// Batches that methods look at.
const BATCHES: u64 = 2;
/// The number of the first, apart from those that plans are compared on.
const FIRST_BATCH: u64 = 1 << 24;

/// What the network took and gave at one step.
#[derive(Debug, Clone)]
pub struct StepRecord {
    /// The latent as the network took it.
    pub latent: Tensor,
    /// The outputs of the conditional pass and, where the step was guided, of the unconditional one.
    pub outputs: Vec<Vec<(String, Tensor)>>,
}

impl StepRecord {
    /// The numbers of an output, or of another value that was recorded, in a pass of this step.
    pub fn numbers(&self, pass: usize, name: &str) -> Result<Vec<f64>, Error> {
        let found = self.outputs.get(pass).and_then(|outputs| outputs.iter().find(|(n, _)| n == name));
        let numbers = found.and_then(|(_, tensor)| tensor.to_f64s());
        numbers.ok_or_else(|| Error::Network(format!("the denoiser gave no numbers as `{name}`")))
    }

    /// The numbers of an output in every pass of this step.
    pub fn passes(&self, name: &str) -> Result<Vec<Vec<f64>>, Error> {
        (0..self.outputs.len()).map(|pass| self.numbers(pass, name)).collect()
    }
}

/// Whatever runs the loop that computes every step.
pub trait PlainLoop {
    /// What the network took and gave at every step of a batch. `value`, one of its tensors, is then among what it gave.
    fn record(&self, table: &Table, batch: u64, value: Option<&str>) -> Result<Vec<StepRecord>, Error>;

    /// Height and width of samples.
    fn sides(&self) -> Result<[usize; 2], Error>;
}

/// One sample's latents and predictions at every step, in the coordinates of a flow.
#[derive(Debug, Clone, Default)]
pub struct Path {
    /// The latents.
    pub states: Vec<Vec<f64>>,
    /// The predictions of the conditional pass.
    pub flows: Vec<Vec<f64>>,
}

/// What happens in the plain loop.
pub struct Calibration<'a> {
    plain: &'a dyn PlainLoop,
    table: &'a Table,
    roles: &'a Roles,
    runs: [OnceCell<Vec<StepRecord>>; BATCHES as usize],
}

impl<'a> Calibration<'a> {
    /// The loop of a table, not run yet.
    pub fn new(plain: &'a dyn PlainLoop, table: &'a Table, roles: &'a Roles) -> Calibration<'a> {
        Calibration { plain, table, roles, runs: Default::default() }
    }

    /// Height and width of samples.
    pub fn sides(&self) -> Result<[usize; 2], Error> {
        self.plain.sides()
    }

    /// The numbers of the steps.
    pub(super) fn table(&self) -> &'a Table {
        self.table
    }

    /// The name of the network's latent.
    pub(super) fn latent(&self) -> &'a str {
        &self.roles.latent
    }

    /// The name of the network's prediction.
    pub(super) fn prediction(&self) -> &'a str {
        &self.roles.output
    }

    /// What happens in one batch.
    pub fn first(&self) -> Result<&[StepRecord], Error> {
        self.run(0)
    }

    /// What happens in every batch.
    pub fn runs(&self) -> Result<Vec<&[StepRecord]>, Error> {
        (0..self.runs.len()).map(|batch| self.run(batch)).collect()
    }

    fn run(&self, batch: usize) -> Result<&[StepRecord], Error> {
        if let Some(run) = self.runs[batch].get() {
            return Ok(run);
        }
        let run = self.plain.record(self.table, FIRST_BATCH + batch as u64, None)?;
        Ok(self.runs[batch].get_or_init(|| run))
    }

    /// What a tensor inside the denoiser is at every step of one batch, in the conditional pass.
    pub fn values(&self, name: &str) -> Result<Vec<Vec<f64>>, Error> {
        let run = self.plain.record(self.table, FIRST_BATCH, Some(name))?;
        run.iter().map(|step| step.numbers(0, name)).collect()
    }

    /// What every sample goes through, in the conditional pass.
    pub fn paths(&self) -> Result<Vec<Path>, Error> {
        let mut all = Vec::new();
        for run in self.runs()? {
            let samples = run.first().map_or(0, |step| step.latent.dims()[0]);
            let mut paths = vec![Path::default(); samples];
            for (step, row) in run.iter().zip(&self.table.rows) {
                let latent = step.latent.to_f64s().unwrap_or_default();
                let state: Vec<f64> = latent.iter().map(|x| x / row.input_scale).collect();
                let output = step.numbers(0, self.prediction())?;
                if output.len() != state.len() {
                    let message = "the denoiser predicts another shape than that of its latent (a variance too?), which \
                                   this method knows nothing of";
                    return Err(Error::Plan(message.to_owned()));
                }
                let [a, b] = row.flow.flow;
                let size = (state.len() / samples.max(1)).max(1);
                for ((path, x), m) in paths.iter_mut().zip(state.chunks(size)).zip(output.chunks(size)) {
                    path.flows.push(x.iter().zip(m).map(|(x, m)| a * x + b * m).collect());
                    path.states.push(x.iter().map(|x| x * row.flow.scale).collect());
                }
            }
            all.extend(paths);
        }
        Ok(all)
    }
}

/// The cosine between two vectors.
pub(super) fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}
