//! Constants that half precision cannot hold keep what reads them in float32.

use super::{Precision, quantized::is_scale, survey::Survey};
use lathe_ir::{AttributeValue, DataType, Node, NodeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// Constants with no more elements than this are parameters of a formula, of which every one counts; weights lose their
/// smallest numbers without harm.
const PARAMETERS: usize = 16;

/// How much smaller the scale of codes may be than what keeps all its digits: codes are as coarse by themselves.
const COARSER: f64 = 8.0;

/// What the numbers of a constant are like.
#[derive(Debug, Clone, Copy, Default)]
struct Numbers {
    /// The largest finite one and the smallest that is not 0, in magnitude.
    largest: f64,
    smallest: Option<f64>,
    /// How many there are.
    count: usize,
}

impl Numbers {
    fn of(tensor: &Tensor) -> Option<Numbers> {
        let numbers = tensor.to_f32s()?;
        tensor.release();
        let mut found = Numbers { count: numbers.len(), ..Numbers::default() };
        for x in numbers.iter().map(|x| f64::from(x.abs())).filter(|x| x.is_finite()) {
            found.largest = found.largest.max(x);
            if x > 0.0 {
                found.smallest = Some(found.smallest.map_or(x, |smallest: f64| smallest.min(x)));
            }
        }
        Some(found)
    }
}

pub(super) fn keep(survey: &mut Survey) {
    let mut known: BTreeMap<ValueId, Option<Numbers>> = BTreeMap::new();
    for id in survey.candidates() {
        let node = survey.graph.node(id);
        let Some(ports) = survey.ports(id) else { continue };
        let read: Vec<(usize, ValueId)> = node
            .inputs()
            .iter()
            .enumerate()
            .filter_map(|(at, value)| Some((at, (*value)?)))
            .filter(|&(at, value)| ports.inputs[at] && survey.constant(value).is_some())
            .collect();
        for (at, value) in read {
            let numbers = *known.entry(value).or_insert_with(|| Numbers::of(survey.constant(value)?));
            let Some(numbers) = numbers else { continue };
            let unused = is_open_bound(node, at, survey.constant(value), survey.precision).is_some();
            if numbers.largest > survey.precision.largest() && !unused {
                let reason = format!("its constant `{}` holds {:.3e}", survey.name(value), numbers.largest);
                survey.keep(id, format!("{reason}, which is beyond the range of {}", survey.precision.dtype));
            }
            let is_scale = is_scale(survey.graph, id, at);
            let smallest = numbers.smallest.filter(|_| numbers.count <= PARAMETERS || is_scale);
            let least = survey.precision.smallest_normal() / if is_scale { COARSER } else { 1.0 };
            if let Some(smallest) = smallest.filter(|&x| x < least) {
                keep_small(survey, id, value, smallest);
            }
        }
        if let Some(AttributeValue::Tensor(tensor)) = node.attribute("value")
            && tensor.dtype() == DataType::Float
            && Numbers::of(tensor).is_some_and(|numbers| numbers.largest > survey.precision.largest())
        {
            survey.keep(id, format!("its value is beyond the range of {}", survey.precision.dtype));
        }
    }
}

/// Keeps a node with a constant that would vanish, and what would then divide by zero.
fn keep_small(survey: &mut Survey, id: NodeId, value: ValueId, smallest: f64) {
    let (name, dtype) = (survey.name(value), survey.precision.dtype);
    survey
        .keep(id, format!("its constant `{name}` holds {smallest:.1e}, which {dtype} rounds to a few digits or to 0"));
    const REASON: &str = "a constant that keeps it from dividing by zero would vanish";
    let roots = followers(survey, id, &["Sqrt", "Div", "Reciprocal", "Log", "Pow", "Max", "Clip"]);
    for root in roots {
        survey.keep(root, REASON);
        for last in followers(survey, root, &["Div", "Reciprocal", "Log"]) {
            survey.keep(last, REASON);
        }
    }
}

fn followers(survey: &Survey, id: NodeId, operators: &[&str]) -> Vec<NodeId> {
    let outputs: Vec<ValueId> = survey.graph.node(id).outputs().iter().flatten().copied().collect();
    let readers = outputs.into_iter().flat_map(|value| survey.readers(value));
    readers
        .map(|(reader, _)| reader)
        .filter(|&reader| operators.contains(&survey.graph.node(reader).op_type.as_str()))
        .collect()
}

/// What becomes of a constant that is a bound no number reaches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum OpenBound {
    /// The input is left out.
    Absent,
    /// It becomes this infinity.
    Infinite(f64),
}

/// Whether input `at` of a node is a bound that lies beyond what half precision holds, and so bounds nothing.
pub(super) fn is_open_bound(
    node: &Node,
    at: usize,
    tensor: Option<&Tensor>,
    precision: Precision,
) -> Option<OpenBound> {
    let numbers = tensor.filter(|tensor| tensor.len() <= PARAMETERS)?.to_f64s()?;
    let below = numbers.iter().all(|&x| x < -precision.largest());
    let above = numbers.iter().all(|&x| x > precision.largest());
    match (node.op_type.as_str(), at) {
        ("Clip", 1) if below => Some(OpenBound::Absent),
        ("Clip", 2) if above => Some(OpenBound::Absent),
        ("Max", _) if below => Some(OpenBound::Infinite(f64::NEG_INFINITY)),
        ("Min", _) if above => Some(OpenBound::Infinite(f64::INFINITY)),
        _ => None,
    }
}
