//! How far two lists of outputs are apart, and whether that keeps a claim. Pure arithmetic: nothing is run here.

mod outcome;
mod sums;

pub use outcome::{Comparison, Excuse, Fault, OutputError};

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
