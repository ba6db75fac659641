//! Folds a constant factor or sum into all of the layers that read it.

use super::linear::{Gain, Layer, LayerKind, RTOL, require_no_growth_over};
use super::rounding::{Sum, is_weight_type, sums};
use crate::{Change, Editor, Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Saving, edit_graphs};
use lathe_ir::{Bindings, Graph, Model, NodeId, Patch, Tensor, Use, ValueId};

/// See [`INFO`].
pub struct FoldNormAffine;

static INFO: Info = Info {
    name: "fold-norm-affine",
    summary: "folds the factor and sum at the end of a normalization into all layers that read it",
    doc: "A normalization that is spelled out ends in a product with γ and perhaps a sum with β. Where everything that \
          reads the result is a Conv, Gemm or MatMul with a weight of its own, γ goes into all of these weights and β \
          into their biases (a MatMul must be followed by a constant sum). Declines where anything else reads the \
          result, where a weight is shared, where a padded Conv would see the sum at its border, and where constants \
          cancel or would lose digits.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Flops],
    source: None,
};

impl Pass for FoldNormAffine {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        edit_graphs(model, cx, fold_all)
    }
}

/// Folds everywhere in one graph, the last nodes first: a sum before the product it follows.
fn fold_all(editor: &mut Editor) -> Result<(), Error> {
    let Editor { graph, opsets, functions, context: cx, outcome } = editor;
    let named = |id: &NodeId, graph: &Graph| ["Mul", "Add"].iter().any(|op| graph.node(*id).is(op));
    let candidates: Vec<NodeId> = graph.all_nodes().into_iter().filter(|id| named(id, graph)).collect();
    let mut facts = None;
    for id in candidates.into_iter().rev() {
        if graph.get(id).is_none() || readers(graph, id).is_none() {
            continue;
        }
        let known = facts.get_or_insert_with(|| cx.facts.take(graph, opsets, functions));
        let mut patch = Patch::new(graph);
        let place = Match { graph, facts: known, opsets, functions, cx, bindings: Bindings::default() };
        match plan(&place, &mut patch, id) {
            Ok(replaced) => {
                let what = if graph.node(id).is("Mul") { "factor-of-layers" } else { "sum-of-layers" };
                outcome.changes.push(Change { what: what.into(), place: graph.describe(id) });
                carry_out(graph, patch, id, &replaced);
                facts = None;
            }
            Err(Refusal::NoMatch) => {}
            Err(Refusal::Reason(reason)) => outcome.refuse(reason, graph.describe(id)),
        }
    }
    if let Some(facts) = facts {
        cx.facts.keep(graph, facts);
    }
    Ok(graph.sort()?)
}

/// The nodes that read the output of `id` as their first input, if nothing else does and there are at least two.
fn readers(graph: &Graph, id: NodeId) -> Option<Vec<NodeId>> {
    let node = graph.node(id);
    let uses = graph.value(node.output(0)?).uses();
    if uses.len() < 2 {
        return None;
    }
    let reader = |place: &Use| match place {
        Use::Node(user, 0) if graph.node(*user).scope() == node.scope() => Some(*user),
        _ => None,
    };
    uses.iter().map(reader).collect()
}

/// Builds the layers anew; returns the nodes whose outputs they replace.
fn plan(m: &Match, g: &mut Patch, id: NodeId) -> Result<Vec<(NodeId, ValueId)>, Refusal> {
    let graph = m.graph();
    let node = graph.node(id);
    let wide = node.output(0).ok_or(Refusal::NoMatch)?;
    let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Err(Refusal::NoMatch) };
    let (x, c) = match (graph.constant(a), graph.constant(b)) {
        (None, Some(c)) => (a, c),
        (Some(c), None) => (b, c),
        _ => return Err(Refusal::NoMatch),
    };
    m.only_if(is_weight_type(c.dtype()))?;
    let layers: Vec<Layer> =
        readers(graph, id).ok_or(Refusal::NoMatch)?.into_iter().map(|id| Layer::at(m, id)).collect::<Result<_, _>>()?;
    // A weight that is refused is found before the others are computed.
    m.require(!layers.iter().any(Layer::shares_weight), "a weight is shared: a copy would enlarge the file")?;
    let (mut replaced, mut gone) = (Vec::new(), vec![id]);
    for layer in &layers {
        let gain = layer.input_gain(m, x, wide, c)?;
        gone.push(layer.id());
        if node.is("Mul") {
            replaced.push((layer.id(), layer.on(g, x, &gain, &Gain::ZERO)?));
        } else if layer.kind == LayerKind::MatMul {
            let (sum, old) = sum_after(m, layer)?;
            let response = layer.response(&gain)?;
            let old = layer.gain(old)?;
            let all: Vec<Sum> = (0..layer.outputs).map(|i| response.at(i).plus(old.at(i))).collect();
            let bias = g.constant("bias", sums(c.dtype(), &[layer.outputs], &all)?);
            let product = layer.on(g, x, &Gain::ONE, &Gain::ZERO)?;
            replaced.push((sum, g.node(graph.node(sum).clone(), &[product, bias])));
            gone.push(sum);
        } else {
            replaced.push((layer.id(), layer.on(g, x, &Gain::ONE, &gain)?));
        }
    }
    require_no_growth_over(m, g, &gone)?;
    Ok(replaced)
}

/// The constant sum that follows a MatMul and takes what a bias would.
fn sum_after<'a>(m: &Match<'a>, layer: &Layer) -> Result<(NodeId, &'a Tensor), Refusal> {
    let graph = m.graph();
    let product = layer.node.output(0).ok_or(Refusal::NoMatch)?;
    let uses = graph.value(product).uses();
    let sum = match (uses.len(), uses.first()) {
        (1, Some(Use::Node(user, _))) if graph.node(*user).is("Add") => *user,
        _ => return Err("a MatMul has no bias, and no constant sum follows it".into()),
    };
    let other = graph.node(sum).inputs().iter().flatten().find(|&&v| v != product);
    let constant = other.and_then(|&v| graph.constant(v));
    let same_scope = graph.node(sum).scope() == layer.node.scope();
    let constant = constant.filter(|_| same_scope).ok_or("a MatMul has no bias, and no constant sum follows it")?;
    Ok((sum, constant))
}

fn carry_out(graph: &mut Graph, patch: Patch, id: NodeId, replaced: &[(NodeId, ValueId)]) {
    let scope = graph.node(id).scope();
    let base = graph.node(id).output(0).map(|v| graph.value(v).name.clone()).unwrap_or_default();
    graph.apply(patch, scope, &base);
    let mut unused = Vec::new();
    for &(old, new) in replaced {
        let value = graph.node(old).output(0).expect("a layer that is folded into is used");
        graph.replace(value, new);
        unused.push(old);
    }
    graph.remove_unused(unused);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    const OPSET: &str = "<ir_version: 8, opset_import: [\"\" : 13]>";
    const WEIGHTS: &str = "float[2] s = {2, -3}, float[2] b = {1, 4}, float[2,3] q = {1, 2, 3, 4, 5, 6}, float[2,2] k = {1, 2, 3, 4}, float[3] d = {1, 2, 3}";

    #[test]
    fn folds_a_factor_into_two_layers() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z) <{WEIGHTS}> {{
            r = Relu (x) t = Mul (s, r) u = MatMul (t, q) y = Relu (u) z = MatMul (t, k) }}"
        );
        assert_snapshot!(check(&FoldNormAffine, &graph), @"
        g (float[N,2] x) => (float[N,3] y, float[N,2] z) <
            float[2] s = {2, -3},
            float[2] b = {1, 4},
            float[2,3] q = {1, 2, 3, 4, 5, 6},
            float[2,2] k = {1, 2, 3, 4},
            float[3] d = {1, 2, 3},
            float[2,3] t_weight = {2, 4, 6, -12, -15, -18},
            float[2,2] t_weight_1 = {2, 4, -9, -12}
        > {
            r = Relu (x)
            u = MatMul (r, t_weight)
            y = Relu (u)  # float[N,3]
            z = MatMul (r, t_weight_1)  # float[N,2]
        }
        ");
    }

    #[test]
    fn all_layers_that_read_it_or_none() {
        let graph = |layers: &str, outputs: &str| {
            format!(
                "{OPSET} g (float[N,2] x) => ({outputs}) <{WEIGHTS}, float[2,2] l = {{4, 3, 2, 1}}> {{ r = Relu (x) t = Mul (s, r) {layers} }}"
            )
        };
        let three =
            graph("y = MatMul (t, q) z = MatMul (t, k) w = MatMul (t, l)", "float[N,3] y, float[N,2] z, float[N,2] w");
        assert!(!check(&FoldNormAffine, &three).contains("Mul (s, r)"));
        // One layer alone is for fold-scale.
        crate::testing::check_untouched(&FoldNormAffine, &graph("y = MatMul (t, q)", "float[N,3] y"));
    }

    #[test]
    fn folds_factor_and_sum() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z) <{WEIGHTS}> {{
            r = Relu (x) t = Mul (r, s) o = Add (t, b) u = MatMul (o, q) y = Add (d, u) z = Gemm (o, k) }}"
        );
        assert_snapshot!(check(&FoldNormAffine, &graph), @"
        g (float[N,2] x) => (float[N,3] y, float[N,2] z) <
            float[2] s = {2, -3},
            float[2] b = {1, 4},
            float[2,3] q = {1, 2, 3, 4, 5, 6},
            float[2,2] k = {1, 2, 3, 4},
            float[3] d = {1, 2, 3},
            float[3] o_bias = {18, 24, 30},
            float[2] o_bias_1 = {13, 18},
            float[2,3] t_weight = {2, 4, 6, -12, -15, -18},
            float[2,2] t_weight_1 = {2, 4, -9, -12}
        > {
            r = Relu (x)
            o_1 = MatMul (r, t_weight)
            y = Add (o_1, o_bias)  # float[N,3]
            z = Gemm (r, t_weight_1, o_bias_1)  # float[N,2]
        }
        ");
    }

    #[test]
    fn works_inside_a_subgraph() {
        let graph = format!("{OPSET} g (float[N,2] x, bool e) => (float[N,2] y) <{WEIGHTS}> {{
            y = If (e) <then_branch = p () => (float[N,2] u) {{ t = Mul (x, s) v = MatMul (t, k) w = Gemm (t, i) u = Add (v, w) }},
                        else_branch = q () => (float[N,2] v) {{ v = Identity (x) }}> }}");
        check(&FoldNormAffine, &graph.replace("float[3] d", "float[2,2] i = {4, 3, 2, 1}, float[3] d"));
    }

    #[test]
    fn keeps_constants_that_cancel_or_lose_digits() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y, float[N,2] z)
             <float[2] s = {{1e-20, 1e-20}}, float[2,2] q = {{1e-20, 2e-20, 3e-20, 4e-20}}, float[2,2] k = {{1, 1, -1, -1}},
              float[2] c = {{1e10, 1e10}}> {{ BODY }}"
        );
        let body = "t = Mul (x, s) y = MatMul (t, q) z = MatMul (t, k)";
        check_refuses(&FoldNormAffine, &graph.replace("BODY", body), "too small for its type");
        let body = "t = Add (x, c) y = Gemm (t, q) z = Gemm (t, k)";
        check_refuses(&FoldNormAffine, &graph.replace("BODY", body), "the constants cancel");
        let body = "t = Add (x, c) u = MatMul (t, q) y = Add (u, c) v = MatMul (t, k) z = Add (v, s)";
        check_refuses(&FoldNormAffine, &graph.replace("BODY", body), "the constants cancel");
    }

    #[test]
    fn keeps_what_it_must() {
        let graph =
            |body: &str| format!("{OPSET} g (float[N,2] x) => (float[N,3] y, float[N,2] z) <{WEIGHTS}> {{ {body} }}");
        check_refuses(
            &FoldNormAffine,
            &graph("t = Add (x, b) y = MatMul (t, q) z = MatMul (t, k)"),
            "a MatMul has no bias",
        );
        check_refuses(
            &FoldNormAffine,
            &graph("t = Mul (x, s) y = MatMul (t, q) z = MatMul (t, k) w = MatMul (x, k)"),
            "a weight is shared",
        );
        let mut model = crate::testing::model(&graph("t = Mul (x, s) y = MatMul (t, q) z = Relu (t)"));
        assert_eq!(FoldNormAffine.apply(&mut model, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn keeps_a_sum_that_reaches_the_border_of_a_transposed_convolution() {
        let graph = format!("{OPSET} g (float[N,2,4] x) => (float[N,2,k] y, float[N,2,k] z)
            <float[2,2,2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2,2,2] v = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2,1] c = {{1, 2}}> {{
            t = Add (x, c) y = ConvTranspose (t, w) z = ConvTranspose (t, v) }}");
        check_refuses(
            &FoldNormAffine,
            &graph,
            "a shift reaches the border of a ConvTranspose in other ways than its middle",
        );
    }
}
