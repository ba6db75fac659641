//! Layers as two thinner layers.

use super::{
    Candidate, Edit, EditCodec, Loss, Method, MethodContext, Proposal, Site, Weight, factors,
    factors::{Layer, LayerStatistics},
    in_batches,
    spectrum::{Spectrum, product},
    weights,
};
use crate::{Error, Info, Kind, Opt, Outcome, Saving};
use faer::Mat;
use lathe_ir::{Graph, Model};
use serde::{Deserialize, Serialize};

/// Replaces layers by products of low rank.
pub struct Factorize;

static INFO: Info = Info {
    name: "factorize",
    summary: "replace layers by two thinner ones, fitted to what they read",
    doc: "Offers every float32 `MatMul`, `Gemm` and ungrouped `Conv` as `x·U` and `·V` of rank r: r(k + n) numbers and \
          multiply-adds per row instead of k·n. The factors lose least of the layer's output on the calibration set \
          (whitened singular value decomposition), not of the weight, and what they lose of its mean is added to the \
          bias where there is one. What is told of their error is that on samples which the fit has not seen. A convolution becomes one with r channels and a \
          1×1 one. Declines layers that give an output of the model, tables that rows are picked of, and those with \
          fewer than 32 inputs or outputs.",
    options: &[
        Opt {
            name: "metric",
            unit: "output or weight",
            default: "output",
            doc: "what is fitted: the output on the calibration set, or the weight itself (plain SVD, for comparison)",
        },
        Opt {
            name: "sequential",
            unit: "none or block",
            default: "none",
            doc: "block carries plans out block by block, whatever the method, and looks anew at what each block reads \
                  once those before it have changed; slower by a run over the calibration set per block",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some("Wang et al. 2024, SVD-LLM, arXiv:2403.07378"),
};

/// How many columns the first factor has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Rank(pub usize);

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

/// When statistics are taken again while a plan is carried out.
#[derive(Clone, Copy, PartialEq)]
enum Sequential {
    Never,
    Block,
}

impl std::str::FromStr for Sequential {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "none" => Ok(Sequential::Never),
            "block" => Ok(Sequential::Block),
            _ => Err(()),
        }
    }
}

/// Whether plans are carried out block by block, on what each block reads by then.
pub fn block_by_block(cx: &MethodContext) -> Result<bool, Error> {
    Ok(cx.setting::<Sequential>(&INFO, "sequential")? == Sequential::Block)
}

/// Ranks that are offered for a layer of these sides, or for several layers together.
pub(super) fn ranks(k: usize, n: usize) -> Vec<usize> {
    let multiple = if k.min(n) < 8 * MULTIPLE { 4 } else { MULTIPLE };
    let mut ranks: Vec<usize> =
        SHARES.iter().map(|share| k * n * share / 100 / (k + n) / multiple * multiple).filter(|&r| r > 0).collect();
    ranks.dedup();
    ranks
}

/// Whether a bias gives back what the factors lose of the mean output; plain SVD has no such thing.
fn centred(graph: &Graph, weight: &Weight, metric: Metric) -> bool {
    metric == Metric::Output && factors::takes_bias(graph, weight)
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

fn candidates(layer: &Layer, metric: Metric, uses: usize) -> Result<Vec<Candidate>, &'static str> {
    let found = spectrum(layer, metric)?;
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let ranks: Vec<usize> = ranks(k, n).into_iter().filter(|&r| r < found.len()).collect();
    // The right sides of directions are orthogonal, so each loses by itself on any rows.
    let judged = |judge: &Mat<f64>| found.tails_under(layer.matrix.as_ref(), judge.as_ref());
    let tails: Vec<Vec<f64>> = layer.judges.iter().map(judged).collect();
    let candidate = |&rank: &usize| Candidate {
        label: format!("rank {rank}"),
        cost: factors::cost(k, n, rank, uses),
        loss: Loss::PerTap(tails.iter().map(|tails| tails[rank].max(0.0).sqrt()).collect()),
        edit: Edit::new(Rank(rank)),
    };
    Ok(ranks.iter().map(candidate).collect())
}

impl Method for Factorize {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Rank>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let metric: Metric = cx.setting(&INFO, "metric")?;
        let work = |weight: &Weight, statistics: &LayerStatistics| {
            let layer = Layer::around(&model.graph, weight, statistics, centred(&model.graph, weight, metric))?;
            candidates(&layer, metric, weight.taps.len())
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
        let metric: Metric = cx.setting(&INFO, "metric")?;
        let &Rank(rank) = candidate.edit.of();
        let mut outcome = Outcome::default();
        let place = || format!("`{}`", site.name);
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let centred = centred(&model.graph, weight, metric);
        let factored = factors::statistics(&model.graph, weight, cx)?.and_then(|statistics| {
            let layer = Layer::around(&model.graph, weight, &statistics, centred)?;
            let found = spectrum(&layer, metric)?;
            Ok((statistics, layer, found))
        });
        match factored {
            Ok((statistics, layer, found)) => {
                debug_assert_eq!(weight.sides(), (found.left.nrows(), found.right.nrows()), "factors span the weight");
                let mut left = found.left.subcols(0, rank).to_owned();
                let mut right = found.right.subcols(0, rank).to_owned();
                let off = &layer.matrix - product(left.as_ref(), right.transpose());
                factors::balance(&mut left, &mut right);
                factors::emit(&mut model.graph, weight, left.as_ref(), right.as_ref());
                for (tap, gram) in weight.taps.iter().zip(&statistics.grams).filter(|_| centred) {
                    let mean = Mat::from_fn(1, gram.mean.len(), |_, column| gram.mean[column]);
                    let change = product(mean.as_ref(), off.as_ref());
                    factors::add_to_bias(&mut model.graph, tap, &factors::numbers(change.as_ref()));
                }
                outcome.change(candidate.label.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::tests::random;
    use super::*;
    use lathe_analysis::{Calibrate, Cross, EvaluateError, Gram, Moments, Rows, SymMatrix};
    use lathe_ir::{ScopeId, text};

    /// Rows with a mean, `[rows, k]`, and the products with a weight.
    struct LayerStatistics {
        rows: Mat<f64>,
        outputs: Mat<f64>,
    }

    impl Calibrate for LayerStatistics {
        fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
            let (count, k) = (self.rows.nrows(), self.rows.ncols());
            let full = super::super::spectrum::tests::gram(&self.rows);
            let upper = (0..k).flat_map(|i| (i..k).map(move |j| (i, j))).map(|at| full[at]).collect();
            let mean = (0..k).map(|i| self.rows.col(i).iter().sum::<f64>() / count as f64).collect();
            Ok(SymMatrix::from_upper(k, upper).map(|matrix| Gram { matrix, mean, rows: count as u64 }))
        }

        fn moments(&self, _: &Rows) -> Result<Option<Moments>, EvaluateError> {
            let square = |j: usize| self.outputs.col(j).squared_norm_l2() / self.outputs.nrows() as f64;
            let square = (0..self.outputs.ncols()).map(square).collect();
            Ok(Some(Moments { square, largest: None, rows: self.outputs.nrows() as u64 }))
        }

        fn held_gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
            self.gram(rows)
        }

        fn held_moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
            self.moments(rows)
        }

        fn cosines(&self, _: &[(Rows, Rows)]) -> Result<Vec<f64>, EvaluateError> {
            Ok(Vec::new())
        }

        fn cross(&self, _: &Model, _: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
            Ok(Vec::new())
        }

        fn trials(&self, _: &Model, _: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
            Ok(Vec::new())
        }
    }

    fn run(body: &str) {
        let weight = random(64, 96, 1);
        let numbers =
            |m: &Mat<f64>| factors::numbers(m.as_ref()).iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[50, 64] x) => (float[50, 96] y) \
             <float[64, 96] w = {{{}}}, float[96] c = {{{}}}> {{ {body} y = Relu (h) }}",
            numbers(&weight),
            numbers(&random(1, 96, 2))
        );
        let model = text::parse(&source).unwrap();
        let rows = random(50, 64, 3) + Mat::from_fn(50, 64, |_, _| 3.0);
        let statistics = LayerStatistics { outputs: product(rows.as_ref(), weight.as_ref()), rows };
        let cx = MethodContext::default().with_calibration(&statistics);
        let site = Factorize.propose(&model, &cx).unwrap().sites.remove(0);
        let mut changed = model.clone();
        let least = site.candidates.len() - 1;
        assert_eq!(Factorize.apply(&mut changed, &site, &site.candidates[least], &cx).unwrap().changes.len(), 1);
        changed.check().unwrap();
        let layers = |model: &Model| model.graph.nodes(ScopeId::MAIN).count();
        assert_eq!(layers(&changed), layers(&model) + 1, "{body}: the mean needs no node");
        // What is told, with the mean given back, is what the rows lose; without, they would lose more.
        let constant = |name: &str| changed.graph.constant(changed.graph.find_value(name).unwrap()).unwrap();
        let floats = |name: &str, m: usize, n: usize| {
            let numbers = constant(name).to_f32s().unwrap();
            Mat::from_fn(m, n, |row, column| f64::from(numbers[row * n + column]))
        };
        let rank = constant("w_left").dims()[1];
        let low = product(floats("w_left", 64, rank).as_ref(), floats("w_right", rank, 96).as_ref());
        let named = changed.graph.find_value("h_bias").map_or("a_bias", |_| "h_bias");
        let bias = constant(named).to_f32s().unwrap();
        let old = random(1, 96, 2);
        let off = product(statistics.rows.as_ref(), (&weight - &low).as_ref());
        let given = Mat::from_fn(50, 96, |_, column| f64::from(bias[column]) - f64::from(old[(0, column)] as f32));
        let norm = statistics.outputs.squared_norm_l2();
        let lost = ((&off - &given).squared_norm_l2() / norm).sqrt();
        let stated = site.candidates[least].loss.per_tap().unwrap()[0];
        assert!((lost - stated).abs() < 1e-4 * stated && stated > 1e-3, "{body}: {lost} lost, {stated} told");
        assert!(off.squared_norm_l2() >= (&off - &given).squared_norm_l2());
    }

    #[test]
    fn a_bias_gives_back_what_is_lost_of_the_mean() {
        run("h = Gemm (x, w, c)");
        run("a = MatMul (x, w) h = Add (a, c)");
    }
}
