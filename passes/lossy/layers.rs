//! Layers with constant weights, as matrices.

use lathe_analysis::{Rows, View};
use lathe_ir::{DataType, Graph, NodeId, ScopeId, Use, ValueId};

/// Smaller weights are not worth a node of their own.
const SMALLEST: usize = 1 << 12;

/// `y = x·W`, with `W` `[inputs, outputs]`: a `MatMul` or `Gemm` of the main graph whose weight is a stored constant.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The node.
    pub node: NodeId,
    /// As reports call it: the name of its node, else of its output.
    pub name: String,
    /// What it reads.
    pub data: ValueId,
    /// The stored weight: `[inputs, outputs]`, or `[outputs, inputs]` if `transposed`.
    pub weight: ValueId,
    /// What it gives.
    pub output: ValueId,
    /// K, the length of a row that it reads.
    pub inputs: usize,
    /// N, the length of a row that it gives.
    pub outputs: usize,
    /// Whether the weight is stored transposed.
    pub transposed: bool,
    /// What its input is for calibration.
    pub rows: Rows,
}

impl Layer {
    /// The matrix `W`, `[inputs, outputs]` row by row, without the `alpha` of a `Gemm`; `None` if a number of it is
    /// not finite.
    pub fn matrix(&self, graph: &Graph) -> Option<Vec<f32>> {
        let stored = graph.constant(self.weight)?.to_f32s()?;
        if !stored.iter().all(|x| x.is_finite()) {
            return None;
        }
        if !self.transposed {
            return Some(stored);
        }
        let mut matrix = vec![0.0; stored.len()];
        for (column, line) in stored.chunks_exact(self.inputs).enumerate() {
            for (row, &x) in line.iter().enumerate() {
                matrix[row * self.outputs + column] = x;
            }
        }
        Some(matrix)
    }

    /// Whether nothing else reads the weight.
    pub fn owns_weight(&self, graph: &Graph) -> bool {
        let uses = graph.value(self.weight).uses();
        uses.iter().all(|place| matches!(place, Use::Node(node, 1) if *node == self.node))
    }
}

/// The layers of the main graph in order of their nodes, and what was passed over with the reason.
pub fn layers(graph: &Graph) -> (Vec<Layer>, Vec<(NodeId, &'static str)>) {
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for id in graph.nodes(ScopeId::MAIN) {
        match layer(graph, id) {
            Some(Ok(layer)) => found.push(layer),
            Some(Err(reason)) => refused.push((id, reason)),
            None => {}
        }
    }
    (found, refused)
}

/// `None` for nodes that are no layers.
fn layer(graph: &Graph, id: NodeId) -> Option<Result<Layer, &'static str>> {
    let node = graph.node(id);
    let gemm = node.is("Gemm");
    if !(gemm || node.is("MatMul")) {
        return None;
    }
    let (data, weight, output) = (node.input(0)?, node.input(1)?, node.output(0)?);
    let Some(tensor) = graph.constant(weight) else {
        let constant = graph.constant(data).is_some();
        return constant.then_some(Err("the weight is the left operand"));
    };
    if graph.constant(data).is_some() {
        return None;
    }
    let &[rows, columns] = tensor.dims() else { return Some(Err("the weight has other than two axes")) };
    let transposed = gemm && node.int("transB") == Some(1);
    let (inputs, outputs) = if transposed { (columns, rows) } else { (rows, columns) };
    let problem = if !matches!(tensor.dtype(), DataType::Float | DataType::Float16 | DataType::Bfloat16) {
        Some("the weight is of a type that is not compressed")
    } else if tensor.len() < SMALLEST {
        Some("the weight is too small to pay")
    } else if gemm && node.int("transA") == Some(1) {
        Some("the rows of its input are along the last axis")
    } else if graph.is_output(weight) {
        Some("the weight is also an output of the model")
    } else if graph.scope_of(data) != Some(ScopeId::MAIN) {
        Some("it reads a value of another graph")
    } else {
        None
    };
    if let Some(reason) = problem {
        return Some(Err(reason));
    }
    let name = if node.name.is_empty() { graph.value(output).name.clone() } else { node.name.clone() };
    let rows = Rows { value: graph.value(data).name.clone(), view: View::Axis(-1) };
    Some(Ok(Layer { node: id, name, data, weight, output, inputs, outputs, transposed, rows }))
}
