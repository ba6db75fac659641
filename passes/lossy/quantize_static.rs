//! Whole numbers of 8 bits between layers: ranges of what they read and give are fixed beforehand, from a calibration set.

mod emit;
mod offers;
mod products;
mod ranges;
mod regions;
#[cfg(test)]
mod tests;
mod units;

use super::{Candidate, EditCodec, Method, MethodContext, Proposal, Recipe, Site, weights};
use crate::{Error, Info, Kind, Opt, Outcome, Quantity};
use emit::StaticEdit;
use lathe_analysis::{Facts, Rows, Spread};
use lathe_ir::{Graph, Model, ValueId};
use ranges::{Cpus, Ranges};
use std::collections::{BTreeMap, BTreeSet};

/// Rounds what layers read and give to whole numbers of fixed ranges.
pub struct QuantizeStatic;

static INFO: Info = Info {
    name: "quantize-static",
    summary: "compute in whole numbers with ranges from the calibration set (static quantization)",
    doc: "Finds regions of convolutions, layers, sums, pools and concatenations that ONNX Runtime's CPU provider computes in \
          whole numbers when `QuantizeLinear` and `DequantizeLinear` stand around each of them, and offers every region as \
          a whole, without its first or last layer, and without the layers that lose most. What they read and give are 8 \
          bits without sign in ranges that the calibration set shows, weights 8 bits with one scale per output, biases 32 \
          bits. A region is timed with the runtime's fusions on, and its loss is measured in the whole model in the same \
          way. Linear layers are offered on their own besides, with what they read rounded and what they give as it was. \
          Offered where latency is limited; declines under execution providers that multiply no whole numbers, and where \
          nothing it could do is faster.",
    options: &[
        Opt {
            name: "ranges",
            unit: "auto, minmax, percentile, mse or entropy",
            default: "auto",
            doc: "how ranges are chosen: all that was seen, 99.99 percent of it, with the least mean square error, or with \
                  the least divergence; auto tries the first and the third on the model",
        },
        Opt {
            name: "cpus",
            unit: "any or vnni",
            default: "any",
            doc: "the processors to be right on: any keeps weights within 64 steps, because some add products of bytes in \
                  pairs of 16 bits; vnni uses 127",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[],
    source: Some("ONNX QuantizeLinear-13; Jacob et al. 2018, arXiv:1712.05877"),
};

const NO_KERNELS: &str = "the execution provider multiplies no whole numbers";

/// How the settings want it.
#[derive(Clone, Copy)]
struct Options {
    ranges: Ranges,
    largest: u8,
}

impl Options {
    fn of(cx: &MethodContext) -> Result<Options, Error> {
        let cpus: Cpus = cx.setting(&INFO, "cpus")?;
        Ok(Options { ranges: cx.setting(&INFO, "ranges")?, largest: cpus.largest_code() })
    }
}

/// Why nothing is offered at all.
fn refusal(method: &QuantizeStatic, cx: &MethodContext) -> Option<&'static str> {
    if !method.serves(&cx.quantities) {
        return Some("it saves time, and latency is not limited");
    }
    (cx.recipe == Recipe::None).then_some(NO_KERNELS)
}

impl Method for QuantizeStatic {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.contains(&Quantity::Latency)
    }

    fn spreads(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        if refusal(self, cx).is_some() {
            return Ok(Vec::new());
        }
        let (graph, facts) = (&model.graph, Facts::infer(model));
        let regions = regions::find(model, &facts, &mut Outcome::default());
        let mut values: BTreeSet<ValueId> = regions.iter().flat_map(|region| region.values(graph)).collect();
        values.extend(products::inputs(graph, &facts));
        Ok(values.into_iter().map(|value| rows(graph, value)).collect())
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<StaticEdit>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        if let Some(reason) = refusal(self, cx) {
            return Ok(Proposal::refused(reason, "the model"));
        }
        let mut proposal = Proposal::default();
        let options = Options::of(cx)?;
        if cx.calibration.is_none() {
            return Ok(Proposal::refused("nothing was seen of it on the calibration set", "the model"));
        }
        let facts = Facts::infer(model);
        let found = regions::find(model, &facts, &mut proposal.outcome);
        offers::propose(model, &facts, &found, cx, options, &mut proposal)?;
        products::propose(model, cx, options, &mut proposal)?;
        if proposal.sites.is_empty() && proposal.outcome.refusals.is_empty() {
            proposal.outcome.refuse("no operator of it has a kernel of whole numbers", "the model");
        }
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        _: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let edit = candidate.edit.of::<StaticEdit>();
        let found = weights(&model.graph).0;
        let done = match edit.units.is_empty() {
            false => edit.apply(&mut model.graph),
            true => match found.iter().find(|weight| Some(weight.value) == site.weight) {
                Some(weight) => edit.apply_to_products(&mut model.graph, weight),
                None => Err("the constant is no longer used as it was"),
            },
        };
        match done {
            Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
            Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
        }
        Ok(outcome)
    }
}

/// A value as rows whose numbers are counted.
fn rows(graph: &Graph, value: ValueId) -> Rows {
    Rows::last(graph.value(value).name.clone())
}

/// How the numbers of values are spread, as far as that was seen.
fn spreads(
    graph: &Graph,
    values: impl IntoIterator<Item = ValueId>,
    cx: &MethodContext,
) -> Result<BTreeMap<ValueId, Spread>, Error> {
    let mut found = BTreeMap::new();
    for value in values {
        let seen = cx.calibration.map(|calibration| calibration.spread(&rows(graph, value))).transpose()?.flatten();
        found.extend(seen.map(|spread| (value, spread)));
    }
    Ok(found)
}
