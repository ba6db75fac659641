//! How large values get, and what stays in float32 for it.

use super::survey::Survey;
use lathe_ir::{DataType, NodeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// How large the numbers of a value get.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Magnitude {
    /// The largest of all that are finite.
    pub largest: f64,
    /// The smallest, where it was asked for.
    pub smallest: Option<f64>,
}

/// How large values get where the model was run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Magnitudes(BTreeMap<ValueId, Magnitude>);

impl FromIterator<(ValueId, Magnitude)> for Magnitudes {
    fn from_iter<I: IntoIterator<Item = (ValueId, Magnitude)>>(found: I) -> Magnitudes {
        Magnitudes(found.into_iter().collect())
    }
}

impl Magnitudes {
    /// Of one value; `None` where it was not measured.
    pub fn of(&self, value: ValueId) -> Option<Magnitude> {
        self.0.get(&value).copied()
    }
}

/// Numbers below this are not divided by, and have no logarithm, in float16.
const LEAST: f64 = 1e-3;

/// Values that stay below this lose digits in float16: its step there is 2⁻²⁴.
const TINY: f64 = 1.0 / 8192.0;

/// A sum that is so many times larger than one of its terms has no use for the digits that the term loses.
const LARGER: f64 = 1024.0;

/// Keeps nodes whose inputs or outputs come near the end of float16's range.
pub(super) fn keep(survey: &mut Survey) {
    if survey.precision.dtype != DataType::Float16 {
        return;
    }
    for id in survey.candidates() {
        let reason = out_of_range(survey, id).or_else(|| sums_too_large(survey, id)).or_else(|| too_small(survey, id));
        if let Some(reason) = reason {
            survey.keep(id, reason);
        }
    }
}

fn out_of_range(survey: &Survey, id: NodeId) -> Option<String> {
    let (node, ports) = (survey.graph.node(id), survey.ports(id)?);
    let of = |values: &[Option<ValueId>], ports: &[bool]| -> Vec<ValueId> {
        values.iter().zip(ports).filter(|(_, changes)| **changes).filter_map(|(value, _)| *value).collect()
    };
    let values = [of(node.inputs(), &ports.inputs), of(node.outputs(), &ports.outputs)].concat();
    values.into_iter().find_map(|value| {
        let largest = survey.magnitude(value)?.largest;
        let name = survey.name(value);
        if largest > survey.limit(value) {
            return Some(format!("`{name}` reaches {largest:.1e}, more than an eighth of float16's range"));
        }
        let vanishes = largest > 0.0 && largest < TINY && !is_added(survey, value, largest);
        vanishes.then(|| format!("`{name}` is {largest:.1e} at most, which float16 has few digits for"))
    })
}

/// Whether all that is done with a value is to add it to something larger, beside which its last digits are none.
fn is_added(survey: &Survey, value: ValueId, largest: f64) -> bool {
    let readers = survey.readers(value);
    let adds = |&(id, _): &(NodeId, Option<usize>)| {
        let node = survey.graph.node(id);
        let sum = node.output(0).and_then(|sum| survey.magnitude(sum));
        matches!(node.op_type.as_str(), "Add" | "Sub" | "Sum") && sum.is_some_and(|sum| sum.largest > LARGER * largest)
    };
    !readers.is_empty() && readers.iter().all(adds)
}

/// Whether the partial sums of a product may overflow: a column of the weight times all that is multiplied with it.
fn sums_too_large(survey: &Survey, id: NodeId) -> Option<String> {
    let node = survey.graph.node(id);
    let (axis, weight) = match node.op_type.as_str() {
        "MatMul" => (usize::MAX, node.input(1)?),
        "Gemm" => (if node.int("transB") == Some(1) { 0 } else { usize::MAX }, node.input(1)?),
        "Conv" => (0, node.input(1)?),
        _ => return None,
    };
    let largest = survey.magnitude(node.input(0)?)?.largest;
    let (norm, terms) = longest_column(survey.constant(weight)?, axis)?;
    let bound = norm * largest * (terms as f64).sqrt();
    (bound > survey.precision.largest()).then(|| format!("its sums may reach {bound:.1e}"))
}

/// The largest Euclidean norm of what is multiplied for one output, and how many numbers that is. Outputs are along the
/// first axis, or the last.
fn longest_column(weight: &Tensor, axis: usize) -> Option<(f64, usize)> {
    let outputs = if axis == 0 { *weight.dims().first()? } else { *weight.dims().last()? };
    if outputs == 0 || weight.dims().len() < 2 {
        return None;
    }
    let numbers = weight.to_f32s()?;
    weight.release();
    let terms = numbers.len() / outputs;
    let mut squares = vec![0.0; outputs];
    for (at, &w) in numbers.iter().enumerate() {
        let output = if axis == 0 { at / terms.max(1) } else { at % outputs };
        squares[output] += f64::from(w).powi(2);
    }
    Some((squares.into_iter().fold(0.0, f64::max).sqrt(), terms))
}

/// Whether a node divides by something that may come near 0, or takes its logarithm.
fn too_small(survey: &Survey, id: NodeId) -> Option<String> {
    let node = survey.graph.node(id);
    let value = divisor(node)?;
    if survey.constant(value).is_some() {
        return None;
    }
    match survey.magnitude(value).and_then(|m| m.smallest) {
        Some(smallest) if smallest >= LEAST => None,
        Some(smallest) => Some(format!(
            "`{}`, which it divides by or takes the logarithm of, is as small as {smallest:.1e}",
            survey.name(value)
        )),
        None => Some(format!(
            "how small `{}`, which it divides by or takes the logarithm of, gets was not measured",
            survey.name(value)
        )),
    }
}

/// The value whose smallest numbers matter to a node.
pub(super) fn divisor(node: &lathe_ir::Node) -> Option<ValueId> {
    match node.op_type.as_str() {
        "Div" => node.input(1),
        "Log" | "Reciprocal" | "Sqrt" => node.input(0),
        _ => None,
    }
}
