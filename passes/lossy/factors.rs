//! Layers as matrices under what they read, and their replacement by two thinner layers.

use super::{Cost, MethodContext, Tap, Weight};
use crate::Error;
use faer::{Mat, MatRef};
use lathe_analysis::{Calibrate, Gram, Moments, Rows};
use lathe_ir::{DataType, Graph, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeMap;

/// Matrices whose smaller side is below this are not worth two products.
const SMALLEST_SIDE: usize = 32;

/// Inputs of a layer above which no second moments are collected: memory grows with the square.
pub const MOST_INPUTS: usize = 8192;

/// What was seen of a layer.
pub(super) struct LayerStatistics {
    /// Second moments of what every use reads, `[k, k]`.
    pub grams: Vec<Gram>,
    /// Mean square norm of a row of every use's output.
    pub outputs: Vec<f64>,
    /// Both, of every use, on rows that no fit sees; empty where none are held out.
    pub held: Vec<(Gram, f64)>,
}

/// What a fit to what was seen of a use is judged by.
pub(super) struct Judge<'a> {
    pub gram: &'a Gram,
    /// The mean square norm that errors are told relative to.
    pub output: f64,
}

impl LayerStatistics {
    /// The rows that are held out. Where there are none, those of the fit, with its error raised by what least squares of
    /// as many unknowns as there are inputs lose beyond the rows that they were fitted to.
    pub fn judges(&self) -> Result<Vec<Judge<'_>>, &'static str> {
        if !self.held.is_empty() {
            return Ok(self.held.iter().map(|(gram, output)| Judge { gram, output: *output }).collect());
        }
        let judge = |(gram, output): (&'_ Gram, &f64)| {
            let (rows, unknowns) = (gram.rows as f64, gram.matrix.size() as f64);
            let beyond = rows / (rows - unknowns) * (rows - 1.0) / (rows - unknowns - 1.0);
            (rows > unknowns + 1.0).then_some(output / beyond)
        };
        let all = self.grams.iter().zip(&self.outputs);
        let judges = all.map(|(gram, output)| Some(Judge { gram, output: judge((gram, output))? }));
        judges
            .collect::<Option<Vec<_>>>()
            .ok_or("fewer rows were seen of it than a fit needs, and none are held out to judge it")
    }
}

/// A layer's weight with what was seen of it, in double precision.
pub(super) struct Layer {
    /// `[k, n]`.
    pub matrix: Mat<f64>,
    /// `Σ G / ‖Y‖²` over the uses: the error under it is the sum of the uses' squared relative errors.
    pub joint: Mat<f64>,
    /// The same of every use, on the rows that fits are judged by.
    pub judges: Vec<Mat<f64>>,
}

/// The rows whose second moments methods may want of a weight; none if it is no layer or too wide.
pub fn gram_rows(weight: &Weight) -> Vec<Rows> {
    let rows = weight.taps.iter().filter_map(|tap| tap.rows.clone());
    rows.filter(|_| weight.sides().0 <= MOST_INPUTS).collect()
}

/// Bytes of the second moments of a weight, of fits and of what they are judged by.
pub(super) fn statistics_bytes(weight: &Weight) -> u64 {
    let k = weight.sides().0 as u64;
    8 * k * (k + 1) * gram_rows(weight).len() as u64
}

/// Bytes that fits of a layer with `k` inputs and `n` outputs take while they are made: the weight in double precision
/// and what a decomposition makes of it, four times `[k, n]`, and some square matrices of the smaller side.
pub(super) fn working_bytes((k, n): (usize, usize)) -> u64 {
    let (k, n) = (k as u64, n as u64);
    8 * (4 * k * n + 2 * k * k + 4 * k.min(n).pow(2))
}

/// What was seen of a layer, or why it cannot be factored.
pub(super) fn statistics(
    graph: &Graph,
    weight: &Weight,
    cx: &MethodContext,
) -> Result<Result<LayerStatistics, &'static str>, Error> {
    let (k, n) = weight.sides();
    if weight.taps.iter().any(|tap| tap.rows.is_none()) {
        return Ok(Err("rows are picked of the constant"));
    }
    if k.min(n) < SMALLEST_SIDE {
        return Ok(Err("it has fewer than 32 inputs or outputs"));
    }
    if weight.taps.iter().any(|tap| feeds_output(graph, tap)) {
        return Ok(Err("it gives an output of the model"));
    }
    products_seen(graph, weight, cx)
}

/// What was seen of every product with a weight, however small it is and whatever it feeds, or why nothing can be fitted
/// to it.
pub(super) fn products_seen(
    graph: &Graph,
    weight: &Weight,
    cx: &MethodContext,
) -> Result<Result<LayerStatistics, &'static str>, Error> {
    let (k, axis) = (weight.sides().0, weight.inputs_axis());
    if weight.taps.iter().any(|tap| tap.inputs_axis != axis) {
        return Ok(Err("its uses sum over different axes"));
    }
    let Some(calibration) = cx.calibration else { return Ok(Err("nothing was seen of it on the calibration set")) };
    let (mut grams, mut outputs) = (Vec::new(), Vec::new());
    for tap in weight.taps.iter().filter(|tap| tap.rows.is_some()) {
        let gram = tap.rows.as_ref().map(|rows| calibration.gram(rows)).transpose()?.flatten();
        let output = calibration.moments(&tap.output_rows)?;
        let (Some(gram), Some(output)) = (gram, output) else {
            return Ok(Err("no second moments were collected of what it reads"));
        };
        let output = product_norm(graph, tap, &output);
        if !is_usable(&gram, output, k) {
            return Ok(Err("what it reads is not finite, or what it gives is all zero"));
        }
        grams.push(gram);
        outputs.push(output);
    }
    Ok(Ok(LayerStatistics { held: held(graph, weight, calibration)?, grams, outputs }))
}

/// What every use reads and gives on the rows that no fit sees; nothing unless all of it is known.
fn held(graph: &Graph, weight: &Weight, calibration: &dyn Calibrate) -> Result<Vec<(Gram, f64)>, Error> {
    let mut all = Vec::new();
    for tap in weight.taps.iter().filter(|tap| tap.rows.is_some()) {
        let gram = tap.rows.as_ref().map(|rows| calibration.held_gram(rows)).transpose()?.flatten();
        let output = calibration.held_moments(&tap.output_rows)?.map(|moments| product_norm(graph, tap, &moments));
        match (gram, output) {
            (Some(gram), Some(output)) if is_usable(&gram, output, weight.sides().0) => all.push((gram, output)),
            _ => return Ok(Vec::new()),
        }
    }
    Ok(all)
}

/// The mean square norm of a row of a product, which a Gemm multiplies with a factor.
fn product_norm(graph: &Graph, tap: &Tap, output: &Moments) -> f64 {
    let node = graph.node(tap.node);
    let factor = f64::from(node.float("alpha").filter(|_| node.is("Gemm")).unwrap_or(1.0));
    output.square.iter().sum::<f64>() / (factor * factor)
}

fn is_usable(gram: &Gram, output: f64, inputs: usize) -> bool {
    let finite = gram.matrix.upper().iter().all(|x| x.is_finite());
    gram.matrix.size() == inputs && finite && output.is_finite() && output > 0.0
}

/// Whether nothing but layout and a bias lies between a layer and an output of the model.
fn feeds_output(graph: &Graph, tap: &Tap) -> bool {
    let mut value = tap.output;
    loop {
        let uses = graph.value(value).uses();
        if uses.iter().any(|place| matches!(place, Use::Output(..))) {
            return true;
        }
        let Some(&Use::Node(id, _)) = uses.first().filter(|_| uses.len() == 1) else { return false };
        let node = graph.node(id);
        let plain = ["Add", "Reshape", "Transpose", "Cast", "Identity", "Softmax", "LogSoftmax"];
        match node.output(0).filter(|_| plain.iter().any(|op| node.is(op))) {
            Some(next) if node.scope() == ScopeId::MAIN => value = next,
            _ => return false,
        }
    }
}

/// A weight's numbers as `[k, n]`, or why it has none that can be used.
pub(super) fn matrix(graph: &Graph, weight: &Weight) -> Result<Mat<f64>, &'static str> {
    let tensor = graph.constant(weight.value).expect("weights are constants");
    let numbers = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite()));
    tensor.release();
    let numbers = numbers.ok_or("the constant holds a NaN or an infinity")?;
    let (k, n) = weight.sides();
    Ok(match weight.inputs_axis() {
        0 => Mat::from_fn(k, n, |row, column| f64::from(numbers[row * n + column])),
        _ => Mat::from_fn(k, n, |row, column| f64::from(numbers[column * k + row])),
    })
}

impl Layer {
    /// Reads the weight and scales what was seen; why it cannot be used otherwise.
    pub fn new(graph: &Graph, weight: &Weight, statistics: &LayerStatistics) -> Result<Layer, &'static str> {
        Layer::around(graph, weight, statistics, false)
    }

    /// The same, of what is read less its mean if `centred`: what the mean loses of the output, a bias can give back.
    pub fn around(
        graph: &Graph,
        weight: &Weight,
        statistics: &LayerStatistics,
        centred: bool,
    ) -> Result<Layer, &'static str> {
        let matrix = matrix(graph, weight)?;
        let k = matrix.nrows();
        // A bias gives back the mean that was seen, whatever that of other rows is.
        let scaled = |gram: &Gram, given: &Gram, output: f64| {
            let around = |row: usize, column: usize| {
                let (own, back) = (&gram.mean, &given.mean);
                back[row] * back[column] - own[row] * back[column] - back[row] * own[column]
            };
            let mean = |row: usize, column: usize| if centred { around(row, column) } else { 0.0 };
            Mat::from_fn(k, k, |row, column| (gram.matrix.get(row, column) + mean(row, column)) / output)
        };
        let mut joint = Mat::zeros(k, k);
        statistics
            .grams
            .iter()
            .zip(&statistics.outputs)
            .for_each(|(gram, output)| joint += scaled(gram, gram, *output));
        let judges = statistics.judges()?;
        let judges = judges.iter().zip(&statistics.grams).map(|(judge, gram)| scaled(judge.gram, gram, judge.output));
        Ok(Layer { matrix, joint, judges: judges.collect() })
    }

    /// The relative error of every use where the weight is off by `off`: `[k, n]`.
    pub fn errors(&self, off: MatRef<'_, f64>) -> Vec<f64> {
        let error =
            |judge: &Mat<f64>| super::spectrum::energies(off, judge.as_ref()).iter().sum::<f64>().max(0.0).sqrt();
        self.judges.iter().map(error).collect()
    }
}

/// Where a constant sum of a use's output can go without a node of its own.
enum Bias {
    /// The third input of the node itself, if it has one already: a constant with a number per output.
    Own(Option<ValueId>),
    /// A sum that is all that reads the output: its node, and which of its inputs is the constant.
    After(NodeId, usize),
}

fn bias(graph: &Graph, tap: &Tap, outputs: usize) -> Option<Bias> {
    let node = graph.node(tap.node);
    let fits = |value: ValueId| {
        let constant = graph.constant(value)?;
        let per_output = constant.dtype() == DataType::Float && constant.len() == outputs;
        (per_output && (node.is("Conv") || constant.dims().last() == Some(&outputs))).then_some(value)
    };
    if node.is("Conv") || node.is("Gemm") && node.float("beta").unwrap_or(1.0) != 0.0 {
        return match node.input(2) {
            Some(value) => fits(value).map(|value| Bias::Own(Some(value))),
            None => Some(Bias::Own(None)),
        };
    }
    let uses = graph.value(tap.output).uses();
    let Some(&Use::Node(id, index)) = uses.first().filter(|_| uses.len() == 1 && node.is("MatMul")) else {
        return None;
    };
    let (sum, other) = (graph.node(id), 1 - index.min(1));
    let constant = sum.input(other).filter(|_| sum.is("Add") && sum.scope() == ScopeId::MAIN)?;
    fits(constant).map(|_| Bias::After(id, other))
}

/// Whether a constant can be added to the output of every use without a node more.
pub(super) fn takes_bias(graph: &Graph, weight: &Weight) -> bool {
    let n = weight.sides().1;
    weight.taps.iter().all(|tap| bias(graph, tap, n).is_some())
}

/// Adds a number per output to the product of a use: in its bias or the sum after it where there is one, else in a new
/// sum.
pub(super) fn add_to_bias(graph: &mut Graph, tap: &Tap, change: &[f32]) {
    let alpha = Some(graph.node(tap.node)).filter(|node| node.is("Gemm")).and_then(|node| node.float("alpha"));
    let change: &[f32] = &change.iter().map(|x| x * alpha.unwrap_or(1.0)).collect::<Vec<f32>>();
    let name = graph.value(tap.output).name.clone();
    let fresh = graph.fresh_name(&format!("{name}_bias"));
    let place = bias(graph, tap, change.len());
    let (node, index, old) = match place {
        Some(Bias::Own(old)) => (tap.node, 2, old),
        Some(Bias::After(node, index)) => (node, index, graph.node(node).input(index)),
        None => {
            let node = graph.node(tap.node);
            let kernel = node.input(1).filter(|_| node.is("Conv")).and_then(|w| graph.constant(w));
            let spatial = kernel.map_or(0, |kernel| kernel.dims().len().saturating_sub(2));
            let dims: Vec<usize> = std::iter::once(change.len()).chain(vec![1; spatial]).collect();
            let bias = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&dims, change));
            let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[tap.output, bias], &format!("{name}_whole"));
            let add = graph.producer(sum).expect("it was just added");
            graph.replace(tap.output, sum);
            return graph.set_input(add, 0, Some(tap.output));
        }
    };
    let kept =
        old.and_then(|value| graph.constant(value)).map(|t| (t.dims().to_vec(), t.to_f32s().unwrap_or_default()));
    // A product multiplies what it adds itself.
    let factor = match node == tap.node && graph.node(node).is("Gemm") {
        true => 1.0 / graph.node(node).float("beta").unwrap_or(1.0),
        false => 1.0,
    };
    let (dims, numbers) = kept.unwrap_or_else(|| (vec![change.len()], vec![0.0; change.len()]));
    let sum: Vec<f32> = numbers.iter().zip(change).map(|(a, b)| a + b * factor).collect();
    let bias = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&dims, &sum));
    let mut inputs: Vec<Option<ValueId>> = graph.node(node).inputs().to_vec();
    inputs.resize(inputs.len().max(index + 1), None);
    inputs[index] = Some(bias);
    graph.set_inputs(node, inputs);
    if let Some(old) = old.filter(|&old| graph.value(old).uses().is_empty()) {
        graph.remove_initializer(old);
    }
}

/// Numbers of a constant along an axis at these indices.
pub(super) fn along(tensor: &Tensor, axis: usize, kept: &[usize]) -> Tensor {
    let numbers = tensor.to_f32s().expect("constants of float layers are floats");
    let mut dims = tensor.dims().to_vec();
    let inner: usize = dims[axis + 1..].iter().product();
    let (outer, size): (usize, usize) = (dims[..axis].iter().product(), dims[axis]);
    let line = |o: usize, at: usize| &numbers[(o * size + at) * inner..][..inner];
    let sliced: Vec<f32> =
        (0..outer).flat_map(|o| kept.iter().flat_map(move |&at| line(o, at).iter().copied())).collect();
    dims[axis] = kept.len();
    Tensor::from_f32s(&dims, &sliced)
}

/// The nodes that read a value.
pub(super) fn readers(graph: &Graph, value: ValueId) -> Vec<NodeId> {
    let node = |place: &Use| match *place {
        Use::Node(id, _) => Some(id),
        _ => None,
    };
    graph.value(value).uses().iter().filter_map(node).collect()
}

/// Lets these nodes read `tensor` instead of a constant, which goes if nothing else reads it.
pub(super) fn replace(graph: &mut Graph, old: ValueId, tensor: Tensor, nodes: &[NodeId]) {
    let name = graph.fresh_name(&format!("{}_kept", graph.value(old).name));
    let new = graph.add_initializer(ScopeId::MAIN, &name, tensor);
    for &id in nodes {
        for index in 0..graph.node(id).inputs().len() {
            if graph.node(id).input(index) == Some(old) {
                graph.set_input(id, index, Some(new));
            }
        }
    }
    if graph.value(old).uses().is_empty() {
        graph.remove_initializer(old);
    }
}

/// What two factors of a rank take.
pub(super) fn cost(k: usize, n: usize, rank: usize, uses: usize) -> Cost {
    let numbers = (rank * (k + n)) as u64;
    Cost { bytes: numbers * 4 + super::OVERHEAD * uses as u64, parameters: numbers, flops_per_row: 2 * numbers }
}

/// Multiplies the columns of `left` and divides those of `right` so that both reach the same largest magnitude: neither
/// overflows a short float before the other.
pub(super) fn balance(left: &mut Mat<f64>, right: &mut Mat<f64>) {
    for i in 0..left.ncols() {
        let largest = |m: &Mat<f64>| m.col(i).iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let (a, c) = (largest(left), largest(right));
        if a > 0.0 && c > 0.0 {
            let factor = (c / a).sqrt();
            left.col_mut(i).iter_mut().for_each(|x| *x *= factor);
            right.col_mut(i).iter_mut().for_each(|x| *x /= factor);
        }
    }
}

/// Row by row, in single precision.
pub(super) fn numbers(matrix: MatRef<'_, f64>) -> Vec<f32> {
    let rows = 0..matrix.nrows();
    rows.flat_map(|row| (0..matrix.ncols()).map(move |column| (row, column))).map(|at| matrix[at] as f32).collect()
}

/// Replaces every use of a weight by a product with `left: [k, r]` and one with `right: [n, r]`, transposed.
///
/// A bias stays with the second. The weight goes if nothing else reads it.
pub(super) fn emit(graph: &mut Graph, weight: &Weight, left: MatRef<'_, f64>, right: MatRef<'_, f64>) {
    let name = graph.value(weight.value).name.clone();
    let (rank, conv) = (left.ncols(), weight.dims.len() > 2);
    let numbers = if conv { numbers(left.transpose()) } else { numbers(left) };
    let dims = if conv { [&[rank], &weight.dims[1..]].concat() } else { vec![left.nrows(), rank] };
    let fresh = graph.fresh_name(&format!("{name}_left"));
    let stored = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&dims, &numbers));
    let mut inner = Vec::new();
    for tap in &weight.taps {
        let node = graph.node_mut(tap.node);
        let mut first = Node::new(if conv { "Conv" } else { "MatMul" });
        if conv {
            for attribute in ["auto_pad", "dilations", "kernel_shape", "pads", "strides"] {
                if let Some(value) = node.attribute(attribute).cloned() {
                    first = first.with(attribute, value);
                    node.remove_attribute(attribute);
                }
            }
        }
        let data = node.input(0).expect("a tap multiplies data");
        inner.push(graph.append(ScopeId::MAIN, first, &[data, stored], &format!("{name}_inner")));
    }
    second(graph, weight, &inner, right);
}

/// Makes every use of a weight a product of what `inner` has for it with `right: [n, r]`, transposed.
///
/// The weight goes if nothing else reads it.
pub(super) fn second(graph: &mut Graph, weight: &Weight, inner: &[ValueId], right: MatRef<'_, f64>) {
    let name = graph.value(weight.value).name.clone();
    let (n, rank) = (right.nrows(), right.ncols());
    let mut stored: BTreeMap<bool, ValueId> = BTreeMap::new();
    for (tap, &inner) in weight.taps.iter().zip(inner) {
        let node = graph.node(tap.node);
        // As it is for convolutions and products that turn it themselves.
        let plain = node.is("Conv") || node.is("Gemm") && node.int("transB") == Some(1);
        let value = *stored.entry(plain).or_insert_with(|| {
            let tensor = match (plain, weight.dims.len()) {
                (false, _) => Tensor::from_f32s(&[rank, n], &numbers(right.transpose())),
                (true, ndim) => {
                    let dims: Vec<usize> = [n, rank].into_iter().chain(vec![1; ndim - 2]).collect();
                    Tensor::from_f32s(&dims, &numbers(right))
                }
            };
            let fresh = graph.fresh_name(&format!("{name}_right"));
            graph.add_initializer(ScopeId::MAIN, &fresh, tensor)
        });
        graph.set_input(tap.node, 0, Some(inner));
        graph.set_input(tap.node, 1, Some(value));
    }
    let left_over: Vec<_> = graph.value(weight.value).uses().iter().copied().collect();
    for place in left_over {
        // Transpositions that led to the uses.
        if let Use::Node(id, _) = place {
            graph.remove_node(id);
        }
    }
    graph.remove_initializer(weight.value);
}

#[cfg(test)]
mod tests {
    use super::super::{spectrum::Spectrum, weights};
    use super::*;
    use lathe_ir::{Model, text};

    /// Replaces the weight by factors of full rank, which must change nothing.
    fn check(shape: &str, dims: &[usize], out: &str, body: &str) {
        let count: usize = dims.iter().product();
        let numbers: Vec<String> = (0..count).map(|i| format!("{:e}", (i * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let sizes = dims.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let bias = vec!["0.5"; 64].join(", ");
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[{shape}] x) => (float[{out}] y) \
             <float[{sizes}] w = {{{}}}, float[64] c = {{{bias}}}> {{ h = {body} y = Relu (h) }}",
            numbers.join(", ")
        );
        let model = text::parse(&source).unwrap();
        let mut changed = model.clone();
        let weight = weights(&changed.graph).0.remove(0);
        let matrix = matrix(&changed.graph, &weight).unwrap();
        let found =
            Spectrum::of(matrix.as_ref(), Mat::<f64>::identity(matrix.nrows(), matrix.nrows()).as_ref()).unwrap();
        emit(&mut changed.graph, &weight, found.left.as_ref(), found.right.as_ref());
        changed.check().unwrap();
        let layers = |model: &Model| model.graph.nodes(ScopeId::MAIN).count();
        assert_eq!(layers(&changed), layers(&model) + 1, "{body}");
        lathe_testkit::equivalent(&model, &changed, Some(1e-4), 1).unwrap_or_else(|why| panic!("{body}: {why}"));
    }

    #[test]
    fn factors_of_full_rank_change_nothing_whatever_the_attributes() {
        check("3, 72", &[72, 64], "3, 64", "MatMul (x, w)");
        check("3, 72", &[72, 64], "3, 64", "Gemm <alpha = 0.5, beta = 2.0> (x, w, c)");
        check("3, 72", &[64, 72], "3, 64", "Gemm <alpha = 0.5, transB = 1> (x, w, c)");
        check("1, 8, 9, 9", &[64, 8, 3, 3], "1, 64, 7, 7", "Conv (x, w, c)");
        check("1, 8, 9, 9", &[64, 8, 3, 3], "1, 64, 5, 5", "Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)");
        check("1, 8, 9, 9", &[64, 8, 3, 3], "1, 64, 6, 5", "Conv <dilations = [2, 2], pads = [1, 0, 0, 0]> (x, w, c)");
        check("1, 8, 9, 9", &[64, 8, 3, 3], "1, 64, 9, 9", "Conv <auto_pad = \"SAME_UPPER\"> (x, w, c)");
    }
}
