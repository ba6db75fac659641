//! What the fusions of normalizations and activations share.

use crate::{Match, Refusal, Target};
use lathe_ir::{DataType, Model, Patch, Tensor, ValueId};

/// The domain of ONNX Runtime's own operators.
pub(super) const CONTRIB: &str = "com.microsoft";

/// Imports ONNX Runtime's domain wherever a graph uses it.
pub(super) fn import_contrib(model: &mut Model) {
    let uses = |graph: &lathe_ir::Graph| graph.all_nodes().iter().any(|&id| graph.node(id).domain == CONTRIB);
    let mut anywhere = uses(&model.graph);
    for function in &mut model.functions {
        if uses(&function.graph) {
            anywhere = true;
            if lathe_ir::imported(&function.opsets, CONTRIB).is_none() {
                function.opsets.push((CONTRIB.to_owned(), 1));
            }
        }
    }
    if anywhere {
        model.import(CONTRIB, 1);
    }
}

/// Requires that operators of ONNX Runtime may be used on elements of this type.
pub(super) fn require_ort(m: &Match, elem: DataType, otherwise: &str) -> Result<(), Refusal> {
    m.require(m.context().target == Target::Ort, otherwise)?;
    let supported = matches!(elem, DataType::Float | DataType::Float16);
    m.require(supported, "ONNX Runtime has the operator for float and float16 only")
}

/// The first axis, counted from the end, over which the `ReduceMean` labelled `label` averages `x`: it must be the
/// last axes without a gap, and they must be kept.
pub(super) fn averaged_axes(m: &Match, label: &str, x: ValueId) -> Result<i64, Refusal> {
    let node = m.node(label);
    m.require(node.int("keepdims") != Some(0), "the mean drops its axes")?;
    let axes = match (node.ints("axes"), node.input(1)) {
        (Some(axes), _) => axes.to_vec(),
        (None, Some(axes)) => m.known_int64s(axes).ok_or("the axes of the mean are unknown")?,
        (None, None) => return Err("the mean is over all axes".into()),
    };
    m.require(!axes.is_empty(), "the mean is over all axes")?;
    let mut axes = if axes.iter().all(|&axis| axis < 0) {
        axes
    } else {
        let ndim = m.facts().ndim(x).ok_or("the number of axes is unknown")? as i64;
        axes.into_iter().map(|axis| if axis < 0 { axis } else { axis - ndim }).collect()
    };
    axes.sort_unstable();
    let first = axes[0];
    m.require(axes.iter().copied().eq(first..0), "the mean is not over the last axes")?;
    Ok(first)
}

/// The constant ε of a normalization.
pub(super) fn epsilon(m: &Match) -> Result<f32, Refusal> {
    let tensor = m.tensor("epsilon")?;
    let value = tensor.scalar_f64().filter(|_| tensor.len() == 1).ok_or("epsilon is not one number")?;
    m.require(value.is_finite() && value >= 0.0, "epsilon is negative or not finite")?;
    Ok(value as f32)
}

/// What a normalization over the axes from `axis` (counted from the end) is applied to.
pub(super) struct Normalized {
    /// The value that is normalized, before a widening cast that belongs to the normalization.
    pub x: ValueId,
    /// Its element type, which is the type of the result too.
    pub elem: DataType,
}

/// Finds what is normalized. `x` is where the computation starts, and `narrowed` whether a cast ends it; a cast to
/// float32 right before `x` then belongs to it, because the operator computes in float32 itself.
pub(super) fn normalized(m: &Match, narrowed: Option<&str>) -> Result<Normalized, Refusal> {
    let x = m.value("x");
    let elem = m.facts().elem(x).ok_or("the element type is unknown")?;
    let half = |elem| matches!(elem, DataType::Float16 | DataType::Bfloat16);
    m.require(elem == DataType::Float || half(elem), "the elements are not float, float16 or bfloat16")?;
    let Some(cast) = narrowed.and_then(|label| m.find_node(label)) else { return Ok(Normalized { x, elem }) };
    let to = cast.int("to").and_then(|code| DataType::from_code(i32::try_from(code).ok()?));
    if half(elem) {
        m.require(to == Some(elem), "the result is cast to another type")?;
        return Ok(Normalized { x, elem });
    }
    let before = m.graph().producer(x).map(|p| m.graph().node(p)).filter(|n| n.is("Cast"));
    let source = before.and_then(|n| n.input(0)).ok_or("the result is cast to another type")?;
    let from = m.facts().elem(source);
    m.require(from.is_some_and(half) && from == to, "the result is cast to another type")?;
    Ok(Normalized { x: source, elem: from.ok_or("the element type is unknown")? })
}

/// Requires that the parameter `name` has one element for each element of the normalized axes, and has their shape.
pub(super) fn require_spans(m: &Match, name: &str, x: &Normalized, axis: i64) -> Result<(), Refusal> {
    let value = m.value(name);
    let count = axis.unsigned_abs() as usize;
    let shape = m.shape(name)?;
    let of = m.facts().shape(x.x).ok_or("the shape of the normalized value is unknown")?;
    m.require(shape.len() == count && of.len() >= count, "a scale or shift does not have the normalized axes")?;
    m.require(shape == &of[of.len() - count..], "a scale or shift does not have the sizes of the normalized axes")?;
    m.require(m.facts().elem(value) == Some(x.elem), "a scale or shift has another type")
}

/// Elements of a scale of ones that may be added: a file grows by it unless several normalizations share it.
const MOST_ONES: usize = 1 << 14;

/// A scale of ones for the axes from `axis` of `x`.
pub(super) fn ones(m: &Match, g: &mut Patch, x: &Normalized, axis: i64) -> Result<ValueId, Refusal> {
    let count = axis.unsigned_abs() as usize;
    let shape = m.facts().shape(x.x).ok_or("the shape of the normalized value is unknown")?;
    m.require(shape.len() >= count, "the value has fewer axes than are normalized")?;
    let sizes: Option<Vec<usize>> =
        shape[shape.len() - count..].iter().map(|d| usize::try_from(d.as_known()?).ok()).collect();
    let sizes = sizes.ok_or("the sizes of the normalized axes are unknown")?;
    let elements = lathe_ir::element_count(&sizes).filter(|&n| n <= MOST_ONES).ok_or("the scale would be large")?;
    let tensor = Tensor::from_f64s(x.elem, &sizes, &vec![1.0; elements]).ok_or("the element type has no ones")?;
    Ok(g.constant("scale", tensor))
}
