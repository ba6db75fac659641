//! Constants that are no matrices of products: weights of recurrent layers, grouped and transposed convolutions, and of
//! products over several axes. They can be stored in fewer bits, with a node in front that widens them.
//!
//! How an error of such a constant shows in what its node gives is not told by sums over rows, so every choice is carried
//! out by itself and its loss is measured in the whole model.

use super::{Choice, Outcome, Site, Spent, Weight, quantize::Layout};
use crate::{Context, Error};
use lathe_ir::{DataType, Graph, Model, NodeId, Origin, ScopeId, Use, ValueId};

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
    pub fn spent(&self, bytes: u64) -> Spent {
        let elements = self.dims.iter().product::<usize>() as u64;
        // Its operations are those of its nodes, whatever it is stored as.
        Spent { bytes, parameters: elements, flops_per_row: 0 }
    }

    /// The place of the constant.
    fn site(&self, graph: &Graph, choices: Vec<Choice>) -> Site {
        Site {
            weight: Some(self.value),
            covers: vec![self.value],
            nodes: self.nodes.clone(),
            name: graph.value(self.value).name.clone(),
            taps: self.nodes.iter().filter_map(|&id| graph.node(id).output(0)).collect(),
            kept: self.spent(4 * self.dims.iter().product::<usize>() as u64),
            choices,
            forced: false,
            apart: true,
        }
    }
}

/// The places of constants with what `offer` names for each and what that takes, as far as it saves bytes; `rewrite`
/// carries a choice out. Their losses are measured.
pub(super) fn sites(
    model: &Model,
    found: &[Stored],
    cx: &Context,
    offer: &dyn Fn(&Stored) -> Vec<(String, Spent)>,
    rewrite: &dyn Fn(&mut Model, &Stored, &str) -> Result<(), &'static str>,
    outcome: &mut Outcome,
) -> Result<Vec<Site>, Error> {
    let graph = &model.graph;
    let place = |stored: &Stored| format!("`{}`", graph.value(stored.value).name);
    let Some(calibration) = cx.calibration else { return Ok(Vec::new()) };
    let kept = |stored: &Stored| 4 * stored.dims.iter().product::<usize>() as u64;
    let offers: Vec<Vec<(String, Spent)>> = found
        .iter()
        .map(|stored| offer(stored).into_iter().filter(|(_, spent)| spent.bytes < kept(stored)).collect())
        .collect();
    let runs: usize = offers.iter().map(Vec::len).sum();
    if calibration.trial_flops() * runs as f64 > MOST_FLOPS {
        let reason = "storing it otherwise would have to be tried in the whole model, which takes too long";
        found.iter().for_each(|stored| outcome.refuse(reason, place(stored)));
        return Ok(Vec::new());
    }
    let mut sites = Vec::new();
    for (stored, offers) in found.iter().zip(offers) {
        let mut choices = Vec::new();
        for (name, spent) in offers {
            let mut variant = model.clone();
            if let Err(reason) = rewrite(&mut variant, stored, &name) {
                outcome.refuse(reason, place(stored));
                continue;
            }
            let lost = calibration.trials(&variant, &[Vec::new()])?.first().copied().filter(|lost| lost.is_finite());
            choices.extend(lost.map(|lost| Choice {
                name,
                spent,
                errors: Vec::new(),
                measured: Some(lost),
                fitted: None,
            }));
        }
        if !choices.is_empty() {
            sites.push(stored.site(graph, choices));
        }
    }
    Ok(sites)
}
