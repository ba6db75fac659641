//! In which order units go: by what the model loses, or by how little they turn the stream.

use super::{candidates::RemovableUnit, surgery::gate};
use crate::Quantity;
use lathe_analysis::{Calibrate, Rows, UnitKind};
use lathe_ir::{Model, ValueId};

/// Candidates that are tried at a time; each time a model is loaded.
const BATCH: usize = 6;

/// A loss beyond which nothing more goes where no number of units is asked for.
const LARGEST_LOSS: f64 = 1.0;

/// How units are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Score {
    /// The distance of the outputs without the unit and all that went before it.
    Loss,
    /// One minus the mean cosine between the stream before and after it, of the whole model.
    Cosine,
}

impl std::str::FromStr for Score {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "loss" => Ok(Score::Loss),
            "cosine" => Ok(Score::Cosine),
            _ => Err(()),
        }
    }
}

/// How many units are to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub any: usize,
    pub attention: usize,
    pub mlp: usize,
}

impl Counts {
    pub fn total(&self) -> usize {
        self.any + self.attention + self.mlp
    }

    /// Takes one off for a unit of this kind; `false` if none of it is to go any more.
    fn take(&mut self, kind: UnitKind) -> bool {
        let own = match kind {
            UnitKind::Attention | UnitKind::CrossAttention => Some(&mut self.attention),
            UnitKind::Mlp => Some(&mut self.mlp),
            _ => None,
        };
        let own = own.filter(|left| **left > 0);
        let left = match own {
            Some(left) => left,
            None => &mut self.any,
        };
        let open = *left > 0;
        *left = left.saturating_sub(1);
        open
    }
}

/// A unit that goes after all before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    pub candidate: usize,
    /// The distance of the outputs without all of them so far.
    pub loss: f64,
}

/// The candidates behind numbers that are inputs.
pub(super) struct Gated<'a> {
    model: Model,
    /// For every candidate the inputs that leave it out.
    names: Vec<Vec<String>>,
    calibration: &'a dyn Calibrate,
}

impl<'a> Gated<'a> {
    /// Where a unit has a normalization that can go or stay, the better of both is kept in its `gone`.
    pub fn new(
        model: &Model,
        candidates: &mut [RemovableUnit],
        calibration: &'a dyn Calibrate,
    ) -> Result<Gated<'a>, crate::Error> {
        let mut gated = model.clone();
        let mut names = Vec::new();
        let mut norms = Vec::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let inner = gate(&mut gated, &candidate.gone, &format!("unit_{index}"));
            names.push(vec![inner.expect("candidates can be left out")]);
            let norm = candidate.norm.map(|sum| gate(&mut gated, &[sum], &format!("norm_{index}")));
            norms.push(norm.map(|name| name.expect("a normalization has one output")));
        }
        let mut gated = Gated { model: gated, names, calibration };
        // Every input needs a number; those of normalizations that stay have 1 for good.
        let both: Vec<usize> = (0..candidates.len()).filter(|&i| norms[i].is_some()).collect();
        gated.names.extend(norms.iter().flatten().map(|name| vec![name.clone()]));
        let count = candidates.len();
        let place = |index: usize| count + both.iter().position(|&i| i == index).expect("it is one of them");
        let pairs: Vec<Vec<usize>> = both.iter().flat_map(|&i| [vec![i], vec![i, place(i)]]).collect();
        let losses = gated.losses(&pairs)?;
        let mut with = Vec::new();
        for (&index, loss) in both.iter().zip(losses.chunks(2)) {
            if loss[1] < loss[0] {
                with.push(index);
            }
        }
        for index in with {
            let extra = gated.names[place(index)].clone();
            gated.names[index].extend(extra);
            let candidate = &mut candidates[index];
            candidate.gone.extend(candidate.norm);
        }
        Ok(gated)
    }

    /// The distance of the outputs without each of these sets of candidates.
    fn losses(&self, sets: &[Vec<usize>]) -> Result<Vec<f64>, crate::Error> {
        if sets.is_empty() {
            return Ok(Vec::new());
        }
        let gates = |set: &Vec<usize>| -> Vec<(String, f32)> {
            let closed: Vec<&String> = set.iter().flat_map(|&i| &self.names[i]).collect();
            let mut all: Vec<String> = self.names.iter().flatten().cloned().collect();
            all.sort();
            all.dedup();
            all.into_iter().map(|name| (name.clone(), if closed.contains(&&name) { 0.0 } else { 1.0 })).collect()
        };
        let gates: Vec<Vec<(String, f32)>> = sets.iter().map(gates).collect();
        Ok(self.calibration.trials(&self.model, &gates)?)
    }

    /// Removes the candidate again and again that costs least, until `counts` are met; without them until the loss is
    /// large or half of the candidates are gone, and by loss for what `quantities` save.
    ///
    /// A candidate is tried anew only where what was last found for it, among the units gone by then, is no worse than
    /// what the best one costs now: units rarely cost less where others are gone.
    pub fn greedy(
        &self,
        candidates: &[RemovableUnit],
        counts: Option<&Counts>,
        quantities: &[Quantity],
    ) -> Result<Vec<Step>, crate::Error> {
        let saving: Vec<f64> =
            candidates.iter().map(|c| if counts.is_some() { 1.0 } else { saving(c, quantities) }).collect();
        let wanted = |&i: &usize| counts.is_none_or(|c| c.clone().take(candidates[i].kind));
        let single: Vec<usize> = (0..candidates.len()).filter(wanted).collect();
        let sets: Vec<Vec<usize>> = single.iter().map(|&i| vec![i]).collect();
        let mut known = vec![f64::INFINITY; candidates.len()];
        for (&i, loss) in single.iter().zip(self.losses(&sets)?) {
            known[i] = loss;
        }
        let mut fresh = true;
        let mut left = counts.cloned();
        let most = counts.map_or(candidates.len().div_ceil(2), Counts::total);
        let (mut steps, mut current): (Vec<Step>, f64) = (Vec::new(), 0.0);
        while steps.len() < most {
            let gone: Vec<usize> = steps.iter().map(|s| s.candidate).collect();
            let price = |i: usize, rise: f64| rise / saving[i];
            let may = |&i: &usize| !gone.contains(&i) && left.clone().is_none_or(|mut l| l.take(candidates[i].kind));
            let mut open: Vec<usize> = (0..candidates.len()).filter(may).collect();
            open.sort_by(|&a, &b| price(a, known[a]).total_cmp(&price(b, known[b])));
            let mut best: Option<(usize, f64)> = fresh.then(|| open.first().map(|&i| (i, known[i]))).flatten();
            for batch in open.chunks(BATCH) {
                if best.is_some_and(|(i, rise)| fresh || price(i, rise) <= price(batch[0], known[batch[0]])) {
                    break;
                }
                let sets: Vec<Vec<usize>> = batch.iter().map(|&i| [gone.as_slice(), &[i]].concat()).collect();
                for (&i, loss) in batch.iter().zip(self.losses(&sets)?) {
                    known[i] = loss - current;
                    if best.is_none_or(|(b, rise)| price(i, known[i]) < price(b, rise)) {
                        best = Some((i, known[i]));
                    }
                }
            }
            let Some((candidate, rise)) = best else { break };
            if !(rise.is_finite() && (counts.is_some() || current + rise <= LARGEST_LOSS)) {
                break;
            }
            current += rise;
            if let Some(left) = &mut left {
                left.take(candidates[candidate].kind);
            }
            steps.push(Step { candidate, loss: current.max(0.0) });
            fresh = false;
        }
        Ok(steps)
    }

    /// The candidates that turn the stream least, all chosen at once.
    pub fn by_cosine(
        &self,
        candidates: &[RemovableUnit],
        counts: Option<&Counts>,
        rows: &dyn Fn(ValueId) -> Rows,
    ) -> Result<Vec<Step>, crate::Error> {
        let pairs: Vec<(Rows, Rows)> = candidates.iter().map(|c| (rows(c.stream.0), rows(c.stream.1))).collect();
        let cosines = self.calibration.cosines(&pairs)?;
        let mut order: Vec<usize> = (0..candidates.len()).collect();
        order.sort_by(|&a, &b| cosines[b].total_cmp(&cosines[a]));
        let mut left = counts.cloned();
        order.retain(|&i| left.as_mut().is_none_or(|l| l.take(candidates[i].kind)));
        order.truncate(counts.map_or(candidates.len().div_ceil(2), Counts::total));
        let sets: Vec<Vec<usize>> = (1..=order.len()).map(|count| order[..count].to_vec()).collect();
        let losses = self.losses(&sets)?;
        Ok(order.into_iter().zip(losses).map(|(candidate, loss)| Step { candidate, loss }).collect())
    }
}

/// What leaving a candidate out saves of what is limited; the operations where nothing is.
fn saving(candidate: &RemovableUnit, quantities: &[Quantity]) -> f64 {
    let of = |measure: &Quantity| match measure {
        Quantity::Size => candidate.bytes,
        Quantity::Parameters => candidate.parameters,
        // How long a unit takes grows with what it computes, as far as can be told without running it.
        Quantity::Flops | Quantity::Latency => candidate.flops,
    };
    quantities.first().map_or(candidate.flops, of).max(1) as f64
}
