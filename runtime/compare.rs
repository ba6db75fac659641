//! How far two lists of outputs are apart, and whether that keeps a claim. Pure arithmetic: nothing is run here.

mod sums;

use self::sums::Sums;
use crate::Datum;
use lathe_ir::{DataType, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is claimed about a candidate's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Claim {
    /// Every output keeps its bits; only the payload of a NaN may differ.
    Identical,
    /// Every float output differs by at most `rtol` in relative L2, or by what an [`Excuse`] accounts for; everything else
    /// is the same.
    Equivalent {
        /// The bound; `None` takes [`default_rtol`] of each output's type.
        rtol: Option<f64>,
    },
    /// Every float output differs by at most `rtol` in relative L2, whatever rounding does in the reference: a bound that
    /// somebody asked for. Everything else is the same.
    Within {
        /// The bound.
        rtol: f64,
    },
}

impl From<Option<f32>> for Claim {
    /// A bound is a claim of equivalence, no bound one of identity.
    fn from(rtol: Option<f32>) -> Claim {
        rtol.map_or(Claim::Identical, |rtol| Claim::Equivalent { rtol: Some(rtol.into()) })
    }
}

/// The bound on the relative L2 error of an exact rewrite, by the output's element type.
///
/// A chain of a hundred re-associated f32 operations stays well below 1e-4; f16 and bf16 round at 5e-4 and 4e-3, so
/// their bounds leave room for a few roundings.
pub fn default_rtol(dtype: DataType) -> f64 {
    match dtype {
        DataType::Double => 1e-6,
        DataType::Float16 => 2e-3,
        DataType::Bfloat16 => 2e-2,
        _ => 1e-4,
    }
}

/// How far one output of the candidate is from the reference's, over all samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    /// The output.
    pub name: String,
    /// The largest difference of two elements; infinite where one is a number and the other is not.
    #[serde(with = "crate::json_float")]
    pub max_abs: f64,
    /// `‖candidate − reference‖ / ‖reference‖`, of the worst sample.
    #[serde(with = "crate::json_float")]
    pub rel_l2: f64,
    /// The cosine of the angle between the two, of the worst sample.
    #[serde(with = "crate::json_float")]
    pub cosine: f64,
    /// The share of rows along the last axis whose largest element is at the same place.
    pub top1: Option<f64>,
    /// The mean over rows of the Kullback-Leibler divergence from reference to candidate, in nats, of the rows
    /// themselves where they are distributions and of their softmax otherwise.
    pub kl: Option<f64>,
    /// How many rows `top1` and `kl` are means over.
    pub rows: u64,
    /// The bound on `rel_l2` that the output was held to; `None` where everything has to be the same.
    pub limit: Option<f64>,
    /// What accounts for an error beyond the bound.
    pub excuse: Option<Excuse>,
    /// Why only type and shape were compared, and not the values.
    pub uncompared: Option<String>,
}

/// What was measured on the reference and accounts for an error beyond the bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Excuse {
    /// The output is as small as the rounding errors of what it is computed from. `error` is the root mean square of
    /// the difference, `noise` that of what changes in the reference when every operand of its arithmetic moves by at
    /// most one unit in the last place; `error` is at most [`Excuse::NOISES`] times `noise`.
    Rounding {
        /// The root mean square of the difference.
        error: f64,
        /// The root mean square of the change that moved operands make.
        noise: f64,
    },
    /// Half precision is rounded in other places: relative to the reference computed in float32, `candidate` is the L2
    /// error of the candidate and `reference` that of the reference; `candidate` is at most [`Excuse::HALVES`] times
    /// `reference`.
    HalfPrecision {
        /// The candidate's relative L2 error.
        candidate: f64,
        /// The reference's relative L2 error.
        reference: f64,
    },
}

impl Excuse {
    /// How many times the noise a difference may be: two summation orders of the same terms differ by a few times what
    /// one rounding of every term changes.
    pub const NOISES: f64 = 8.0;

    /// How many times as far from float32 as the reference a candidate in half precision may be.
    pub const HALVES: f64 = 2.0;

    /// One sentence without a subject.
    pub fn describe(&self) -> String {
        match self {
            Excuse::Rounding { error, noise } => format!(
                "differs by {error:.1e} (root mean square), and rounding inside the original moves it by {noise:.1e} \
                 (at most {} times that is allowed)",
                Excuse::NOISES
            ),
            Excuse::HalfPrecision { candidate, reference } => format!(
                "is {candidate:.1e} (relative L2) from the original computed in float32, and the original in half \
                 precision is {reference:.1e} from it (at most {} times that is allowed)",
                Excuse::HALVES
            ),
        }
    }

    /// Used up of what is allowed: 1 is all of it.
    fn share(&self) -> f64 {
        match *self {
            Excuse::Rounding { error, noise } => error / (Excuse::NOISES * noise),
            Excuse::HalfPrecision { candidate, reference } => candidate / (Excuse::HALVES * reference),
        }
    }
}

/// Why a claim does not hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum Fault {
    /// There are more or fewer outputs.
    #[error("expected {expected} outputs, found {found}")]
    Count {
        /// The reference's.
        expected: usize,
        /// The candidate's.
        found: usize,
    },
    /// An output has another name.
    #[error("expected the output `{expected}`, found `{found}`")]
    Name {
        /// The reference's.
        expected: String,
        /// The candidate's.
        found: String,
    },
    /// An output has another type or shape, or elements that have to be the same are not.
    #[error("output `{output}`: {message}")]
    Differs {
        /// The output.
        output: String,
        /// What differs.
        message: String,
    },
    /// The numbers of an output are further apart than the bound.
    #[error("output `{output}`: the relative L2 error is {error:.3e}, the limit {limit:.1e}")]
    TooFar {
        /// The output.
        output: String,
        /// The relative L2 error.
        #[serde(with = "crate::json_float")]
        error: f64,
        /// The bound.
        limit: f64,
    },
}

/// What a comparison came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// One entry per output, in the model's order.
    pub outputs: Vec<OutputError>,
    /// Why the claim does not hold; empty if it holds.
    pub faults: Vec<Fault>,
}

impl Comparison {
    /// Whether the claim holds.
    pub fn holds(&self) -> bool {
        self.faults.is_empty()
    }

    /// Joins the result of further samples to this one.
    pub fn merge(&mut self, other: Comparison) {
        for error in other.outputs {
            match self.outputs.iter_mut().find(|e| e.name == error.name) {
                Some(known) => known.merge(&error),
                None => self.outputs.push(error),
            }
        }
        for fault in other.faults {
            self.add(fault);
        }
    }

    /// Keeps a fault. Of an output that is too far from the reference on several samples the largest error is told.
    fn add(&mut self, fault: Fault) {
        if let Fault::TooFar { output: name, error: found, .. } = &fault
            && let Some(Fault::TooFar { error, .. }) =
                self.faults.iter_mut().find(|f| matches!(f, Fault::TooFar { output, .. } if output == name))
        {
            *error = error.max(*found);
        } else if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    /// The output whose relative L2 error is largest beside its bound; `None` where no values were compared.
    pub fn worst(&self) -> Option<&OutputError> {
        let share = |output: &OutputError| match (output.rel_l2, output.limit) {
            (error, Some(limit)) if limit > 0.0 => error / limit,
            (error, _) => error,
        };
        let compared = self.outputs.iter().filter(|o| o.uncompared.is_none());
        compared.reduce(|worst, next| if share(next) > share(worst) { next } else { worst })
    }

    /// The outputs that are beyond their bound and nothing else.
    pub(crate) fn too_far(&self) -> Vec<String> {
        let name = |fault: &Fault| match fault {
            Fault::TooFar { output, .. } => Some(output.clone()),
            _ => None,
        };
        self.faults.iter().filter_map(name).collect()
    }

    /// The outputs that differ in any way.
    pub(crate) fn faulty(&self) -> impl Iterator<Item = &str> {
        self.faults.iter().filter_map(|fault| match fault {
            Fault::Differs { output, .. } | Fault::TooFar { output, .. } => Some(output.as_str()),
            Fault::Count { .. } | Fault::Name { .. } => None,
        })
    }

    /// Lets an output beyond its bound pass, and keeps the reason.
    pub(crate) fn excuse(&mut self, name: &str, excuse: Excuse) {
        self.faults.retain(|fault| !matches!(fault, Fault::TooFar { output, .. } if output == name));
        for output in self.outputs.iter_mut().filter(|o| o.name == name) {
            output.excuse = Some(excuse);
        }
    }

    /// The faults in one line.
    pub fn describe_faults(&self) -> String {
        self.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }
}

impl OutputError {
    fn merge(&mut self, other: &OutputError) {
        let mean = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => {
                let (n, m) = (self.rows as f64, other.rows as f64);
                Some(if n + m > 0.0 { (a * n + b * m) / (n + m) } else { a })
            }
            (a, b) => a.or(b),
        };
        let (top1, kl) = (mean(self.top1, other.top1), mean(self.kl, other.kl));
        self.max_abs = self.max_abs.max(other.max_abs);
        self.rel_l2 = self.rel_l2.max(other.rel_l2);
        self.cosine = self.cosine.min(other.cosine);
        self.top1 = top1;
        self.kl = kl;
        self.rows += other.rows;
        self.limit = self.limit.or(other.limit);
        let excuses = self.excuse.into_iter().chain(other.excuse);
        self.excuse = excuses.reduce(|a, b| if b.share() > a.share() { b } else { a });
        if self.uncompared.is_none() {
            self.uncompared.clone_from(&other.uncompared);
        }
    }
}

/// What two runs of the reference say about one of its outputs, where they differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unsteady {
    /// Why values are not compared, for people.
    pub reason: String,
    /// Whether even the shape differs from run to run.
    pub shape: bool,
}

/// Outputs whose values are not compared, by their names.
pub(crate) type Unsteadies = BTreeMap<String, Unsteady>;

/// Compares the outputs of a candidate with those of the reference.
pub fn compare(reference: &[(String, Datum)], candidate: &[(String, Datum)], claim: Claim) -> Comparison {
    compare_steady(reference, candidate, claim, &Unsteadies::new())
}

/// Compares outputs; of those that are `unsteady` only type and shape.
pub(crate) fn compare_steady(
    reference: &[(String, Datum)],
    candidate: &[(String, Datum)],
    claim: Claim,
    unsteady: &Unsteadies,
) -> Comparison {
    let mut result = Comparison::default();
    if reference.len() != candidate.len() {
        result.faults.push(Fault::Count { expected: reference.len(), found: candidate.len() });
        return result;
    }
    for ((name, expected), (other, found)) in reference.iter().zip(candidate) {
        if name != other {
            result.faults.push(Fault::Name { expected: name.clone(), found: other.clone() });
            continue;
        }
        let mut error = OutputError::none(name);
        let unsteady = unsteady.get(name);
        let outcome = match unsteady {
            Some(unsteady) => same_form(expected, found, unsteady.shape),
            None => compare_datum(expected, found, claim, &mut error),
        };
        if let Some(unsteady) = unsteady {
            error.uncompared = Some(unsteady.reason.clone());
        }
        if let Err(mismatch) = outcome {
            if unsteady.is_some() {
                error.fail();
            }
            let output = name.clone();
            result.faults.push(match mismatch {
                Mismatch::Differs(message) => Fault::Differs { output, message },
                Mismatch::TooFar { error, limit } => Fault::TooFar { output, error, limit },
            });
        }
        result.outputs.push(error);
    }
    result
}

/// How one output differs.
enum Mismatch {
    /// In a way that no bound allows.
    Differs(String),
    /// By more than the bound.
    TooFar { error: f64, limit: f64 },
}

impl From<String> for Mismatch {
    fn from(message: String) -> Mismatch {
        Mismatch::Differs(message)
    }
}

impl Mismatch {
    fn in_member(self, index: usize) -> Mismatch {
        Mismatch::Differs(match self {
            Mismatch::Differs(message) => format!("member {index}: {message}"),
            Mismatch::TooFar { error, limit } => {
                format!("member {index}: the relative L2 error is {error:.3e}, the limit {limit:.1e}")
            }
        })
    }
}

impl OutputError {
    fn none(name: &str) -> OutputError {
        OutputError {
            name: name.to_owned(),
            max_abs: 0.0,
            rel_l2: 0.0,
            cosine: 1.0,
            top1: None,
            kl: None,
            rows: 0,
            limit: None,
            excuse: None,
            uncompared: None,
        }
    }

    /// As far apart as can be: nothing numeric can be said.
    fn fail(&mut self) {
        (self.max_abs, self.rel_l2, self.cosine) = (f64::INFINITY, f64::INFINITY, 0.0);
    }
}

/// Compares types, and shapes unless they are random too.
fn same_form(expected: &Datum, found: &Datum, any_shape: bool) -> Result<(), Mismatch> {
    let same = match (expected, found) {
        (Datum::Tensor(a), Datum::Tensor(b)) => {
            let sizes = if any_shape { a.dims().len() == b.dims().len() } else { a.dims() == b.dims() };
            a.dtype() == b.dtype() && sizes
        }
        (Datum::Sequence(a), Datum::Sequence(b)) => any_shape || a.len() == b.len(),
        (Datum::Map { keys: a, values: v }, Datum::Map { keys: b, values: w }) => {
            a.dtype() == b.dtype() && v.dtype() == w.dtype()
        }
        (Datum::None, Datum::None) => true,
        _ => false,
    };
    if same { Ok(()) } else { Err(format!("expected {}, found {}", expected.describe(), found.describe()).into()) }
}

fn compare_datum(expected: &Datum, found: &Datum, claim: Claim, error: &mut OutputError) -> Result<(), Mismatch> {
    match (expected, found) {
        (Datum::Tensor(a), Datum::Tensor(b)) => compare_tensor(a, b, claim, error),
        (Datum::Sequence(a), Datum::Sequence(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                let mut inner = OutputError::none(&error.name);
                let outcome = compare_datum(a, b, claim, &mut inner);
                error.merge(&inner);
                outcome.map_err(|mismatch| mismatch.in_member(index))?;
            }
            Ok(())
        }
        (Datum::Map { keys: a, values: v }, Datum::Map { keys: b, values: w }) => {
            if !a.same_bits(b) {
                error.fail();
                return Err("the keys of the map differ".to_owned().into());
            }
            compare_tensor(v, w, claim, error)
        }
        (Datum::None, Datum::None) => Ok(()),
        _ => {
            error.fail();
            same_form(expected, found, false)
        }
    }
}

fn compare_tensor(expected: &Tensor, found: &Tensor, claim: Claim, error: &mut OutputError) -> Result<(), Mismatch> {
    if expected.dtype() != found.dtype() || expected.dims() != found.dims() {
        error.fail();
        let show = |t: &Tensor| format!("{}{:?}", t.dtype(), t.dims());
        return Err(format!("expected {}, found {}", show(expected), show(found)).into());
    }
    if !expected.dtype().is_float() {
        return compare_exact(expected, found, error);
    }
    let sums = Sums::over(expected, found);
    sums.report(error);
    error.limit = match claim {
        Claim::Identical => None,
        Claim::Equivalent { rtol } => Some(rtol.unwrap_or_else(|| default_rtol(expected.dtype()))),
        Claim::Within { rtol } => Some(rtol),
    };
    if let Some(at) = sums.special_at {
        error.fail();
        let (a, b) = sums.special;
        let count = sums.special_count;
        return Err(format!(
            "{count} elements are NaN or infinite in only one of the two, first {a:?} and {b:?} at {at}"
        )
        .into());
    }
    match error.limit {
        None if sums.bits_differ > 0 => {
            let (count, all, max) = (sums.bits_differ, expected.len(), error.max_abs);
            Err(format!("{count} of {all} elements have other bits, at most {max:.3e} apart").into())
        }
        Some(limit) if error.rel_l2 > limit || error.rel_l2.is_nan() => {
            Err(Mismatch::TooFar { error: error.rel_l2, limit })
        }
        _ => Ok(()),
    }
}

/// Compares whole numbers, booleans, strings and complex numbers, which must be the same.
fn compare_exact(expected: &Tensor, found: &Tensor, error: &mut OutputError) -> Result<(), Mismatch> {
    if expected.same_bits(found) {
        return Ok(());
    }
    error.fail();
    if let (Some(a), Some(b)) = (expected.string_data(), found.string_data()) {
        let differing = a.iter().zip(b).filter(|(a, b)| a != b).count();
        return Err(format!("{differing} of {} strings differ", a.len()).into());
    }
    let (Some(a), Some(b)) = (expected.to_f64s(), found.to_f64s()) else {
        return Err("the elements differ".to_owned().into());
    };
    let sums = Sums::of(&a, &b);
    sums.report(error);
    // Large whole numbers are told apart by their own digits: widened to float64, neighbours may be equal.
    let differing = match (expected.to_i64s(), found.to_i64s()) {
        (Some(a), Some(b)) => {
            let distances = || a.iter().zip(&b).map(|(a, b)| a.abs_diff(*b)).filter(|&distance| distance > 0);
            error.max_abs = error.max_abs.max(distances().max().unwrap_or(0) as f64);
            distances().count()
        }
        _ => a.iter().zip(&b).filter(|(a, b)| a != b).count(),
    };
    Err(format!("{differing} of {} elements differ, by at most {}", a.len(), error.max_abs).into())
}

#[cfg(test)]
mod tests;
