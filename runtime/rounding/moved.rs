//! A copy of a model in which every operand of its arithmetic moves by at most one unit in the last place, at random.
//!
//! The result of a sum, a product or a convolution in floating point is the exact result for operands that are moved a
//! little, so that what comes of moving them is what rounding may do. Values that decide something (they are compared,
//! or rounded to whole numbers) and all that they depend on stay as they are: where a decision turns, a model gives
//! something else, and that is no noise.

use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, Node, NodeId, ScopeId, Tensor, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Operators that round, by the operands whose rounding they pass on. Operators that only move data (`Transpose`,
/// `Relu`) pass on what has moved already; exponents and sizes of windows are left alone.
const ARITHMETIC: &[(&[usize], &[&str])] = &[
    (&[0], &["ReduceSum", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"]),
    (&[0], &["ReduceSumSquare", "Softmax", "LogSoftmax", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "CumSum"]),
    (&[0], &["Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Tanh", "Asinh", "Acosh", "Atanh"]),
    (&[0], &["Sigmoid", "Softplus", "Softsign", "Gelu", "FastGelu", "QuickGelu", "Elu", "Selu", "Celu", "Mish"]),
    (&[0], &["Swish", "HardSwish", "HardSigmoid", "AveragePool", "GlobalAveragePool", "LpPool", "GlobalLpPool", "LRN"]),
    (&[0], &["LpNormalization", "MeanVarianceNormalization", "Resize", "Upsample", "GridSample", "Det", "DFT"]),
    (&[0, 1], &["Add", "Sub", "Mul", "Div", "MatMul", "FusedMatMul", "BiasGelu", "STFT", "RMSNormalization"]),
    (&[0, 1], &["SimplifiedLayerNormalization"]),
    (&[0, 1, 2], &["Gemm", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "LayerNormalization"]),
    (&[0, 1, 2], &["InstanceNormalization", "GroupNormalization", "GroupQueryAttention", "Attention"]),
    (&[0, 1, 2, 3], &["MultiHeadAttention", "LSTM", "GRU", "RNN", "SkipSimplifiedLayerNormalization"]),
    (&[0, 1, 2, 3, 4], &["BatchNormalization", "SkipLayerNormalization", "Sum", "Mean", "Einsum"]),
];

/// Operators whose results turn where a number passes another.
const DECIDING: &[&str] = &[
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Mod",
    "ArgMax",
    "ArgMin",
    "TopK",
    "NonZero",
    "NonMaxSuppression",
    "Unique",
    "Hardmax",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "MaxPool",
    "Range",
    "OneHot",
    "ThresholdedRelu",
    "Shrink",
    "RoiAlign",
    "MaxRoiPool",
    "Multinomial",
    "Bernoulli",
];

/// The copy for the main graph's outputs `wanted`; `None` where nothing in it rounds.
pub(super) fn moved(model: &Model, wanted: &BTreeSet<usize>) -> Option<Model> {
    let facts = Facts::infer(model);
    let mut copy = model.clone();
    let still = still(model, wanted);
    let mut moves = Moves { graph: &mut copy.graph, facts: &facts, constants: BTreeMap::new(), count: 0 };
    for id in model.graph.all_nodes() {
        if !still.contains(&id) {
            moves.operands_of(id);
        }
    }
    if moves.count == 0 {
        return None;
    }
    copy.graph.sort().ok()?;
    Some(copy)
}

/// Nodes whose operands do not move: those that no wanted output depends on, and those that a decision depends on.
fn still(model: &Model, wanted: &BTreeSet<usize>) -> BTreeSet<NodeId> {
    let graph = &model.graph;
    let outputs = graph.main().outputs().iter().enumerate().filter(|(index, _)| wanted.contains(index));
    let needed = upstream(graph, outputs.map(|(_, &value)| value).collect());
    let decisive = needed.iter().filter(|&&id| decides(model, id)).flat_map(|&id| read_by(graph, id)).collect();
    let mut still = upstream(graph, decisive);
    let inner = |id: &NodeId| graph.scope(graph.node(*id).scope()).owner();
    for id in graph.all_nodes() {
        // A node in a subgraph is as its owner is; owners come before what is inside them.
        let outside = inner(&id).map_or_else(|| !needed.contains(&id), |owner| still.contains(&owner));
        let deciding_body = inner(&id).is_some_and(|owner| decides(model, owner));
        if outside || deciding_body {
            still.insert(id);
        }
    }
    still
}

/// The nodes of the main graph that `values` are computed by.
fn upstream(graph: &Graph, values: Vec<ValueId>) -> BTreeSet<NodeId> {
    let mut pending = values;
    let mut nodes = BTreeSet::new();
    while let Some(value) = pending.pop() {
        if let Some(id) = graph.producer(value).filter(|&id| graph.node(id).scope() == ScopeId::MAIN)
            && nodes.insert(id)
        {
            pending.extend(read_by(graph, id));
        }
    }
    nodes
}

/// What a node reads, its subgraphs included.
fn read_by(graph: &Graph, id: NodeId) -> Vec<ValueId> {
    let node = graph.node(id);
    let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
    node.inputs().iter().flatten().copied().chain(captured).collect()
}

/// Whether a node, or one inside it, turns where a number passes another. A cast to whole numbers does.
fn decides(model: &Model, id: NodeId) -> bool {
    let node = model.graph.node(id);
    let called = model.function(&node.domain, &node.op_type, &node.overload);
    let inside = |scope: ScopeId| model.graph.nodes(scope).any(|inner| decides(model, inner));
    is_deciding(node)
        || node.subgraphs().into_iter().any(inside)
        || called.is_some_and(|f| f.graph.all_nodes().into_iter().any(|inner| is_deciding(f.graph.node(inner))))
}

fn is_deciding(node: &Node) -> bool {
    let to = node.int("to").and_then(|code| DataType::from_code(i32::try_from(code).ok()?));
    DECIDING.contains(&node.op_type.as_str()) || (node.is("Cast") && to.is_some_and(|to| !to.is_float()))
}

struct Moves<'a> {
    graph: &'a mut Graph,
    facts: &'a Facts,
    /// Scalars of the main graph by type: one, and one unit in its last place.
    constants: BTreeMap<DataType, (ValueId, ValueId)>,
    count: usize,
}

impl Moves<'_> {
    fn operands_of(&mut self, id: NodeId) {
        let op_type = self.graph.node(id).op_type.as_str();
        let Some((operands, _)) = ARITHMETIC.iter().find(|(_, operators)| operators.contains(&op_type)) else { return };
        // Every operand of these is a term.
        let all = matches!(op_type, "Sum" | "Mean" | "Einsum");
        let inputs = self.graph.node(id).inputs().to_vec();
        for (index, value) in inputs.into_iter().enumerate() {
            let Some(value) = value.filter(|_| all || operands.contains(&index)) else { continue };
            let Some(unit) = self.facts.elem(value).and_then(unit) else { continue };
            let scope = self.graph.node(id).scope();
            let moved = self.moved(value, scope, self.facts.elem(value).expect("it has a unit"), unit);
            self.graph.set_input(id, index, Some(moved));
        }
    }

    /// `value · (1 + unit · r)` with `r` between −1 and 1, drawn for every element and every run.
    fn moved(&mut self, value: ValueId, scope: ScopeId, dtype: DataType, unit: f64) -> ValueId {
        self.count += 1;
        let wide = if dtype == DataType::Double { DataType::Double } else { DataType::Float };
        let (one, unit) = self.scalars(dtype, wide, unit);
        let draw = Node::new("RandomUniformLike")
            .with("dtype", i64::from(wide.code()))
            .with("low", -1.0)
            .with("high", 1.0)
            .with("seed", self.count as f32);
        let mut append = |node: Node, inputs: &[ValueId]| self.graph.append(scope, node, inputs, "moved");
        let draw = append(draw, &[value]);
        let step = append(Node::new("Mul"), &[draw, unit]);
        let mut factor = append(Node::new("Add"), &[step, one]);
        if wide != dtype {
            factor = append(Node::new("Cast").with("to", i64::from(dtype.code())), &[factor]);
        }
        append(Node::new("Mul"), &[value, factor])
    }

    fn scalars(&mut self, dtype: DataType, wide: DataType, unit: f64) -> (ValueId, ValueId) {
        if let Some(&known) = self.constants.get(&dtype) {
            return known;
        }
        let mut scalar = |value: f64| {
            let tensor = Tensor::from_f64s(wide, &[], &[value]).expect("both are wide floats");
            self.graph.add_initializer(ScopeId::MAIN, "unit", tensor)
        };
        let both = (scalar(1.0), scalar(unit));
        self.constants.insert(dtype, both);
        both
    }
}

/// One unit in the last place of 1.
fn unit(dtype: DataType) -> Option<f64> {
    Some(match dtype {
        DataType::Double => f64::EPSILON,
        DataType::Float => f32::EPSILON.into(),
        DataType::Float16 => half::f16::EPSILON.into(),
        DataType::Bfloat16 => half::bf16::EPSILON.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn parse(body: &str) -> Model {
        text::parse(&format!("g (float[n,4] x) => (float[n,4] y, float[n,4] z) {{ {body} }}")).unwrap()
    }

    /// Which nodes have operands that move, by their outputs.
    fn movable(body: &str, wanted: &[usize]) -> Vec<String> {
        let model = parse(body);
        let Some(copy) = moved(&model, &wanted.iter().copied().collect()) else { return Vec::new() };
        let graph = &copy.graph;
        copy.check().unwrap();
        let moves = |id: &NodeId| {
            let factor = |value: &ValueId| {
                graph
                    .producer(*value)
                    .is_some_and(|p| graph.value(*value).name.starts_with("moved") && graph.node(p).is("Mul"))
            };
            graph.node(*id).inputs().iter().flatten().any(factor)
        };
        let named = |id: NodeId| graph.node(id).output(0).map(|v| graph.value(v).name.clone()).unwrap();
        graph.nodes(ScopeId::MAIN).filter(moves).map(named).filter(|name| !name.starts_with("moved")).collect()
    }

    #[test]
    fn arithmetic_moves_and_layout_does_not() {
        let body = "a = Add (x, x) b = Relu (a) y = Exp (b) z = Neg (x)";
        assert_eq!(movable(body, &[0, 1]), ["a", "y"]);
    }

    #[test]
    fn what_no_wanted_output_depends_on_stays() {
        let body = "y = Exp (x) z = Sqrt (x)";
        assert_eq!(movable(body, &[1]), ["z"]);
        assert!(movable("y = Exp (x) z = Neg (x)", &[1]).is_empty());
    }

    #[test]
    fn what_a_decision_depends_on_stays() {
        let body = "a = Exp (x) b = Floor (a) c = Sqrt (b) y = Add (c, x) z = Mul (a, a)";
        assert_eq!(movable(body, &[0, 1]), ["c", "y", "z"]);
        let cast = "a = Exp (x) i = Cast <to = 7> (a) f = Cast <to = 1> (i) y = Add (f, x) z = Relu (x)";
        assert_eq!(movable(cast, &[0]), ["y"]);
    }

    #[test]
    fn exponents_stay() {
        let body = "e = Constant <value_float = 2.0> () y = Pow (x, e) z = Relu (x)";
        let copy = moved(&parse(body), &BTreeSet::from([0])).unwrap();
        let power = copy.graph.all_nodes().into_iter().find(|&id| copy.graph.node(id).is("Pow")).unwrap();
        let exponent = copy.graph.node(power).input(1).unwrap();
        assert_eq!(copy.graph.value(exponent).name, "e");
    }

    #[test]
    fn bodies_move_with_their_owner() {
        let body = "c = Constant <value = bool {1}> ()
            y = If <then_branch = a () => (float[n,4] p) { p = Exp (x) }, else_branch = b () => (float[n,4] q) { q = Neg (x) }> (c)
            z = Relu (x)";
        let copy = moved(&parse(body), &BTreeSet::from([0])).unwrap();
        copy.check().unwrap();
        let draws = copy.graph.all_nodes().into_iter().filter(|&id| copy.graph.node(id).is("RandomUniformLike"));
        assert_eq!(draws.map(|id| copy.graph.node(id).scope() == ScopeId::MAIN).collect::<Vec<_>>(), [false]);
    }
}
