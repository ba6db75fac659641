//! Constants that are no matrices of products: weights of recurrent layers, grouped and transposed convolutions, and of
//! products over several axes. They can be stored in fewer bits, with a node in front that widens them.
//!
//! How an error of such a constant shows in what its node gives is not told by sums over rows, so every choice is carried
//! out by itself and its loss is measured in the whole model.

use super::{Candidate, Cost, Edit, Loss, MethodContext, Site, Weight, integers::Layout};
use crate::{Error, Outcome};
use lathe_ir::{DataType, Graph, Model, NodeId, Origin, ScopeId, Use, ValueId};
use std::fmt;

/// Floating-point operations that trying all choices of a method may take.
const MOST_FLOPS: f64 = 2e12;

/// A constant that is only stored otherwise.
pub(super) struct Stored {
    pub value: ValueId,
    pub dims: Vec<usize>,
    /// The nodes that read it.
    nodes: Vec<NodeId>,
    /// How its numbers make lines that one output sums over; of kernels, where scales cannot change along a line.
    pub layout: Layout,
    pub is_kernel: bool,
}

/// The constants among those that are no [`Weight`], with the reasons of the others.
pub(super) fn stored(
    graph: &Graph,
    refused: Vec<(ValueId, &'static str)>,
) -> (Vec<Stored>, Vec<(ValueId, &'static str)>) {
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for (value, reason) in refused {
        match of(graph, value) {
            Some(stored) => found.push(stored),
            None => others.push((value, reason)),
        }
    }
    (found, others)
}

/// The constant of this value, if it is one that can be stored otherwise.
pub(super) fn of(graph: &Graph, value: ValueId) -> Option<Stored> {
    let tensor = graph.constant(value).filter(|t| t.dtype() == DataType::Float && !t.is_empty())?;
    if !matches!(graph.value(value).origin(), Origin::Initializer(ScopeId::MAIN)) {
        return None;
    }
    let dims = tensor.dims().to_vec();
    let read = |place: &Use| match *place {
        Use::Node(id, index) if graph.node(id).scope() == ScopeId::MAIN => {
            Some((id, kind(graph, id, index, dims.len())?))
        }
        _ => None,
    };
    let reads: Vec<(NodeId, Kind)> = graph.value(value).uses().iter().map(read).collect::<Option<_>>()?;
    let &(_, first) = reads.first()?;
    let (is_kernel, axis) = match first {
        Kind::Summed(axis) => (false, axis),
        Kind::Kernel => (true, 1),
    };
    let size = |range: std::ops::Range<usize>| dims[range].iter().product::<usize>();
    let layout = match is_kernel {
        true => Layout { outer: dims[0], length: size(1..dims.len()), inner: 1, axis },
        false => Layout { outer: size(0..axis), length: dims[axis], inner: size(axis + 1..dims.len()), axis },
    };
    let mut nodes: Vec<NodeId> = reads.iter().map(|(id, _)| *id).collect();
    nodes.sort_unstable();
    nodes.dedup();
    reads.iter().all(|(_, kind)| *kind == first).then_some(Stored { value, dims, nodes, layout, is_kernel })
}

/// What a node makes of a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Sums of products along this axis.
    Summed(usize),
    /// The kernel of a convolution.
    Kernel,
}

fn kind(graph: &Graph, id: NodeId, index: usize, ndim: usize) -> Option<Kind> {
    let node = graph.node(id);
    let recurrent = ["LSTM", "GRU", "RNN"].iter().any(|op| node.is(op));
    match index {
        // `[directions, gates · hidden, inputs]`, and the same of the hidden state.
        1 | 2 if recurrent && ndim == 3 => Some(Kind::Summed(2)),
        1 if node.is("ConvTranspose") && ndim > 2 => Some(Kind::Kernel),
        1 if node.is("Conv") && ndim > 2 => Some(Kind::Kernel),
        1 if node.is("MatMul") && ndim > 2 => Some(Kind::Summed(ndim - 2)),
        _ => None,
    }
}

impl Stored {
    /// The constant as a weight without uses that are watched, as far as its storage goes.
    pub fn weight(&self) -> Weight {
        Weight { value: self.value, dims: self.dims.clone(), taps: Vec::new() }
    }

    /// What it takes as it is, in these many bytes.
    pub fn cost(&self, bytes: u64) -> Cost {
        let elements = self.dims.iter().product::<usize>() as u64;
        // Its operations are those of its nodes, whatever it is stored as.
        Cost { bytes, parameters: elements, flops_per_row: 0 }
    }

    /// The place of the constant.
    fn site(&self, graph: &Graph, candidates: Vec<Candidate>) -> Site {
        Site {
            weight: Some(self.value),
            footprint: vec![self.value],
            nodes: self.nodes.clone(),
            name: graph.value(self.value).name.clone(),
            taps: self.nodes.iter().filter_map(|&id| graph.node(id).output(0)).collect(),
            baseline: self.cost(4 * self.dims.iter().product::<usize>() as u64),
            candidates,
            required: false,
            isolatable: true,
        }
    }
}

/// Another way to store a constant.
pub(super) struct Storage<F> {
    /// What it is to the method that carries it out.
    pub form: F,
    pub label: String,
    /// Bytes in the file.
    pub bytes: u64,
}

/// The sites of constants with the ways to store each that `storages` names, as far as they save bytes; `store` carries one
/// out. Their losses are measured.
pub(super) fn sites<F: Copy + fmt::Debug + PartialEq + Send + Sync + 'static>(
    model: &Model,
    found: &[Stored],
    cx: &MethodContext,
    storages: &dyn Fn(&Stored) -> Vec<Storage<F>>,
    store: &dyn Fn(&mut Model, &Stored, F) -> Result<(), &'static str>,
    outcome: &mut Outcome,
) -> Result<Vec<Site>, Error> {
    let graph = &model.graph;
    let place = |stored: &Stored| format!("`{}`", graph.value(stored.value).name);
    let Some(calibration) = cx.calibration else { return Ok(Vec::new()) };
    let baseline = |stored: &Stored| 4 * stored.dims.iter().product::<usize>() as u64;
    let smaller = |stored: &Stored| storages(stored).into_iter().filter(|s| s.bytes < baseline(stored)).collect();
    let all: Vec<Vec<Storage<F>>> = found.iter().map(smaller).collect();
    let runs: usize = all.iter().map(Vec::len).sum();
    if calibration.trial_flops() * runs as f64 > MOST_FLOPS {
        let reason = "storing it otherwise would have to be tried in the whole model, which takes too long";
        found.iter().for_each(|stored| outcome.refuse(reason, place(stored)));
        return Ok(Vec::new());
    }
    let mut sites = Vec::new();
    for (stored, storages) in found.iter().zip(all) {
        let mut candidates = Vec::new();
        for Storage { form, label, bytes } in storages {
            let mut variant = model.clone();
            if let Err(reason) = store(&mut variant, stored, form) {
                outcome.refuse(reason, place(stored));
                continue;
            }
            let loss = calibration.trials(&variant, &[Vec::new()])?.first().copied().filter(|loss| loss.is_finite());
            let (cost, edit) = (stored.cost(bytes), Edit::new(form));
            candidates.extend(loss.map(|loss| Candidate { label, cost, loss: Loss::Measured(loss), edit }));
        }
        if !candidates.is_empty() {
            sites.push(stored.site(graph, candidates));
        }
    }
    Ok(sites)
}
