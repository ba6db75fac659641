//! Layers of 4 bits with a thin layer beside them that makes up for what rounding loses of the output.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, OVERHEAD, Proposal, Site, Weight,
    factorize::Rank,
    factors::{self, Layer, LayerStatistics},
    in_batches,
    integers::Scheme,
    quantize::{self, Coded},
    spectrum::Spectrum,
    weights,
};
use crate::{Error, Info, Kind, Outcome, Quantity, Saving, Target};
use faer::Mat;
use lathe_ir::{Graph, Model, Node, ScopeId, Tensor};

/// Adds a bypass of low rank to quantized layers.
pub struct Compensate;

static INFO: Info = Info {
    name: "compensate",
    summary: "add thin layers beside int4 ones that make up for their rounding (EoRA)",
    doc: "Offers every float32 `MatMul` and `Gemm` as int4 of block 128, rounded by GPTQ, with `x·A·B` of rank 8, 16 or 32 added, fitted in \
          closed form to what rounding loses of the output on the calibration set. Costs the bytes of A and B in float32 \
          and two small products per run. Not offered where only parameters or FLOPs are limited, and for convolutions. \
          Needs operator set 21.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some("Liu et al. 2024, EoRA, arXiv:2410.21271"),
};

/// Ranks of the bypass.
const RANKS: [usize; 3] = [8, 16, 32];

/// What is quantized, how far it is off, and the directions of that.
fn coded(graph: &Graph, weight: &Weight, layer: &Layer) -> Result<(Coded, Mat<f64>, Spectrum), &'static str> {
    let coded = Coded::fitted(graph, weight, Scheme::new(4, 128), &layer.joint)?;
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let restored = coded.restored();
    let turned = weight.inputs_axis() == 1;
    let at = |row: usize, column: usize| if turned { column * k + row } else { row * n + column };
    let off = Mat::from_fn(k, n, |row, column| layer.matrix[(row, column)] - f64::from(restored[at(row, column)]));
    let found = Spectrum::of(off.as_ref(), layer.joint.as_ref()).ok_or("its decomposition does not converge")?;
    Ok((coded, off, found))
}

fn candidates(graph: &Graph, weight: &Weight, layer: &Layer, target: Target) -> Result<Vec<Candidate>, &'static str> {
    if weight.dims.len() > 2 {
        return Err("it is a convolution");
    }
    if weight.taps.iter().any(|tap| graph.node(tap.node).float("alpha").is_some_and(|alpha| alpha != 1.0)) {
        return Err("its Gemm scales the product");
    }
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let (coded, off, found) = coded(graph, weight, layer)?;
    let judged = |judge: &Mat<f64>| found.tails_under(off.as_ref(), judge.as_ref());
    let tails: Vec<Vec<f64>> = layer.judges.iter().map(judged).collect();
    let ranks = RANKS.into_iter().filter(|&r| 4 * r <= k.min(n) && r < found.len());
    let candidate = |rank: usize| {
        let numbers = (rank * (k + n)) as u64;
        let base = coded.cost(graph, weight, target);
        let errors = tails.iter().map(|tails| tails[rank].max(0.0).sqrt()).collect();
        let cost = Cost {
            bytes: base.bytes + 4 * numbers + 3 * OVERHEAD * weight.taps.len() as u64,
            parameters: base.parameters + numbers,
            flops_per_row: base.flops_per_row + 2 * numbers,
        };
        let label = format!("{} + rank {rank}", coded.name());
        Candidate { label, cost, loss: Loss::PerTap(errors), edit: Edit::new(Rank(rank)) }
    };
    Ok(ranks.map(candidate).filter(|c| c.cost.bytes < 4 * (k * n) as u64).collect())
}

impl Method for Compensate {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        quantities.iter().any(|m| matches!(m, Quantity::Size | Quantity::Latency))
    }

    fn operator_set(&self) -> i64 {
        quantize::OPSET
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Rank>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        if model.opset() < quantize::OPSET {
            let reason = "blocked DequantizeLinear needs operator set 21; --opset 21 upgrades";
            return Ok(Proposal::refused(reason, "the model"));
        }
        if !self.serves(&cx.quantities) {
            return Ok(Proposal::refused("it saves neither bytes nor time", "the model"));
        }
        let target = cx.target;
        let work = |weight: &Weight, statistics: &LayerStatistics| {
            let layer = Layer::new(&model.graph, weight, statistics)?;
            candidates(&model.graph, weight, &layer, target)
        };
        in_batches(model, cx, &work)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let &Rank(rank) = candidate.edit.of();
        let place = || format!("`{}`", site.name);
        let mut outcome = Outcome::default();
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let made = factors::statistics(&model.graph, weight, cx)?.and_then(|statistics| {
            let layer = Layer::new(&model.graph, weight, &statistics)?;
            coded(&model.graph, weight, &layer)
        });
        match made {
            Ok((coded, _, found)) => {
                let mut left = found.left.subcols(0, rank).to_owned();
                let mut right = found.right.subcols(0, rank).to_owned();
                factors::balance(&mut left, &mut right);
                emit(&mut model.graph, weight, &left, &right);
                coded.emit(model, weight, cx.target);
                outcome.change(candidate.label.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}

/// Adds `x·left·rightᵀ` to the output of every use.
fn emit(graph: &mut Graph, weight: &Weight, left: &Mat<f64>, right: &Mat<f64>) {
    let name = graph.value(weight.value).name.clone();
    let (k, n, rank) = (left.nrows(), right.nrows(), left.ncols());
    let store = |graph: &mut Graph, part: &str, tensor: Tensor| {
        let fresh = graph.fresh_name(&format!("{name}_{part}"));
        graph.add_initializer(ScopeId::MAIN, &fresh, tensor)
    };
    let a = store(graph, "bypass_left", Tensor::from_f32s(&[k, rank], &factors::numbers(left.as_ref())));
    let b = store(graph, "bypass_right", Tensor::from_f32s(&[rank, n], &factors::numbers(right.transpose())));
    for tap in &weight.taps {
        let data = graph.node(tap.node).input(0).expect("a tap multiplies data");
        let inner = graph.append(ScopeId::MAIN, Node::new("MatMul"), &[data, a], &format!("{name}_bypass"));
        let bypass = graph.append(ScopeId::MAIN, Node::new("MatMul"), &[inner, b], &format!("{name}_bypass"));
        let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[tap.output, bypass], &format!("{name}_whole"));
        let add = graph.producer(sum).expect("it was just added");
        graph.replace(tap.output, sum);
        graph.set_input(add, 0, Some(tap.output));
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::{
        product,
        tests::{gram, random},
    };
    use super::*;

    #[test]
    fn a_bypass_of_every_rank_leaves_what_it_says_and_no_more_than_plain_svd() {
        let (x, off) = (random(90, 24, 1), random(24, 20, 2));
        let gram = gram(&x);
        let found = Spectrum::of(off.as_ref(), gram.as_ref()).unwrap();
        let plain = Spectrum::of(off.as_ref(), Mat::<f64>::identity(24, 24).as_ref()).unwrap();
        let left = |found: &Spectrum, rank: usize| {
            let low = product(found.left.as_ref().subcols(0, rank), found.right.as_ref().subcols(0, rank).transpose());
            product(x.as_ref(), (&off - low).as_ref()).squared_norm_l2() / 90.0
        };
        for (rank, tail) in Spectrum::tails(&found.energy).into_iter().enumerate() {
            let lost = left(&found, rank);
            assert!((lost - tail).abs() < 1e-9, "{rank}: {lost} {tail}");
            assert!(lost <= left(&plain, rank) + 1e-9);
        }
    }
}
