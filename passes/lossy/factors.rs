//! Layers as matrices under what they read, and their replacement by two thinner layers.

use super::{Spent, Tap, Weight};
use crate::{Context, Error};
use faer::{Mat, MatRef};
use lathe_analysis::{Gram, Rows};
use lathe_ir::{Graph, Node, ScopeId, Tensor, Use, ValueId};

/// Matrices whose smaller side is below this are not worth two products.
const SMALLEST_SIDE: usize = 32;

/// Inputs of a layer above which no second moments are collected: memory grows with the square.
pub const MOST_INPUTS: usize = 8192;

/// What was seen of a layer.
pub(super) struct Seen {
    /// Second moments of what every use reads, `[k, k]`.
    pub grams: Vec<Gram>,
    /// Mean square norm of a row of every use's output.
    pub outputs: Vec<f64>,
}

/// A layer's weight with what was seen of it, in double precision.
pub(super) struct Layer {
    /// `[k, n]`.
    pub matrix: Mat<f64>,
    /// `Σ G / ‖Y‖²` over the uses: the error under it is the sum of the uses' squared relative errors.
    pub joint: Mat<f64>,
    /// Second moments of every use over the mean square of its output.
    pub taps: Vec<Mat<f64>>,
}

/// Inputs and outputs of a layer's weight.
pub(super) fn sides(weight: &Weight) -> (usize, usize) {
    let (first, others) = (weight.dims[0], weight.dims[1..].iter().product());
    if weight.inputs_axis() == 0 { (first, others) } else { (others, first) }
}

/// The rows whose second moments methods may want of a weight; none if it is no layer or too wide.
pub fn gram_rows(weight: &Weight) -> Vec<Rows> {
    let rows: Option<Vec<Rows>> = weight.taps.iter().map(|tap| tap.rows.clone()).collect();
    rows.filter(|_| sides(weight).0 <= MOST_INPUTS).unwrap_or_default()
}

/// What was seen of a layer, or why it cannot be factored.
pub(super) fn seen(graph: &Graph, weight: &Weight, cx: &Context) -> Result<Result<Seen, &'static str>, Error> {
    let (k, n) = sides(weight);
    let axis = weight.inputs_axis();
    if weight.taps.iter().any(|tap| tap.rows.is_none()) {
        return Ok(Err("rows are picked of the constant"));
    }
    if weight.taps.iter().any(|tap| tap.inputs_axis != axis) {
        return Ok(Err("its uses sum over different axes"));
    }
    if k.min(n) < SMALLEST_SIDE {
        return Ok(Err("it has fewer than 32 inputs or outputs"));
    }
    if weight.taps.iter().any(|tap| feeds_output(graph, tap)) {
        return Ok(Err("it gives an output of the model"));
    }
    let Some(calibration) = cx.calibration else { return Ok(Err("nothing was seen of it on the calibration set")) };
    let (mut grams, mut outputs) = (Vec::new(), Vec::new());
    for tap in &weight.taps {
        let gram = tap.rows.as_ref().map(|rows| calibration.gram(rows)).transpose()?.flatten();
        let output = calibration.moments(&tap.output_rows)?;
        let (Some(gram), Some(output)) = (gram, output) else {
            return Ok(Err("no second moments were collected of what it reads"));
        };
        let output: f64 = output.square.iter().sum();
        let fits = gram.matrix.size() == k && gram.matrix.upper().iter().all(|x| x.is_finite());
        if !fits || output.is_nan() || output <= 0.0 {
            return Ok(Err("what it reads is not finite, or what it gives is all zero"));
        }
        grams.push(gram);
        outputs.push(output);
    }
    Ok(Ok(Seen { grams, outputs }))
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
    let (k, n) = sides(weight);
    Ok(match weight.inputs_axis() {
        0 => Mat::from_fn(k, n, |row, column| f64::from(numbers[row * n + column])),
        _ => Mat::from_fn(k, n, |row, column| f64::from(numbers[column * k + row])),
    })
}

impl Layer {
    /// Reads the weight and scales what was seen; why it cannot be used otherwise.
    pub fn new(graph: &Graph, weight: &Weight, seen: &Seen) -> Result<Layer, &'static str> {
        let matrix = matrix(graph, weight)?;
        let k = matrix.nrows();
        let scaled = |(gram, output): (&Gram, &f64)| {
            let full = gram.matrix.to_full();
            Mat::from_fn(k, k, |row, column| full[row * k + column] / output)
        };
        let taps: Vec<Mat<f64>> = seen.grams.iter().zip(&seen.outputs).map(scaled).collect();
        let mut joint = taps[0].clone();
        taps[1..].iter().for_each(|tap| joint += tap);
        Ok(Layer { matrix, joint, taps })
    }

    /// The relative error of every use where the weight is off by `off`: `[k, n]`.
    pub fn errors(&self, off: MatRef<'_, f64>) -> Vec<f64> {
        let error = |tap: &Mat<f64>| super::spectrum::energies(off, tap.as_ref()).iter().sum::<f64>().max(0.0).sqrt();
        self.taps.iter().map(error).collect()
    }
}

/// What two factors of a rank take.
pub(super) fn spent(k: usize, n: usize, rank: usize, uses: usize) -> Spent {
    let numbers = (rank * (k + n)) as u64;
    Spent { bytes: numbers * 4 + super::OVERHEAD * uses as u64, parameters: numbers, flops_per_row: 2 * numbers }
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
    let rank = left.ncols();
    let mut stored: Vec<(&str, ValueId)> = Vec::new();
    for tap in &weight.taps {
        let node = graph.node(tap.node);
        let kind = match (node.is("Conv"), node.is("Gemm") && node.int("transB") == Some(1)) {
            (true, _) => "Conv",
            (_, true) => "Gemm",
            _ => "MatMul",
        };
        let data = node.input(0).expect("a tap multiplies data");
        let window = |name: &str| node.attribute(name).cloned();
        let mut first = Node::new(if kind == "Conv" { "Conv" } else { "MatMul" });
        if kind == "Conv" {
            for attribute in ["auto_pad", "dilations", "kernel_shape", "pads", "strides"] {
                if let Some(value) = window(attribute) {
                    first = first.with(attribute, value);
                }
            }
        }
        let thin = if kind == "Conv" { "Conv" } else { "MatMul" };
        let mut store = |graph: &mut Graph, part: &str, which: &'static str, make: &dyn Fn() -> Tensor| match stored
            .iter()
            .find(|(w, _)| *w == which)
        {
            Some(&(_, value)) => value,
            None => {
                let fresh = graph.fresh_name(&format!("{name}_{part}"));
                let value = graph.add_initializer(ScopeId::MAIN, &fresh, make());
                stored.push((which, value));
                value
            }
        };
        let a = store(graph, "left", if thin == "Conv" { "left conv" } else { "left" }, &|| match thin {
            "Conv" => {
                let mut dims = weight.dims.clone();
                dims[0] = rank;
                Tensor::from_f32s(&dims, &numbers(left.transpose()))
            }
            _ => Tensor::from_f32s(&[left.nrows(), rank], &numbers(left)),
        });
        let b = match kind {
            "Conv" => store(graph, "right", "right conv", &|| {
                let mut dims = vec![1; weight.dims.len()];
                (dims[0], dims[1]) = (right.nrows(), rank);
                Tensor::from_f32s(&dims, &numbers(right))
            }),
            "Gemm" => {
                store(graph, "right", "right gemm", &|| Tensor::from_f32s(&[right.nrows(), rank], &numbers(right)))
            }
            _ => store(graph, "right", "right", &|| {
                Tensor::from_f32s(&[rank, right.nrows()], &numbers(right.transpose()))
            }),
        };
        let between = graph.append(ScopeId::MAIN, first, &[data, a], &format!("{name}_inner"));
        graph.set_input(tap.node, 0, Some(between));
        graph.set_input(tap.node, 1, Some(b));
        if kind == "Conv" {
            let node = graph.node_mut(tap.node);
            for attribute in ["auto_pad", "dilations", "kernel_shape", "pads", "strides"] {
                node.remove_attribute(attribute);
            }
        }
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
