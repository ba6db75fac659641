//! Where the numbers of a step come from: constants, or tables that iterations of a loop read.

use super::Emitter;
use crate::sampler::{
    Clip, Error, Row,
    sizes::Border,
    sums::{Factor, Sums},
};
use lathe_ir::{ScopeId, Tensor, ValueId};

/// Where the numbers of a step come from.
pub(super) struct Numbers {
    pub input_scale: Factor,
    /// Factors of state and output in the estimate.
    pub estimate: [Factor; 2],
    /// Factors of state, output and estimate in what is kept; without clipping the estimate is resolved.
    pub kept: [Factor; 3],
    pub state: Factor,
    pub output: Factor,
    /// Whether what is kept is computed; if not, `state` and `output` hold what it would contribute.
    pub keeps: bool,
    /// Factors of what this row keeps and of what earlier ones kept.
    pub history: Vec<Factor>,
    /// How many rows ago the state lies that this row starts from, and its factor.
    pub anchor: Option<(usize, Factor)>,
    /// Noise with its factors: the fresh one, and that of the row before.
    pub noise: Vec<(ValueId, Factor)>,
    /// What happens to the state before noise is added, where the next step has another size.
    pub border: Option<Border>,
    /// What the network knows of the time.
    pub ahead: Vec<ValueId>,
    /// The state of the flow: factor of the state. Only the adaptive form asks.
    pub flow_scale: Factor,
    /// The flow: factors of state and output.
    pub flow: [Factor; 2],
}

/// The iteration of a loop that a step stands in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Iteration {
    pub scope: ScopeId,
    /// The counter; `None` in the main graph.
    pub index: Option<ValueId>,
}

impl Emitter<'_> {
    /// The numbers of a step: constants, or rows of tables where several iterations share it.
    pub(super) fn numbers(&mut self, steps: &[usize], at: Iteration) -> Result<Numbers, Error> {
        let table = self.sampler.table;
        let keeps = steps.iter().any(|&step| self.keeps(step));
        let clips = keeps && table.clip != Clip::None;
        let mut factor = |value: &dyn Fn(usize) -> f64, name: &str| {
            let values: Vec<f64> = steps.iter().map(|&step| value(step)).collect();
            match at.index {
                Some(index) if values.iter().any(|v| *v != values[0]) => {
                    let numbers: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                    let mut sums = Sums { graph: &mut self.out.graph, scope: at.scope };
                    let rows = sums.constant(Tensor::from_f32s(&[numbers.len()], &numbers), &format!("{name}.table"));
                    Factor::Value(sums.row(rows, index, name))
                }
                // Numbers are written in float32, so what is one there costs nothing.
                _ => Factor::Number(f64::from(values[0] as f32)),
            }
        };
        let row = |step: usize| &table.rows[step];
        let deepest = steps.iter().map(|&step| row(step).history.len()).max().unwrap_or(0);
        let resolved = |step: usize| {
            if keeps { (row(step).state, row(step).output) } else { (row(step).affine().0, row(step).affine().1) }
        };
        let kept = |step: usize| match clips {
            true => row(step).kept,
            false => [row(step).kept_affine()[0], row(step).kept_affine()[1], 0.0],
        };
        let adaptive = self.sampler.plan.adaptive.is_some();
        let numbers = Numbers {
            input_scale: factor(&|step| row(step).input_scale, "input_scale"),
            estimate: [0, 1].map(|k| match clips {
                true => factor(&|step| row(step).estimate[k], "estimate"),
                false => Factor::Number(0.0),
            }),
            kept: [0, 1, 2].map(|k| match keeps {
                true => factor(&|step| kept(step)[k], "kept"),
                false => Factor::Number(0.0),
            }),
            state: factor(&|step| resolved(step).0, "state"),
            output: factor(&|step| resolved(step).1, "output"),
            keeps,
            history: (0..deepest)
                .map(|k| match k == 0 && !keeps {
                    true => Factor::Number(0.0),
                    false => factor(&|step| row(step).history.get(k).copied().unwrap_or(0.0), "weight"),
                })
                .collect(),
            anchor: row(steps[0])
                .anchor
                .map(|first| (first.back, factor(&|step| row(step).anchor.map_or(0.0, |a| a.factor), "anchor"))),
            noise: Vec::new(),
            border: None,
            ahead: Vec::new(),
            flow_scale: match adaptive {
                true => factor(&|step| row(step).flow.scale, "flow_scale"),
                false => Factor::Number(0.0),
            },
            flow: [0, 1].map(|k| match adaptive {
                true => factor(&|step| row(step).flow.flow[k], "flow"),
                false => Factor::Number(0.0),
            }),
        };
        let factors = [factor(&|step| row(step).noise, "noise"), factor(&|step| row(step).noise_before, "noise")];
        let fresh = match self.noise {
            Some(noise) if steps.iter().any(|&step| row(step).noise != 0.0) => Some(self.fresh(noise, steps, at)),
            _ => None,
        };
        let before = match self.noise {
            Some(noise) if steps.iter().any(|&step| row(step).noise_before != 0.0) => {
                let earlier: Vec<usize> = steps.iter().map(|&step| step.saturating_sub(1)).collect();
                Some(self.fresh(noise, &earlier, at))
            }
            _ => None,
        };
        // Where steps have sizes, each has its own numbers.
        let (sizes, last) = (self.sampler.plan.sizes.as_ref(), table.rows.len() - 1);
        let border = sizes.and_then(|sizes| sizes.border(steps[0]));
        let next = sizes.map(|sizes| sizes.steps[(steps[0] + 1).min(last)]);
        let fresh = match fresh.map(|fresh| self.cropped(fresh, next, at.scope)) {
            Some(fresh) => match &border {
                Some(border) => Some(self.lessened(fresh, border, at.scope)?),
                None => Some(fresh),
            },
            None => None,
        };
        let ahead = (0..self.net.ahead.len()).map(|k| self.ahead(k, steps, at)).collect::<Result<_, _>>()?;
        let noise = [fresh, before].into_iter().zip(factors).filter_map(|(noise, f)| Some((noise?, f))).collect();
        Ok(Numbers { noise, border, ahead, ..numbers })
    }

    /// The noise that a step adds.
    pub(super) fn fresh(&mut self, noise: ValueId, steps: &[usize], at: Iteration) -> ValueId {
        let rows = &self.sampler.table.rows;
        let before = |step: usize| rows[..step].iter().filter(|row| row.noise != 0.0).count() as i64;
        let last = self.sampler.table.noises() as i64 - 1;
        let indices: Vec<i64> = steps.iter().map(|&step| before(step).min(last)).collect();
        let mut sums = self.sums(at.scope);
        let index = match at.index {
            Some(iteration) => {
                let indices = sums.int64s(&indices, "noise.table");
                sums.row(indices, iteration, "noise.index")
            }
            None => sums.constant(Tensor::from_i64s(&[], &indices[..1]), "noise.index"),
        };
        sums.row(noise, index, "fresh")
    }

    /// What the network knows of the time at a step.
    pub(super) fn ahead(&mut self, index: usize, steps: &[usize], at: Iteration) -> Result<ValueId, Error> {
        let tensors: Vec<Tensor> = steps.iter().map(|&step| self.times[step][index].clone()).collect();
        let first = tensors[0].clone();
        let Some(iteration) = at.index.filter(|_| tensors.iter().any(|t| !t.same_bits(&first))) else {
            return Ok(self.sums(at.scope).constant(first, "time"));
        };
        let dims: Vec<usize> = std::iter::once(tensors.len()).chain(first.dims().iter().copied()).collect();
        let bytes: Vec<u8> = tensors.iter().flat_map(|t| t.bytes().to_vec()).collect();
        let table = Tensor::new(first.dtype(), dims, bytes);
        let table =
            table.map_err(|e| Error::Network(format!("what the network knows of the time changes shape: {e}")))?;
        let mut sums = self.sums(at.scope);
        let table = sums.constant(table, "time.table");
        Ok(sums.row(table, iteration, "time"))
    }

    /// Whether what a row keeps must be computed: an estimate in it is clipped, or a later row uses it.
    pub(super) fn keeps(&self, step: usize) -> bool {
        let rows = &self.sampler.table.rows;
        let clipped = self.sampler.table.clip != Clip::None && rows[step].kept[2] != 0.0;
        let own = clipped && rows[step].history.first().is_some_and(|&b| b != 0.0);
        let later = |(back, row): (usize, &Row)| row.history.get(back + 1).is_some_and(|&b| b != 0.0);
        own || rows[step + 1..].iter().enumerate().any(later)
    }
}
