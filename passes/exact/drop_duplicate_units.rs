//! Merges hidden units that compute the same, and drops those that compute zero.

use super::linear::{Gain, Layer, LayerKind, RTOL};
use super::rounding::{Sum, sums};
use crate::{Error, Info, Kind, Match, Opt, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, NodeId, Patch, Tensor, Use, ValueId};
use std::{collections::BTreeMap, sync::LazyLock};

/// See [`INFO`].
pub struct DropDuplicateUnits;

static INFO: Info = Info {
    name: "drop-duplicate-units",
    summary: "merges hidden units with equal weights and drops units that are always zero (off by default)",
    doc: "Between two layers with nothing but an activation in between, hidden units whose incoming weights and bias \
          have the same bits compute the same: one stays, and its outgoing weights become the sum of theirs. Units \
          without incoming weights that the activation maps to zero go altogether. Trained models rarely have any, so \
          the pass is off unless `enabled` is set. Declines where anything else reads the units, where other nodes \
          share a weight, and on grouped convolutions.",
    options: &[Opt { name: "enabled", unit: "true or false", default: "false", doc: "Whether the pass does anything" }],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Parameters, Saving::Flops],
    source: None,
};

impl Pass for DropDuplicateUnits {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        if !cx.setting::<bool>(&INFO, "enabled")? {
            return Ok(Outcome::default());
        }
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![rule(
        "merge-units",
        pat!(reader: MatMul|Gemm|Conv(act: Relu|Sigmoid|Tanh|Erf|Gelu|Elu|LeakyRelu|Selu|Softplus|Softsign|HardSigmoid|HardSwish|Mish(h), _, ..)),
        merge_units,
    )]
}

/// The layer that makes the units, and the constant sum after it if there is one.
struct Maker<'a> {
    layer: Layer<'a>,
    sum: Option<(NodeId, usize)>,
}

impl<'a> Maker<'a> {
    fn of(m: &Match<'a>, h: ValueId) -> Result<Maker<'a>, Refusal> {
        let graph = m.graph();
        let id = graph.producer(h).ok_or(Refusal::NoMatch)?;
        let node = graph.node(id);
        m.only_if(node.scope() == m.scope())?;
        if !node.is("Add") {
            return Ok(Maker { layer: Layer::at(m, id)?, sum: None });
        }
        let constant = node.inputs().iter().position(|v| v.is_some_and(|v| graph.constant(v).is_some()));
        let index = constant.ok_or(Refusal::NoMatch)?;
        let product = node.input(1 - index).and_then(|v| graph.producer(v)).ok_or(Refusal::NoMatch)?;
        m.only_if(graph.node(product).scope() == m.scope() && index < 2)?;
        Ok(Maker { layer: Layer::at(m, product)?, sum: Some((id, index)) })
    }

    /// Where the bias is: the node and the index of its input.
    fn bias(&self) -> Option<(NodeId, usize)> {
        self.sum.or_else(|| self.layer.node.input(2).map(|_| (self.layer.id(), 2)))
    }
}

fn merge_units(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let graph = m.graph();
    let reader = Layer::at(m, m.id("reader"))?;
    let maker = Maker::of(m, m.value("h"))?;
    let ungrouped = |layer: &Layer| layer.node.int("group").unwrap_or(1) == 1;
    let (Some(out_axis), Some(in_axis)) = (output_axis(&maker.layer), output_axis(&reader).map(|axis| 1 - axis)) else {
        return Err(Refusal::NoMatch);
    };
    let units = maker.layer.outputs;
    let plain = ungrouped(&maker.layer) && ungrouped(&reader) && reader.node.int("transA").unwrap_or(0) == 0;
    m.only_if(plain && reader.inputs == units)?;
    let bias = match maker.bias() {
        None => None,
        Some((id, index)) => {
            let tensor = graph.node(id).input(index).and_then(|v| graph.constant(v)).ok_or(Refusal::NoMatch)?;
            let gain = match maker.sum {
                Some(_) => maker.layer.gain(tensor)?,
                None => Gain::read(tensor, Some(2), 0, units)?,
            };
            Some((id, index, tensor, gain))
        }
    };
    let columns = along(maker.layer.weight, out_axis)?;
    let mut classes: BTreeMap<Vec<u64>, Vec<usize>> = BTreeMap::new();
    for (unit, column) in columns.iter().enumerate() {
        let bias = bias.as_ref().map_or(0.0, |b| b.3.at(unit));
        let zero = column.iter().all(|&w| w == 0.0) && activation(m.node("act"), bias) == Some(0.0);
        if !zero {
            let bits = column.iter().chain([&bias]).map(|x| x.to_bits()).collect();
            classes.entry(bits).or_default().push(unit);
        }
    }
    let mut classes: Vec<Vec<usize>> = classes.into_values().collect();
    classes.sort();
    m.only_if(classes.len() < units && !classes.is_empty())?;
    require_own(m, &maker, &reader)?;

    let single: Vec<Vec<usize>> = classes.iter().map(|class| vec![class[0]]).collect();
    let weight = combine(maker.layer.weight, out_axis, &single)?;
    let mut inputs = maker.layer.node.inputs().to_vec();
    inputs[1] = Some(g.constant("weight", weight));
    let bias = match bias {
        Some((id, index, tensor, _)) if tensor.len() > 1 => {
            let axis = tensor.dims().iter().position(|&dim| dim == units).ok_or(Refusal::NoMatch)?;
            Some((id, index, Some(g.constant("bias", combine(tensor, axis, &single)?))))
        }
        Some((id, index, ..)) => Some((id, index, graph.node(id).input(index))),
        None => None,
    };
    if let Some((_, 2, value)) = bias.filter(|b| b.0 == maker.layer.id()) {
        inputs[2] = value;
    }
    let mut made = g.node_with(maker.layer.node.clone(), &inputs, 1)[0];
    if let (Some((sum, _)), Some((_, _, Some(value)))) = (maker.sum, bias) {
        made = g.node(graph.node(sum).clone(), &[made, value]);
    }
    made = g.node(m.node("act").clone(), &[made]);
    let mut inputs = reader.node.inputs().to_vec();
    inputs[0] = Some(made);
    inputs[1] = Some(g.constant("weight", combine(reader.weight, in_axis, &classes)?));
    Ok(g.node_with(reader.node.clone(), &inputs, 1)[0])
}

/// The axis of the output channels in the weight of an ungrouped layer.
fn output_axis(layer: &Layer) -> Option<usize> {
    match layer.kind {
        LayerKind::Conv => Some(0),
        LayerKind::Gemm => Some(usize::from(layer.node.int("transB").unwrap_or(0) == 0)),
        LayerKind::MatMul if layer.weight.dims().len() == 2 => Some(1),
        _ => None,
    }
}

/// Refuses unless the units and the weights of both layers have no other readers.
fn require_own(m: &Match, maker: &Maker, reader: &Layer) -> Result<(), Refusal> {
    let graph = m.graph();
    let alone = |value: Option<ValueId>| value.is_some_and(|v| graph.value(v).uses().len() == 1 && !graph.is_output(v));
    let sum = maker.sum.is_none_or(|(id, _)| alone(graph.node(id).output(0)));
    let values = alone(maker.layer.node.output(0)) && sum && alone(m.node("act").output(0));
    m.require(values, "something else reads the units")?;
    m.require(
        !maker.layer.shares_weight() && !reader.shares_weight(),
        "the weight is shared: a copy would enlarge the file",
    )?;
    let bias = maker.bias().and_then(|(id, index)| Some((id, index, graph.node(id).input(index)?)));
    let own = bias.is_none_or(|(id, index, v)| graph.value(v).uses().iter().all(|u| *u == Use::Node(id, index)));
    m.require(own, "the bias is shared: a copy would enlarge the file")
}

/// What an activation makes of a number, for those that may make zero of one.
fn activation(node: &Node, x: f64) -> Option<f64> {
    match node.op_type.as_str() {
        "Relu" => Some(x.max(0.0)),
        "Tanh" | "Erf" | "Gelu" | "Elu" | "LeakyRelu" | "Selu" | "Softsign" | "HardSwish" | "Mish" => {
            (x == 0.0).then_some(0.0)
        }
        _ => None,
    }
}

/// The elements of a tensor for every index of `axis`.
fn along(tensor: &Tensor, axis: usize) -> Result<Vec<Vec<f64>>, Refusal> {
    let numbers = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
    let size = tensor.dims()[axis];
    let inner: usize = tensor.dims()[axis + 1..].iter().product();
    let mut found = vec![Vec::new(); size];
    for (block, values) in numbers.chunks(inner.max(1)).enumerate() {
        found[block % size].extend_from_slice(values);
    }
    Ok(found)
}

/// A tensor that holds, along `axis`, the sum over each class of old indices.
fn combine(tensor: &Tensor, axis: usize, classes: &[Vec<usize>]) -> Result<Tensor, Refusal> {
    let numbers = tensor.to_f64s().ok_or(Refusal::NoMatch)?;
    let size = tensor.dims()[axis];
    let inner: usize = tensor.dims()[axis + 1..].iter().product();
    let mut all = Vec::with_capacity(numbers.len());
    for slab in numbers.chunks((size * inner).max(1)) {
        for class in classes {
            all.extend(
                (0..inner)
                    .map(|at| class.iter().fold(Sum::of(0.0, 1.0), |sum, unit| sum.plus(slab[unit * inner + at]))),
            );
        }
    }
    let mut dims = tensor.dims().to_vec();
    dims[axis] = classes.len();
    sums(tensor.dtype(), &dims, &all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_in, check_refuses_in};
    use insta::assert_snapshot;

    const OPSET: &str = "<ir_version: 8, opset_import: [\"\" : 13]>";
    const WEIGHTS: &str =
        "float[2,4] u = {1, 2, 1, 0, 3, 4, 3, 0}, float[4] b = {1, 2, 1, -1}, float[4,2] d = {1, 2, 3, 4, 5, 6, 7, 8}";

    fn enabled() -> PassContext<'static> {
        let settings = [("drop-duplicate-units.enabled".to_owned(), "true".to_owned())];
        PassContext::default().with_settings(settings).with_evaluator(lathe_testkit::evaluator())
    }

    #[test]
    fn merges_equal_units_and_drops_zero_ones() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y) <{WEIGHTS}> {{
            t = MatMul (x, u) s = Add (t, b) r = Relu (s) y = MatMul (r, d) }}"
        );
        assert_snapshot!(check_in(&DropDuplicateUnits, &graph, &enabled()), @"
        g (float[N,2] x) => (float[N,2] y) <
            float[2,4] u = {1, 2, 1, 0, 3, 4, 3, 0},
            float[4] b = {1, 2, 1, -1},
            float[4,2] d = {1, 2, 3, 4, 5, 6, 7, 8},
            float[2,2] y_weight = {1, 2, 3, 4},
            float[2] y_bias = {1, 2},
            float[2,2] y_weight_1 = {6, 8, 3, 4}
        > {
            y_1 = MatMul (x, y_weight)
            y_2 = Add (y_1, y_bias)
            y_3 = Relu (y_2)
            y = MatMul (y_3, y_weight_1)  # float[N,2]
        }
        ");
    }

    #[test]
    fn merges_units_of_gemm_and_conv() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y) <{WEIGHTS}> {{
            t = Gemm (x, u, b) r = Sigmoid (t) y = Gemm (r, d) }}"
        );
        check_in(&DropDuplicateUnits, &graph, &enabled());
        let graph = format!("{OPSET} g (float[N,1,5] x) => (float[N,1,M] y) <float[2,1,2] w = {{1, 2, 1, 2}}, float[2] c = {{3, 3}}, float[1,2,3] v = {{1, 2, 3, 4, 5, 6}}> {{
            t = Conv (x, w, c) r = Relu (t) y = Conv <pads = [1, 1]> (r, v) }}");
        check_in(&DropDuplicateUnits, &graph, &enabled());
    }

    #[test]
    fn works_inside_a_subgraph() {
        let graph = format!(
            "{OPSET} g (float[N,2] x, bool e) => (float[N,2] y) <{WEIGHTS}> {{
            y = If (e) <then_branch = p () => (float[N,2] z) {{ t = MatMul (x, u) r = Tanh (t) z = MatMul (r, d) }},
                        else_branch = q () => (float[N,2] v) {{ v = Identity (x) }}> }}"
        );
        check_in(&DropDuplicateUnits, &graph, &enabled());
    }

    #[test]
    fn keeps_units_that_are_read_elsewhere_and_shared_weights() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y, float[N,4] r) <{WEIGHTS}> {{
            t = MatMul (x, u) r = Relu (t) y = MatMul (r, d) }}"
        );
        check_refuses_in(&DropDuplicateUnits, &graph, "something else reads the units", &enabled());
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y, float[N,4] z) <{WEIGHTS}> {{
            t = MatMul (x, u) z = MatMul (x, u) r = Relu (t) y = MatMul (r, d) }}"
        );
        check_refuses_in(&DropDuplicateUnits, &graph, "the weight is shared", &enabled());
    }

    #[test]
    fn keeps_a_bias_that_others_read() {
        let graph = format!(
            "{OPSET} g (float[N,2] x) => (float[N,2] y, float[N,4] z) <{WEIGHTS}> {{
            t = MatMul (x, u) s = Add (t, b) r = Relu (s) y = MatMul (r, d) z = Neg (b) }}"
        );
        check_refuses_in(&DropDuplicateUnits, &graph, "the bias is shared: a copy would enlarge the file", &enabled());
    }
}
