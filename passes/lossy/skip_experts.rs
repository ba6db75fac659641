//! Experts that a token hardly needs: pairs of a token and an expert are left out by the weight of the router, and experts go.

mod layer;
#[cfg(test)]
mod tests;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, NestedEffect, OVERHEAD, Proposal, Site,
    regions::held_by,
};
use crate::{Error, Info, Kind, Opt, Outcome, Pass, Quantity, Saving, exact::DropDead};
use lathe_analysis::{Bindings, Calibrate, Cost as ModelCost, Facts, Rows};
use lathe_ir::{DataType, Model, Node, NodeId, ScopeId, ValueId};
use layer::{Layer, Skip, layers};
use std::collections::BTreeMap;

/// See [`INFO`].
pub struct SkipExperts;

static INFO: Info = Info {
    name: "skip-experts",
    summary: "leave out experts where the router gives them little weight, and those that hardly matter",
    doc: "For every layer of experts that `group-experts` has grouped, offers a threshold below which a pair of a token and \
          an expert is left out, fewer experts for every token, and layers without the experts that the outputs miss least. \
          Thresholds are those of the router's weights on the calibration set, at shares of the pairs from a tenth to four \
          fifths; the order of experts is that of the loss where one alone is missing. The other experts keep their \
          weights. The loss of every choice is measured by carrying it out, and its work is that of the pairs that are left \
          on the calibration set. Declines in subgraphs, and where the pairs do not come from a TopK as the router wrote it.",
    options: &[Opt {
        name: "experts",
        unit: "true or false",
        default: "true",
        doc: "Whether whole experts may go: one that no sample needs may be needed elsewhere",
    }],
    kind: Kind::Lossy,
    lowers: &[Saving::Flops, Saving::Parameters],
    source: Some("Huang et al. 2025, MoDES, arXiv:2511.15690"),
};

/// Shares of the pairs that a threshold leaves out.
const SHARES: [f64; 8] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8];

/// Parts of the experts that may go together.
const PARTS: [usize; 3] = [8, 4, 2];

/// Floating-point operations that trying every choice once may take.
const MOST_FLOPS: f64 = 1e14;

/// A weight of the router that every pair exceeds.
const EVERY: f32 = -1.0;

impl Method for SkipExperts {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, ..Needs::default() }
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Skip>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let found = layers(model);
        let Some(calibration) = cx.calibration.filter(|_| !found.is_empty()) else { return Ok(proposal) };
        let drops = cx.setting::<bool>(&INFO, "experts")?;
        let runs: usize = found.iter().map(|layer| SHARES.len() + layer.slots + layer.experts + PARTS.len()).sum();
        if calibration.trial_flops() * runs as f64 > MOST_FLOPS {
            proposal.outcome.refuse("trying its layers of experts takes longer than a budget is worth", "the model");
            return Ok(proposal);
        }
        let mut choices = vec![Vec::new(); found.len()];
        thresholds(model, &found, calibration, &mut choices)?;
        if drops {
            least_missed(model, &found, calibration, &mut choices)?;
        }
        for (layer, skips) in found.iter().zip(&mut choices) {
            skips.extend((1..layer.slots).map(|slots| (Skip::Slots(slots), None)));
        }
        let kept = kept_shares(model, &found, calibration, &choices)?;
        for ((layer, skips), kept) in found.iter().zip(choices).zip(kept) {
            let site = site(model, layer, skips, &kept, calibration)?;
            if site.candidates.is_empty() {
                proposal.outcome.refuse("no choice of its experts has a finite loss", site.name);
            } else {
                let saves = |quantity: &Quantity| !matches!(quantity, Quantity::Size | Quantity::Parameters);
                let mut site = site;
                if !cx.quantities.iter().any(saves) {
                    site.candidates.retain(|candidate| candidate.cost.parameters < site.baseline.parameters);
                }
                proposal.sites.extend((!site.candidates.is_empty()).then_some(site));
            }
        }
        Ok(proposal)
    }

    /// Experts that stay have fewer rows; those that go are no longer there.
    fn effect_on_nested(
        &self,
        model: &Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Option<NestedEffect>, Error> {
        let Some(layer) = layers(model).into_iter().find(|layer| layer.name(&model.graph) == site.name) else {
            return Ok(None);
        };
        let mut changed = model.clone();
        layer.apply(&mut changed, candidate.edit.of::<Skip>())?;
        DropDead.apply(&mut changed, &cx.pass_context())?;
        let share = candidate.cost.flops_per_row as f64 / site.baseline.flops_per_row.max(1) as f64;
        let nodes: Vec<NodeId> = layer.nodes.iter().copied().filter(|&id| changed.graph.get(id).is_some()).collect();
        let rows: BTreeMap<ValueId, f64> =
            held_by(&changed.graph, &nodes).into_iter().map(|value| (value, share)).collect();
        Ok(Some(NestedEffect { model: changed, rows }))
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        _: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        match layers(model).into_iter().find(|layer| layer.name(&model.graph) == site.name) {
            Some(layer) => {
                layer.apply(model, candidate.edit.of::<Skip>())?;
                outcome.change(candidate.label.clone(), site.name.clone());
            }
            None => outcome.refuse("the experts are no longer grouped as they were", site.name.clone()),
        }
        Ok(outcome)
    }
}

/// A choice, and what it loses if that is measured already.
type Choice = (Skip, Option<f64>);

/// Thresholds on the weights of the router, with their losses: one copy of the model with a threshold for every layer runs
/// them all.
fn thresholds(
    model: &Model,
    found: &[Layer],
    calibration: &dyn Calibrate,
    choices: &mut [Vec<Choice>],
) -> Result<(), Error> {
    let weights: Vec<Rows> = found.iter().map(|layer| Rows::last(layer.weights_name(&model.graph))).collect();
    let spreads = calibration.spreads_of(model, &weights)?;
    let mut gated = model.clone();
    let mut names = Vec::new();
    for (index, layer) in found.iter().enumerate() {
        names.push(layer.gate_threshold(&mut gated, &format!("threshold_{index}"))?);
    }
    let mut tried: Vec<(usize, f32)> = Vec::new();
    for (index, spread) in spreads.iter().enumerate() {
        let Some(spread) = spread else { continue };
        let mut limits: Vec<f32> = SHARES.iter().map(|&share| spread.percentile(share).1 as f32).collect();
        limits.dedup();
        limits.retain(|&limit| f64::from(limit) < spread.largest);
        tried.extend(limits.into_iter().map(|limit| (index, limit)));
    }
    let losses = losses(calibration, &gated, &names, &tried, EVERY)?;
    for ((index, limit), loss) in tried.into_iter().zip(losses) {
        choices[index].push((Skip::Below(limit), Some(loss)));
    }
    Ok(())
}

/// What the model loses with one gate at a number and all others at `open`, for each of `tried`.
fn losses(
    calibration: &dyn Calibrate,
    gated: &Model,
    names: &[String],
    tried: &[(usize, f32)],
    open: f32,
) -> Result<Vec<f64>, Error> {
    if tried.is_empty() {
        return Ok(Vec::new());
    }
    let all = |&(index, number): &(usize, f32)| -> Vec<(String, f32)> {
        let value = |at: usize| if at == index { number } else { open };
        names.iter().enumerate().map(|(at, name)| (name.clone(), value(at))).collect()
    };
    let gates: Vec<Vec<(String, f32)>> = tried.iter().map(all).collect();
    Ok(calibration.trials(gated, &gates)?)
}

/// Sets of the experts that the outputs miss least, each alone.
fn least_missed(
    model: &Model,
    found: &[Layer],
    calibration: &dyn Calibrate,
    choices: &mut [Vec<Choice>],
) -> Result<(), Error> {
    let mut gated = model.clone();
    let mut names = Vec::new();
    for (index, layer) in found.iter().enumerate() {
        names.push(layer.gate_expert(&mut gated, &format!("expert_{index}"))?);
    }
    let each = |(index, layer): (usize, &Layer)| (0..layer.experts).map(move |expert| (index, expert as f32));
    let tried: Vec<(usize, f32)> = found.iter().enumerate().flat_map(each).collect();
    let losses = losses(calibration, &gated, &names, &tried, EVERY)?;
    let mut begin = 0;
    for (layer, skips) in found.iter().zip(choices) {
        let own = &losses[begin..begin + layer.experts];
        begin += layer.experts;
        let mut order: Vec<usize> = (0..layer.experts).collect();
        order.sort_by(|&a, &b| own[a].total_cmp(&own[b]).then(a.cmp(&b)));
        let mut counts: Vec<usize> = PARTS.iter().map(|part| layer.experts / part).filter(|&count| count > 0).collect();
        counts.dedup();
        for count in counts {
            let mut gone = order[..count].to_vec();
            gone.sort_unstable();
            let loss = (count == 1).then(|| own[gone[0]]);
            skips.push((Skip::Experts(gone), loss));
        }
    }
    Ok(())
}

/// The share of the pairs that every choice keeps on the calibration set.
fn kept_shares(
    model: &Model,
    found: &[Layer],
    calibration: &dyn Calibrate,
    choices: &[Vec<Choice>],
) -> Result<Vec<Vec<f64>>, Error> {
    let facts = Facts::infer(model);
    let mut watched = model.clone();
    let mut rows = Vec::new();
    for (layer, skips) in found.iter().zip(choices) {
        for (skip, _) in skips {
            let keep = layer.keep(&mut watched.graph, &facts, skip);
            let cast = Node::new("Cast").with("to", i64::from(DataType::Float.code()));
            let ones = watched.graph.append(ScopeId::MAIN, cast, &[keep], "kept_share");
            rows.push(Rows::last(watched.graph.value(ones).name.clone()));
        }
    }
    watched.graph.sort()?;
    let mut shares =
        calibration.spreads_of(&watched, &rows)?.into_iter().map(|spread| spread.map_or(1.0, |s| s.mean()));
    Ok(choices.iter().map(|skips| shares.by_ref().take(skips.len()).collect()).collect())
}

/// The place of a layer with its choices; those that nothing was measured of are carried out.
fn site(
    model: &Model,
    layer: &Layer,
    skips: Vec<Choice>,
    kept: &[f64],
    calibration: &dyn Calibrate,
) -> Result<Site, Error> {
    let graph = &model.graph;
    let nodes: Vec<NodeId> = layer.nodes.iter().copied().collect();
    let cost = ModelCost::of(model, &Facts::infer(model), &Bindings::default());
    let footprint = held_by(graph, &nodes);
    let tensors = || footprint.iter().filter_map(|&value| graph.constant(value));
    let baseline = Cost {
        bytes: tensors().map(|t| t.byte_len() as u64).sum(),
        parameters: tensors().filter(|t| t.dtype().is_float()).map(|t| t.len() as u64).sum(),
        flops_per_row: nodes.iter().map(|id| cost.by_node[id.index()].flops).sum(),
    };
    let mut candidates = Vec::new();
    for ((skip, loss), &share) in skips.into_iter().zip(kept) {
        let loss = match loss {
            Some(loss) => loss,
            None => {
                let mut changed = model.clone();
                layer.apply(&mut changed, &skip)?;
                calibration.trials(&changed, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY)
            }
        };
        if !loss.is_finite() {
            continue;
        }
        let left = match &skip {
            Skip::Experts(gone) => (layer.experts - gone.len()) as f64 / layer.experts as f64,
            Skip::Below(_) | Skip::Slots(_) => 1.0,
        };
        let part = |whole: u64, share: f64| (whole as f64 * share).round() as u64;
        candidates.push(Candidate {
            label: label(&skip, layer, share),
            cost: Cost {
                bytes: part(baseline.bytes, left) + 8 * OVERHEAD,
                parameters: part(baseline.parameters, left),
                flops_per_row: part(baseline.flops_per_row, share),
            },
            loss: Loss::Measured(loss),
            edit: Edit::new(skip),
        });
    }
    Ok(Site {
        weight: None,
        footprint,
        nodes,
        name: layer.name(graph),
        taps: vec![layer.result],
        baseline,
        candidates,
        required: false,
        isolatable: false,
    })
}

/// As reports call it: `weights to 0.21, 48 % of the pairs`.
fn label(skip: &Skip, layer: &Layer, share: f64) -> String {
    let pairs = format!("{:.0} % of the pairs", 100.0 * share);
    match skip {
        Skip::Below(limit) => format!("weights above {limit:.3}, {pairs}"),
        Skip::Slots(slots) => format!("{slots} of {} experts for a token", layer.slots),
        Skip::Experts(gone) => format!("{} of {} experts, {pairs}", layer.experts - gone.len(), layer.experts),
    }
}
