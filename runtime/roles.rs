//! What a model does with each of its inputs, so that random values for it are values the model accepts.

use lathe_ir::{DataType, Graph, Node, Shape, Use, ValueId};
use std::collections::BTreeSet;

/// What an input is used for. Later variants outrank earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Nothing is known: any value of the type.
    Plain,
    /// It divides whole numbers: zero would stop the process.
    Divisor,
    /// It is a size, a count or a position along an axis: a small positive number.
    Size,
    /// It indexes an axis: below `bound`, which is 0 where the size of that axis is not known.
    Index {
        /// The size of the indexed axis.
        bound: usize,
    },
}

impl Role {
    /// What is left when a value must serve both.
    fn and(self, other: Role) -> Role {
        match (self, other) {
            (Role::Index { bound: a }, Role::Index { bound: b }) => Role::Index { bound: a.min(b) },
            (a, b) => a.max(b),
        }
    }
}

/// Follows a value through the graph to what it is used for in the end.
///
/// `size_of` knows the sizes of symbolic dimensions in the run at hand.
pub(crate) fn role_of(graph: &Graph, input: ValueId, size_of: &dyn Fn(&Shape, usize) -> Option<usize>) -> Role {
    let mut role = Role::Plain;
    let mut visited = BTreeSet::from([(input, true)]);
    let mut pending = vec![(input, true)];
    // `exact`: the elements are still the input's own, not sums or products of them.
    while let Some((value, exact)) = pending.pop() {
        for place in graph.value(value).uses() {
            let Use::Node(id, index) = *place else { continue };
            let node = graph.node(id);
            if let Some(stated) = role_at(graph, node, index, size_of) {
                let stated = match stated {
                    // A shifted or scaled index stays small when the input does.
                    Role::Index { bound } if !exact => Role::Index { bound: bound.min(2) },
                    other => other,
                };
                role = role.and(stated);
                continue;
            }
            let Some(keeps) = passes_on(node, index) else { continue };
            let outputs = node.outputs().iter().flatten().map(|&o| (o, exact && keeps));
            pending.extend(outputs.filter(|next| visited.insert(*next)));
        }
    }
    role
}

/// What input `index` of a node must be, if the operator restricts it.
fn role_at(graph: &Graph, node: &Node, index: usize, size_of: &dyn Fn(&Shape, usize) -> Option<usize>) -> Option<Role> {
    let axis_size = |input: usize, axis: i64| -> Option<usize> {
        let value = node.input(input)?;
        let resolve = |ndim: usize| usize::try_from(if axis < 0 { axis + ndim as i64 } else { axis }).ok();
        if let Some(tensor) = graph.constant(value) {
            return tensor.dims().get(resolve(tensor.dims().len())?).copied();
        }
        let shape = graph.value(value).ty.as_ref()?.shape()?;
        let axis = resolve(shape.dims.len()).filter(|&a| a < shape.dims.len())?;
        size_of(shape, axis)
    };
    let along = |input: usize, axis: i64| Some(Role::Index { bound: axis_size(input, axis).unwrap_or(1) });
    let op = node.op_type.as_str();
    match (op, index) {
        ("Gather" | "GatherElements" | "GatherBlockQuantized" | "ScatterElements" | "Scatter", 1) => {
            along(0, node.int("axis").or(node.int("gather_axis")).unwrap_or(0))
        }
        ("GatherND" | "ScatterND", 1) => {
            let data = node.input(0)?;
            let ndim = match graph.constant(data) {
                Some(tensor) => tensor.dims().len(),
                None => graph.value(data).ty.as_ref().and_then(|t| t.shape()).map_or(0, |s| s.dims.len()),
            };
            let sizes = (0..ndim).map(|axis| axis_size(0, axis as i64).unwrap_or(1));
            Some(Role::Index { bound: sizes.min().unwrap_or(1) })
        }
        ("OneHot", 0) => {
            let depth = node.input(1).and_then(|v| graph.constant(v)).and_then(|t| t.to_f64s()?.first().copied());
            Some(Role::Index { bound: depth.map_or(1, |d| d.max(1.0) as usize) })
        }
        ("EmbedLayerNormalization", 0) => along(2, 0),
        ("EmbedLayerNormalization", 1) => along(4, 0),
        ("EmbedLayerNormalization", 8) => along(3, 0),
        ("RotaryEmbedding", 1) if !node.is_standard() => along(2, 0),
        ("RotaryEmbedding", 3) if node.is_standard() => along(1, 0),
        ("ArrayFeatureExtractor", 1) => along(0, -1),
        ("SequenceAt" | "SequenceErase", 1) | ("SequenceInsert", 2) => Some(Role::Index { bound: 1 }),
        ("NegativeLogLikelihoodLoss" | "SoftmaxCrossEntropyLoss", 1) => along(0, 1),
        ("Reshape" | "Expand" | "Tile" | "Pad" | "TopK" | "Split", 1)
        | ("ConstantOfShape" | "Loop", 0)
        | ("Slice", 1..=4)
        | ("Resize", 2 | 3)
        | ("Range", _)
        | ("ReverseSequence" | "CenterCropPad", 1)
        | ("LSTM" | "GRU" | "RNN", 4)
        | ("GroupQueryAttention", 5 | 6) => Some(Role::Size),
        ("Squeeze" | "Unsqueeze" | "CumSum", 1) => Some(Role::Index { bound: 1 }),
        ("Div" | "Mod", 1) => {
            let divides_whole_numbers = node
                .inputs()
                .iter()
                .flatten()
                .filter_map(|&v| graph.constant(v).map(|t| t.dtype()).or(graph.value(v).ty.as_ref()?.elem()))
                .any(DataType::is_integer);
            divides_whole_numbers.then_some(Role::Divisor)
        }
        _ => None,
    }
}

/// Whether the outputs of a node hold the elements of input `index` (`true`), something computed from them elementwise
/// (`false`), or nothing of the kind (`None`).
fn passes_on(node: &Node, index: usize) -> Option<bool> {
    match (node.op_type.as_str(), index) {
        ("Cast" | "CastLike" | "Reshape" | "Unsqueeze" | "Squeeze" | "Flatten" | "Expand" | "Tile" | "Slice", 0)
        | ("Identity" | "Transpose" | "Split" | "Gather" | "GatherElements" | "GatherND" | "Dropout" | "Pad", 0)
        | ("Trilu" | "Compress" | "DepthToSpace" | "SpaceToDepth" | "CenterCropPad" | "ReduceMax" | "ReduceMin", 0)
        | ("Concat", _)
        | ("Where", 1 | 2)
        | ("Max" | "Min", _)
        | ("Clip" | "Abs" | "Relu", 0) => Some(true),
        ("Add" | "Sub" | "Mul" | "Div" | "Mod" | "Sum" | "ReduceSum" | "CumSum" | "Floor" | "Ceil" | "Round", _)
        | ("Neg", 0) => Some(false),
        _ => None,
    }
}

/// Whether an input reaches scores of attention as a mask: through comparisons, logic, layout and choices to a `Softmax`,
/// or as the mask of an attention operator.
pub(crate) fn masks_scores(graph: &Graph, input: ValueId) -> bool {
    let mut visited = BTreeSet::from([input]);
    let mut pending = vec![input];
    while let Some(value) = pending.pop() {
        for place in graph.value(value).uses() {
            let Use::Node(id, index) = *place else { continue };
            let node = graph.node(id);
            let passes = match (node.op_type.as_str(), index) {
                ("Softmax", 0) | ("Attention", 3) | ("MultiHeadAttention", 4 | 5) => return true,
                ("Not" | "And" | "Or" | "Where" | "Cast" | "Sub" | "Mul" | "Add" | "Equal", _)
                | ("Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual", _)
                | ("Unsqueeze" | "Squeeze" | "Reshape" | "Expand" | "Transpose" | "Slice" | "Identity" | "Concat", 0) => {
                    true
                }
                _ => false,
            };
            if passes {
                pending.extend(node.outputs().iter().flatten().copied().filter(|&o| visited.insert(o)));
            }
        }
    }
    false
}

/// Whether all that is computed from an input is computed in whole numbers, so that nothing is ever rounded. Divisions are
/// left out: the smallest number of a type over −1 stops the process.
pub(crate) fn stays_whole(graph: &Graph, input: ValueId) -> bool {
    let mut visited = BTreeSet::from([input]);
    let mut pending = vec![input];
    while let Some(value) = pending.pop() {
        for place in graph.value(value).uses() {
            let Use::Node(id, index) = *place else { continue };
            let node = graph.node(id);
            let exact = match (node.op_type.as_str(), index) {
                ("Cast", _) => {
                    let to = node.int("to").and_then(|code| DataType::from_code(i32::try_from(code).ok()?));
                    to.is_some_and(|to| to.is_integer() || to == DataType::Bool)
                }
                ("Clip" | "Min" | "Max" | "Add" | "Sub" | "Mul" | "Sum" | "Neg" | "Abs" | "Sign" | "Where", _)
                | ("Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Concat", _)
                | ("Not" | "And" | "Or" | "Xor" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "BitwiseNot", _)
                | ("Identity" | "Reshape" | "Unsqueeze" | "Squeeze" | "Flatten" | "Transpose" | "Expand" | "Tile", 0)
                | ("Slice" | "Split" | "Gather" | "GatherElements" | "GatherND" | "Pad", 0)
                | ("ReduceMax" | "ReduceMin" | "ReduceSum" | "ArgMax" | "ArgMin", 0) => true,
                _ => false,
            };
            if !exact {
                return false;
            }
            pending.extend(node.outputs().iter().flatten().copied().filter(|&o| visited.insert(o)));
        }
    }
    true
}

/// The size that axis `axis` of an input must have because of a constant it meets at once, or the rank it must have.
pub(crate) struct Pinned {
    /// How many axes.
    pub ndim: usize,
    /// Sizes of axes, counted from the front.
    pub sizes: Vec<(usize, usize)>,
}

/// What the constants beside an input say about its shape; `ndim` is its rank where the file states one.
pub(crate) fn pinned(graph: &Graph, input: ValueId, ndim: Option<usize>) -> Option<Pinned> {
    graph.value(input).uses().iter().find_map(|place| {
        let Use::Node(id, index) = *place else { return None };
        let node = graph.node(id);
        let other = |at: usize| node.input(at).and_then(|v| graph.constant(v)).map(|t| t.dims().to_vec());
        match (node.op_type.as_str(), index) {
            ("Conv", 0) => {
                let weight = other(1)?;
                let channels = weight.get(1)?.checked_mul(usize::try_from(node.int("group").unwrap_or(1)).ok()?)?;
                Some(Pinned { ndim: weight.len(), sizes: vec![(1, channels)] })
            }
            ("ConvTranspose", 0) => {
                let weight = other(1)?;
                Some(Pinned { ndim: weight.len(), sizes: vec![(1, *weight.first()?)] })
            }
            ("MatMul", 0) => {
                let weight = other(1)?;
                let k = if weight.len() == 1 { weight[0] } else { *weight.get(weight.len().checked_sub(2)?)? };
                let ndim = ndim.unwrap_or(2);
                Some(Pinned { ndim, sizes: vec![(ndim.checked_sub(1)?, k)] })
            }
            ("Gemm", 0) => {
                let weight = other(1).filter(|w| w.len() == 2)?;
                let k = weight[usize::from(node.int("transB") == Some(1))];
                Some(Pinned { ndim: 2, sizes: vec![(usize::from(node.int("transA") != Some(1)), k)] })
            }
            ("LSTM" | "GRU" | "RNN", 0) => Some(Pinned { ndim: 3, sizes: vec![(2, *other(1)?.get(2)?)] }),
            ("LayerNormalization", 0) if node.int("axis").unwrap_or(-1) == -1 => {
                let scale = other(1).filter(|s| s.len() == 1)?;
                let ndim = ndim.unwrap_or(2);
                Some(Pinned { ndim, sizes: vec![(ndim.checked_sub(1)?, scale[0])] })
            }
            _ => None,
        }
    })
}
