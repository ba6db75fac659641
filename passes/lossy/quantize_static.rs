//! Whole numbers of 8 bits between layers: ranges of what they read and give are fixed beforehand, from a calibration set.

mod channels;
mod emit;
mod offers;
mod products;
mod ranges;
#[cfg(test)]
mod recipe_tests;
mod refine;
mod regions;
mod rounding;
mod smoothing;
#[cfg(test)]
mod step_tests;
#[cfg(test)]
mod tests;
mod told;
mod units;

pub use told::{LayersInCodes, layers_in_codes};

use super::{Candidate, EditCodec, Method, MethodContext, Proposal, Recipe, Site, weights};
use crate::{Error, Info, Kind, Opt, Outcome, Quantity};
use emit::StaticEdit;
use lathe_analysis::{Facts, Rows, Spread};
use lathe_ir::{Graph, Model, NodeId, Use, ValueId};
use ranges::{Cpus, Ranges, Width};
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
          bits. Where that lowers the loss in the whole model, channels between layers are made alike first (cross-layer \
          equalisation, which changes no output before rounding), numbers of a weight are rounded so that later ones make up for earlier \
          ones (GPTQ), and biases for what rounding takes of the mean. A region is timed with the runtime's fusions on, and its loss is measured in the same \
          way. Linear layers are offered on their own besides, with what they read rounded and what they give as it was, and \
          divided by channel in the normalisation before it where that loses less (SmoothQuant). \
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
            name: "activations",
            unit: "8 or 16",
            default: "8",
            doc: "bits of what layers read and give; 16 is for --target qnn, needs operator set 21, and is slower than 8",
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
    source: Some(
        "ONNX QuantizeLinear-13; Jacob et al. 2018, arXiv:1712.05877; Nagel et al. 2019, arXiv:1906.04721; Xiao et al. 2022, \
         SmoothQuant, arXiv:2211.10438",
    ),
};

/// The oldest operator set that rounds to 16 bits.
const WIDE_OPSET: i64 = 21;

const NO_KERNELS: &str = "the execution provider multiplies no whole numbers";

/// How the settings want it.
#[derive(Clone, Copy)]
struct Options {
    ranges: Ranges,
    largest: u8,
    recipe: Recipe,
    everywhere: bool,
    width: Width,
}

impl Options {
    fn of(cx: &MethodContext) -> Result<Options, Error> {
        let cpus: Cpus = cx.setting(&INFO, "cpus")?;
        let largest = if cx.recipe == Recipe::Cpu { cpus } else { Cpus::Vnni }.largest_code();
        let everywhere = cx.setting(&INFO, "everywhere")?;
        let width = cx.setting(&INFO, "activations")?;
        Ok(Options { ranges: cx.setting(&INFO, "ranges")?, largest, recipe: cx.recipe, everywhere, width })
    }
}

/// Why nothing is offered at all.
fn refusal(method: &QuantizeStatic, model: &Model, cx: &MethodContext) -> Result<Option<&'static str>, Error> {
    if !method.serves(&cx.quantities) && !method.is_requested(cx)? {
        return Ok(Some("it saves time, and latency is not limited"));
    }
    if cx.setting::<Width>(&INFO, "activations")? == Width::Sixteen {
        if cx.recipe != Recipe::Qnn {
            return Ok(Some("activations of 16 bits are for --target qnn: others have no kernels for them"));
        }
        if model.opset() < WIDE_OPSET {
            return Ok(Some("activations of 16 bits need operator set 21; --opset 21 upgrades"));
        }
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
        Ok(values.into_iter().map(|value| rows(graph, &facts, value)).collect())
    }

    fn grams(&self, model: &Model, cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        if refusal(self, model, cx)?.is_some() {
            return Ok(Vec::new());
        }
        let (graph, facts) = (&model.graph, Facts::infer(model));
        let regions = regions::find(model, &facts, cx.recipe, &mut Outcome::default());
        let layers = regions.iter().flat_map(|region| &region.units).filter(|unit| unit.has_weight());
        let all: BTreeSet<Rows> = layers
            .flat_map(|unit| [rounding::read_rows(graph, unit), rounding::mean_rows(graph, unit)])
            .flatten()
            .collect();
        Ok(all.into_iter().collect())
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
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let edit = candidate.edit.of::<StaticEdit>();
        let found = weights(&model.graph).0;
        let graph = &mut model.graph;
        let done = match edit.units.is_empty() {
            false => match edit.scale(graph) {
                Ok(()) => {
                    let fits = rounding::fits(graph, edit, cx)?;
                    edit.emit(graph, &fits)
                }
                Err(reason) => Err(reason),
            },
            true => match found.iter().find(|weight| Some(weight.value) == site.weight) {
                Some(weight) => {
                    let fits = rounding::fits_of_products(graph, weight, edit, cx)?;
                    edit.emit_products(graph, weight, &fits)
                }
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

/// Operators that read and give channels on the second axis.
const OF_IMAGES: [&str; 4] = ["Conv", "MaxPool", "AveragePool", "GlobalAveragePool"];

/// A value as rows whose numbers are counted, with its channels as features.
fn rows(graph: &Graph, facts: &Facts, value: ValueId) -> Rows {
    let name = graph.value(value).name.clone();
    let of_image = |id: NodeId| OF_IMAGES.iter().any(|op| graph.node(id).is(op));
    let read = graph.value(value).uses().iter().any(|place| matches!(*place, Use::Node(id, 0) if of_image(id)));
    let image = facts.ndim(value) >= Some(4) || read || graph.producer(value).is_some_and(of_image);
    if image { Rows::channels(name) } else { Rows::last(name) }
}

/// How the numbers of values are spread, as far as that was seen.
fn spreads(
    (graph, facts): (&Graph, &Facts),
    values: impl IntoIterator<Item = ValueId>,
    cx: &MethodContext,
) -> Result<BTreeMap<ValueId, Spread>, Error> {
    let mut found = BTreeMap::new();
    for value in values {
        let seen = cx.calibration.map(|calibration| calibration.spread(&rows(graph, facts, value)));
        found.extend(seen.transpose()?.flatten().map(|spread| (value, spread)));
    }
    Ok(found)
}

/// How large every channel of values gets, as far as that was seen.
fn sizes(
    (graph, facts): (&Graph, &Facts),
    values: impl IntoIterator<Item = ValueId>,
    cx: &MethodContext,
) -> Result<BTreeMap<ValueId, Vec<f64>>, Error> {
    let mut found = BTreeMap::new();
    for value in values {
        let seen = cx.calibration.map(|calibration| calibration.extremes(&rows(graph, facts, value)));
        let most = |ends: Vec<(f64, f64)>| ends.into_iter().map(|(low, high)| high.max(-low).max(0.0)).collect();
        found.extend(seen.transpose()?.flatten().map(|ends| (value, most(ends))));
    }
    Ok(found)
}
