//! Products of whole numbers: weights stored so, inputs rounded anew in every run.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, OVERHEAD, Proposal, Site, Weight, batches,
    factors::{self, LayerStatistics},
    integers::Scheme,
    layers::Tap,
    quantize::{Coded, Fit, fit},
    weights, within_memory,
};
use crate::{Error, Info, Kind, Outcome, Quantity};
use lathe_ir::{DataType, Graph, Model, Node, ScopeId, Tensor, Use, ValueId};

/// Multiplies whole numbers, whose inputs are rounded as they come.
pub struct QuantizeDynamic;

static INFO: Info = Info {
    name: "quantize-dynamic",
    summary: "multiply in whole numbers, rounding inputs in every run (dynamic quantization)",
    doc: "Offers every float32 `MatMul` and `Gemm` with a constant weight as `DynamicQuantizeLinear` and `MatMulInteger`: \
          inputs are rounded to 8 bits between the least and the largest number of the run's whole input, weights to 7 \
          bits with one scale per output, so that no processor's 16-bit sums overflow, by GPTQ where that loses less. Offered only where latency is \
          limited, and taken only where its own timing wins. A table of which rows are picked too stays beside its whole \
          numbers. What one sample gives then depends a little on the samples \
          that share its batch.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[],
    source: Some("ONNX DynamicQuantizeLinear-11, MatMulInteger-10"),
};

/// Pairs of products of 8 and 7 bits fit 16 bits: processors without dot products of bytes add them so.
const SCHEME: Scheme = Scheme::new(7, usize::MAX);

const NAME: &str = "int8 products";

/// What was seen of a use.
struct Input {
    /// Mean squares of what the weight is multiplied with, `[k]`.
    squares: Vec<f64>,
    /// The largest magnitude among it.
    largest: f64,
    /// Mean square norm of a row of the output.
    output: f64,
}

/// What was seen of every use, `None` where rows are picked, or why the weight is passed over.
fn inputs_of(
    graph: &Graph,
    weight: &Weight,
    cx: &MethodContext,
) -> Result<Result<Vec<Option<Input>>, &'static str>, Error> {
    if weight.dims.len() != 2 {
        return Ok(Err("it is a convolution"));
    }
    let Some(calibration) = cx.calibration else { return Ok(Err("nothing was seen of it on the calibration set")) };
    let mut inputs = Vec::new();
    for tap in &weight.taps {
        let Some(rows) = &tap.rows else {
            inputs.push(None);
            continue;
        };
        if tap.inputs_axis != weight.inputs_axis() {
            return Ok(Err("its uses sum over different axes"));
        }
        let node = graph.node(tap.node);
        if node.is("Gemm") && ["alpha", "beta"].iter().any(|f| node.float(f).is_some_and(|factor| factor != 1.0)) {
            return Ok(Err("its Gemm scales the product or what it adds"));
        }
        let (moments, output) = (calibration.moments(rows)?, calibration.moments(&tap.output_rows)?);
        let (Some(moments), Some(output)) = (moments, output) else {
            return Ok(Err("nothing was seen of it on the calibration set"));
        };
        let output: f64 = output.square.iter().sum();
        let Some(largest) = moments.largest.filter(|l| l.is_finite()) else {
            return Ok(Err("the range of what it reads was not watched or is not finite"));
        };
        if moments.square.len() != weight.sides().0 || output.is_nan() || output <= 0.0 {
            return Ok(Err("what it reads is not finite, or what it gives is all zero"));
        }
        inputs.push(Some(Input { squares: moments.square, largest, output }));
    }
    if inputs.iter().all(Option::is_none) {
        return Ok(Err("rows are picked of the constant"));
    }
    Ok(Ok(inputs))
}

/// A weight with what was seen of its uses, or why it is passed over.
fn work_on<'a>(graph: &Graph, weight: &'a Weight, cx: &MethodContext) -> Result<Result<Work<'a>, &'static str>, Error> {
    let inputs = match inputs_of(graph, weight, cx)? {
        Ok(inputs) => inputs,
        Err(reason) => return Ok(Err(reason)),
    };
    let seen = if cx.only_timed { None } else { factors::products_seen(graph, weight, cx)?.ok() };
    Ok(Ok(Work { weight, inputs, seen }))
}

/// A weight with what was seen of its uses.
struct Work<'a> {
    weight: &'a Weight,
    inputs: Vec<Option<Input>>,
    seen: Option<LayerStatistics>,
}

impl Work<'_> {
    /// What rounding that makes up for itself is fitted to, where that loses less than rounding to nearest. What picks rows
    /// reads the constant as it is.
    fn fit(&self, graph: &Graph) -> Option<Fit> {
        let taps = self.weight.taps.iter().filter(|tap| tap.rows.is_some()).cloned().collect();
        let products = Weight { taps, ..self.weight.clone() };
        let squares = |input: &Input| input.squares.iter().map(|square| square / input.output).collect();
        let squares: Vec<Vec<f64>> = self.inputs.iter().flatten().map(squares).collect();
        fit(graph, &products, &squares, self.seen.as_ref()?, SCHEME)
    }

    fn coded(&self, graph: &Graph, fit: Option<&Fit>) -> Result<Coded, &'static str> {
        if let Some(fit) = fit {
            return Coded::fitted(graph, self.weight, SCHEME, &fit.moments);
        }
        let joint = |i: usize| self.inputs.iter().flatten().map(|input| input.squares[i] / input.output).sum();
        let squares: Vec<f64> = (0..self.weight.sides().0).map(joint).collect();
        Coded::of(graph, self.weight, SCHEME, &squares)
    }
}

/// What rounding weights and inputs loses of every use's output, relative to it. Rows are picked of the constant as it is.
fn candidate(graph: &Graph, work: &Work<'_>) -> Result<Candidate, &'static str> {
    let Work { weight, inputs, .. } = work;
    let fit = work.fit(graph);
    // What the nearest codes lose tells what fitted ones do.
    let coded = work.coded(graph, None)?;
    let matrix = factors::matrix(graph, weight)?;
    let restored = coded.restored();
    let (k, n) = weight.sides();
    let turned = weight.inputs_axis() == 1;
    let (mut lost, mut energy) = (vec![0.0; k], vec![0.0; k]);
    for row in 0..k {
        for column in 0..n {
            let w = f64::from(restored[if turned { column * k + row } else { row * n + column }]);
            lost[row] += (matrix[(row, column)] - w).powi(2);
            energy[row] += w * w;
        }
    }
    let mut gains = fit.iter().flat_map(|fit| &fit.gains).copied();
    let mut error = |input: &Input| {
        let gain = gains.next().unwrap_or(1.0);
        // A range has both signs at worst; numbers far below a step are rounded to nothing.
        let step = 2.0 * input.largest / 255.0;
        let rounded = |square: f64| square.min(step * step / 12.0);
        let total: f64 =
            (0..k).map(|i| gain * lost[i] * input.squares[i] + energy[i] * rounded(input.squares[i])).sum();
        (total / input.output).sqrt()
    };
    let elements = (k * n) as u64;
    let products = inputs.iter().flatten().count() as u64;
    let table = if products < inputs.len() as u64 { elements } else { 0 };
    let cost = Cost {
        bytes: elements + 4 * n as u64 + 5 * OVERHEAD * products + 4 * table,
        parameters: elements + table,
        flops_per_row: 2 * elements,
    };
    let loss = Loss::PerTap(inputs.iter().map(|input| input.as_ref().map_or(0.0, &mut error)).collect());
    Ok(Candidate { label: NAME.to_owned(), cost, loss, edit: Edit::new(()) })
}

impl Method for QuantizeDynamic {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn rounds_only(&self) -> bool {
        true
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.contains(&Quantity::Latency)
    }

    fn plain(&self, _: &Candidate) -> Option<&'static str> {
        Some("dynamic int8")
    }

    fn needs(&self, cx: &MethodContext) -> Needs {
        // A plan of a size that turns out to be slow is looked beyond.
        let may_serve = cx.quantities.iter().any(|q| matches!(q, Quantity::Latency | Quantity::Size));
        Needs { ranges: may_serve, ..Needs::default() }
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<()>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        if !self.serves(&cx.quantities) {
            proposal.outcome.refuse("it saves time, and latency is not limited", "the model");
            return Ok(proposal);
        }
        let graph = &model.graph;
        let place = |value: ValueId| format!("`{}`", graph.value(value).name);
        let (found, refused) = weights(graph);
        refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
        for batch in batches(&found, cx, factors::statistics_bytes) {
            let mut ready = Vec::new();
            for weight in batch {
                match work_on(graph, weight, cx)? {
                    Ok(work) => ready.push(work),
                    Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
                }
            }
            let bytes = |work: &Work<'_>| factors::working_bytes(work.weight.sides());
            let candidates = within_memory(&ready, cx, bytes, |work| candidate(graph, work));
            for (work, candidate) in ready.iter().zip(candidates) {
                match candidate {
                    Ok(candidate) => proposal.sites.push(work.weight.site(graph, vec![candidate])),
                    Err(reason) => proposal.outcome.refuse(reason, place(work.weight.value)),
                }
            }
        }
        Ok(proposal)
    }

    fn apply(&self, model: &mut Model, site: &Site, _: &Candidate, cx: &MethodContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let place = || format!("`{}`", site.name);
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let made = work_on(&model.graph, weight, cx)?
            .and_then(|work| work.coded(&model.graph, work.fit(&model.graph).as_ref()));
        match made {
            Ok(coded) => {
                emit(&mut model.graph, weight, &coded);
                outcome.change(NAME, place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}

/// Replaces every product with a weight by one of whole numbers. Only what picks rows of it uses it afterwards.
fn emit(graph: &mut Graph, weight: &Weight, coded: &Coded) {
    let name = graph.value(weight.value).name.clone();
    let (k, n) = weight.sides();
    let (codes, scales) = coded.parts();
    let turned = weight.inputs_axis() == 1;
    let code = |at: usize| codes[if turned { at % n * k + at / n } else { at }] as u8;
    let codes = Tensor::new(DataType::Int8, vec![k, n], (0..k * n).map(code).collect::<Vec<u8>>())
        .expect("there is a code for all");
    let fresh = graph.fresh_name(&format!("{name}_quantized"));
    let codes = graph.add_initializer(ScopeId::MAIN, &fresh, codes);
    let fresh = graph.fresh_name(&format!("{name}_scale"));
    let scales = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&[n], scales));
    for tap in weight.taps.iter().filter(|tap| tap.rows.is_some()) {
        let data = graph.node(tap.node).input(0).expect("a tap multiplies data");
        let added = graph.node(tap.node).input(2).filter(|_| graph.node(tap.node).is("Gemm"));
        let [rounded, step, zero] = rounded(graph, data);
        let mut then = |op: &str, inputs: &[ValueId], part: &str| {
            let node = Node::new(op);
            let node = if op == "Cast" { node.with("to", i64::from(DataType::Float.code())) } else { node };
            graph.append(ScopeId::MAIN, node, inputs, &format!("{name}_{part}"))
        };
        let sums = then("MatMulInteger", &[rounded, codes, zero], "sums");
        let sums = then("Cast", &[sums], "sums");
        let scale = then("Mul", &[step, scales], "step");
        let mut whole = then("Mul", &[sums, scale], "product");
        if let Some(added) = added {
            whole = then("Add", &[whole, added], "whole");
        }
        graph.replace(tap.output, whole);
        remove(graph, tap);
    }
}

/// `data` in whole numbers, with their step and zero point; layers that read the same share them.
fn rounded(graph: &mut Graph, data: ValueId) -> [ValueId; 3] {
    let reader = |place: &Use| match *place {
        Use::Node(id, 0) if graph.node(id).is("DynamicQuantizeLinear") => Some(id),
        _ => None,
    };
    let known = graph.value(data).uses().iter().find_map(reader);
    let id = known.unwrap_or_else(|| {
        let base = graph.value(data).name.clone();
        let outputs = ["rounded", "step", "zero"].map(|part| {
            let name = graph.fresh_name(&format!("{base}_{part}"));
            Some(graph.add_value(name, None))
        });
        graph.add_node(ScopeId::MAIN, Node::new("DynamicQuantizeLinear"), vec![Some(data)], outputs.to_vec())
    });
    [0, 1, 2].map(|index| graph.node(id).output(index).expect("it gives three values"))
}

/// Removes a product that nothing reads, and the transposition of the weight before it.
fn remove(graph: &mut Graph, tap: &Tap) {
    let weight = graph.node(tap.node).input(1);
    graph.remove_node(tap.node);
    let turn = weight.filter(|&w| graph.value(w).uses().is_empty()).and_then(|w| graph.producer(w));
    if let Some(turn) = turn {
        graph.remove_node(turn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn check(parameters: &str, body: &str) {
        let numbers: Vec<String> = (0..72 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, 72] x) => (float[3, 64] y) \
             <{parameters}, float[64] c = {{{}}}> {{ {body} }}",
            vec!["0.5"; 64].join(", ")
        );
        let model = text::parse(&source.replace("{}", &format!("{{{}}}", numbers.join(", ")))).unwrap();
        let mut changed = model.clone();
        let weight = weights(&changed.graph).0.remove(0);
        let coded = Coded::of(&changed.graph, &weight, SCHEME, &[1.0; 72]).unwrap();
        emit(&mut changed.graph, &weight, &coded);
        changed.graph.remove_initializer(weight.value);
        changed.check().unwrap();
        lathe_testkit::equivalent(&model, &changed, Some(0.03), 1).unwrap_or_else(|why| panic!("{body}: {why}"));
        let nodes: Vec<_> =
            changed.graph.nodes(ScopeId::MAIN).map(|id| changed.graph.node(id).op_type.clone()).collect();
        assert_eq!(nodes.iter().filter(|op| *op == "DynamicQuantizeLinear").count(), 1, "{nodes:?}");
        assert!(!nodes.iter().any(|op| op == "MatMul" || op == "Gemm"), "{nodes:?}");
    }

    #[test]
    fn products_of_whole_numbers_are_near_those_they_replace() {
        check("float[72, 64] w = {}", "y = MatMul (x, w)");
        check("float[64, 72] w = {}", "y = Gemm <transB = 1> (x, w, c)");
        check("float[64, 72] w = {}", "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)");
    }

    #[test]
    fn a_table_that_is_a_layer_too_stays_for_those_who_look_up() {
        let numbers: Vec<String> = (0..72 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, 72] x) => (float[3, 64] y, float[2, 72] z) \
             <float[64, 72] w = {{{}}}, int64[2] ids = {{5, 9}}> {{ z = Gather (w, ids) y = Gemm <transB = 1> (x, w) }}",
            numbers.join(", ")
        );
        let model = text::parse(&source).unwrap();
        let mut changed = model.clone();
        let weight = weights(&changed.graph).0.remove(0);
        assert_eq!(weight.taps.len(), 2);
        let coded = Coded::of(&changed.graph, &weight, SCHEME, &[1.0; 72]).unwrap();
        emit(&mut changed.graph, &weight, &coded);
        changed.check().unwrap();
        let ops: Vec<_> = changed.graph.nodes(ScopeId::MAIN).map(|id| changed.graph.node(id).op_type.clone()).collect();
        assert!(ops.contains(&"Gather".to_owned()) && !ops.contains(&"Gemm".to_owned()), "{ops:?}");
        lathe_testkit::equivalent(&model, &changed, Some(0.03), 1).unwrap();
    }

    #[test]
    fn layers_that_read_the_same_round_it_once() {
        check("float[72, 64] w = {}", "a = MatMul (x, w) b = MatMul (x, w) y = Add (a, b)");
    }
}
