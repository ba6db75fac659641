//! Long sums, and means of squares that a norm is spelled out with, stay in float32.

use super::survey::Survey;
use lathe_ir::{DataType, Node, NodeId, Tensor, ValueId};

/// Terms that bfloat16, of 8 digits, adds up without losing the last ones.
const MOST_TERMS: u64 = 256;

const OF_NORM: &str = "it belongs to a normalization that is spelled out: squares and their mean overflow first";

pub(super) fn keep(survey: &mut Survey) {
    for id in survey.candidates() {
        let node = survey.graph.node(id);
        let Some(terms) = terms(survey, node) else { continue };
        if is_square_sum(survey, node) {
            keep_norm(survey, id);
        }
        match terms {
            None => survey.keep(id, "how many numbers it adds up is not known"),
            Some(terms) => keep_long(survey, id, terms),
        }
    }
}

/// How many numbers a node adds up: `None` where it adds up none, `Some(None)` where that depends on the run.
fn terms(survey: &Survey, node: &Node) -> Option<Option<u64>> {
    let value = node.input(0)?;
    let ndim = survey.facts.ndim(value).map(|ndim| ndim as i64);
    Some(match node.op_type.as_str() {
        "ReduceSum" | "ReduceMean" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare" | "ReduceLogSum"
        | "ReduceLogSumExp" | "ReduceProd" => {
            let given = node.input(1).map(|axes| survey.constant(axes).and_then(Tensor::to_i64s));
            match (node.ints("axes"), given) {
                (Some(axes), _) => survey.fixed_elements(value, Some(axes)),
                (None, Some(None)) => None,
                (None, Some(Some(axes))) if !axes.is_empty() => survey.fixed_elements(value, Some(&axes)),
                _ => survey.fixed_elements(value, None),
            }
        }
        "GlobalAveragePool" | "GlobalLpPool" => {
            let axes: Option<Vec<i64>> = ndim.map(|ndim| (2..ndim).collect());
            axes.and_then(|axes| survey.fixed_elements(value, Some(&axes)))
        }
        "LpNormalization" => survey.fixed_elements(value, Some(&[node.int("axis").unwrap_or(-1)])),
        "CumSum" | "MeanVarianceNormalization" => None,
        _ => return None,
    })
}

fn keep_long(survey: &mut Survey, id: NodeId, terms: u64) {
    let precision = survey.precision;
    if precision.dtype != DataType::Float16 {
        if terms > MOST_TERMS {
            survey.keep(id, format!("it adds up {terms} numbers"));
        }
        return;
    }
    let node = survey.graph.node(id);
    let Some(range) = node.input(0).and_then(|value| survey.magnitude(value)) else {
        return survey.keep(id, format!("it adds up {terms} numbers, and how large they get was not measured"));
    };
    let squares = ["ReduceL2", "ReduceSumSquare", "LpNormalization", "GlobalLpPool"].contains(&node.op_type.as_str());
    let largest = if squares { range.largest.powi(2) } else { range.largest };
    if largest * terms as f64 > precision.limit() {
        survey.keep(id, format!("it adds up {terms} numbers of up to {:.1e}", range.largest));
    }
}

/// Whether a sum is one of squares.
fn is_square_sum(survey: &Survey, node: &Node) -> bool {
    let Some((_, square)) = node.input(0).and_then(|value| survey.producer(value)) else { return false };
    match square.op_type.as_str() {
        "Mul" => square.input(0) == square.input(1),
        "Pow" => square.input(1).and_then(|two| survey.constant(two)?.scalar_f64()) == Some(2.0),
        _ => false,
    }
}

/// Keeps a norm around its sum of squares: what is squared and how it was centred, and what divides by the root.
fn keep_norm(survey: &mut Survey, sum: NodeId) {
    survey.keep(sum, OF_NORM);
    let mut upstream: Vec<(NodeId, &[&str])> = Vec::new();
    let producers = |survey: &Survey, id: NodeId| -> Vec<NodeId> {
        let read: Vec<ValueId> = survey.float_inputs(id);
        read.into_iter().filter_map(|value| survey.producer(value)).map(|(id, _)| id).collect()
    };
    for square in producers(survey, sum) {
        survey.keep(square, OF_NORM);
        upstream.push((square, &["Sub"]));
    }
    while let Some((id, wanted)) = upstream.pop() {
        for before in producers(survey, id) {
            if wanted.contains(&survey.graph.node(before).op_type.as_str()) {
                survey.keep(before, OF_NORM);
                upstream.push((before, &["ReduceMean"]));
            }
        }
    }
    let mut downstream = vec![(sum, 0)];
    while let Some((id, depth)) = downstream.pop() {
        let outputs: Vec<ValueId> = survey.graph.node(id).outputs().iter().flatten().copied().collect();
        let readers: Vec<NodeId> =
            outputs.into_iter().flat_map(|value| survey.readers(value)).map(|(id, _)| id).collect();
        for reader in readers {
            let op = survey.graph.node(reader).op_type.as_str();
            let inner = ["Add", "Sqrt", "Pow", "Max", "Clip", "Mul"].contains(&op) && depth < 3;
            let last = ["Div", "Reciprocal"].contains(&op) || (op == "Mul" && depth > 1);
            if inner || last {
                survey.keep(reader, OF_NORM);
            }
            if inner && !last || op == "Reciprocal" {
                downstream.push((reader, depth + 1));
            }
        }
    }
}
