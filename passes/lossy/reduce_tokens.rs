//! Fewer tokens from layer to layer: the most similar ones are merged.

pub(super) mod emit;
mod place;
mod schedule;
#[cfg(test)]
mod tests;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, NestedEffect, OVERHEAD, Proposal, Site, Tap,
    Weight, weights,
};
use crate::{Error, Info, Kind, Opt, Outcome, Pass as _, Quantity, Saving, exact::DropDead};
use emit::{Form, emit, most, open_sum};
use lathe_analysis::{Bindings, Calibrate, Cost as ModelCost, Facts};
use lathe_ir::{Model, NodeId, Use, ValueId};
use place::{Chain, TokenOptions, chains};
use schedule::{SHARES, Stretch, merged, plans};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Merges similar tokens.
pub struct ReduceTokens;

static INFO: Info = Info {
    name: "reduce-tokens",
    summary: "merge similar tokens of a vision transformer from layer to layer",
    doc: "In transformers over a fixed number of tokens, offers to merge the most similar tokens after attentions: half of \
          the tokens look for their most similar one in the other half, by the cosine of their keys, and the most similar \
          pairs become their mean. Later attentions and averages count a token as often as it stands for. What is lost by \
          merging a share of the tokens after one attention alone is measured on calibration samples; a dynamic \
          programme over the layers makes schedules of that, and the loss of each is measured again as a whole. Units \
          that go and other choices for layers join a schedule at what is left to compute; their losses add up. Tokens \
          at the front that the model picks by their position stay. Heads that need every token get all of them back. \
          Declines where the number of tokens is open, and where anything reads tokens other than one by one, in \
          attentions or in averages: windows, grids, tables of positions inside, masks, caches, convolutions. Lowers \
          FLOPs and latency only.",
    options: &[
        Opt {
            name: "protected",
            unit: "auto or a number",
            default: "auto",
            doc: "tokens at the front that stay; auto: those that the model picks by their position",
        },
        Opt {
            name: "form",
            unit: "auto, merge or mix",
            default: "auto",
            doc: "merge pairs; or mix every token into those that stay, which the attention before looks at most, where \
                  its weights can be read; auto measures both",
        },
        Opt {
            name: "temperature",
            unit: "a number above 0",
            default: "0.1",
            doc: "of the softmax over cosines that mixes; towards 0 each token goes to the one most like it",
        },
        Opt {
            name: "restore",
            unit: "true or false",
            default: "true",
            doc: "whether a head that needs every token gets all of them back, each what it was merged into",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Flops],
    source: Some("Bolya et al. 2023, ToMe, arXiv:2210.09461; Chen et al. 2023, DiffRate, arXiv:2305.17997"),
};

/// The oldest operator set with what is written: sums that scatter, and layer normalizations.
const OLDEST_OPSET: i64 = 17;

/// Shares of the operations from the first attention on that schedules aim for.
const TARGETS: [f64; 12] = [0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.2];

/// What merging takes besides its operations, as if it were operations: a few dozen small nodes.
const MERGE: f64 = 5e5;

/// How tokens may become fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Forms {
    Auto,
    Merge,
    Mix,
}

impl std::str::FromStr for Forms {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Forms::Auto),
            "merge" => Ok(Forms::Merge),
            "mix" => Ok(Forms::Mix),
            _ => Err(()),
        }
    }
}

/// A number above 0.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Temperature(f32);

impl std::str::FromStr for Temperature {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().ok().filter(|t: &f32| t.is_finite() && *t > 0.0).map(Temperature).ok_or(())
    }
}

/// What settings ask for.
struct Requested {
    token_options: TokenOptions,
    forms: Forms,
    temperature: f32,
}

impl Requested {
    fn of(cx: &MethodContext) -> Result<Requested, Error> {
        let Protected(protected) = cx.setting(&INFO, "protected")?;
        let Temperature(temperature) = cx.setting(&INFO, "temperature")?;
        let token_options = TokenOptions { restore: cx.setting(&INFO, "restore")?, protected };
        Ok(Requested { token_options, forms: cx.setting(&INFO, "form")?, temperature })
    }

    /// The forms to try on a chain, the first one in order to make schedules.
    fn forms(&self, model: &Model, chain: &Chain) -> Vec<Form> {
        let mix = Form::Mix(self.temperature);
        // Only a softmax of its own gives weights.
        let readable = chain.cuts.iter().all(|cut| model.graph.node(cut.node).is("Softmax"));
        match self.forms {
            Forms::Merge => vec![Form::Merge],
            Forms::Mix if readable => vec![mix],
            Forms::Mix => Vec::new(),
            Forms::Auto if readable => vec![Form::Merge, mix],
            Forms::Auto => vec![Form::Merge],
        }
    }
}

/// How many tokens stay at the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Protected(Option<usize>);

impl std::str::FromStr for Protected {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Protected(None)),
            count => count.parse().map(|count| Protected(Some(count))).map_err(|_| ()),
        }
    }
}

impl Method for ReduceTokens {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Flops | Quantity::Latency))
    }

    fn operator_set(&self) -> i64 {
        OLDEST_OPSET
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, ..Needs::default() }
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Schedule>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let Some(calibration) = cx.calibration.filter(|_| self.serves(&cx.quantities)) else { return Ok(proposal) };
        let requested = Requested::of(cx)?;
        for found in chains(model, requested.token_options) {
            match found {
                Ok(chain) if model.opset() >= OLDEST_OPSET => match site(model, &chain, &requested, calibration)? {
                    Some(site) => proposal.sites.push(site),
                    None => proposal.outcome.refuse("no schedule saves anything", name(model, &chain)),
                },
                Ok(chain) => proposal.outcome.refuse("operator set 17 or newer is needed", name(model, &chain)),
                Err((place, reason)) => proposal.outcome.refuse(reason, place),
            }
        }
        Ok(proposal)
    }

    fn effect_on_nested(
        &self,
        model: &Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Option<NestedEffect>, Error> {
        let Schedule { counts, .. } = candidate.edit.of();
        let own = |chain: &Chain| name(model, chain) == site.name && chain.cuts.len() == counts.len();
        let Some(chain) = chains(model, Requested::of(cx)?.token_options).into_iter().flatten().find(own) else {
            return Ok(None);
        };
        let mut changed = model.clone();
        let done = self.apply(&mut changed, site, candidate, cx)?;
        DropDead.apply(&mut changed, &cx.pass_context())?;
        let rows = rows_left(model, &chain, counts);
        Ok((!done.changes.is_empty()).then_some(NestedEffect { model: changed, rows }))
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let Schedule { counts, form } = candidate.edit.of();
        if reduce(model, Requested::of(cx)?.token_options, &site.name, counts, *form) {
            outcome.change(candidate.label.clone(), site.name.clone());
        } else {
            outcome.refuse("the tokens are no longer what they were", site.name.clone());
        }
        Ok(outcome)
    }
}

/// A chain is called by its first cut.
fn name(model: &Model, chain: &Chain) -> String {
    format!("tokens of `{}`", model.graph.value(chain.cuts[0].stream).name)
}

/// How many tokens become fewer after every attention, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Schedule {
    counts: Vec<usize>,
    form: Form,
}

/// What a schedule is called: how many tokens are left after every attention.
fn label(tokens: usize, counts: &[usize], form: Form) -> String {
    let left = counts.iter().scan(tokens, |left, count| {
        *left -= count;
        Some(left.to_string())
    });
    let end = if form == Form::Merge { "" } else { " mixed" };
    format!("{tokens} tokens to {}{end}", left.collect::<Vec<_>>().join(", "))
}

/// Takes this many tokens away after every attention of the chain of this name; `false` if there is none that fits.
fn reduce(model: &mut Model, token_options: TokenOptions, called: &str, counts: &[usize], form: Form) -> bool {
    let find = |model: &Model| {
        let all = chains(model, token_options).into_iter().flatten();
        all.into_iter().find(|chain| name(model, chain) == called && fits(chain, counts, form))
    };
    let Some(chain) = find(model) else { return false };
    let active = chain.cuts.iter().zip(counts).filter(|(_, count)| **count > 0);
    let sums: Vec<(ValueId, NodeId)> = active.map(|(cut, _)| (cut.stream, cut.node)).collect();
    let opened = sums.into_iter().filter(|&(stream, node)| open_sum(&mut model.graph, stream, node)).count();
    let chain = if opened > 0 { find(model) } else { Some(chain) };
    chain.inspect(|chain| emit(model, chain, counts, form)).is_some()
}

/// Whether a schedule can be carried out.
fn fits(chain: &Chain, counts: &[usize], form: Form) -> bool {
    let mut left = chain.tokens.count;
    let mut fits = |&count: &usize| {
        let enough = match form {
            Form::Merge => count <= most(left, chain.protected),
            // One is left at least, besides those that stay.
            Form::Mix(_) => count + chain.protected < left,
        };
        left = left.saturating_sub(count);
        enough
    };
    chain.cuts.len() == counts.len() && counts.iter().all(&mut fits)
}

/// Proposes schedules for a chain; `None` if no model with fewer tokens gives finite outputs.
fn site(
    model: &Model,
    chain: &Chain,
    requested: &Requested,
    calibration: &dyn Calibrate,
) -> Result<Option<Site>, Error> {
    let called = name(model, chain);
    let forms = requested.forms(model, chain);
    let Some(&form) = forms.first() else { return Ok(None) };
    let variant = |counts: &[usize], form: Form| {
        let mut changed = model.clone();
        reduce(&mut changed, requested.token_options, &called, counts, form).then_some(changed)
    };
    let loss = |changed: &Model| -> Result<f64, Error> {
        Ok(calibration.trials(changed, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY))
    };
    let work = Work::of(model);
    let mut stretches = work.stretches(model, chain);
    for (at, stretch) in stretches.iter_mut().enumerate() {
        for (share, lost) in SHARES.iter().zip(&mut stretch.losses) {
            let mut counts = vec![0; chain.cuts.len()];
            counts[at] = merged(*share, chain.tokens.count, most(chain.tokens.count, chain.protected));
            let changed = variant(&counts, form);
            *lost = changed.as_ref().map_or(Ok(f64::INFINITY), &loss)?;
        }
    }
    let (nodes, footprint) = (chain.nodes(&model.graph), chain.footprint(&model.graph));
    let baseline = work.cost(model, &nodes);
    let mut candidates = Vec::new();
    for counts in plans(&stretches, chain.tokens.count, &TARGETS, &|count| most(count, chain.protected)) {
        let mut best: Option<(f64, Form, Model)> = None;
        for &form in &forms {
            let Some(changed) = variant(&counts, form) else { continue };
            let lost = loss(&changed)?;
            if lost.is_finite() && best.as_ref().is_none_or(|(least, ..)| lost < *least) {
                best = Some((lost, form, changed));
            }
        }
        let Some((lost, form, changed)) = best else { continue };
        let cost = work.left(&baseline, &changed);
        let label = label(chain.tokens.count, &counts, form);
        let edit = Edit::new(Schedule { counts, form });
        candidates.push(Candidate { label, cost, loss: Loss::Measured(lost), edit });
    }
    let taps = chain.ends(&model.graph);
    let site = Site {
        weight: None,
        footprint,
        nodes,
        name: called,
        taps,
        baseline,
        candidates,
        required: false,
        isolatable: false,
    };
    Ok((!site.candidates.is_empty()).then_some(site))
}

/// What nodes compute with all tokens.
struct Work {
    cost: ModelCost,
}

impl Work {
    fn of(model: &Model) -> Work {
        Work { cost: ModelCost::of(model, &Facts::infer(model), &Bindings::default()) }
    }

    fn cost(&self, model: &Model, nodes: &[NodeId]) -> Cost {
        let read: BTreeSet<ValueId> =
            nodes.iter().flat_map(|&id| model.graph.node(id).inputs()).flatten().copied().collect();
        let tensors = || read.iter().filter_map(|&v| model.graph.constant(v));
        Cost {
            bytes: tensors().map(|t| t.byte_len() as u64).sum(),
            parameters: tensors().filter(|t| t.dtype().is_float()).map(|t| t.len() as u64).sum(),
            flops_per_row: nodes.iter().map(|id| self.cost.by_node[id.index()].flops).sum(),
        }
    }

    /// What these nodes, which take `kept`, take in a model with fewer tokens.
    fn left(&self, kept: &Cost, changed: &Model) -> Cost {
        let now = Work::of(changed).cost;
        Cost {
            bytes: (kept.bytes + now.weight_bytes).saturating_sub(self.cost.weight_bytes)
                + OVERHEAD * now.nodes.saturating_sub(self.cost.nodes) as u64,
            parameters: (kept.parameters + now.parameters).saturating_sub(self.cost.parameters),
            flops_per_row: (kept.flops_per_row + now.flops).saturating_sub(self.cost.flops),
        }
    }

    /// What runs from every cut to the next one.
    fn stretches(&self, model: &Model, chain: &Chain) -> Vec<Stretch> {
        let graph = &model.graph;
        let all: Vec<usize> = (0..chain.cuts.len()).collect();
        let stages = chain.stages(graph, &all).expect("stages were checked with every cut");
        let merge =
            chain.cuts.iter().map(|cut| MERGE + (chain.tokens.count * chain.tokens.count * cut.width / 4) as f64);
        let mut stretches: Vec<Stretch> = merge.map(|merge| Stretch { merge, ..Stretch::default() }).collect();
        for &id in &chain.tokens.nodes {
            let node = graph.node(id);
            let mut seen = node.inputs().iter().flatten().filter_map(|v| Some((chain.tokens.of(*v)?, stages.get(v)?)));
            let Some((axes, stage)) = seen.next().filter(|(_, stage)| **stage > 0) else { continue };
            let (own, stretch) = (self.cost.by_node[id.index()].flops as f64, &mut stretches[stage - 1]);
            let output = node.output(0).and_then(|v| chain.tokens.of(v));
            if axes.axes.len() > 1 || output.is_some_and(|axes| axes.axes.len() > 1) {
                stretch.square += own;
            } else if chain.tokens.attentions.iter().any(|attention| attention.node == id) {
                // Scores and weighted sum; what else one operator does grows with the tokens.
                let square = (4 * chain.tokens.count * chain.tokens.count * chain.cuts[stage - 1].width) as f64;
                stretch.square += square.min(own);
                stretch.linear += (own - square).max(0.0);
            } else {
                stretch.linear += own;
            }
        }
        stretches
    }
}

/// The share of its rows that the layer of every weight still has.
fn rows_left(model: &Model, chain: &Chain, counts: &[usize]) -> BTreeMap<ValueId, f64> {
    let active: Vec<usize> = (0..counts.len()).filter(|&at| counts[at] > 0).collect();
    let stages = chain.stages(&model.graph, &active).expect("stages were checked with every cut");
    let left = |stage: usize| {
        let gone: usize = active[..stage].iter().map(|&at| counts[at]).sum();
        (chain.tokens.count - gone) as f64 / chain.tokens.count as f64
    };
    let (found, _) = weights(&model.graph);
    let share = |tap: &Tap| {
        let read = model.graph.node(tap.node).input(0).filter(|v| chain.tokens.of(*v).is_some());
        read.map_or(1.0, |v| left(stages.get(&v).copied().unwrap_or(0)))
    };
    let of = |weight: &Weight| {
        let all = weight.taps.iter().map(share).sum::<f64>() / weight.taps.len().max(1) as f64;
        (weight.value, all)
    };
    found.iter().map(of).collect()
}

/// The node of a use, if it is one's.
fn reader(place: &Use) -> Option<NodeId> {
    match *place {
        Use::Node(id, _) => Some(id),
        _ => None,
    }
}
