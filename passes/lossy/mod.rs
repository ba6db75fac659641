//! Lossy methods: what could be stored or computed otherwise, what that costs and what it loses.
//!
//! A method proposes and carries out; it never chooses. All options of all methods compete in one allocation.

pub mod allocate;
mod blocks;
mod compensate;
mod convert_floats;
mod dictionary;
mod drop_inputs;
mod factorize;
mod factorize_jointly;
mod factors;
#[cfg(test)]
mod judging;
mod layers;
mod prune_channels;
mod prune_units;
mod quantize;
mod quantize_dynamic;
mod reduce_tokens;
mod select_visual_tokens;
mod spectrum;
mod stored;
mod substitute;

pub use compensate::Compensate;
pub use convert_floats::ConvertFloats;
pub use dictionary::Dictionary;
pub use drop_inputs::{DropInputs, QUIET};
pub use factorize::{Factorize, block_by_block};
pub use factorize_jointly::FactorizeJointly;
pub use factors::{MOST_INPUTS, gram_rows};
pub use layers::{SMALLEST, Tap, Weight, weights};
pub use prune_channels::PruneChannels;
pub use prune_units::PruneUnits;
pub use quantize::Quantize;
pub use quantize_dynamic::QuantizeDynamic;
pub use reduce_tokens::ReduceTokens;
pub use select_visual_tokens::SelectVisualTokens;
pub use substitute::Substitute;

use crate::{Context, Error, Info, Outcome};
use allocate::Measure;
use factors::Seen;
use lathe_analysis::Rows;
use lathe_ir::{Graph, Model, NodeId, Origin, ScopeId, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// Bytes that a node and the names of two tensors add to a file, roughly.
const OVERHEAD: u64 = 200;

/// The oldest operator set in which models are compressed.
pub const OLDEST_OPSET: i64 = 13;

/// Why nothing is fitted: what it loses could not be told.
const NOT_HELD_OUT: &str = "the calibration set has one sample only, and none is left to judge a fit by";

/// What something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spent {
    /// Bytes in the file: padding, scales, zero points, masks and positions included.
    pub bytes: u64,
    /// Stored numbers.
    pub parameters: u64,
    /// Floating-point operations per row of the layer's input.
    pub flops_per_row: u64,
}

impl Spent {
    /// Both together.
    fn and(&self, other: &Spent) -> Spent {
        Spent {
            bytes: self.bytes + other.bytes,
            parameters: self.parameters + other.parameters,
            flops_per_row: self.flops_per_row + other.flops_per_row,
        }
    }
}

/// One way to carry out the work of a site.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// As reports call it: `int4 block 32`.
    pub name: String,
    /// What it takes.
    pub spent: Spent,
    /// The relative L2 error of every tap of the site over the calibration set: ‖X(W − Ŵ)‖ / ‖Y‖.
    pub errors: Vec<f64>,
    /// How far the outputs of the model are from where they were with this choice, where it was run; `errors` do not
    /// count then.
    pub measured: Option<f64>,
    /// What it was fitted to be, where the model and its statistics do not say it again.
    pub fitted: Option<Arc<Fitted>>,
}

/// What was fitted on the calibration set to stand between values, which are known by name: a choice can be carried out
/// on a copy of a part of the model too.
#[derive(Debug)]
pub struct Fitted {
    /// The values that are read, as the inputs of the piece.
    pub reads: Vec<String>,
    /// The value that is made anew: the output of the piece, a constant of it if it reads nothing.
    pub gives: String,
    /// Nodes and numbers.
    pub piece: Graph,
}

impl PartialEq for Fitted {
    /// Whether both are one: equal ones are never fitted twice.
    fn eq(&self, other: &Fitted) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Fitted {
    /// Puts the piece in its place; what only the old value needed goes. An error says why it does not fit.
    fn splice(&self, graph: &mut Graph) -> Result<(), &'static str> {
        let reads: Vec<Option<ValueId>> = self.reads.iter().map(|name| graph.find_value(name)).collect();
        let gives = graph.find_value(&self.gives).filter(|_| reads.iter().all(Option::is_some));
        let gives = gives.ok_or("a value that it stands between is gone")?;
        let fragment = self.piece.fragment(ScopeId::MAIN);
        let pasted = graph.paste(&fragment, ScopeId::MAIN, &reads, &BTreeMap::new(), &self.gives);
        let made = pasted.outputs.first().copied().flatten().expect("a piece has an output");
        graph.replace(gives, made);
        drop_unused(graph, gives);
        graph.sort().map_err(|_| "nodes need one another")
    }
}

/// A place where a method could act.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The constant whose products' error is told; `None` where the site is no single layer's, and operations are
    /// counted for a whole run.
    pub weight: Option<ValueId>,
    /// Every value that would change or go, in order: constants, and what nodes give. Sites that cover the same exclude
    /// each other; a site that covers more holds those that cover a part of it: they exist only where it stays as it is, or
    /// where its choice leaves them ([`Method::around`]).
    /// A site that shares but a part with another is refused.
    pub covers: Vec<ValueId>,
    /// The nodes that would change, in order; for a single constant, those that use it.
    pub nodes: Vec<NodeId>,
    /// As reports call it: the name of the constant.
    pub name: String,
    /// The values whose error is told: the outputs of the nodes that use the constant.
    pub taps: Vec<ValueId>,
    /// What it takes as it is.
    pub kept: Spent,
    /// What could be done instead.
    pub choices: Vec<Choice>,
    /// Whether settings ask for one of the choices, so that the site cannot stay as it is.
    pub forced: bool,
    /// Whether choices can be carried out on a copy of the nodes alone, so that each is timed; if not, it takes its share
    /// of the operations.
    pub apart: bool,
}

/// What a method could do with a model.
#[derive(Debug, Clone, Default)]
pub struct Proposal {
    /// Its places.
    pub sites: Vec<Site>,
    /// Where it could not act, and why; it has made no changes.
    pub outcome: Outcome,
}

/// Shares of rows by weight.
pub type RowsLeft = BTreeMap<ValueId, f64>;

/// What a choice leaves of the places inside its site.
pub struct Around {
    /// The model with the choice carried out, and nothing else.
    pub model: Model,
    /// The share of its rows that the layer of every weight still has.
    pub rows: RowsLeft,
}

/// What a site takes where a choice around it is carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct Within {
    /// The share of its rows that operations are counted by.
    pub rows: f64,
    /// What it takes as it is.
    pub kept: Spent,
    /// What every choice takes; `None` for one that cannot be carried out there.
    pub choices: Vec<Option<Spent>>,
}

/// A lossy method: one idea, one file.
pub trait Method: Sync {
    /// The method as a user meets it.
    fn info(&self) -> &'static Info;

    /// Whether it reads statistics of weights, which take time to collect.
    fn reads_activations(&self) -> bool {
        true
    }

    /// Whether it reads the largest magnitudes of what layers read, which second moments do not tell.
    fn reads_ranges(&self, _cx: &Context) -> bool {
        false
    }

    /// Values whose magnitudes it wants, as far as second moments tell; they are collected before it proposes.
    fn magnitudes(&self, _model: &Model, _cx: &Context) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Values whose errors it tells beside those of the outputs of layers with weights.
    fn watched(&self, _model: &Model, _cx: &Context) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Whether a choice that is timed is worth nothing unless it is faster than what is there.
    fn must_be_faster(&self) -> bool {
        false
    }

    /// Whether errors of its choices are so large that their loss is not told by those of the layer: every choice is then
    /// carried out alone and its loss measured, where that takes no longer than other searches do.
    fn is_tried(&self) -> bool {
        false
    }

    /// Whether it may lower any of what is limited.
    fn serves(&self, _measures: &[Measure]) -> bool {
        true
    }

    /// The oldest operator set with everything it writes. Older models are upgraded to it where a budget is given that the
    /// method may serve.
    fn operator_set(&self) -> i64 {
        OLDEST_OPSET
    }

    /// Whether settings ask for it where no budget is given.
    fn asked(&self, _cx: &Context) -> Result<bool, Error> {
        Ok(false)
    }

    /// Every place this method could act on, and what it could do there. Reads the calibration of `cx`.
    fn propose(&self, model: &Model, cx: &Context) -> Result<Proposal, Error>;

    /// What a choice leaves of the places inside its site, which go on then; `None` where nothing inside is left as it
    /// was.
    fn around(&self, _model: &Model, _site: &Site, _choice: usize, _cx: &Context) -> Result<Option<Around>, Error> {
        Ok(None)
    }

    /// What a site inside another one takes where a choice of that one is carried out first; `None` where it is no longer
    /// a place then.
    ///
    /// What concerns products of weights alone goes on with the rows that all of these have left.
    fn within(&self, site: &Site, around: &Around, _cx: &Context) -> Result<Option<Within>, Error> {
        let Some(&rows) = site.weight.and_then(|weight| around.rows.get(&weight)) else { return Ok(None) };
        let alike = site.covers.iter().all(|value| around.rows.get(value) == Some(&rows));
        let choices = site.choices.iter().map(|choice| Some(choice.spent)).collect();
        Ok(alike.then_some(Within { rows, kept: site.kept, choices }))
    }

    /// Carries out one choice of a site that [`Method::propose`] named, for a model whose other sites may have changed.
    fn rewrite(&self, model: &mut Model, site: &Site, choice: usize, cx: &Context) -> Result<Outcome, Error>;
}

/// Every lossy method.
pub const METHODS: &[&dyn Method] = &[
    &Quantize,
    &QuantizeDynamic,
    &ConvertFloats,
    &Compensate,
    &Factorize,
    &FactorizeJointly,
    &Dictionary,
    &PruneChannels,
    &DropInputs,
    &PruneUnits,
    &Substitute,
    &ReduceTokens,
    &SelectVisualTokens,
];

/// Layers whose second moments are in memory at a time.
const BATCH: usize = 8;

/// What a method makes of one layer.
type Work<'a> = dyn Fn(&Weight, &Seen) -> Result<Vec<Choice>, &'static str> + Sync + 'a;

/// What `work` makes of every layer that can be factored, a few layers at a time.
fn in_batches(model: &Model, cx: &Context, work: &Work<'_>) -> Result<Proposal, Error> {
    let mut proposal = Proposal::default();
    let graph = &model.graph;
    let place = |value: ValueId| format!("`{}`", graph.value(value).name);
    let (found, refused) = weights(graph);
    refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
    for batch in found.chunks(BATCH) {
        let mut ready = Vec::new();
        for weight in batch {
            match factors::seen(graph, weight, cx)? {
                Ok(seen) => ready.push((weight, seen)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
        let done = on_all_cores(&ready, |(weight, seen)| work(weight, seen));
        for ((weight, _), choices) in ready.iter().zip(done) {
            match choices {
                Ok(choices) => proposal.sites.push(weight.site(graph, choices)),
                Err(reason) => proposal.outcome.refuse(reason, place(weight.value)),
            }
        }
    }
    Ok(proposal)
}

/// What nodes read that is constant, and what they give.
fn held_by(graph: &Graph, nodes: &[NodeId]) -> Vec<ValueId> {
    let mut held = BTreeSet::new();
    for &id in nodes {
        let node = graph.node(id);
        held.extend(node.inputs().iter().flatten().filter(|v| graph.constant(**v).is_some()));
        held.extend(node.outputs().iter().flatten());
    }
    held.into_iter().collect()
}

/// The outputs of the model that nodes give.
fn ends_of(graph: &Graph, nodes: &[NodeId]) -> Vec<ValueId> {
    let outputs = nodes.iter().flat_map(|&id| graph.node(id).outputs()).flatten();
    outputs.copied().filter(|&v| graph.is_output(v)).collect()
}

/// Removes what makes a value that nothing uses, and what only that needed.
fn drop_unused(graph: &mut Graph, value: ValueId) {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        match graph.value(value).origin() {
            _ if !graph.value(value).uses().is_empty() => {}
            Origin::Node(id, _) => {
                let node = graph.node(id);
                if node.outputs().iter().flatten().all(|&v| graph.value(v).uses().is_empty()) {
                    open.extend(node.inputs().iter().flatten());
                    graph.remove_node(id);
                }
            }
            Origin::Initializer(_) => graph.remove_initializer(value),
            Origin::Input(_) | Origin::None => {}
        }
    }
}

/// Applies `work` to every item on all cores; results in the order of the items.
fn on_all_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len().max(1));
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut all: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("a worker only computes")).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}
