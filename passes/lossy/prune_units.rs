//! Residual units that change little: left out, with something cheap in their place.

mod caches;
mod candidates;
mod patch;
mod search;
mod span;
mod surgery;
#[cfg(test)]
mod tests;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, NestedCost, NestedEffect, Proposal, Site,
};
use crate::{Error, Info, Kind, Opt, Outcome, Pass as _, Saving, exact::DropDead};
use caches::{Caches, settle};
use candidates::{RemovableUnit, candidates};
use lathe_analysis::{Bindings, Cost as ModelCost, Facts, Rows, View};
use lathe_ir::{Graph, Model, NodeId, ValueId};
use patch::{Patch, leave_out_with};
use search::{Counts, Gated, Score, Step};
use std::collections::BTreeSet;
use surgery::read_shapes_elsewhere;

/// Leaves residual units out.
pub struct PruneUnits;

static INFO: Info = Info {
    name: "prune-units",
    summary: "leave out residual units whose work the outputs hardly miss",
    doc: "Where a model computes x + f(x), offers to leave f out: attention, feed-forward or convolutional units, one by \
          one. One copy of the model with a factor on every unit is run on calibration samples to find the unit whose \
          absence the outputs miss least, then the next one without it, and so on; the loss of every set is measured, \
          not predicted. What is left of a run of units can be patched: by a factor per feature, by a change of the \
          layer before it, or by a product, fitted in closed form to the stream of the whole model on other samples. \
          Key-value caches of attention that goes go with it. Where tokens become fewer too, gaps stay as they are. Declines \
          on the first and the last block of a chain, on units that change the size of the stream or that hold a quarter \
          of the model, on those whose inside is read elsewhere, and in subgraphs.",
    options: &[
        Opt { name: "count", unit: "a number", default: "0", doc: "units that must go, of any kind" },
        Opt { name: "attention", unit: "a number", default: "0", doc: "attention units that must go besides" },
        Opt { name: "mlp", unit: "a number", default: "0", doc: "feed-forward units that must go besides" },
        Opt {
            name: "score",
            unit: "loss or cosine",
            default: "loss",
            doc: "what orders them: the loss of the outputs, one after another; or how little they turn the stream, all \
                  at once",
        },
        Opt {
            name: "patch",
            unit: "auto, none, scale, fold, affine or low-rank",
            default: "auto",
            doc: "what may stand in their place; auto offers all, and the measured loss decides",
        },
        Opt {
            name: "ends",
            unit: "keep or free",
            default: "keep",
            doc: "whether the first and the last block of a chain stay whatever they do",
        },
        Opt {
            name: "caches",
            unit: "compact or keep-io",
            default: "compact",
            doc: "whether key-value inputs and outputs of attention that goes go too and the others are numbered anew, \
                  or stay and hold zeros",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some(
        "Song et al. 2024, SLEB, arXiv:2402.09025; Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819; Men et al. 2024, \
         ShortGPT, arXiv:2403.03853",
    ),
};

/// Floating-point operations that trying all units once may take where no number of them is asked for.
const MOST_FLOPS: f64 = 2e12;

/// What to try of patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patches {
    All,
    Only(Patch),
}

impl std::str::FromStr for Patches {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "auto" {
            return Ok(Patches::All);
        }
        Patch::ALL.into_iter().find(|p| p.name() == text).map(Patches::Only).ok_or(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Keep,
    Free,
}

impl std::str::FromStr for Ends {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "keep" => Ok(Ends::Keep),
            "free" => Ok(Ends::Free),
            _ => Err(()),
        }
    }
}

/// How many units settings ask for; `None` if for none.
fn requested(cx: &MethodContext) -> Result<Option<Counts>, Error> {
    let number = |name| cx.setting::<usize>(&INFO, name);
    let counts = Counts { any: number("count")?, attention: number("attention")?, mlp: number("mlp")? };
    Ok((counts.total() > 0).then_some(counts))
}

impl Method for PruneUnits {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, ..Needs::default() }
    }

    fn is_requested(&self, cx: &MethodContext) -> Result<bool, Error> {
        Ok(requested(cx)?.is_some())
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Patch>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let counts = requested(cx)?;
        let (mut found, refused) = candidates(model, cx.setting::<Ends>(&INFO, "ends")? == Ends::Free);
        refused.into_iter().for_each(|(reason, name)| proposal.outcome.refuse(reason, format!("`{name}`")));
        let Some(calibration) = cx.calibration.filter(|_| !found.is_empty()) else { return Ok(proposal) };
        // Every unit is tried once at least, and patches are fitted for every set that is offered.
        if counts.is_none() && calibration.trial_flops() * found.len() as f64 > MOST_FLOPS {
            let reason = "trying its units takes longer than a budget is worth; --set prune-units.count=N asks for it";
            proposal.outcome.refuse(reason, "the model");
            return Ok(proposal);
        }
        let gated = Gated::new(model, &mut found, calibration)?;
        let steps = match cx.setting::<Score>(&INFO, "score")? {
            Score::Loss => gated.greedy(&found, counts.as_ref(), &cx.quantities)?,
            Score::Cosine => gated.by_cosine(&found, counts.as_ref(), &|v| stream_rows(model, v))?,
        };
        if let Some(counts) = counts.as_ref().filter(|c| steps.len() < c.total()) {
            let reason = format!("{} units are to go, and {} can", counts.total(), steps.len());
            proposal.outcome.refuse(reason.clone(), "the model");
            proposal.unmet = Some(reason);
            return Ok(proposal);
        }
        let mut patches = cx.setting::<Patches>(&INFO, "patch")?;
        if !calibration.holds_out() && patches != Patches::Only(Patch::None) {
            proposal.outcome.refuse(super::NOT_HELD_OUT, "the model");
            if patches != Patches::All {
                return Ok(proposal);
            }
            patches = Patches::Only(Patch::None);
        }
        let whole = Totals::of(model);
        let first = if counts.is_some() { steps.len() } else { 1 };
        for count in first..=steps.len() {
            let site = site(model, &whole, &found, &steps[..count], patches, cx)?;
            match site {
                Ok(site) => proposal.sites.push(Site { required: counts.is_some(), ..site }),
                Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", found[steps[count - 1].candidate].name)),
            }
        }
        Ok(proposal)
    }

    /// What a choice around it added may still read something inside, which then stays. Patches are fitted to a stream
    /// whose rows are the same with the units and without, as they are not where tokens merge: there is none.
    fn cost_under(&self, site: &Site, effect: &NestedEffect, cx: &MethodContext) -> Result<Option<NestedCost>, Error> {
        let (mut bare, nodes) = (effect.model.clone(), site.nodes.iter().copied().collect());
        let left = match leave(&mut bare, &site.taps, &nodes, Patch::None, cx)? {
            Ok(_) => settle(&mut bare, &nodes, cx.setting(&INFO, "caches")?, cx)?.is_ok(),
            Err(_) => false,
        };
        if !left {
            return Ok(None);
        }
        let stays = still_read(&bare, site);
        let baseline = Totals::of(&effect.model).beyond(&Totals::of(&bare)).and(&stays);
        let bare = |candidate: &Candidate| (*candidate.edit.of::<Patch>() == Patch::None).then_some(stays);
        let candidates: Vec<Option<Cost>> = site.candidates.iter().map(bare).collect();
        Ok(candidates.contains(&Some(stays)).then_some(NestedCost { rows: 1.0, baseline, candidates }))
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let &patch = candidate.edit.of::<Patch>();
        let nodes = site.nodes.iter().copied().collect();
        let done = match leave(model, &site.taps, &nodes, patch, cx)? {
            Ok(_) => settle(model, &nodes, cx.setting(&INFO, "caches")?, cx)?.map(|_| ()),
            Err(reason) => Err(reason),
        };
        match done {
            Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
            Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
        }
        Ok(outcome)
    }
}

fn label(patch: Patch) -> String {
    match patch {
        Patch::None => "leave out".to_owned(),
        patch => format!("leave out, {}", patch.name()),
    }
}

/// Leaves units out and fills the gaps; caches stay as they are. Says how many gaps could be filled.
fn leave(
    model: &mut Model,
    gone: &[ValueId],
    nodes: &BTreeSet<NodeId>,
    patch: Patch,
    cx: &MethodContext,
) -> Result<Result<usize, &'static str>, Error> {
    if !read_shapes_elsewhere(model, nodes) {
        return Ok(Err("the shape of a value inside is read elsewhere, and no value outside has the same"));
    }
    leave_out_with(model, gone, patch, cx.calibration)
}

/// What a model takes, for comparison with what it takes after a change.
#[derive(Clone, Copy)]
struct Totals {
    bytes: u64,
    parameters: u64,
    flops: u64,
}

impl Totals {
    fn of(model: &Model) -> Totals {
        let cost = ModelCost::of(model, &Facts::infer(model), &Bindings::default());
        Totals { bytes: cost.weight_bytes, parameters: cost.parameters, flops: cost.flops }
    }

    /// What is more than in another.
    fn beyond(&self, other: &Totals) -> Cost {
        Cost {
            bytes: self.bytes.saturating_sub(other.bytes),
            parameters: self.parameters.saturating_sub(other.parameters),
            flops_per_row: self.flops.saturating_sub(other.flops),
        }
    }
}

/// What is still there of a site's own nodes and constants in a model without its units.
fn still_read(model: &Model, site: &Site) -> Cost {
    let graph = &model.graph;
    let cost = ModelCost::of(model, &Facts::infer(model), &Bindings::default());
    let nodes = site.nodes.iter().filter(|&&id| graph.get(id).is_some());
    let tensors = || site.footprint.iter().filter_map(|&v| graph.constant(v));
    Cost {
        bytes: tensors().map(|t| t.byte_len() as u64).sum(),
        parameters: tensors().filter(|t| t.dtype().is_float()).map(|t| t.len() as u64).sum(),
        flops_per_row: nodes.map(|id| cost.by_node[id.index()].flops).sum(),
    }
}

/// A loss that is only rounding: no patch is needed any more.
const ROUNDING: f64 = 1e-7;

/// Part of the loss by which a dearer patch must be better than those before it.
const WORTH: f64 = 0.98;

/// The place of all units of `steps` together.
fn site(
    model: &Model,
    whole: &Totals,
    found: &[RemovableUnit],
    steps: &[Step],
    patches: Patches,
    cx: &MethodContext,
) -> Result<Result<Site, &'static str>, Error> {
    let units: Vec<&RemovableUnit> = steps.iter().map(|s| &found[s.candidate]).collect();
    let gone: Vec<ValueId> = units.iter().flat_map(|u| u.gone.iter().copied()).collect();
    let nodes: BTreeSet<NodeId> = units.iter().flat_map(|u| u.nodes.iter().copied()).collect();
    let caches = cx.setting::<Caches>(&INFO, "caches")?;
    let mut least = None;
    let mut candidates: Vec<Candidate> = Vec::new();
    for patch in Patch::ALL {
        let best = candidates.iter().filter_map(|c| c.loss.measured()).fold(f64::INFINITY, f64::min);
        let wanted = patches == Patches::All && best > ROUNDING || patches == Patches::Only(patch);
        // What is left without any patch tells what the units take.
        if !wanted && patch != Patch::None {
            continue;
        }
        let mut variant = model.clone();
        let filled = match leave(&mut variant, &gone, &nodes, patch, cx)? {
            Ok(filled) => filled,
            Err(reason) => return Ok(Err(reason)),
        };
        if filled == 0 && patch != Patch::None {
            continue;
        }
        let calibration = cx.calibration.expect("what was searched was run");
        let loss = match patch {
            Patch::None => steps.last().map_or(0.0, |s| s.loss),
            _ => calibration.trials(&variant, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY),
        };
        if let Err(reason) = settle(&mut variant, &nodes, caches, cx)? {
            return Ok(Err(reason));
        }
        DropDead.apply(&mut variant, &cx.pass_context())?;
        let left = Totals::of(&variant);
        let bare = *least.get_or_insert(left);
        if wanted && loss.is_finite() && (loss < WORTH * best || candidates.is_empty()) {
            candidates.push(Candidate {
                label: label(patch),
                cost: left.beyond(&bare),
                loss: Loss::Measured(loss),
                edit: Edit::new(patch),
            });
        }
    }
    let Some(bare) = least.filter(|_| !candidates.is_empty()) else {
        return Ok(Err("its gap cannot be filled as asked"));
    };
    let names: Vec<&str> = units.iter().map(|u| u.name.as_str()).collect();
    let mut footprint: BTreeSet<ValueId> = gone.iter().copied().collect();
    footprint.extend(own_values(&model.graph, &nodes));
    Ok(Ok(Site {
        weight: None,
        footprint: footprint.into_iter().collect(),
        nodes: nodes.into_iter().collect(),
        name: names.join(", "),
        taps: gone,
        baseline: whole.beyond(&bare),
        candidates,
        required: false,
        isolatable: false,
    }))
}

/// What these nodes give, and constants that nothing else reads.
pub(super) fn own_values(graph: &Graph, nodes: &BTreeSet<NodeId>) -> BTreeSet<ValueId> {
    let read = nodes.iter().flat_map(|&id| graph.node(id).inputs().iter().flatten().copied());
    let inside = |place: &lathe_ir::Use| matches!(place, lathe_ir::Use::Node(id, _) if nodes.contains(id));
    let constants = read.filter(|&v| graph.constant(v).is_some() && graph.value(v).uses().iter().all(inside));
    let given = nodes.iter().flat_map(|&id| graph.node(id).outputs().iter().flatten().copied());
    constants.chain(given).collect()
}

/// A stream as rows of features: channels where it is an image.
fn stream_rows(model: &Model, value: ValueId) -> Rows {
    let ndim = Facts::infer(model).ndim(value).unwrap_or(0);
    let view = if ndim == 4 { View::Axis(1) } else { View::Axis(-1) };
    Rows { value: model.graph.value(value).name.clone(), view }
}
