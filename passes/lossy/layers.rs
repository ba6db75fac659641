//! Constants that layers and tables are made of, and where they are used.

use super::{Candidate, Cost, Site};
use lathe_analysis::Rows;
use lathe_ir::{DataType, Graph, NodeId, Origin, ScopeId, Use, ValueId};
use std::collections::BTreeMap;

/// Smaller constants are not worth a node of their own, in elements.
pub const SMALLEST: usize = 1 << 12;

/// A use of a constant whose output can be watched.
#[derive(Debug, Clone, PartialEq)]
pub struct Tap {
    /// The node.
    pub node: NodeId,
    /// What it gives.
    pub output: ValueId,
    /// What it multiplies the constant with; `None` where it picks rows of it.
    pub rows: Option<Rows>,
    /// Which axis of the stored constant its products are summed over; for picked rows, the axis of the features. A
    /// convolution sums over all axes from this one on.
    pub inputs_axis: usize,
    /// What its output is as rows.
    pub output_rows: Rows,
}

/// A float constant in the main graph with everything that uses it: a matrix, a table, or kernels of convolutions.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The constant.
    pub value: ValueId,
    /// Its shape: two axes, or those of a convolution's weight.
    pub dims: Vec<usize>,
    /// Its uses: products, and tables that rows are picked of.
    pub taps: Vec<Tap>,
}

impl Weight {
    /// Which axis of the stored constant the products of its first use are summed over.
    pub fn inputs_axis(&self) -> usize {
        self.taps.first().map_or(0, |tap| tap.inputs_axis)
    }

    /// Inputs that one output sums over; for picked rows, the features of a row.
    pub fn inputs(&self) -> usize {
        self.sides().0
    }

    /// Inputs and outputs of the layer.
    pub(super) fn sides(&self) -> (usize, usize) {
        let (first, others) = (self.dims[0], self.dims[1..].iter().product());
        if self.inputs_axis() == 0 { (first, others) } else { (others, first) }
    }

    /// The norm of what every input of a use is multiplied with; `None` unless the weight is float32.
    pub fn norms(&self, graph: &Graph, tap: &Tap) -> Option<Vec<f64>> {
        let tensor = graph.constant(self.value)?;
        let numbers = tensor.to_f32s()?;
        tensor.release();
        let others: usize = self.dims[1..].iter().product();
        let mut squares = vec![0.0; if tap.inputs_axis == 0 { self.dims[0] } else { others }];
        for (at, w) in numbers.into_iter().enumerate() {
            squares[if tap.inputs_axis == 0 { at / others } else { at % others }] += f64::from(w).powi(2);
        }
        Some(squares.into_iter().map(f64::sqrt).collect())
    }

    /// The weight as a site with candidates.
    pub(super) fn site(&self, graph: &Graph, candidates: Vec<Candidate>) -> Site {
        let elements: u64 = self.dims.iter().product::<usize>() as u64;
        let turned = |tap: &Tap| {
            let stored = graph.node(tap.node).input(1).filter(|_| tap.rows.is_some())?;
            graph.producer(stored)
        };
        let mut nodes: Vec<NodeId> = self.taps.iter().flat_map(|tap| [turned(tap), Some(tap.node)]).flatten().collect();
        nodes.sort_unstable();
        nodes.dedup();
        Site {
            weight: Some(self.value),
            footprint: vec![self.value],
            nodes,
            name: graph.value(self.value).name.clone(),
            taps: self.taps.iter().map(|tap| tap.output).collect(),
            baseline: Cost { bytes: elements * 4, parameters: elements, flops_per_row: 2 * elements },
            candidates,
            required: false,
            isolatable: true,
        }
    }
}

/// The weights of the main graph in order of their first use, and what was passed over with the reason.
pub fn weights(graph: &Graph) -> (Vec<Weight>, Vec<(ValueId, &'static str)>) {
    of_size(graph, SMALLEST)
}

/// The same, however few elements they have, for what is left of layers that were found before.
pub(super) fn of_any_size(graph: &Graph) -> Vec<Weight> {
    of_size(graph, 1).0
}

fn of_size(graph: &Graph, smallest: usize) -> (Vec<Weight>, Vec<(ValueId, &'static str)>) {
    let mut order = Vec::new();
    let mut seen = BTreeMap::new();
    for id in graph.nodes(ScopeId::MAIN) {
        for &value in graph.node(id).inputs().iter().flatten() {
            let large = graph.constant(value).is_some_and(|t| t.len() >= smallest && t.dtype().is_float());
            if large && seen.insert(value, ()).is_none() {
                order.push(value);
            }
        }
    }
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    for value in order {
        match weight(graph, value) {
            Ok(weight) => found.push(weight),
            Err(reason) => refused.push((value, reason)),
        }
    }
    (found, refused)
}

fn weight(graph: &Graph, value: ValueId) -> Result<Weight, &'static str> {
    let tensor = graph.constant(value).expect("only constants are asked about");
    if tensor.dtype() != DataType::Float {
        return Err("the constant is not float32");
    }
    let dims = tensor.dims().to_vec();
    if !matches!(graph.value(value).origin(), Origin::Initializer(ScopeId::MAIN)) {
        return Err("the constant is not stored as an initializer of the main graph");
    }
    let taps = taps(graph, value, false)?;
    let kernels = taps.iter().all(|tap| graph.node(tap.node).is("Conv"));
    if !(dims.len() == 2 && !taps.iter().any(|tap| graph.node(tap.node).is("Conv")) || dims.len() > 2 && kernels) {
        return Err("the constant is neither a matrix nor a convolution's weight");
    }
    Ok(Weight { value, dims, taps })
}

/// What uses a constant; `turned` if it passed through a transposition.
fn taps(graph: &Graph, value: ValueId, turned: bool) -> Result<Vec<Tap>, &'static str> {
    let mut found = Vec::new();
    for place in graph.value(value).uses() {
        let &Use::Node(id, index) = place else { return Err("the constant is also an output of the model") };
        let node = graph.node(id);
        let output = node.output(0).ok_or("a node that reads the constant has no output")?;
        if node.scope() != ScopeId::MAIN {
            return Err("the constant is read in a subgraph");
        }
        if node.is("Transpose") && !turned {
            found.extend(taps(graph, output, true)?);
            continue;
        }
        let rows = |value: ValueId| Rows::last(graph.value(value).name.clone());
        let watched = |data: Option<ValueId>| data.filter(|&v| graph.constant(v).is_none());
        if node.is("Gather") && index == 0 && node.int("axis").unwrap_or(0) == 0 && !turned {
            found.push(Tap { node: id, output, rows: None, inputs_axis: 1, output_rows: rows(output) });
            continue;
        }
        if node.is("Conv") && index == 1 && !turned {
            if node.int("group").unwrap_or(1) != 1 {
                return Err("the convolution has groups");
            }
            let rows = Rows::of_conv(graph, id).ok_or("the convolution's window is not known")?;
            let output_rows = Rows::channels(graph.value(output).name.clone());
            found.push(Tap { node: id, output, rows: Some(rows), inputs_axis: 1, output_rows });
            continue;
        }
        let product = (node.is("MatMul") || (node.is("Gemm") && node.int("transA") != Some(1))) && index == 1;
        let data = watched(node.input(0)).filter(|_| product).ok_or("the constant is read by other than products")?;
        let stored_turned = turned != (node.is("Gemm") && node.int("transB") == Some(1));
        let inputs_axis = usize::from(stored_turned);
        found.push(Tap { node: id, output, rows: Some(rows(data)), inputs_axis, output_rows: rows(output) });
    }
    Ok(found)
}
