//! Moves the bias of a residual branch into the normalization whose result it is added to.

use super::linear::RTOL;
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Saving, pat, rewrite, rule};
use lathe_ir::{DataType, Model, Node, NodeId, Patch, Tensor, Use, ValueId};

/// See [`INFO`].
pub struct FoldResidualBias;

static INFO: Info = Info {
    name: "fold-residual-bias",
    summary: "moves the bias of a residual branch into the normalization that it is added to",
    doc: "Where a constant bias, and then the result of a LayerNormalization, are added to one value, as in transformers \
          that normalize behind a sum, the bias moves into the shift of that LayerNormalization, and the biases of all \
          layers that read its result take back what this adds to theirs. Needs constant shift, weights and biases that \
          nothing else uses. Declines where anything but such layers reads the normalized value, and where the bias is \
          large beside the scale of the normalization, so that digits would be lost.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

impl Pass for FoldResidualBias {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &[rule("fold-residual-bias", pat!(Add(inner: Add(branch, bias), normal)), fold)])
    }
}

/// How many times the largest scale of a normalization a bias may be.
const LARGEST: f64 = 8.0;

fn fold(m: &Match, g: &mut Patch) -> Result<Replacement, Refusal> {
    let graph = m.graph();
    let (mut branch, mut bias, normal) = (m.value("branch"), m.value("bias"), m.value("normal"));
    if graph.constant(bias).is_none() {
        std::mem::swap(&mut branch, &mut bias);
    }
    let norm = graph.producer(normal).map(|id| graph.node(id));
    let norm = norm.filter(|n| n.is("LayerNormalization") && n.scope() == m.scope() && n.output(0) == Some(normal));
    let norm = norm.ok_or(Refusal::NoMatch)?;
    m.only_if(graph.constant(bias).is_some() && graph.constant(branch).is_none())?;
    let width = m.facts().shape(normal).and_then(|s| usize::try_from(s.last()?.as_known()?).ok());
    let width = width.ok_or("the width is unknown")?;
    m.require(m.same_shape("output", "normal"), "the sum may have another shape than what is normalized")?;
    let (scale, shift) = (norm.input(1), norm.input(2));
    let [bias, scale, shift] = [Some(bias), scale, shift].map(|v| vector(m, v?, width));
    let (Some(bias), Some(scale), Some(shift)) = (bias, scale, shift) else {
        return Err("the bias, the scale or the shift is not one constant for each feature".into());
    };
    let most = |all: &[f64]| all.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    m.require(most(&bias) <= LARGEST * most(&scale), "the bias is large beside the scale of the normalization")?;
    let plain = norm.outputs()[1..].iter().all(Option::is_none);
    m.require(plain, "the mean or deviation is an output too")?;
    let sum: Vec<f64> = shift.iter().zip(&bias).map(|(a, b)| a + b).collect();
    let shifted = constant(g, "shift", &[width], &sum)?;
    let normalized = copy(g, norm, &[norm.input(0), norm.input(1), Some(shifted)]);
    let mut others = Vec::new();
    for place in graph.value(normal).uses() {
        match place {
            Use::Node(user, _) if *user == m.root() => {}
            Use::Node(user, 0) => others.push(layer(m, g, *user, normalized, &bias)?),
            _ => return Err("something else than layers reads the normalized value".into()),
        }
    }
    let output = g.node(Node::new("Add"), &[branch, normalized]);
    Ok(Replacement { outputs: vec![(0, output)], others })
}

/// The elements of a constant with one float for each feature.
fn vector(m: &Match, value: ValueId, width: usize) -> Option<Vec<f64>> {
    let tensor = m.graph().constant(value).filter(|t| t.dims() == [width] && t.dtype() == DataType::Float)?;
    tensor.to_f64s()
}

fn constant(g: &mut Patch, name: &str, dims: &[usize], values: &[f64]) -> Result<ValueId, Refusal> {
    let finite = values.iter().all(|&x| (x as f32).is_finite());
    let tensor = Tensor::from_f64s(DataType::Float, dims, values).filter(|_| finite);
    Ok(g.constant(name, tensor.ok_or("a bias would not be finite")?))
}

/// A node like `old` with other inputs.
fn copy(g: &mut Patch, old: &Node, inputs: &[Option<ValueId>]) -> ValueId {
    let mut node = Node::new(old.op_type.clone()).in_domain(old.domain.clone());
    node.attributes = old.attributes.clone();
    g.node_with(node, inputs, 1)[0]
}

/// The layer that starts at `user`, reading `normalized` in which `bias` is added to its input: what it made and what it
/// makes.
fn layer(
    m: &Match,
    g: &mut Patch,
    user: NodeId,
    normalized: ValueId,
    bias: &[f64],
) -> Result<(ValueId, ValueId), Refusal> {
    let graph = m.graph();
    let node = graph.node(user);
    let other = "a layer without a bias of its own reads the normalized value";
    m.require(node.scope() == m.scope(), "a subgraph reads the normalized value")?;
    let weight = node.input(1).ok_or(other)?;
    if node.domain == "com.microsoft" && node.op_type == "Attention" {
        let corrected = corrected(m, g, weight, node.input(2).ok_or(other)?, bias)?;
        let only = node.outputs().iter().flatten().count() == 1;
        m.require(only, "an Attention has a second output")?;
        let mut inputs = node.inputs().to_vec();
        (inputs[0], inputs[2]) = (Some(normalized), Some(corrected));
        return Ok((node.output(0).ok_or(other)?, copy(g, node, &inputs)));
    }
    m.require(node.is("MatMul"), other)?;
    let product = node.output(0).ok_or(other)?;
    let [Use::Node(next, at)] = graph.value(product).uses().iter().collect::<Vec<_>>()[..] else {
        return Err(other.into());
    };
    // What it makes would need a bias again, and the old normalization would stay.
    m.require(*next != m.id("inner"), "the branch is one layer, which reads the normalized value itself")?;
    let adds = graph.node(*next);
    let gelu = adds.domain == "com.microsoft" && adds.op_type == "BiasGelu" && *at == 0;
    m.require((adds.is("Add") || gelu) && *at < 2 && adds.scope() == m.scope(), other)?;
    let own = adds.input(1 - *at).ok_or(other)?;
    let corrected = corrected(m, g, weight, own, bias)?;
    let product = copy(g, node, &[Some(normalized), Some(weight)]);
    let made = adds.output(0).ok_or(other)?;
    Ok((made, copy(g, adds, &[Some(product), Some(corrected)])))
}

/// The bias `own` of a layer less what `bias` adds to the products with its weight.
fn corrected(m: &Match, g: &mut Patch, weight: ValueId, own: ValueId, bias: &[f64]) -> Result<ValueId, Refusal> {
    let shape = "a layer's weight or bias is not a constant of its shape";
    let matrix = m.graph().constant(weight).filter(|t| t.dtype() == DataType::Float).ok_or(shape)?;
    let &[rows, columns] = matrix.dims() else { return Err(shape.into()) };
    m.require(rows == bias.len(), shape)?;
    let mut own = vector(m, own, columns).ok_or(shape)?;
    let weights = matrix.to_f32s().ok_or(shape)?;
    for (row, factor) in weights.chunks_exact(columns).zip(bias) {
        for (sum, weight) in own.iter_mut().zip(row) {
            *sum -= f64::from(*weight) * factor;
        }
    }
    constant(g, "bias", &[columns], &own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    fn graph(reader: &str) -> String {
        format!(
            r#"<opset_import: ["" : 17, "com.microsoft" : 1]>
            g (float[B,S,2] x, float[B,S,2] h) => (float[B,S,2] y, float[B,S,2] z)
            <float[2] scale = {{1, 2}}, float[2] shift = {{0.5, -1}}, float[2] bias = {{3, 4}}, float[2] own = {{5, 7}},
             float[2,2] w = {{1, 2, 3, 4}}> {{
                n = LayerNormalization <epsilon = 1e-5> (x, scale, shift)
                {reader}
                hb = Add (h, bias)
                y = Add (n, hb)
            }}"#
        )
    }

    const LAYER: &str = "p = MatMul (n, w) z = Add (own, p)";

    #[test]
    fn the_layers_behind_take_it_back() {
        let printed = check(&FoldResidualBias, &graph(LAYER));
        assert!(printed.contains("{3.5, 3}") && printed.contains("{-10, -15}"), "{printed}");
        assert_eq!(printed.matches("Add (").count(), 2, "{printed}");
        assert_eq!(printed.matches("LayerNormalization").count(), 1, "{printed}");
    }

    #[test]
    fn knows_layers_of_onnx_runtime() {
        let gelu = check(&FoldResidualBias, &graph("p = MatMul (n, w) z = com.microsoft.BiasGelu (p, own)"));
        assert!(gelu.contains("{-10, -15}") && !gelu.contains("hb ="), "{gelu}");
        let attention = graph("z = com.microsoft.Attention <num_heads = 1> (n, w6, own6)");
        let attention = attention.replace(
            "float[2] own",
            "float[2,6] w6 = {1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4}, float[6] own6 = {5, 7, 5, 7, 5, 7}, float[2] own",
        );
        let attention = check(&FoldResidualBias, &attention);
        assert!(attention.contains("{-10, -15, -10, -15, -10, -15}"), "{attention}");
    }

    #[test]
    fn refuses() {
        let refuses = |graph: &str, reason: &str| check_refuses(&FoldResidualBias, graph, reason);
        refuses(&graph("z = MatMul (n, w)"), "a layer without a bias of its own");
        refuses(&graph("z = Neg (n)"), "a layer without a bias of its own");
        refuses(&graph("p = Add (n, w) z = Add (own, p)"), "a layer without a bias of its own");
        refuses(&graph("p = MatMul (n, w) z = Sub (p, own)"), "a layer without a bias of its own");
        refuses(&graph("z = Sub (h, n)"), "something else than layers");
        refuses(&graph("p = MatMul (n, w) z = Add (p, h)"), "not a constant of its shape");
        let own = graph("p = MatMul (n, w) z = Neg (h)").replace("Add (h, bias)", "Add (p, bias)");
        refuses(&own, "the branch is one layer");
        let large = graph(LAYER).replace("bias = {3, 4}", "bias = {3, 40}");
        refuses(&large, "the bias is large");
        let wide =
            graph(LAYER).replace("float[B,S,2] h", "float[C,B,S,2] h").replace("(float[B,S,2] y", "(float[C,B,S,2] y");
        refuses(&wide, "another shape");
        let one = graph(LAYER).replace("float[2] bias = {3, 4}", "float bias = {3}");
        refuses(&one, "not one constant for each feature");
        refuses(&graph(LAYER).replace("float[B,S,2] x", "float[B,S,N] x"), "the width is unknown");
        let huge = graph(LAYER).replace("scale = {1, 2}", "scale = {1e38, 1e38}");
        let huge = huge.replace("shift = {0.5, -1}", "shift = {3e38, 0}").replace("bias = {3, 4}", "bias = {3e38, 0}");
        refuses(&huge, "a bias would not be finite");
        let branch = graph(
            "z = If (c) <then_branch = t () => (float[B,S,2] p) { p = MatMul (n, w) },
                         else_branch = e () => (float[B,S,2] q) { q = Neg (h) }>",
        );
        refuses(
            &branch.replace("g (float[B,S,2] x", "g (bool c, float[B,S,2] x"),
            "a subgraph reads the normalized value",
        );
        let twice = graph("z, u = com.microsoft.Attention <num_heads = 1> (n, w6, own6)").replace(
            "float[2] own",
            "float[2,6] w6 = {1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4}, float[6] own6 = {5, 7, 5, 7, 5, 7}, float[2] own",
        );
        refuses(&twice, "an Attention has a second output");
        let mean = graph(LAYER).replace("n = Layer", "n, mean = Layer");
        refuses(&mean, "the mean or deviation is an output too");
    }
}
