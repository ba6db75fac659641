//! How far two lists of outputs are apart, and whether that keeps a claim. Pure arithmetic: nothing is run here.

use crate::{
    Datum,
    metrics::logits::{divergence, is_distribution},
};
use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};
use serde::{Deserialize, Serialize};

/// What is claimed about a candidate's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Claim {
    /// Every output keeps its bits; only the payload of a NaN may differ.
    Identical,
    /// Every float output differs by at most `rtol` in relative L2; everything else is the same.
    Equivalent {
        /// The bound; `None` takes [`default_rtol`] of each output's type.
        rtol: Option<f64>,
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
    #[serde(with = "exact")]
    pub max_abs: f64,
    /// `‖candidate − reference‖ / ‖reference‖`, of the worst sample.
    #[serde(with = "exact")]
    pub rel_l2: f64,
    /// The cosine of the angle between the two, of the worst sample.
    #[serde(with = "exact")]
    pub cosine: f64,
    /// The share of rows along the last axis whose largest element is at the same place.
    pub top1: Option<f64>,
    /// The mean over rows of the Kullback-Leibler divergence from reference to candidate, in nats, of the rows
    /// themselves where they are distributions and of their softmax otherwise.
    pub kl: Option<f64>,
    /// How many rows `top1` and `kl` are means over.
    pub rows: u64,
    /// Whether the error is what float32 rounding does to a number near 1. Where the reference is close to zero
    /// everywhere, `rel_l2` then says nothing.
    pub rounding: bool,
}

/// What a comparison came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// One entry per output, in the model's order.
    pub outputs: Vec<OutputError>,
    /// Why the claim does not hold, one sentence per reason; empty if it holds.
    pub failures: Vec<String>,
}

impl Comparison {
    /// Joins the result of further samples to this one.
    pub fn merge(&mut self, other: Comparison) {
        for error in other.outputs {
            match self.outputs.iter_mut().find(|e| e.name == error.name) {
                Some(known) => known.merge(&error),
                None => self.outputs.push(error),
            }
        }
        for failure in other.failures {
            if !self.failures.contains(&failure) {
                self.failures.push(failure);
            }
        }
    }

    /// The largest relative L2 error over the outputs, apart from those that differ by rounding only; 0 without outputs.
    pub fn worst(&self) -> f64 {
        self.outputs.iter().filter(|o| !o.rounding).map(|o| o.rel_l2).fold(0.0, f64::max)
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
        self.rounding &= other.rounding;
    }
}

/// Compares the outputs of a candidate with those of the reference.
pub fn compare(reference: &[(String, Datum)], candidate: &[(String, Datum)], claim: Claim) -> Comparison {
    let mut result = Comparison::default();
    if reference.len() != candidate.len() {
        let (expected, found) = (reference.len(), candidate.len());
        result.failures.push(format!("expected {expected} outputs, found {found}"));
        return result;
    }
    for ((name, expected), (other, found)) in reference.iter().zip(candidate) {
        if name != other {
            result.failures.push(format!("expected the output `{name}`, found `{other}`"));
            continue;
        }
        let mut error = OutputError::none(name);
        if let Err(failure) = compare_datum(expected, found, claim, &mut error) {
            result.failures.push(format!("output `{name}`: {failure}"));
        }
        result.outputs.push(error);
    }
    result
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
            rounding: false,
        }
    }

    /// As far apart as can be: nothing numeric can be said.
    fn fail(&mut self) {
        (self.max_abs, self.rel_l2, self.cosine) = (f64::INFINITY, f64::INFINITY, 0.0);
    }
}

fn compare_datum(expected: &Datum, found: &Datum, claim: Claim, error: &mut OutputError) -> Result<(), String> {
    let wrong_kind = || Err(format!("expected {}, found {}", expected.describe(), found.describe()));
    match (expected, found) {
        (Datum::Tensor(a), Datum::Tensor(b)) => compare_tensor(a, b, claim, error),
        (Datum::Sequence(a), Datum::Sequence(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                let mut inner = OutputError::none(&error.name);
                let outcome = compare_datum(a, b, claim, &mut inner);
                error.merge(&inner);
                outcome.map_err(|e| format!("member {index}: {e}"))?;
            }
            Ok(())
        }
        (Datum::Map { keys: a, values: v }, Datum::Map { keys: b, values: w }) => {
            if !a.same_bits(b) {
                error.fail();
                return Err("the keys of the map differ".to_owned());
            }
            compare_tensor(v, w, claim, error)
        }
        (Datum::None, Datum::None) => Ok(()),
        _ => {
            error.fail();
            wrong_kind()
        }
    }
}

fn compare_tensor(expected: &Tensor, found: &Tensor, claim: Claim, error: &mut OutputError) -> Result<(), String> {
    if expected.dtype() != found.dtype() || expected.dims() != found.dims() {
        error.fail();
        let show = |t: &Tensor| format!("{}{:?}", t.dtype(), t.dims());
        return Err(format!("expected {}, found {}", show(expected), show(found)));
    }
    if !expected.dtype().is_float() {
        return compare_exact(expected, found, error);
    }
    let sums = Sums::over(expected, found);
    sums.report(error);
    if let Some(at) = sums.special_at {
        error.fail();
        let (a, b) = sums.special;
        let count = sums.special_count;
        return Err(format!(
            "{count} elements are NaN or infinite in only one of the two, first {a:?} and {b:?} at {at}"
        ));
    }
    match claim {
        Claim::Identical if sums.bits_differ > 0 => {
            let (count, all, max) = (sums.bits_differ, expected.len(), error.max_abs);
            Err(format!("{count} of {all} elements have other bits, at most {max:.3e} apart"))
        }
        Claim::Identical => Ok(()),
        Claim::Equivalent { rtol } => {
            let rtol = rtol.unwrap_or_else(|| default_rtol(expected.dtype()));
            // What f32 rounding does to a number near 1 is no difference: it is all that remains where the reference
            // cancels to zero.
            error.rounding = sums.rms() <= f64::from(f32::EPSILON);
            if error.rel_l2 <= rtol || error.rounding {
                return Ok(());
            }
            Err(format!("the relative L2 error is {:.3e}, the limit {rtol:.1e}", error.rel_l2))
        }
    }
}

/// Compares whole numbers, booleans, strings and complex numbers, which must be the same.
fn compare_exact(expected: &Tensor, found: &Tensor, error: &mut OutputError) -> Result<(), String> {
    if expected.same_bits(found) {
        return Ok(());
    }
    error.fail();
    if let (Some(a), Some(b)) = (expected.string_data(), found.string_data()) {
        let differing = a.iter().zip(b).filter(|(a, b)| a != b).count();
        return Err(format!("{differing} of {} strings differ", a.len()));
    }
    let (Some(a), Some(b)) = (expected.to_f64s(), found.to_f64s()) else {
        return Err("the elements differ".to_owned());
    };
    let differing = a.iter().zip(&b).filter(|(a, b)| a != b).count();
    let mut sums = Sums::default();
    a.iter().zip(&b).for_each(|(&a, &b)| sums.add(a, b));
    sums.report(error);
    Err(format!("{differing} of {} elements differ, by at most {}", a.len(), error.max_abs))
}

/// What one pass over two float tensors finds out.
#[derive(Default)]
struct Sums {
    count: u64,
    max_abs: f64,
    difference: f64,
    reference: f64,
    candidate: f64,
    product: f64,
    bits_differ: u64,
    special_at: Option<u64>,
    special: (f64, f64),
    special_count: u64,
    rows: u64,
    agreeing: u64,
    kl: f64,
}

impl Sums {
    fn over(expected: &Tensor, found: &Tensor) -> Sums {
        let mut sums = Sums::default();
        let width = expected.dims().last().copied().unwrap_or(1);
        // Rows of one element say nothing about an order; they are taken together only to go faster.
        let (row, ranked) = if width > 1 { (width, true) } else { (4096, false) };
        let (mut a, mut b) = (Vec::with_capacity(row), Vec::with_capacity(row));
        let step = expected.dtype().bits() / 8;
        if !matches!(expected.dtype(), DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16) {
            let all = |t: &Tensor| t.to_f64s().unwrap_or_default();
            sums.row(&all(expected), &all(found), false);
            return sums;
        }
        let pieces = expected.bytes().chunks(row * step).zip(found.bytes().chunks(row * step));
        for (left, right) in pieces {
            decode(expected.dtype(), left, &mut a);
            decode(expected.dtype(), right, &mut b);
            sums.row(&a, &b, ranked);
        }
        sums
    }

    fn row(&mut self, a: &[f64], b: &[f64], ranked: bool) {
        let before = self.special_count;
        a.iter().zip(b).for_each(|(&a, &b)| self.add(a, b));
        let finite = |row: &[f64]| row.iter().all(|x| x.is_finite());
        if ranked && self.special_count == before && finite(a) {
            self.rows += 1;
            self.agreeing += u64::from(largest(a) == largest(b));
            self.kl += divergence(a, b, is_distribution(a) && is_distribution(b));
        }
    }

    fn add(&mut self, a: f64, b: f64) {
        let at = self.count;
        self.count += 1;
        // Every narrower float widens without loss, so equal bits here are equal bits there.
        self.bits_differ += u64::from(a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan()));
        if !a.is_finite() || !b.is_finite() {
            if !(a == b || (a.is_nan() && b.is_nan())) {
                self.special_count += 1;
                if self.special_at.is_none() {
                    self.special_at = Some(at);
                    self.special = (a, b);
                }
            }
            return;
        }
        self.max_abs = self.max_abs.max((b - a).abs());
        self.difference += (b - a) * (b - a);
        self.reference += a * a;
        self.candidate += b * b;
        self.product += a * b;
    }

    /// The root mean square of the difference.
    fn rms(&self) -> f64 {
        if self.count == 0 { 0.0 } else { (self.difference / self.count as f64).sqrt() }
    }

    fn report(&self, error: &mut OutputError) {
        error.max_abs = self.max_abs;
        error.rel_l2 = match (self.difference, self.reference) {
            (0.0, _) => 0.0,
            (_, 0.0) => f64::INFINITY,
            (difference, reference) => (difference / reference).sqrt(),
        };
        let scale = (self.reference * self.candidate).sqrt();
        error.cosine = if self.difference == 0.0 { 1.0 } else { if scale > 0.0 { self.product / scale } else { 0.0 } };
        if self.rows > 0 {
            error.rows = self.rows;
            error.top1 = Some(self.agreeing as f64 / self.rows as f64);
            error.kl = Some(self.kl / self.rows as f64);
        }
    }
}

/// Widens packed elements into `out`.
pub(crate) fn decode(dtype: DataType, bytes: &[u8], out: &mut Vec<f64>) {
    out.clear();
    match dtype {
        DataType::Float => out.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f64::from(f32::from_le_bytes(b)))),
        DataType::Double => out.extend(bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b))),
        DataType::Float16 => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(f16::from_le_bytes(b)))),
        _ => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b)))),
    }
}

/// The first index of the largest element.
pub(crate) fn largest(row: &[f64]) -> usize {
    let mut best = 0;
    for (index, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = index;
        }
    }
    best
}

/// Floats in JSON, with the ones JSON has no number for written as text.
pub(crate) mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.serialize_str(&value.to_string()) }
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(f64),
        Text(String),
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        match Either::deserialize(deserializer)? {
            Either::Number(value) => Ok(value),
            Either::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }

    /// Lists of lists of them.
    pub(crate) mod lists {
        use serde::{Deserialize, Deserializer, Serialize, Serializer};

        #[derive(Serialize, Deserialize)]
        struct One(#[serde(with = "super")] f64);

        pub(crate) fn serialize<S: Serializer>(lists: &[Vec<f64>], serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(lists.iter().map(|list| list.iter().map(|&x| One(x)).collect::<Vec<_>>()))
        }

        pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<f64>>, D::Error> {
            let lists: Vec<Vec<One>> = Deserialize::deserialize(deserializer)?;
            Ok(lists.into_iter().map(|list| list.into_iter().map(|One(x)| x).collect()).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, tensor: Tensor) -> Vec<(String, Datum)> {
        vec![(name.to_owned(), tensor.into())]
    }

    fn floats(values: &[f32]) -> Vec<(String, Datum)> {
        one("y", Tensor::from_f32s(&[values.len()], values))
    }

    const EQUIVALENT: Claim = Claim::Equivalent { rtol: None };

    #[test]
    fn negative_zero_breaks_identity_only() {
        let (a, b) = (floats(&[0.0, 1.0]), floats(&[-0.0, 1.0]));
        assert_eq!(compare(&a, &b, Claim::Identical).failures.len(), 1);
        assert!(compare(&a, &b, EQUIVALENT).failures.is_empty());
    }

    #[test]
    fn any_nan_is_like_any_other() {
        let (a, b) = (floats(&[f32::NAN, 1.0]), floats(&[-f32::NAN, 1.0]));
        assert!(compare(&a, &b, Claim::Identical).failures.is_empty());
    }

    #[test]
    fn an_infinity_must_stay_where_it_is() {
        let (a, b) = (floats(&[f32::INFINITY, 1.0]), floats(&[f32::MAX, 1.0]));
        let result = compare(&a, &b, EQUIVALENT);
        assert_eq!(
            result.failures,
            [
                "output `y`: 1 elements are NaN or infinite in only one of the two, first inf and 3.4028234663852886e38 at 0"
            ]
        );
        assert_eq!(result.outputs[0].max_abs, f64::INFINITY);
        assert!(compare(&a, &a, Claim::Identical).failures.is_empty());
    }

    #[test]
    fn relative_error_is_measured_over_the_whole_output() {
        let result = compare(&floats(&[3.0, 4.0]), &floats(&[3.0, 4.5]), EQUIVALENT);
        let error = &result.outputs[0];
        assert!((error.rel_l2 - 0.1).abs() < 1e-12 && (error.max_abs - 0.5).abs() < 1e-12);
        assert_eq!(error.top1, Some(1.0));
        assert_eq!(result.failures, ["output `y`: the relative L2 error is 1.000e-1, the limit 1.0e-4"]);
        let loose = Claim::Equivalent { rtol: Some(0.2) };
        assert!(compare(&floats(&[3.0, 4.0]), &floats(&[3.0, 4.5]), loose).failures.is_empty());
    }

    #[test]
    fn whole_numbers_and_strings_are_exact_under_any_claim() {
        let (a, b) = (one("y", Tensor::int64s(&[1, 2])), one("y", Tensor::int64s(&[1, 3])));
        assert_eq!(compare(&a, &b, EQUIVALENT).failures, ["output `y`: 1 of 2 elements differ, by at most 1"]);
        let text = |s: &'static str| one("y", Tensor::strings(vec![1], vec![s.into()]).unwrap());
        assert_eq!(compare(&text("a"), &text("b"), EQUIVALENT).failures, ["output `y`: 1 of 1 strings differ"]);
    }

    #[test]
    fn sequences_are_compared_member_by_member() {
        let sequence = |v: f32| {
            let members = vec![Tensor::from_f32s(&[1], &[1.0]).into(), Tensor::from_f32s(&[1], &[v]).into()];
            vec![("y".to_owned(), Datum::Sequence(members))]
        };
        assert!(compare(&sequence(2.0), &sequence(2.0), Claim::Identical).failures.is_empty());
        let failures = compare(&sequence(2.0), &sequence(3.0), Claim::Identical).failures;
        assert_eq!(failures, ["output `y`: member 1: 1 of 1 elements have other bits, at most 1.000e0 apart"]);
    }

    #[test]
    fn shapes_and_names_must_agree() {
        let (a, b) = (floats(&[1.0]), floats(&[1.0, 2.0]));
        assert_eq!(compare(&a, &b, EQUIVALENT).failures, ["output `y`: expected float[1], found float[2]"]);
        let renamed = one("z", Tensor::from_f32s(&[1], &[1.0]));
        assert_eq!(compare(&a, &renamed, EQUIVALENT).failures, ["expected the output `y`, found `z`"]);
    }

    #[test]
    fn rounding_around_zero_is_no_difference() {
        assert!(compare(&floats(&[0.0, 0.0]), &floats(&[0.0, 6e-8]), EQUIVALENT).failures.is_empty());
    }

    #[test]
    fn infinite_errors_survive_json() {
        let result = compare(&floats(&[f32::INFINITY]), &floats(&[1.0]), EQUIVALENT);
        let text = serde_json::to_string(&result).unwrap();
        assert_eq!(serde_json::from_str::<Comparison>(&text).unwrap(), result);
    }

    #[test]
    fn samples_are_joined_by_the_worst_of_each() {
        let mut all = compare(&floats(&[1.0, 2.0]), &floats(&[1.0, 2.0]), EQUIVALENT);
        all.merge(compare(&floats(&[1.0, 2.0]), &floats(&[2.0, 1.0]), EQUIVALENT));
        assert_eq!((all.outputs[0].top1, all.outputs[0].max_abs, all.outputs[0].rows), (Some(0.5), 1.0, 2));
        assert_eq!(all.failures.len(), 1);
    }
}
