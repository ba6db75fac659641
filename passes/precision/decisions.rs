//! Choices and coordinates stay in float32, with what they are computed by.

use super::survey::Survey;
use lathe_ir::{DataType, NodeId, ValueId};

/// Operators whose result is a choice, or depends on one.
const CHOICES: &[&str] = &[
    "ArgMax",
    "ArgMin",
    "Bernoulli",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Hardmax",
    "IsInf",
    "Less",
    "LessOrEqual",
    "MaxUnpool",
    "Mod",
    "Multinomial",
    "NonMaxSuppression",
    "NonZero",
    "OneHot",
    "Sign",
    "TopK",
    "Unique",
];

/// Operators that draw other numbers in another type.
const RANDOM: &[&str] = &["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"];

/// Operators with inputs that are coordinates, from which on.
const COORDINATES: &[(&str, usize)] = &[
    ("AffineGrid", 0),
    ("DeformConv", 2),
    ("GridSample", 1),
    ("MaxRoiPool", 1),
    ("RoiAlign", 1),
    ("NonMaxSuppression", 0),
];

/// Operators that make whole numbers of floats.
const WHOLE: &[&str] = &["Ceil", "Floor", "Round"];

/// Arguments of sines up to this are as exact as any other value.
const TURN: f64 = 8.0;

const OF_COORDINATES: &str = "coordinates are computed by it";
const OF_WHOLE: &str = "whole numbers are computed by it";
const OF_ANGLES: &str = "angles of several turns are computed by it";

pub(super) fn keep(survey: &mut Survey) {
    // Choices whose own types allow no half precision make coordinates of others all the same.
    let all: Vec<NodeId> = survey.graph.nodes(lathe_ir::ScopeId::MAIN).collect();
    for id in all {
        let node = survey.graph.node(id);
        let op = node.op_type.as_str();
        if CHOICES.contains(&op) {
            survey.keep(id, "what it chooses may change by rounding");
        }
        if RANDOM.contains(&op) {
            survey.keep(id, "it draws other numbers in another type");
        }
        if let Some((_, first)) = COORDINATES.iter().find(|(name, _)| *name == op) {
            survey.keep(id, "it reads coordinates");
            upstream(survey, id, *first, false, OF_COORDINATES);
        }
        if WHOLE.contains(&op) || to_whole(survey, id) {
            survey.keep(id, "it makes whole numbers of floats");
            upstream(survey, id, 0, false, OF_WHOLE);
        }
        if matches!(op, "Sin" | "Cos" | "Tan") {
            let angle = node.input(0).and_then(|value| survey.magnitude(value));
            if angle.is_none_or(|angle| angle.largest > TURN) {
                survey.keep(id, "it reads angles of several turns");
                upstream(survey, id, 0, true, OF_ANGLES);
            }
        }
    }
}

fn upstream(survey: &mut Survey, id: NodeId, first: usize, and_sources: bool, reason: &str) {
    let values: Vec<ValueId> = survey.graph.node(id).inputs().iter().skip(first).flatten().copied().collect();
    values.into_iter().for_each(|value| survey.keep_upstream(value, and_sources, reason));
}

/// Whether a node casts float32 to whole numbers.
fn to_whole(survey: &Survey, id: NodeId) -> bool {
    let node = survey.graph.node(id);
    let elem = |value: Option<ValueId>| value.and_then(|value| survey.facts.elem(value));
    node.is("Cast")
        && elem(node.input(0)) == Some(DataType::Float)
        && elem(node.output(0)).is_some_and(DataType::is_integer)
}
