//! Attention over a few blocks of keys per block of queries, which a draft of pooled blocks chooses.

mod emit;
mod place;
#[cfg(test)]
mod tests;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, OLDEST_OPSET, OVERHEAD, Proposal, Site,
    prune_units::own_values, reduce_tokens::emit::Writer, regions::drop_unused,
};
use crate::{Error, Info, Kind, Outcome, Quantity, Saving};
use emit::sparse;
use lathe_analysis::{Bindings, Cost as ModelCost, Cross, Facts, Rows};
use lathe_ir::{Model, Node};
use place::{Place, places};
use serde::{Deserialize, Serialize};

/// Leaves blocks of keys out of attentions.
pub struct SparseAttention;

static INFO: Info = Info {
    name: "sparse-attention",
    summary: "let each block of queries look at the few blocks of keys that a draft scores highest",
    doc: "In attentions over a fixed number of tokens, 512 or more, offers to compute scores for a part of the keys alone: \
          queries and keys are averaged in blocks of 64 or 128, their products are a draft of the scores, and every block \
          of queries reads the blocks of keys with the highest draft, a half of them to a tenth. The first block and its \
          own are always among them. Masks and biases that are added to scores, causal ones among them, are cut up in the \
          same way. The error of each attention is measured on calibration samples, the loss of every choice in the \
          whole model where trying them takes little time; only what is measured to be faster is kept. Declines where the \
          number of tokens is open, is less than 512 or is no multiple of 64, where weights of an attention have other \
          uses, where scores are changed by other than scales and sums, with caches, and under every budget but latency.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Flops],
    source: Some("Shen et al. 2025, DraftAttention, arXiv:2505.14708"),
};

/// Tokens of a block.
const BLOCKS: [usize; 2] = [128, 64];

/// Shares of the blocks of keys that are kept.
const SHARES: [f64; 5] = [0.5, 0.35, 0.25, 0.15, 0.1];

/// What one choice keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Tokens of a block.
    block: usize,
    /// Blocks of keys that every block of queries reads.
    count: usize,
}

impl Kept {
    /// Every choice there is for so many tokens, the one that keeps most first; the same blocks are offered once.
    fn of(tokens: usize) -> Vec<Kept> {
        let mut all = Vec::new();
        for block in BLOCKS.into_iter().filter(|block| tokens.is_multiple_of(*block)) {
            let blocks = tokens / block;
            for share in SHARES {
                let kept = Kept { block, count: ((blocks as f64 * share).round() as usize).max(2) };
                if kept.count < blocks && !all.contains(&kept) {
                    all.push(kept);
                }
            }
        }
        all
    }

    fn label(self, tokens: usize) -> String {
        format!("{} of {} blocks of {} keys", self.count, tokens / self.block, self.block)
    }
}

impl Method for SparseAttention {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.contains(&Quantity::Latency)
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, trials: true, speedup: true, ..Needs::default() }
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Kept>())
    }

    fn extra_taps(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        if !self.serves(&cx.quantities) || model.opset() < OLDEST_OPSET {
            return Ok(Vec::new());
        }
        let found = places(model, &Facts::infer(model)).into_iter().flatten();
        Ok(found.map(|place| Rows::last(model.graph.value(place.output).name.clone())).collect())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let Some(calibration) = cx.calibration.filter(|_| self.serves(&cx.quantities)) else { return Ok(proposal) };
        if model.opset() < OLDEST_OPSET {
            return Ok(Proposal::refused("operator set 13 or newer is needed", "the model"));
        }
        let facts = Facts::infer(model);
        let mut found = Vec::new();
        for place in places(model, &facts) {
            match place {
                Ok(place) => found.push(place),
                Err((reason, place)) => proposal.outcome.refuse(reason, place),
            }
        }
        if found.is_empty() {
            return Ok(proposal);
        }
        let (variant, pairs) = beside(model, &found)?;
        let seen = match calibration.holds_out() {
            true => calibration.held_out(&variant, &pairs)?,
            false => calibration.cross(&variant, &pairs)?,
        };
        let costs = ModelCost::of(model, &facts, &Bindings::default());
        for (place, seen) in found.iter().zip(&seen) {
            match site(model, place, seen, &costs) {
                Some(site) => proposal.sites.push(site),
                None => proposal.outcome.refuse("what it gives is not finite, or is all zero", place.called(model)),
            }
        }
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        _cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let found = places(model, &Facts::infer(model)).into_iter().flatten();
        let Some(place) = found.into_iter().find(|place| model.graph.value(place.output).name == site.name) else {
            outcome.refuse("the attention is no longer what it was", format!("`{}`", site.name));
            return Ok(outcome);
        };
        let opset = model.opset();
        let graph = &mut model.graph;
        let output =
            sparse(&mut Writer::new(graph, format!("{}_sparse", site.name)), &place, *candidate.edit.of(), opset);
        graph.replace(place.output, output);
        drop_unused(graph, place.output);
        graph.sort()?;
        outcome.change(candidate.label.clone(), place.called(model));
        Ok(outcome)
    }
}

/// The model with what every choice at every place would give, and the squares by which it is off, for every row of what
/// is there.
fn beside(model: &Model, found: &[Place]) -> Result<(Model, Vec<(Rows, Rows)>), Error> {
    let mut variant = model.clone();
    let opset = model.opset();
    let mut pairs = Vec::new();
    for place in found {
        let name = format!("{}_draft", variant.graph.value(place.output).name);
        let w = &mut Writer::new(&mut variant.graph, name);
        let squares = |w: &mut Writer<'_>, x| {
            let (square, last) = (w.node(Node::new("Mul"), &[x, x]), w.ints(&[-1]));
            w.node(Node::new("ReduceSum"), &[square, last])
        };
        let mut off = Vec::new();
        for kept in Kept::of(place.tokens) {
            let made = sparse(w, place, kept, opset);
            let difference = w.node(Node::new("Sub"), &[made, place.output]);
            off.push(squares(w, difference));
        }
        let (off, whole) = (w.join(&off, -1), squares(w, place.output));
        let rows = |value| Rows::last(w.graph.value(value).name.clone());
        pairs.push((rows(off), rows(whole)));
    }
    variant.graph.sort()?;
    Ok((variant, pairs))
}

fn site(model: &Model, place: &Place, seen: &Cross, costs: &ModelCost) -> Option<Site> {
    let nodes = place.nodes.clone();
    let whole = *seen.y_mean.first().filter(|mean| mean.is_finite() && **mean > 0.0)?;
    let flops = nodes.iter().map(|id| costs.by_node[id.index()].flops).sum();
    let bytes = OVERHEAD * nodes.len() as u64;
    let baseline = Cost { bytes, parameters: 0, flops_per_row: flops };
    let mut candidates = Vec::new();
    for (kept, off) in Kept::of(place.tokens).into_iter().zip(&seen.x_mean).filter(|(_, off)| off.is_finite()) {
        let blocks = place.tokens / kept.block;
        // The draft multiplies one row for every block instead of for every token.
        let part = kept.count as f64 / blocks as f64 + 1.0 / (kept.block * kept.block) as f64;
        let flops_per_row = (flops as f64 * part) as u64;
        candidates.push(Candidate {
            label: kept.label(place.tokens),
            cost: Cost { bytes: bytes + 24 * OVERHEAD, parameters: 0, flops_per_row },
            loss: Loss::PerTap(vec![(off.max(0.0) / whole).sqrt()]),
            edit: Edit::new(kept),
        });
    }
    (!candidates.is_empty()).then(|| Site {
        weight: None,
        footprint: own_values(&model.graph, &nodes.iter().copied().collect()).into_iter().collect(),
        nodes,
        name: model.graph.value(place.output).name.clone(),
        taps: vec![place.output],
        baseline,
        candidates,
        required: false,
        isolatable: true,
    })
}
