//! What the fusions of normalizations and activations share.

use crate::{Match, Refusal, Target, operands};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Model, Node, Patch, Tensor, ValueId};

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
    require_ort_type(m, elem)
}

/// Requires that operators of ONNX Runtime take elements of this type.
pub(super) fn require_ort_type(m: &Match, elem: DataType) -> Result<(), Refusal> {
    let supported = matches!(elem, DataType::Float | DataType::Float16);
    m.require(supported, "ONNX Runtime has the operator for float and float16 only")
}

/// The first axis, counted from the end, over which every node labelled `mean` averages: all of them over the same
/// last axes of `x` without a gap, which are kept.
pub(super) fn averaged_axes(m: &Match, x: ValueId) -> Result<i64, Refusal> {
    let mut axes = m.labelled("mean").into_iter().map(|mean| negative_axes(m, mean, x));
    let first = axes.next().ok_or(Refusal::NoMatch)??;
    for others in axes {
        m.require(others? == first, "the means are over different axes")?;
    }
    m.require(first.iter().copied().eq(first[0]..0), "the mean is not over the last axes")?;
    Ok(first[0])
}

/// The axes over which `mean` averages values with the axes of `x`, sorted and counted from the end.
fn negative_axes(m: &Match, mean: &Node, x: ValueId) -> Result<Vec<i64>, Refusal> {
    m.require(mean.int("keepdims") != Some(0), "the mean drops its axes")?;
    let axes = operands::int64s(m, mean, "axes", 1)?.unwrap_or_default();
    m.require(!axes.is_empty(), "the mean is over all axes")?;
    if axes.iter().all(|&axis| axis < 0) {
        let mut axes = axes;
        axes.sort_unstable();
        return Ok(axes);
    }
    let ndim = m.facts().ndim(x).ok_or("the number of axes is unknown")?;
    let axes = operands::sorted_axes(m, &axes, ndim)?;
    Ok(axes.into_iter().map(|axis| axis as i64 - ndim as i64).collect())
}

/// The constant ε of a normalization.
pub(super) fn epsilon(m: &Match) -> Result<f32, Refusal> {
    let tensor = m.tensor("epsilon")?;
    let value = tensor.scalar_f64().filter(|_| tensor.len() == 1).ok_or("epsilon is not one number")?;
    m.require(value.is_finite() && value >= 0.0, "epsilon is negative or not finite")?;
    Ok(value as f32)
}

/// What is normalized.
pub(super) struct Normalized {
    /// The value, before a widening cast that belongs to the normalization.
    pub x: ValueId,
    /// Its element type, which is the type of the result too.
    pub elem: DataType,
}

/// Finds what is normalized. The computation starts at `x`; a cast right before that belongs to it where the result has
/// the type from before the cast, because the operator computes in float32 itself.
pub(super) fn normalized(m: &Match) -> Result<Normalized, Refusal> {
    let (x, result) = (m.value("x"), m.elem("output")?);
    let elem = m.facts().elem(x).ok_or("the element type is unknown")?;
    let half = |elem| matches!(elem, DataType::Float16 | DataType::Bfloat16);
    m.require(elem == DataType::Float || half(elem), "the elements are not float, float16 or bfloat16")?;
    m.require_no_new_axes(x, &[m.value("epsilon")])?;
    if elem == result {
        return Ok(Normalized { x, elem });
    }
    let before = m.graph().producer(x).map(|p| m.graph().node(p)).filter(|n| n.is("Cast"));
    let source = before.and_then(|n| n.input(0)).filter(|&v| m.facts().elem(v) == Some(result) && half(result));
    let source = source.ok_or("the result has another type than what is normalized")?;
    Ok(Normalized { x: source, elem: result })
}

/// The parameter `name` with one element for each element of the axes from `axis` of `x`, and with their shape. A
/// constant may have further axes of size one, or be one number.
pub(super) fn spanning(m: &Match, g: &mut Patch, name: &str, x: &Normalized, axis: i64) -> Result<ValueId, Refusal> {
    let value = m.value(name);
    let shape = m.shape(name)?;
    let of = normalized_sizes(m, x, axis)?;
    m.require(m.facts().elem(value) == Some(x.elem), "a scale or shift has another type")?;
    if shape == of {
        return Ok(value);
    }
    let further = shape.len().saturating_sub(of.len());
    let same =
        shape.len() > of.len() && shape[further..] == *of && shape[..further].iter().all(|d| d.as_known() == Some(1));
    let constant = m.graph().constant(value).filter(|t| same || t.len() == 1);
    let constant = constant.ok_or("a scale or shift does not have the normalized axes")?;
    if same {
        let dims = constant.dims()[further..].to_vec();
        return Ok(g.constant(name, constant.reshaped(dims).expect("axes of size one hold no elements")));
    }
    let number = constant.scalar_f64().ok_or(Refusal::NoMatch)?;
    filled(m, g, name, x, axis, number)
}

/// The sizes of the axes from `axis` of `x`.
fn normalized_sizes<'a>(m: &Match<'a>, x: &Normalized, axis: i64) -> Result<&'a [DimExpr], Refusal> {
    let shape = m.facts().shape(x.x).ok_or("the shape of the normalized value is unknown")?;
    let kept = shape.len().checked_sub(axis.unsigned_abs() as usize);
    Ok(&shape[kept.ok_or("the value has fewer axes than are normalized")?..])
}

/// Elements of a constant that may be added: a file grows by it unless several normalizations share it.
const MOST_FILLED: usize = 1 << 14;

/// A parameter for the axes from `axis` of `x` that is `number` everywhere.
pub(super) fn filled(
    m: &Match,
    g: &mut Patch,
    name: &str,
    x: &Normalized,
    axis: i64,
    number: f64,
) -> Result<ValueId, Refusal> {
    let sizes = normalized_sizes(m, x, axis)?.iter();
    let sizes: Option<Vec<usize>> = sizes.map(|d| usize::try_from(d.as_known()?).ok()).collect();
    let sizes = sizes.ok_or("the sizes of the normalized axes are unknown")?;
    let elements = lathe_ir::element_count(&sizes).filter(|&n| n <= MOST_FILLED).ok_or("the scale would be large")?;
    let tensor = Tensor::from_f64s(x.elem, &sizes, &vec![number; elements]).ok_or(Refusal::NoMatch)?;
    Ok(g.constant(name, tensor))
}

#[cfg(test)]
mod tests {
    use crate::{
        PassContext, Target,
        exact::{fuse_gelu::FuseGelu, fuse_layer_norm::FuseLayerNorm},
        testing::{check, check_refuses, check_refuses_in},
    };

    /// A layer normalization of `x` with operator set 17.
    fn normalization(x: &str, end: &str) -> String {
        format!(
            r#"<opset_import: ["" : 17, "test" : 1]> g ({x}) => (float[A,B] y, float[C,D] z) <float eps = {{1e-5}}> {{
                mean = ReduceMean <axes = [-1]> (x)
                d = Sub (x, mean)
                sq = Mul (d, d)
                var = ReduceMean <axes = [-1]> (sq)
                e = Add (var, eps)
                s = Sqrt (e)
                y = Div (d, s)
                {end}
            }}"#
        )
    }

    #[test]
    fn refuses_what_is_not_known_well_enough() {
        let open = normalization("float[2,N] x", "z = Neg (x)");
        check_refuses(&FuseLayerNorm, &open, "the sizes of the normalized axes are unknown");
        let large = normalization("float[2,20000] x", "z = Neg (x)");
        check_refuses(&FuseLayerNorm, &large, "the scale would be large");
        let deep = normalization("float[2,4] x", "z = Neg (x)").replace("[-1]", "[-3, -2, -1]");
        check_refuses(&FuseLayerNorm, &deep, "the value has fewer axes than are normalized");
        let shapeless = normalization("float[] x", "z = Neg (x)");
        check_refuses(&FuseLayerNorm, &shapeless, "the shape of the normalized value is unknown");
        let strange = normalization("float[2,4] u", "z = Neg (x)").replace("mean = ", "x = test.Strange (u) mean = ");
        check_refuses(&FuseLayerNorm, &strange, "the element type is unknown");
        check_refuses(&FuseLayerNorm, &strange.replace("[-1]", "[1]"), "the number of axes is unknown");
        let computed = normalization("float[2,4] x, int64[1] axes", "z = Neg (x)")
            .replace(": 17", ": 18")
            .replace("<axes = [-1]> (x)", "(x, axes)")
            .replace("<axes = [-1]> (sq)", "(sq, axes)");
        check_refuses(&FuseLayerNorm, &computed, "the axes of a ReduceMean are computed");
    }

    #[test]
    fn refuses_results_and_parameters_of_other_types() {
        let widened = normalization("float16[2,4] x", "z = Neg (y)")
            .replace("sq = Mul (d, d)", "w = Cast <to = 1> (d) sq = Mul (w, w)")
            .replace("y = Div (d, s)", "y = Div (w, s)");
        check_refuses(&FuseLayerNorm, &widened, "the result has another type than what is normalized");
        // The deviation is read elsewhere, so that no smaller form can be fused either.
        let scaled = normalization("float16[2,4] u, float[4] scale, float16[4] shift", "z = Neg (s)")
            .replace("mean = ", "x = Cast <to = 1> (u) mean = ")
            .replace("y = Div (d, s)", "n = Div (d, s) k = Mul (n, scale) h = Cast <to = 10> (k) y = Add (h, shift)")
            .replace("float[A,B] y", "float16[A,B] y");
        check_refuses(&FuseLayerNorm, &scaled, "a scale or shift has another type");
        assert!(check(&FuseLayerNorm, &scaled.replace("Neg (s)", "Neg (x)")).contains("LayerNormalization"));
    }

    #[test]
    fn only_a_widening_cast_belongs_to_a_normalization() {
        let narrowed = normalization("double[2,4] u", "z = Neg (s)")
            .replace("mean = ", "x = Cast <to = 1> (u) mean = ")
            .replace("y = Div (d, s)", "n = Div (d, s) y = Cast <to = 11> (n)")
            .replace("float[A,B] y", "double[A,B] y");
        check_refuses(&FuseLayerNorm, &narrowed, "the result has another type than what is normalized");
    }

    #[test]
    fn onnx_runtime_has_its_operators_for_two_types() {
        let graph = r#"<opset_import: ["" : 17]> g (double[N] x) => (double[N] y) { s = Sigmoid (x) y = Mul (x, s) }"#;
        let ort = PassContext::default().with_target(Target::Ort);
        check_refuses_in(&FuseGelu, graph, "the operator for float and float16 only", &ort);
        check_refuses(&FuseGelu, graph, "QuickGelu is an operator of ONNX Runtime");
        check_refuses_in(&FuseGelu, &graph.replace("double", "int32"), "not floating-point numbers", &ort);
    }
}
