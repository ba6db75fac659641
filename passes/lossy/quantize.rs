//! Weights as whole numbers of 8, 4 or 2 bits with one scale per block, dequantized where they are used.

mod coded;
mod importance;
mod sample;

pub(super) use coded::Coded;
pub(super) use sample::{Fit, fit};

use super::{
    Candidate, Edit, EditCodec, Loss, Method, MethodContext, Proposal, Site, Weight, batches, blocks,
    factors::{self, LayerStatistics},
    gptq::Gptq,
    integers::{Layout, Scheme, losses, quantize, zero_points_gain},
    stored::{self, Storage, Stored},
    weights, within_memory,
};
use crate::{Error, Info, Kind, Outcome, Quantity, Saving, Target};
use coded::Coding;
use importance::{Importance, importances, joint};
use lathe_ir::{Graph, Model};
use sample::{Sample, joint_moments};
use std::collections::BTreeMap;

/// Stores weights as blocks of 2, 4 or 8 bits.
pub struct Quantize;

static INFO: Info = Info {
    name: "quantize",
    summary: "store weights as blocks of 2-bit, 4-bit or 8-bit whole numbers",
    doc: "Offers every float32 matrix that products or table look-ups use as int4 or int8 (under `--target ort` int2 too) with \
          one float32 scale per 32, 64 or 128 numbers along the axis that products are summed over, int4 and int2 with a zero \
          point per block as well where that gains more than its bits would elsewhere, and the \
          weights of ungrouped convolutions with one scale per output channel. Scales are chosen to lose least on what the calibration set multiplies the weight with. \
          Where second moments of it were collected, numbers are rounded one after the other so that later ones make up for \
          what earlier ones lose of the product (GPTQ), if that loses less on samples that are held out. \
          Weights of LSTM, GRU and RNN nodes, of grouped and transposed convolutions, and of products with more than two \
          axes are stored so too, with a loss that is measured in the whole model. \
          Under `--target portable` a blocked `DequantizeLinear` restores them, which needs operator set 21 \
          (`--opset 21` upgrades) and which ONNX Runtime turns into `MatMulNBits` by itself; under `--target ort` products are \
          `MatMulNBits` with `accuracy_level` 4 and look-ups `GatherBlockQuantized` in the file already, and a table that is also a head is stored once for both. Declines where a constant has other uses, is not finite, or would not become smaller.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some(
        "ONNX DequantizeLinear-21; Frantar et al. 2022, GPTQ, arXiv:2210.17323, with blocks' scales from a clipping search",
    ),
};

/// The oldest operator set with blocked `DequantizeLinear`.
pub(super) const OPSET: i64 = 21;

/// Kernels have axes that blocks cannot run over: one scale per output channel.
const KERNEL_SCHEMES: [Scheme; 2] = [Scheme::new(8, usize::MAX), Scheme::new(4, usize::MAX)];

/// Numbers that share a scale.
const BLOCKS: [usize; 3] = [32, 64, 128];

/// The schemes for a weight; zero points where they gain more than as many bits elsewhere would.
fn schemes(graph: &Graph, weight: &Weight, target: Target, gain: impl Fn(usize) -> f64) -> Vec<Scheme> {
    if weight.dims.len() > 2 {
        return KERNEL_SCHEMES.to_vec();
    }
    let mut schemes = SCHEMES.to_vec();
    let mut lowest = vec![4];
    // A standard operator restores 2 bits from operator set 25 on only; the runtime's own ones read them.
    if target == Target::Ort && blocks::contrib(graph, weight, BLOCKS[0]).is_some() {
        schemes.extend(BLOCKS.map(|block| Scheme::new(2, block)));
        lowest.push(2);
    }
    for bits in lowest {
        // A bit more of every number quarters what is lost.
        let worth = 0.25f64.powf(bits as f64 / BLOCKS[0] as f64);
        if gain(bits) < worth {
            schemes.extend(BLOCKS.map(|block| Scheme::with_zero_points(bits, block)));
        }
    }
    schemes
}

const SCHEMES: [Scheme; 6] = [
    Scheme::new(8, 32),
    Scheme::new(8, 64),
    Scheme::new(8, 128),
    Scheme::new(4, 32),
    Scheme::new(4, 64),
    Scheme::new(4, 128),
];

/// What tools without an allocator store.
const PLAIN: Coding = Coding { scheme: Scheme::new(4, 32), fitted: false };

/// What every scheme would make of a weight.
fn site(graph: &Graph, work: &Work<'_>, target: Target) -> Result<Site, &'static str> {
    let Work { weight, importances, seen } = work;
    let layout = Layout::of(weight);
    let tensor = graph.constant(weight.value).expect("weights are constants");
    let Some(matrix) = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite())) else {
        return Err("the constant holds a NaN or an infinity");
    };
    tensor.release();
    let joint = joint(importances, layout);
    let baseline = matrix.len() as u64 * 4;
    let mut candidates = Vec::new();
    let sample = seen.as_ref().and_then(|seen| Sample::of(&matrix, work, seen, &joint));
    // Blocks of other sizes gain about as much.
    let mut gains: BTreeMap<(usize, bool), Option<Vec<f64>>> = BTreeMap::new();
    for scheme in schemes(graph, weight, target, |bits| zero_points_gain(&matrix, layout, bits, &joint)) {
        let cost = scheme.cost(&layout, blocks::are_whole(graph, weight, scheme.block, target));
        if cost.bytes >= baseline {
            continue;
        }
        let blocks = quantize(&matrix, layout, scheme, &joint);
        let lost = losses(&matrix, &blocks, layout, scheme);
        let lost = |tap: &Importance| {
            let total: f64 = lost.iter().zip(&tap.inputs).map(|(lost, x)| lost * x).sum();
            total / tap.output
        };
        let plain: Vec<f64> = importances.iter().map(lost).collect();
        let gains =
            gains.entry((scheme.bits, scheme.zero_points)).or_insert_with(|| Some(sample.as_ref()?.gains(scheme)));
        let fitted = gains.as_ref().map(|gains| plain.iter().zip(gains).map(|(lost, gain)| lost * gain));
        let fitted: Option<Vec<f64>> = fitted.map(Iterator::collect);
        let fitted = fitted.filter(|fitted| fitted.iter().sum::<f64>() < plain.iter().sum());
        let mut offer = |fitted: bool, lost: Vec<f64>| {
            let coding = Coding { scheme, fitted };
            let loss = Loss::PerTap(lost.into_iter().map(f64::sqrt).collect());
            candidates.push(Candidate { label: coding.name(), cost, loss, edit: Edit::new(coding) });
        };
        // The plain one is beaten, and there to be told beside the plan.
        if fitted.is_none() || PLAIN.scheme == scheme {
            offer(false, plain);
        }
        if let Some(fitted) = fitted {
            offer(true, fitted);
        }
    }
    Ok(weight.site(graph, candidates))
}

/// A weight with what was seen of it.
struct Work<'a> {
    weight: &'a Weight,
    importances: Vec<Importance>,
    /// `None` where nothing can be fitted to it.
    seen: Option<LayerStatistics>,
}

/// Bytes that a weight in codes takes while it is made, beside its statistics.
fn working_bytes(weight: &Weight) -> u64 {
    let (k, n) = weight.sides();
    // The numbers, codes and scales; moments that rounding is fitted to and judged by.
    8 * (k * n) as u64 + Gptq::working_bytes((k, n)) + 8 * 3 * (k * k) as u64
}

/// What a constant that is only stored otherwise could be stored as.
fn storages(stored: &Stored) -> Vec<Storage<Coding>> {
    let schemes: &[Scheme] = if stored.is_kernel { &KERNEL_SCHEMES } else { &SCHEMES };
    let bytes = |scheme: Scheme| scheme.cost(&stored.layout, false).bytes;
    let form = |&scheme: &Scheme| {
        let coding = Coding { scheme, fitted: false };
        Storage { form: coding, label: coding.name(), bytes: bytes(scheme) }
    };
    schemes.iter().map(form).collect()
}

/// Stores a constant in codes that are near its numbers, each of which counts alike.
fn store(model: &mut Model, stored: &Stored, scheme: Scheme) -> Result<(), &'static str> {
    let layout = stored.layout;
    let tensor = model.graph.constant(stored.value).expect("only constants are stored");
    let numbers = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite()));
    tensor.release();
    let numbers = numbers.ok_or("the constant holds a NaN or an infinity")?;
    let blocks = quantize(&numbers, layout, scheme, &vec![1.0; layout.length]);
    blocks::emit_stored(model, stored, scheme, &blocks);
    Ok(())
}

impl Method for Quantize {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn rounds_only(&self) -> bool {
        true
    }

    fn plain(&self, candidate: &Candidate) -> Option<&'static str> {
        (*candidate.edit.of::<Coding>() == PLAIN).then_some("int4 of block 32, rounded to nearest")
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Size | Quantity::Latency))
    }

    fn operator_set(&self) -> i64 {
        OPSET
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Coding>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        if !self.serves(&cx.quantities) {
            proposal.outcome.refuse("it saves bytes and time, and neither is limited", "the model");
            return Ok(proposal);
        }
        let (found, refused) = weights(&model.graph);
        let (others, refused) = stored::stored(&model.graph, refused);
        for (value, reason) in refused {
            proposal.outcome.refuse(reason, format!("`{}`", model.graph.value(value).name));
        }
        let old = model.opset() < OPSET;
        if old && cx.target != Target::Ort {
            proposal.outcome.refuse("blocked DequantizeLinear needs operator set 21; --opset 21 upgrades", "the model");
            return Ok(proposal);
        }
        let graph = &model.graph;
        let place = |weight: &Weight| format!("`{}`", graph.value(weight.value).name);
        for batch in batches(&found, cx, factors::statistics_bytes) {
            let mut ready = Vec::new();
            for weight in batch {
                // ONNX Runtime's own operators need no operator set in particular.
                if old && blocks::contrib(graph, weight, SCHEMES[0].block).is_none() {
                    let reason = "DequantizeLinear needs operator set 21 for it; --opset 21 upgrades";
                    proposal.outcome.refuse(reason, place(weight));
                    continue;
                }
                match importances(weight, cx)? {
                    Ok(importances) => {
                        let seen = factors::products_seen(graph, weight, cx)?.ok();
                        ready.push(Work { weight, importances, seen });
                    }
                    Err(reason) => proposal.outcome.refuse(reason, place(weight)),
                }
            }
            let bytes = |work: &Work<'_>| working_bytes(work.weight);
            let target = cx.target;
            let sites = within_memory(&ready, cx, bytes, |work| site(graph, work, target));
            for (work, site) in ready.iter().zip(sites) {
                match site {
                    Ok(site) => proposal.sites.push(site),
                    Err(reason) => proposal.outcome.refuse(reason, place(work.weight)),
                }
            }
        }
        if !old {
            let sites = stored::sites(
                model,
                &others,
                cx,
                &storages,
                &|model, stored, coding: Coding| store(model, stored, coding.scheme),
                &mut proposal.outcome,
            )?;
            proposal.sites.extend(sites);
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
        let &coding = candidate.edit.of::<Coding>();
        let place = || format!("`{}`", site.name);
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            let stored = site.weight.and_then(|value| stored::of(&model.graph, value));
            let done = stored.ok_or("the constant is no longer used as it was");
            match done.and_then(|stored| store(model, &stored, coding.scheme)) {
                Ok(()) => outcome.change(candidate.label.clone(), place()),
                Err(reason) => outcome.refuse(reason, place()),
            }
            return Ok(outcome);
        };
        let importances = match importances(weight, cx)? {
            Ok(importances) => importances,
            Err(reason) => {
                outcome.refuse(reason, place());
                return Ok(outcome);
            }
        };
        let coding = Coding { fitted: coding.fitted && !cx.only_timed, ..coding };
        let seen = if coding.fitted { factors::products_seen(&model.graph, weight, cx)?.ok() } else { None };
        let moments = seen.map(|seen| joint_moments(weight, &seen, &importances));
        let importance = joint(&importances, Layout::of(weight));
        match Coded::new(&model.graph, weight, coding, (&importance, moments.as_ref())) {
            Ok(coded) => {
                coded.emit(model, weight, cx.target);
                outcome.change(candidate.label.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}
