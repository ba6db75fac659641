//! Layers as two thinner layers.

use super::{
    Choice, Method, Proposal, Site, factors,
    factors::{Layer, Seen, sides},
    in_batches,
    spectrum::Spectrum,
    weights,
};
use crate::{Context, Error, Info, Kind, Opt, Outcome, Quantity};
use faer::Mat;
use lathe_ir::Model;

/// Replaces layers by products of low rank.
pub struct Factorize;

static INFO: Info = Info {
    name: "factorize",
    summary: "replace layers by two thinner ones, fitted to what they read",
    doc: "Offers every float32 `MatMul`, `Gemm` and ungrouped `Conv` as `x·U` and `·V` of rank r: r(k + n) numbers and \
          multiply-adds per row instead of k·n. The factors lose least of the layer's output on the calibration set \
          (whitened singular value decomposition), not of the weight. A convolution becomes one with r channels and a \
          1×1 one. Declines layers that give an output of the model, tables that rows are picked of, and those with \
          fewer than 32 inputs or outputs.",
    options: &[Opt {
        name: "metric",
        unit: "output or weight",
        default: "output",
        doc: "what is fitted: the output on the calibration set, or the weight itself (plain SVD, for comparison)",
    }],
    kind: Kind::Lossy,
    lowers: &[Quantity::Parameters, Quantity::Flops],
    source: Some("Wang et al. 2024, SVD-LLM, arXiv:2403.07378"),
};

/// Percent of the layer's numbers that its factors may take.
const SHARES: [usize; 14] = [95, 90, 85, 80, 75, 70, 65, 60, 55, 50, 45, 40, 30, 20];

/// Ranks are multiples of this, for the sake of kernels; of layers with small sides, of 4.
const MULTIPLE: usize = 16;

/// What the factors are fitted to.
#[derive(Clone, Copy, PartialEq)]
enum Metric {
    Output,
    Weight,
}

impl std::str::FromStr for Metric {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "output" => Ok(Metric::Output),
            "weight" => Ok(Metric::Weight),
            _ => Err(()),
        }
    }
}

fn ranks(k: usize, n: usize) -> Vec<usize> {
    let multiple = if k.min(n) < 8 * MULTIPLE { 4 } else { MULTIPLE };
    let mut ranks: Vec<usize> =
        SHARES.iter().map(|share| k * n * share / 100 / (k + n) / multiple * multiple).filter(|&r| r > 0).collect();
    ranks.dedup();
    ranks
}

fn spectrum(layer: &Layer, metric: Metric) -> Result<Spectrum, &'static str> {
    let found = match metric {
        Metric::Output => Spectrum::of(layer.matrix.as_ref(), layer.joint.as_ref()),
        Metric::Weight => {
            let k = layer.matrix.nrows();
            Spectrum::of(layer.matrix.as_ref(), Mat::<f64>::identity(k, k).as_ref())
        }
    };
    found.ok_or("its decomposition does not converge")
}

fn choices(layer: &Layer, metric: Metric, uses: usize) -> Result<Vec<Choice>, &'static str> {
    let found = spectrum(layer, metric)?;
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let ranks: Vec<usize> = ranks(k, n).into_iter().filter(|&r| r < found.len()).collect();
    let name = |rank: usize| format!("rank {rank}");
    // Directions that were fitted to the output lose independently of one another; others do not.
    if metric == Metric::Output && layer.taps.len() == 1 {
        let tails = Spectrum::tails(&found.energy);
        let choice =
            |&r: &usize| Choice { name: name(r), spent: factors::spent(k, n, r, uses), errors: vec![tails[r].sqrt()] };
        return Ok(ranks.iter().map(choice).collect());
    }
    let choice = |&r: &usize| {
        let (left, right) = (found.left.as_ref().subcols(0, r), found.right.as_ref().subcols(0, r));
        let off = &layer.matrix - super::spectrum::product(left, right.transpose());
        Choice { name: name(r), spent: factors::spent(k, n, r, uses), errors: layer.errors(off.as_ref()) }
    };
    Ok(ranks.iter().map(choice).collect())
}

impl Method for Factorize {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn propose(&self, model: &Model, cx: &Context) -> Result<Proposal, Error> {
        let metric: Metric = cx.setting(&INFO, "metric")?;
        let work = |weight: &super::Weight, seen: &Seen| {
            let layer = Layer::new(&model.graph, weight, seen)?;
            choices(&layer, metric, weight.taps.len())
        };
        in_batches(model, cx, &work)
    }

    fn rewrite(&self, model: &mut Model, site: &Site, choice: usize, cx: &Context) -> Result<Outcome, Error> {
        let metric: Metric = cx.setting(&INFO, "metric")?;
        let name = &site.choices[choice].name;
        let rank = name.strip_prefix("rank ").and_then(|r| r.parse().ok()).expect("a choice names its rank");
        let mut outcome = Outcome::default();
        let place = || format!("`{}`", site.name);
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| w.value == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let factored = factors::seen(&model.graph, weight, cx)?.and_then(|seen| {
            let layer = Layer::new(&model.graph, weight, &seen)?;
            spectrum(&layer, metric)
        });
        match factored {
            Ok(found) => {
                debug_assert_eq!(sides(weight), (found.left.nrows(), found.right.nrows()), "factors span the weight");
                let mut left = found.left.subcols(0, rank).to_owned();
                let mut right = found.right.subcols(0, rank).to_owned();
                factors::balance(&mut left, &mut right);
                factors::emit(&mut model.graph, weight, left.as_ref(), right.as_ref());
                outcome.change(name.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}
