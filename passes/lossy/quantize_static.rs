//! Whole numbers of 8 bits between layers: ranges of what they read and give are fixed beforehand, from a calibration set.

mod emit;
mod offers;
mod products;
mod ranges;
#[cfg(test)]
mod recipe_tests;
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
          bits. Where it is known what a layer reads on average, its bias makes up for what rounding takes of its weight, if that lowers the loss. A region is timed with the runtime's fusions on, and its loss is measured in the whole model in the same \
          way. Linear layers are offered on their own besides, with what they read rounded and what they give as it was. \
          Under `--target tensorrt`, `openvino` and `qnn` the model is one region, rounded where and how these read it. \
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
            doc: "the processors to be right on, of ONNX Runtime's CPU provider: any keeps weights within 64 steps, because some add products of bytes in \
                  pairs of 16 bits; vnni uses 127",
        },
        Opt {
            name: "everywhere",
            unit: "true or false",
            default: "false",
            doc: "whether it acts wherever it can, whatever that saves; needs no budget",
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
    recipe: Recipe,
    everywhere: bool,
}

impl Options {
    fn of(cx: &MethodContext) -> Result<Options, Error> {
        let cpus: Cpus = cx.setting(&INFO, "cpus")?;
        let largest = if cx.recipe == Recipe::Cpu { cpus } else { Cpus::Vnni }.largest_code();
        let everywhere = cx.setting(&INFO, "everywhere")?;
        Ok(Options { ranges: cx.setting(&INFO, "ranges")?, largest, recipe: cx.recipe, everywhere })
    }
}

/// Why nothing is offered at all.
fn refusal(method: &QuantizeStatic, model: &Model, cx: &MethodContext) -> Result<Option<&'static str>, Error> {
    if !method.serves(&cx.quantities) && !method.is_requested(cx)? {
        return Ok(Some("it saves time, and latency is not limited"));
    }
    if model.opset() < method.operator_set() {
        return Ok(Some("one scale for every output needs operator set 13; --opset 13 upgrades"));
    }
    Ok((cx.recipe == Recipe::None).then_some(NO_KERNELS))
}

impl Method for QuantizeStatic {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn rounds_only(&self) -> bool {
        true
    }

    fn plain(&self, candidate: &Candidate) -> Option<&'static str> {
        candidate.edit.of::<StaticEdit>().whole.then_some("static int8")
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.contains(&Quantity::Latency)
    }

    fn spreads(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        if refusal(self, model, cx)?.is_some() {
            return Ok(Vec::new());
        }
        let (graph, facts) = (&model.graph, Facts::infer(model));
        let regions = regions::find(model, &facts, cx.recipe, &mut Outcome::default());
        let mut values: BTreeSet<ValueId> = regions.iter().flat_map(|region| region.values(graph)).collect();
        if cx.recipe == Recipe::Cpu {
            values.extend(products::inputs(graph, &facts));
        }
        Ok(values.into_iter().map(|value| rows(graph, value)).collect())
    }

    fn is_requested(&self, cx: &MethodContext) -> Result<bool, Error> {
        cx.setting(&INFO, "everywhere")
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<StaticEdit>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        if let Some(reason) = refusal(self, model, cx)? {
            return Ok(Proposal::refused(reason, "the model"));
        }
        let mut proposal = Proposal::default();
        let options = Options::of(cx)?;
        if cx.calibration.is_none() {
            return Ok(Proposal::refused("nothing was seen of it on the calibration set", "the model"));
        }
        let facts = Facts::infer(model);
        let found = regions::find(model, &facts, cx.recipe, &mut proposal.outcome);
        offers::propose(model, &facts, &found, cx, options, &mut proposal)?;
        if cx.recipe == Recipe::Cpu {
            products::propose(model, cx, options, &mut proposal)?;
        }
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
