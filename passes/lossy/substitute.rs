//! Layers and branches that something without parameters, and a map fitted in closed form, can stand in for.

mod basis;
mod fit;
mod fitted;
mod frozen;
mod places;
#[cfg(test)]
mod tests;

use super::{
    Candidate, Cost, Edit, Loss, Method, MethodContext, Needs, OLDEST_OPSET, OVERHEAD, Proposal, Site, on_all_cores,
};
use crate::{Error, Info, Kind, Opt, Outcome, Quantity, Saving};
use basis::{Base, Form};
use fit::{Fit, Moments};
use fitted::Fitted;
use lathe_analysis::{Bindings, Calibrate, Cost as ModelCost, Cross, Facts, Rows};
use lathe_ir::{Graph, Model, NodeId, ValueId};
use places::{Place, places};
use std::collections::BTreeSet;

/// Puts pools, shifts and copies in the place of layers.
pub struct Substitute;

static INFO: Info = Info {
    name: "substitute",
    summary: "replace convolutions, attentions and branches by pools, shifts or copies and one small layer",
    doc: "Offers to compute what a convolution with a window gives, alone or with the pointwise layer after it, from the \
          maximum, the average, a shift or a copy of what it reads, by a factor per channel or a pointwise layer. What an \
          attention or a feed-forward branch adds is offered as one layer of what its normalization gives, of averages \
          over neighbours of a square grid of tokens, and of the average token. The numbers are fitted in closed form to \
          calibration samples and judged on samples that the fit has not seen; a factor in front of a pointwise layer \
          goes into it. Weights of attentions over a fixed number of tokens are offered as constants, their mean over the \
          calibration set. The loss of every choice that no other is as good as is measured in the whole model, where \
          trying them takes little time. Where latency is limited, only what is measured to be faster is \
          kept, which pools in the place of depthwise convolutions rarely are. Declines windows that are dilated or not \
          centred, groups of several channels, layers whose weights others share, branches that read more than the \
          stream, and under a budget of size alone.",
    options: &[
        Opt {
            name: "most",
            unit: "a number above 0",
            default: "0.9",
            doc: "share of the variance of a layer's output that may be lost; what loses more is not offered",
        },
        Opt {
            name: "frozen",
            unit: "auto or never",
            default: "auto",
            doc: "whether weights of attentions are offered as constants; auto where trying all takes little time",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some("Kim et al. 2022, PfLayer, arXiv:2202.02777; Hassid et al. 2022, PAPA, arXiv:2211.03495"),
};

/// Features of one place whose second moments are taken at most: memory grows with the square.
const MOST_FEATURES: usize = 1536;

/// Numbers of second moments that are in memory at a time.
const MOST_NUMBERS: usize = 1 << 26;

/// A number above 0.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Share(f64);

impl std::str::FromStr for Share {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0).map(Share).ok_or(())
    }
}

/// Whether attentions are tried with constant weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frozen {
    Auto,
    Never,
}

impl std::str::FromStr for Frozen {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Frozen::Auto),
            "never" => Ok(Frozen::Never),
            _ => Err(()),
        }
    }
}

impl Method for Substitute {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Flops | Quantity::Latency | Quantity::Parameters))
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, trials: true, speedup: true, ..Needs::default() }
    }

    fn extra_taps(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        if !self.serves(&cx.quantities) || model.opset() < OLDEST_OPSET {
            return Ok(Vec::new());
        }
        let (found, _) = places(model);
        Ok(found.iter().map(|place| place.rows(&model.graph, place.output)).collect())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let Some(calibration) = cx.calibration.filter(|_| self.serves(&cx.quantities)) else { return Ok(proposal) };
        if model.opset() < OLDEST_OPSET {
            return Ok(Proposal::refused("operator set 13 or newer is needed", "the model"));
        }
        if !calibration.holds_out() {
            return Ok(Proposal::refused(super::NOT_HELD_OUT, "the model"));
        }
        let Share(most) = cx.setting(&INFO, "most")?;
        let (found, refused) = places(model);
        refused.into_iter().for_each(|(reason, place)| proposal.outcome.refuse(reason, place));
        let (work, quantities) = (Work::of(model), cx.quantities.as_slice());
        for batch in batches(&found) {
            let moments = PlaceMoments::of(model, batch, calibration)?;
            let ready: Vec<(&Place, &PlaceMoments)> = batch.iter().zip(&moments).collect();
            let sites = on_all_cores(cx, &ready, |(place, moments)| work.site(place, moments, most, quantities));
            for (place, site) in batch.iter().zip(sites) {
                match site {
                    Ok(site) => proposal.sites.push(site),
                    Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", place.name)),
                }
            }
        }
        if cx.setting::<Frozen>(&INFO, "frozen")? == Frozen::Auto {
            frozen::propose(&work, calibration, &mut proposal)?;
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
        match candidate.edit.of::<Fitted>().splice(&mut model.graph) {
            Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
            Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
        }
        Ok(outcome)
    }
}

/// Places in groups whose second moments fit into memory together.
fn batches(found: &[Place]) -> Vec<&[Place]> {
    let numbers = |place: &Place| {
        let features = place.inputs * basis::bases(place).len();
        2 * features * (features + place.outputs)
    };
    let (mut batches, mut start, mut sum) = (Vec::new(), 0, 0);
    for (at, place) in found.iter().enumerate() {
        let own = numbers(place);
        if sum + own > MOST_NUMBERS && at > start {
            batches.push(&found[start..at]);
            (start, sum) = (at, 0);
        }
        sum += own;
    }
    batches.push(&found[start..]);
    batches.retain(|batch: &&[Place]| !batch.is_empty());
    batches
}

/// Moments of a place: of all its bases beside each other with what it gives, and with what its second layer reads.
struct PlaceMoments {
    fits: [Moments; 2],
    held: [Moments; 2],
}

impl PlaceMoments {
    /// Of several places in one run over the calibration set.
    fn of(model: &Model, places: &[Place], calibration: &dyn Calibrate) -> Result<Vec<PlaceMoments>, Error> {
        let mut variant = model.clone();
        let graph = &mut variant.graph;
        let mut pairs = Vec::new();
        for place in places {
            let features = basis::beside(graph, place);
            let features = place.rows(graph, features);
            pairs.push((features.clone(), features.clone()));
            pairs.push((features.clone(), place.rows(graph, place.output)));
            if let Some(second) = &place.second {
                pairs.push((features, place.rows(graph, second.reads)));
            }
        }
        graph.sort()?;
        let split = |found: Vec<Cross>| -> Vec<[Moments; 2]> {
            let mut all = found.into_iter();
            let mut next = || all.next().expect("there is one for every pair");
            let mut moments = Vec::new();
            for place in places {
                let (own, output) = (next(), next());
                let whole = Moments::of(&own, &output);
                let inner = place.second.as_ref().map(|_| Moments::of(&own, &next()));
                let inner = inner.unwrap_or_else(|| whole.clone());
                moments.push([whole, inner]);
            }
            moments
        };
        let fits = split(calibration.cross(&variant, &pairs)?);
        let held = split(calibration.held_out(&variant, &pairs)?);
        Ok(fits.into_iter().zip(held).map(|(fits, held)| PlaceMoments { fits, held }).collect())
    }
}

/// A model and what its nodes take.
struct Work<'a> {
    model: &'a Model,
    facts: Facts,
    cost: ModelCost,
}

impl<'a> Work<'a> {
    fn of(model: &'a Model) -> Work<'a> {
        let facts = Facts::infer(model);
        let cost = ModelCost::of(model, &facts, &Bindings::default());
        Work { model, facts, cost }
    }

    /// What nodes take with the constants that only they read.
    fn baseline(&self, nodes: &[NodeId]) -> Cost {
        let graph = &self.model.graph;
        let own: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let values = super::prune_units::own_values(graph, &own);
        let tensors = || values.iter().filter_map(|&v| graph.constant(v));
        Cost {
            bytes: tensors().map(|t| t.byte_len() as u64).sum::<u64>() + OVERHEAD * nodes.len() as u64,
            parameters: tensors().filter(|t| t.dtype().is_float()).map(|t| t.len() as u64).sum(),
            flops_per_row: nodes.iter().map(|id| self.cost.by_node[id.index()].flops).sum(),
        }
    }

    /// What a fragment takes that reads these values.
    fn cost(&self, fragment: &Graph, reads: &[ValueId]) -> Cost {
        let mut model =
            Model { graph: fragment.clone(), functions: Vec::new(), training: Vec::new(), ..self.model.clone() };
        for (at, &value) in reads.iter().enumerate() {
            let input = model.graph.main().inputs()[at];
            model.graph.value_mut(input).ty = self.facts.ty(value);
        }
        let cost = ModelCost::of(&model, &Facts::infer(&model), &Bindings::default());
        Cost {
            bytes: cost.weight_bytes + OVERHEAD * cost.nodes as u64,
            parameters: cost.parameters,
            flops_per_row: cost.flops,
        }
    }

    /// The site of a place with everything that could stand in it.
    fn site(
        &self,
        place: &Place,
        moments: &PlaceMoments,
        most: f64,
        quantities: &[Quantity],
    ) -> Result<Site, &'static str> {
        let graph = &self.model.graph;
        let [fits, held] = [&moments.fits[0], &moments.held[0]];
        if !fits.is_finite() || !held.is_finite() || held.output() <= 0.0 {
            return Err("what it reads or gives is not finite, or is all zero");
        }
        let baseline = self.baseline(&place.nodes);
        let all = basis::bases(place);
        let mut candidates = Vec::new();
        for bases in basis::combinations(&all) {
            let columns: Vec<usize> = bases.iter().flat_map(|base| columns(&all, *base, place.inputs)).collect();
            for form in Form::of(place, &bases) {
                let made = self.fit(place, moments, &columns, form);
                let Some((fit, lost)) = made else { continue };
                if lost > most * held.variance() || !lost.is_finite() {
                    continue;
                }
                let fragment = basis::fragment(graph, place, &bases, &fit, form);
                let cost = self.cost(&fragment, &[place.reads]);
                if !saves(&cost, &baseline, quantities) {
                    continue;
                }
                let name = |value: ValueId| graph.value(value).name.clone();
                let fitted = Fitted { inputs: vec![name(place.reads)], output: name(place.output), fragment };
                candidates.push(Candidate {
                    label: basis::name(&bases, form),
                    cost,
                    loss: Loss::PerTap(vec![(lost.max(0.0) / held.output()).sqrt()]),
                    edit: Edit::new(fitted),
                });
            }
        }
        if candidates.is_empty() {
            return Err("nothing that it could do comes near what is there and saves something");
        }
        Ok(Site {
            weight: None,
            footprint: place.footprint.clone(),
            nodes: place.nodes.clone(),
            name: place.name.clone(),
            taps: vec![place.output],
            baseline,
            candidates,
            required: false,
            isolatable: true,
        })
    }

    /// The best map of one form, and what it loses of the output in mean square where it was not fitted.
    fn fit(&self, place: &Place, moments: &PlaceMoments, columns: &[usize], form: Form) -> Option<(Fit, f64)> {
        let [fits, held] = [&moments.fits, &moments.held].map(|moments| moments[0].pick(columns));
        match form {
            Form::Layer => fit::layer(&fits, &held),
            Form::Factors => {
                let fit = fit::factors(&fits)?;
                let lost = held.lost(&fit);
                Some((fit, lost))
            }
            Form::Folded => {
                let second = place.second.as_ref()?;
                let factors = fit::factors(&moments.fits[1].pick(columns))?;
                let fit = second.after(&self.model.graph, &factors)?;
                let lost = held.lost(&fit);
                Some((fit, lost))
            }
        }
    }
}

/// Where the features of a base are among those of all bases.
fn columns(all: &[Base], base: Base, width: usize) -> std::ops::Range<usize> {
    let at = all.iter().position(|other| *other == base).expect("combinations are of all bases");
    at * width..(at + 1) * width
}

/// Whether a candidate may save something that is limited; how long it takes is measured later.
fn saves(cost: &Cost, baseline: &Cost, quantities: &[Quantity]) -> bool {
    quantities.iter().any(|measure| match measure {
        Quantity::Latency => true,
        Quantity::Flops => cost.flops_per_row < baseline.flops_per_row,
        Quantity::Parameters => cost.parameters < baseline.parameters,
        Quantity::Size => cost.bytes < baseline.bytes,
    })
}
