//! Weights as whole numbers of 8 or 4 bits with one scale per block, dequantized where they are used.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Proposal, Site, Tap, Weight, blocks,
    integers::{Blocks, Layout, Scheme, losses, quantize},
    on_all_cores,
    stored::{self, Storage, Stored},
    weights,
};
use crate::{Error, Info, Kind, Outcome, Quantity, Saving, Target};
use lathe_analysis::Calibrate;
use lathe_ir::{Graph, Model};

/// Stores weights as 4-bit or 8-bit blocks.
pub struct Quantize;

static INFO: Info = Info {
    name: "quantize",
    summary: "store weights as blocks of 4-bit or 8-bit whole numbers",
    doc: "Offers every float32 matrix that products or table look-ups use as int4 or int8 with one float32 scale per 32, \
          64 or 128 numbers along the axis that products are summed over, and the \
          weights of ungrouped convolutions with one scale per output channel. Scales are chosen to lose least on what the calibration set multiplies the weight with. \
          Weights of LSTM, GRU and RNN nodes, of grouped and transposed convolutions, and of products with more than two \
          axes are stored so too, with a loss that is measured in the whole model. \
          Under `--target portable` a blocked `DequantizeLinear` restores them, which needs operator set 21 \
          (`--opset 21` upgrades) and which ONNX Runtime turns into `MatMulNBits` by itself; under `--target ort` products are \
          `MatMulNBits` with `accuracy_level` 4 and look-ups `GatherBlockQuantized` in the file already, and a table that is also a head is stored once for both. Declines where a constant has other uses, is not finite, or would not become smaller.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some("ONNX DequantizeLinear-21; block-wise round to nearest with clipping search"),
};

/// The oldest operator set with blocked `DequantizeLinear`.
pub(super) const OPSET: i64 = 21;

/// Kernels have axes that blocks cannot run over: one scale per output channel.
const KERNEL_SCHEMES: [Scheme; 2] = [Scheme { bits: 8, block: usize::MAX }, Scheme { bits: 4, block: usize::MAX }];

/// The schemes for a weight.
fn schemes(weight: &Weight) -> &'static [Scheme] {
    if weight.dims.len() > 2 { &KERNEL_SCHEMES } else { &SCHEMES }
}

const SCHEMES: [Scheme; 6] = [
    Scheme { bits: 8, block: 32 },
    Scheme { bits: 8, block: 64 },
    Scheme { bits: 8, block: 128 },
    Scheme { bits: 4, block: 32 },
    Scheme { bits: 4, block: 64 },
    Scheme { bits: 4, block: 128 },
];

/// How much a change of a stored number moves a tap's output: mean squares of what it is multiplied with.
struct Importance {
    inputs: Vec<f64>,
    /// Mean square norm of a row of the output.
    output: f64,
}

/// `None` if the tap was not seen on the calibration set.
fn importance(tap: &Tap, weight: &Weight, calibration: Option<&dyn Calibrate>) -> Result<Option<Importance>, Error> {
    let Some(calibration) = calibration else { return Ok(None) };
    let Some(output) = calibration.moments(&tap.output_rows)? else { return Ok(None) };
    let output: f64 = output.square.iter().sum();
    let inputs = match &tap.rows {
        Some(rows) => match calibration.moments(rows)? {
            Some(moments) => moments.square,
            None => return Ok(None),
        },
        // Rows are picked: each is as likely as any other.
        None => vec![1.0 / weight.dims[0] as f64; weight.dims[1]],
    };
    let fits = inputs.len() == weight.inputs() && output.is_finite() && inputs.iter().all(|x| x.is_finite());
    Ok((fits && output > 0.0).then_some(Importance { inputs, output }))
}

/// What every scheme would make of a weight.
fn site(graph: &Graph, weight: &Weight, importances: &[Importance], target: Target) -> Result<Site, &'static str> {
    let layout = Layout::of(weight);
    let tensor = graph.constant(weight.value).expect("weights are constants");
    let Some(matrix) = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite())) else {
        return Err("the constant holds a NaN or an infinity");
    };
    tensor.release();
    let joint = joint(importances, layout);
    let baseline = matrix.len() as u64 * 4;
    let mut candidates = Vec::new();
    for &scheme in schemes(weight) {
        let cost = scheme.cost(&layout, blocks::are_whole(graph, weight, scheme.block, target));
        if cost.bytes >= baseline {
            continue;
        }
        let blocks = quantize(&matrix, layout, scheme, &joint);
        let lost = losses(&matrix, &blocks, layout, scheme);
        let error = |tap: &Importance| {
            let total: f64 = lost.iter().zip(&tap.inputs).map(|(lost, x)| lost * x).sum();
            (total / tap.output).sqrt()
        };
        let loss = Loss::PerTap(importances.iter().map(error).collect());
        candidates.push(Candidate { label: scheme.name(), cost, loss, edit: Edit::new(scheme) });
    }
    Ok(weight.site(graph, candidates))
}

/// What was seen of every tap, or why the weight is passed over.
fn importances(weight: &Weight, cx: &MethodContext) -> Result<Result<Vec<Importance>, &'static str>, Error> {
    let axis = Layout::of(weight).axis;
    if weight.taps.iter().any(|tap| tap.inputs_axis != axis) {
        return Ok(Err("its uses sum over different axes"));
    }
    let mut found = Vec::new();
    for tap in &weight.taps {
        match importance(tap, weight, cx.calibration)? {
            Some(importance) => found.push(importance),
            None => return Ok(Err("nothing was seen of it on the calibration set")),
        }
    }
    Ok(Ok(found))
}

/// One importance for all taps: each counts by its share of its own output.
fn joint(importances: &[Importance], layout: Layout) -> Vec<f64> {
    let mut joint = vec![0.0; layout.length];
    for tap in importances {
        for (sum, x) in joint.iter_mut().zip(&tap.inputs) {
            *sum += x / tap.output;
        }
    }
    // Inputs that were never active still keep their weights near what they were.
    let floor = joint.iter().copied().fold(0.0, f64::max) * 1e-6;
    joint.iter_mut().for_each(|x| *x += floor);
    joint
}

/// A weight in codes, for methods that build on it.
pub(super) struct Coded {
    scheme: Scheme,
    layout: Layout,
    blocks: Blocks,
}

impl Coded {
    /// The matrix in codes, where a number counts by what its input is squared on average.
    pub fn of(graph: &Graph, weight: &Weight, scheme: Scheme, squares: &[f64]) -> Result<Coded, &'static str> {
        let layout = Layout::of(weight);
        let tensor = graph.constant(weight.value).expect("weights are constants");
        let matrix = tensor.to_f32s().filter(|m| m.iter().all(|w| w.is_finite()));
        tensor.release();
        let matrix = matrix.ok_or("the constant holds a NaN or an infinity")?;
        let only = Importance { inputs: squares.to_vec(), output: 1.0 };
        let blocks = quantize(&matrix, layout, scheme, &joint(&[only], layout));
        Ok(Coded { scheme, layout, blocks })
    }

    /// As reports call it.
    pub fn name(&self) -> String {
        self.scheme.name()
    }

    /// What it takes as a weight of `graph`.
    pub fn cost(&self, graph: &Graph, weight: &Weight, target: Target) -> Cost {
        self.scheme.cost(&self.layout, blocks::are_whole(graph, weight, self.scheme.block, target))
    }

    /// The numbers it stands for, in the order of the stored constant.
    pub fn restored(&self) -> Vec<f32> {
        let (layout, count) = (self.layout, self.layout.length.div_ceil(self.scheme.block));
        let scale = |at: usize| {
            let (inner, row, outer) =
                (at % layout.inner, at / layout.inner % layout.length, at / layout.inner / layout.length);
            self.blocks.scales[(outer * count + row / self.scheme.block) * layout.inner + inner]
        };
        self.blocks.codes.iter().enumerate().map(|(at, &code)| f32::from(code) * scale(at)).collect()
    }

    /// The codes as they are stored, one byte each, in the order of the stored constant, and the scales.
    pub fn parts(&self) -> (&[i8], &[f32]) {
        (&self.blocks.codes, &self.blocks.scales)
    }

    /// Stores it in place of the weight.
    pub fn emit(&self, model: &mut Model, weight: &Weight, target: Target) {
        blocks::emit(model, weight, self.layout, self.scheme, &self.blocks, target);
    }
}

/// What a constant that is only stored otherwise could be stored as.
fn storages(stored: &Stored) -> Vec<Storage<Scheme>> {
    let schemes: &[Scheme] = if stored.is_kernel { &KERNEL_SCHEMES } else { &SCHEMES };
    let bytes = |scheme: Scheme| scheme.cost(&stored.layout, false).bytes;
    schemes.iter().map(|&form| Storage { form, label: form.name(), bytes: bytes(form) }).collect()
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

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Size | Quantity::Latency))
    }

    fn operator_set(&self) -> i64 {
        OPSET
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Scheme>())
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
        let mut work = Vec::new();
        for weight in &found {
            // ONNX Runtime's own operators need no operator set in particular.
            if old && blocks::contrib(&model.graph, weight, SCHEMES[0].block).is_none() {
                let reason = "DequantizeLinear needs operator set 21 for it; --opset 21 upgrades";
                proposal.outcome.refuse(reason, format!("`{}`", model.graph.value(weight.value).name));
                continue;
            }
            match importances(weight, cx)? {
                Ok(importances) => work.push((weight, importances)),
                Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", model.graph.value(weight.value).name)),
            }
        }
        let target = cx.target;
        let sites = on_all_cores(cx, &work, |(weight, importances)| site(&model.graph, weight, importances, target));
        for ((weight, _), site) in work.iter().zip(sites) {
            match site {
                Ok(site) => proposal.sites.push(site),
                Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", model.graph.value(weight.value).name)),
            }
        }
        if !old {
            let sites = stored::sites(model, &others, cx, &storages, &store, &mut proposal.outcome)?;
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
        let &scheme = candidate.edit.of::<Scheme>();
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            let stored = site.weight.and_then(|value| stored::of(&model.graph, value));
            match stored.ok_or("the constant is no longer used as it was").and_then(|s| store(model, &s, scheme)) {
                Ok(()) => outcome.change(candidate.label.clone(), format!("`{}`", site.name)),
                Err(reason) => outcome.refuse(reason, format!("`{}`", site.name)),
            }
            return Ok(outcome);
        };
        let layout = Layout::of(weight);
        let importances = match importances(weight, cx)? {
            Ok(importances) => importances,
            Err(reason) => {
                outcome.refuse(reason, format!("`{}`", site.name));
                return Ok(outcome);
            }
        };
        let tensor = model.graph.constant(weight.value).expect("weights are constants");
        let matrix = tensor.to_f32s().expect("sites are float32");
        let coded = quantize(&matrix, layout, scheme, &joint(&importances, layout));
        tensor.release();
        blocks::emit(model, weight, layout, scheme, &coded, cx.target);
        outcome.change(candidate.label.clone(), format!("`{}`", site.name));
        Ok(outcome)
    }
}
