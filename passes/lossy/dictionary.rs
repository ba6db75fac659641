//! Layers as a dictionary of directions with few coefficients per output.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, OVERHEAD, Proposal, Site, Weight,
    factors::{self, Layer, LayerStatistics},
    in_batches,
    spectrum::{Spectrum, product},
    weights,
};
use crate::{Error, Info, Kind, Opt, Outcome, Quantity, Saving};
use faer::{Accum, Mat, Par, Side, linalg::matmul::matmul, prelude::Solve};
use lathe_ir::{DataType, Graph, Model, Node, ScopeId, Tensor, ValueId};
use serde::{Deserialize, Serialize};

/// Stores layers as a dictionary and sparse coefficients.
pub struct Dictionary;

static INFO: Info = Info {
    name: "dictionary",
    summary: "store layers as a dictionary with few coefficients per output (ROCKET)",
    doc: "Offers every float32 `MatMul`, `Gemm` and ungrouped `Conv` as `U·V` with k directions in `U` and s of k \
          coefficients in every column of `V`, chosen by what the outputs on the calibration set and the weight lose, \
          with `U` fitted again afterwards. Stored are `U`, the coefficients and one bit per position; nodes put the \
          weight together when the model is loaded, so it is smaller on disk and as fast and as large in memory as \
          before. Not offered where latency or FLOPs are limited, or where other options of half its size lose half as \
          much. Needs operator set 18.",
    options: &[
        Opt {
            name: "lambda",
            unit: "number from 0 to 1",
            default: "0.5",
            doc: "how much the error of the weight itself counts beside that of the output when coefficients are chosen",
        },
        Opt {
            name: "beta",
            unit: "number from 0 to 1",
            default: "0.005",
            doc: "share of the directions that every column gives up so that the best coefficients of all columns return",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters],
    source: Some("ROCKET, arXiv:2602.11008"),
};

/// Percent of the layer's numbers that dictionary and coefficients may take.
const SHARES: [usize; 10] = [95, 90, 85, 80, 75, 70, 60, 50, 40, 30];

/// Directions per coefficient of a column.
const RATIOS: [f64; 5] = [1.25, 1.5, 2.0, 2.5, 3.0];

/// Share of the mean square coefficient that is added to the diagonal when the dictionary is fitted again.
const RIDGE: f64 = 1e-6;

/// The oldest operator set whose operators the decoder uses.
const OPSET: i64 = 18;

/// How many directions, and how many coefficients in a column on average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Form {
    atoms: usize,
    coefficients: usize,
}

impl Form {
    fn name(self) -> String {
        format!("dictionary {} of {}", self.coefficients, self.atoms)
    }

    fn cost(self, k: usize, n: usize) -> Cost {
        let numbers = (self.atoms * k + self.coefficients * n) as u64;
        let positions = (self.atoms * n.div_ceil(8)) as u64;
        // Put together at load: the layer multiplies as many numbers as before.
        Cost { bytes: numbers * 4 + positions + DECODER_BYTES, parameters: numbers, flops_per_row: 2 * (k * n) as u64 }
    }

    /// The forms of a share of a layer, bits of positions included where `bytes` count.
    fn within(k: usize, n: usize, percent: usize, bytes: bool) -> Vec<Form> {
        let numbers = (k * n * percent / 100) as f64;
        let of_ratio = |&ratio: &f64| {
            let bits = if bytes { n as f64 / 32.0 } else { 0.0 };
            let atoms = ((numbers / (k as f64 + n as f64 / ratio + bits)) as usize).min(k.min(n));
            let left = numbers - atoms as f64 * (k as f64 + bits);
            let coefficients = ((left / n as f64).max(0.0) as usize).min(atoms);
            (atoms > 0 && coefficients > 0 && coefficients < atoms).then_some(Form { atoms, coefficients })
        };
        let mut forms: Vec<Form> = RATIOS.iter().filter_map(of_ratio).collect();
        forms.dedup();
        forms
    }
}

/// Bytes that the decoder's nodes and small constants add to a file, roughly.
const DECODER_BYTES: u64 = 8 * OVERHEAD;

/// How coefficients are chosen.
#[derive(Clone, Copy)]
struct Choosing {
    lambda: f64,
    beta: f64,
}

impl Choosing {
    fn of(cx: &MethodContext) -> Result<Choosing, Error> {
        let part = |option: &'static str| -> Result<f64, Error> {
            let value: f64 = cx.setting(&INFO, option)?;
            match (0.0..=1.0).contains(&value) {
                true => Ok(value),
                false => Err(Error::Setting {
                    option: format!("dictionary.{option}"),
                    value: value.to_string(),
                    expected: "a number from 0 to 1",
                }),
            }
        };
        Ok(Choosing { lambda: part("lambda")?, beta: part("beta")? })
    }
}

/// Coefficients `[atoms, n]` of the first directions, most of them 0, with what is lost before `U` is fitted again.
fn sparse(found: &Spectrum, form: Form, choosing: Choosing) -> (Mat<f64>, f64) {
    let (k, n) = (form.atoms.min(found.len()), found.right.nrows());
    let sigma: Vec<f64> = found.energy.iter().map(|e| e.max(0.0).sqrt()).collect();
    // What a unit of coefficient is worth in the weight itself: ‖L⁻¹b‖, with b the direction of the whitened weight.
    let damage: Vec<f64> =
        (0..k).map(|i| if sigma[i] > 0.0 { found.left.col(i).norm_l2() / sigma[i] } else { 0.0 }).collect();
    let importance: Vec<f64> = damage.into_iter().map(|damage| damage.powf(choosing.lambda)).collect();
    let all = scaled(found, &sigma[..k]);
    let score = |i: usize, j: usize| all[(i, j)].abs() * importance[i];
    let kept = form.coefficients.saturating_sub((choosing.beta * k as f64).ceil() as usize).max(1).min(k);
    let mut chosen = Mat::<f64>::zeros(k, n);
    let mut others: Vec<(f64, u32, u32)> = Vec::new();
    for j in 0..n {
        let mut order: Vec<(f64, usize)> = (0..k).map(|i| (score(i, j), i)).collect();
        let largest = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        order.select_nth_unstable_by(kept - 1, largest);
        order[..kept].iter().for_each(|&(_, i)| chosen[(i, j)] = all[(i, j)]);
        // No column takes more than twice its share of what is left.
        let most = (2 * (form.coefficients - kept.min(form.coefficients)) + kept).min(k);
        if most > kept {
            order[kept..].select_nth_unstable_by(most - kept - 1, largest);
        }
        others.extend(order[kept..most].iter().map(|&(score, i)| (score, i as u32, j as u32)));
    }
    let extra = (form.coefficients * n).saturating_sub(kept * n).min(others.len());
    if (1..others.len()).contains(&extra) {
        others.select_nth_unstable_by(extra - 1, |a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    }
    for &(_, i, j) in &others[..extra] {
        let at = (i as usize, j as usize);
        chosen[at] = all[at];
    }
    let tail = Spectrum::tails(&found.energy)[k];
    let masked = all.squared_norm_l2() - chosen.squared_norm_l2();
    (chosen, tail + masked.max(0.0))
}

/// Columns that are turned into rows at a time: as many numbers as a cache line holds, twice.
const TURNED: usize = 16;

/// The first directions as rows, each times its factor: `[factors, n]`.
fn scaled(found: &Spectrum, factors: &[f64]) -> Mat<f64> {
    let n = found.right.nrows();
    let mut all = Mat::zeros(factors.len(), n);
    for start in (0..n).step_by(TURNED) {
        for (i, factor) in factors.iter().enumerate() {
            (start..n.min(start + TURNED)).for_each(|j| all[(i, j)] = factor * found.right[(j, i)]);
        }
    }
    all
}

/// The dictionary `[k, atoms]` that loses least with these coefficients, and what it loses of the output.
///
/// With `W = left · rightᵀ` and orthogonal directions of energy `e`, `U = W Cᵀ (C Cᵀ + μI)⁻¹` and everything that is
/// lost follows from `P = diag(√e) rightᵀ Cᵀ`: no whitening factor is inverted.
fn fit(layer: &Layer, found: &Spectrum, coefficients: &Mat<f64>) -> Option<(Mat<f64>, f64)> {
    let atoms = coefficients.nrows();
    let squares = product(coefficients.as_ref(), coefficients.transpose());
    let mean = (0..atoms).map(|i| squares[(i, i)]).sum::<f64>() / atoms as f64;
    let mut ridge = RIDGE;
    let solver = loop {
        let mut damped = squares.clone();
        (0..atoms).for_each(|i| damped[(i, i)] += ridge * mean + f64::MIN_POSITIVE);
        match damped.llt(Side::Lower) {
            Ok(solver) => break solver,
            Err(_) if ridge < 1.0 => ridge *= 10.0,
            Err(_) => return None,
        }
    };
    let spread = product(found.right.transpose(), coefficients.transpose());
    let p = Mat::from_fn(found.len(), atoms, |i, a| found.energy[i].max(0.0).sqrt() * spread[(i, a)]);
    // Rows of `D` in the basis of the directions.
    let d = solver.solve(p.transpose()).transpose().to_owned();
    let cross: f64 = dot(&p, &d);
    let mut again = Mat::zeros(d.nrows(), atoms);
    matmul(again.as_mut(), Accum::Replace, d.as_ref(), squares.as_ref(), 1.0, Par::Seq);
    let lost = Spectrum::tails(&found.energy)[0] - 2.0 * cross + dot(&d, &again);
    let dictionary = solver.solve(product(coefficients.as_ref(), layer.matrix.transpose())).transpose().to_owned();
    Some((dictionary, lost.max(0.0)))
}

fn dot(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    (0..a.ncols()).map(|j| a.col(j).iter().zip(b.col(j).iter()).map(|(x, y)| x * y).sum::<f64>()).sum()
}

/// Whether another method offers the same for half the bytes and half the error.
fn beaten(incumbents: &[Candidate], cost: &Cost, error: f64) -> bool {
    incumbents.iter().any(|incumbent| {
        let worst = incumbent.loss.per_tap().unwrap_or_default().iter().map(|e| e * e).sum::<f64>().sqrt();
        2 * incumbent.cost.bytes <= cost.bytes && 2.0 * worst <= error
    })
}

fn candidates(
    layer: &Layer,
    incumbents: &[Candidate],
    bytes: bool,
    choosing: Choosing,
) -> Result<Vec<Candidate>, &'static str> {
    let found =
        Spectrum::of(layer.matrix.as_ref(), layer.joint.as_ref()).ok_or("its decomposition does not converge")?;
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let tails = Spectrum::tails(&found.energy);
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut passed_over = false;
    for percent in SHARES {
        let mut forms = Form::within(k, n, percent, bytes);
        // With all coefficients, as many directions lose what is behind them.
        let least = |form: &Form| tails[form.atoms.min(found.len())].sqrt();
        let before = forms.len();
        forms.retain(|form| !bytes || !beaten(incumbents, &form.cost(k, n), least(form)));
        passed_over |= forms.len() < before;
        let tried = forms.into_iter().map(|form| (form, sparse(&found, form, choosing)));
        let best = tried.min_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let Some((form, (coefficients, before))) = best else { continue };
        let cost = form.cost(k, n);
        if cost.bytes >= 4 * (k * n) as u64 || candidates.iter().any(|c| *c.edit.of::<Form>() == form) {
            continue;
        }
        if bytes && beaten(incumbents, &cost, before.sqrt()) {
            passed_over = true;
            continue;
        }
        let (dictionary, _) = fit(layer, &found, &coefficients).ok_or("its dictionary cannot be fitted")?;
        let errors = layer.errors((&layer.matrix - product(dictionary.as_ref(), coefficients.as_ref())).as_ref());
        candidates.push(Candidate { label: form.name(), cost, loss: Loss::PerTap(errors), edit: Edit::new(form) });
    }
    if candidates.is_empty() && passed_over {
        Err("other options take half the bytes and lose half as much")
    } else {
        Ok(candidates)
    }
}

impl Method for Dictionary {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn serves(&self, quantities: &[Quantity]) -> bool {
        !quantities.iter().any(|m| matches!(m, Quantity::Latency | Quantity::Flops))
    }

    fn operator_set(&self) -> i64 {
        OPSET
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Form>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let choosing = Choosing::of(cx)?;
        if model.opset() < OPSET {
            return Ok(Proposal::refused("its decoder needs operator set 18; --opset 21 upgrades", "the model"));
        }
        if !self.serves(&cx.quantities) {
            return Ok(Proposal::refused("it saves neither time nor FLOPs", "the model"));
        }
        let bytes = cx.quantities.contains(&Quantity::Size);
        let none = Vec::new();
        let incumbents = &cx.incumbents;
        let work = |weight: &Weight, statistics: &LayerStatistics| {
            let layer = Layer::new(&model.graph, weight, statistics)?;
            candidates(&layer, incumbents.get(&weight.value).unwrap_or(&none), bytes, choosing)
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
        let choosing = Choosing::of(cx)?;
        let &form = candidate.edit.of::<Form>();
        let place = || format!("`{}`", site.name);
        let mut outcome = Outcome::default();
        let (found, _) = weights(&model.graph);
        let Some(weight) = found.iter().find(|w| Some(w.value) == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let made = factors::statistics(&model.graph, weight, cx)?.and_then(|statistics| {
            let layer = Layer::new(&model.graph, weight, &statistics)?;
            let found = Spectrum::of(layer.matrix.as_ref(), layer.joint.as_ref());
            let found = found.ok_or("its decomposition does not converge")?;
            let (coefficients, _) = sparse(&found, form, choosing);
            let (dictionary, _) = fit(&layer, &found, &coefficients).ok_or("its dictionary cannot be fitted")?;
            Ok((dictionary, coefficients))
        });
        match made {
            Ok((dictionary, coefficients)) => {
                emit(&mut model.graph, weight, dictionary, coefficients);
                outcome.change(candidate.label.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}

/// Replaces the constant by its dictionary, its coefficients in the order of their positions and a bit for each
/// position, and by nodes that put it together.
fn emit(graph: &mut Graph, weight: &Weight, mut dictionary: Mat<f64>, coefficients: Mat<f64>) {
    let (atoms, n) = (coefficients.nrows(), coefficients.ncols());
    let mut right = coefficients.transpose().to_owned();
    factors::balance(&mut dictionary, &mut right);
    let mut values = Vec::new();
    let wide = n.div_ceil(8);
    let mut bits = vec![0u8; atoms * wide];
    for i in 0..atoms {
        for j in 0..n {
            if right[(j, i)] != 0.0 {
                values.push(right[(j, i)] as f32);
                bits[i * wide + j / 8] |= 1 << (j % 8);
            }
        }
    }
    let name = graph.value(weight.value).name.clone();
    let store = |graph: &mut Graph, part: &str, tensor: Tensor| {
        let fresh = graph.fresh_name(&format!("{name}_{part}"));
        graph.add_initializer(ScopeId::MAIN, &fresh, tensor)
    };
    let u8s = |dims: Vec<usize>, bytes: Vec<u8>| Tensor::new(DataType::Uint8, dims, bytes).expect("a byte each");
    let mask = store(graph, "positions", u8s(vec![atoms, wide, 1], bits));
    let powers = store(graph, "powers", u8s(vec![8], (0..8).map(|b| 1u8 << b).collect()));
    let zero = store(graph, "none", u8s(vec![], vec![0]));
    // The first of the packed numbers stands for "no coefficient".
    values.insert(0, 0.0);
    let packed = store(graph, "coefficients", Tensor::from_f32s(&[values.len()], &values));
    let flat = store(graph, "flat", Tensor::int64s(&[-1]));
    let whole = store(graph, "padded", Tensor::int64s(&[atoms as i64, 8 * wide as i64]));
    let axis = store(graph, "axis", Tensor::from_i64s(&[], &[0]));
    let add = |graph: &mut Graph, node: Node, inputs: &[ValueId], part: &str| {
        graph.append(ScopeId::MAIN, node, inputs, &format!("{name}_{part}"))
    };
    let int32 = DataType::Int32.code();
    let set = add(graph, Node::new("BitwiseAnd"), &[mask, powers], "set_bits");
    let set = add(graph, Node::new("Equal"), &[set, zero], "unset");
    let set = add(graph, Node::new("Not"), &[set], "set");
    let ones = add(graph, Node::new("Cast").with("to", i64::from(int32)), &[set], "ones");
    let ones = add(graph, Node::new("Reshape"), &[ones, flat], "ones_flat");
    let count = add(graph, Node::new("CumSum"), &[ones, axis], "counts");
    let index = add(graph, Node::new("Mul"), &[count, ones], "indices");
    let values = add(graph, Node::new("Gather"), &[packed, index], "values");
    let mut matrix = add(graph, Node::new("Reshape"), &[values, whole], "sparse_padded");
    if n != 8 * wide {
        let [from, to, along] = [("from", 0), ("to", n as i64), ("along", 1)]
            .map(|(part, value)| store(graph, part, Tensor::int64s(&[value])));
        matrix = add(graph, Node::new("Slice"), &[matrix, from, to, along], "sparse");
    }
    let turned = weight.inputs_axis() == 1;
    let left = factors::numbers(dictionary.as_ref());
    let left = store(graph, "dictionary", Tensor::from_f32s(&[dictionary.nrows(), atoms], &left));
    let mut restored = add(graph, Node::new("MatMul"), &[left, matrix], "restored");
    if turned {
        restored = add(graph, Node::new("Transpose").with("perm", vec![1i64, 0]), &[restored], "turned");
    }
    if weight.dims.len() > 2 {
        let dims: Vec<i64> = weight.dims.iter().map(|&d| d as i64).collect();
        let dims = store(graph, "shape", Tensor::int64s(&dims));
        restored = add(graph, Node::new("Reshape"), &[restored, dims], "kernel");
    }
    graph.replace_uses(weight.value, restored);
    graph.remove_initializer(weight.value);
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::tests::{gram, random};
    use super::*;

    const CHOOSING: Choosing = Choosing { lambda: 0.5, beta: 0.005 };

    fn layer(k: usize, n: usize) -> (Mat<f64>, Layer) {
        let (x, matrix) = (random(100, k, 1), random(k, n, 2));
        let joint = gram(&x);
        (x, Layer { matrix, judges: vec![joint.clone()], joint })
    }

    #[test]
    fn tells_what_is_lost_before_and_after_the_dictionary_is_fitted() {
        for (k, n) in [(24, 40), (40, 24), (30, 30)] {
            let (x, layer) = layer(k, n);
            let found = Spectrum::of(layer.matrix.as_ref(), layer.joint.as_ref()).unwrap();
            let (coefficients, before) = sparse(&found, Form { atoms: 18, coefficients: 9 }, CHOOSING);
            let lost = |weight: &Mat<f64>| {
                product(x.as_ref(), (&layer.matrix - weight).as_ref()).squared_norm_l2() / x.nrows() as f64
            };
            // Directions of the whitened weight, brought back: W v / σ.
            let basis = Mat::from_fn(k, 18, |row, i| found.left[(row, i)] / found.energy[i].sqrt());
            let first = lost(&product(basis.as_ref(), coefficients.as_ref()));
            assert!((first - before).abs() < 1e-6 * before, "{k} x {n}: {first} {before}");
            let (dictionary, after) = fit(&layer, &found, &coefficients).unwrap();
            let second = lost(&product(dictionary.as_ref(), coefficients.as_ref()));
            assert!((second - after).abs() < 1e-6 * before, "{k} x {n}: {second} {after}");
            assert!(after <= before * (1.0 + 1e-6));
            let count = (0..n).map(|j| coefficients.col(j).iter().filter(|c| **c != 0.0).count()).sum::<usize>();
            assert_eq!(count, 9 * n);
        }
    }

    #[test]
    fn with_all_coefficients_it_is_low_rank() {
        let (_, layer) = layer(30, 24);
        let found = Spectrum::of(layer.matrix.as_ref(), layer.joint.as_ref()).unwrap();
        let (coefficients, before) = sparse(&found, Form { atoms: 10, coefficients: 10 }, CHOOSING);
        let tail = Spectrum::tails(&found.energy)[10];
        let (dictionary, after) = fit(&layer, &found, &coefficients).unwrap();
        assert!((before - tail).abs() < 1e-10 * tail && (after - tail).abs() < 1e-5 * tail);
        let low = product(found.left.as_ref().subcols(0, 10), found.right.as_ref().subcols(0, 10).transpose());
        assert!((product(dictionary.as_ref(), coefficients.as_ref()) - &low).norm_max() < 1e-4 * low.norm_max());
    }

    #[test]
    fn forms_keep_to_their_share() {
        for (k, n, percent) in [(576, 1536, 80), (1536, 576, 50), (64, 64, 30)] {
            for form in Form::within(k, n, percent, true) {
                let cost = form.cost(k, n);
                assert!(cost.bytes - DECODER_BYTES <= (4 * k * n * percent / 100) as u64 + (k * 8) as u64, "{form:?}");
            }
        }
    }
}
