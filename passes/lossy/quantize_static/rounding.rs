//! Weights of layers in codes: the nearest, or those that make up for each other under what the layer reads (GPTQ).

use super::{
    channels::Scaled,
    emit::{CHANGED, StaticEdit},
    ranges::Codes,
    units::{Form, Unit, floats, output_axis},
};
use crate::{
    Error,
    lossy::{
        MOST_INPUTS, MethodContext, Recipe, Weight,
        factors::{LayerStatistics, products_seen},
        gptq::Gptq,
        integers::{Layout, Scheme, quantize},
        spectrum::energies,
    },
};
use faer::Mat;
use lathe_analysis::{Calibrate, Gram, Rows};
use lathe_ir::{Graph, NodeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// Codes that lose less than the nearest, by the names of weights.
pub(super) type Fits = BTreeMap<String, Codes>;

/// The numbers of a weight, and how they lie.
pub(super) struct Numbers {
    pub dims: Vec<usize>,
    pub numbers: Vec<f32>,
    /// The axis of the outputs.
    pub axis: usize,
    /// Whether all of it has one scale.
    pub as_one: bool,
}

impl Numbers {
    /// Of a constant whose outputs lie along an axis.
    pub fn of(graph: &Graph, weight: Option<ValueId>, axis: usize, recipe: Recipe) -> Option<Numbers> {
        let tensor = floats(graph, weight)?;
        let (dims, numbers) = (tensor.dims().to_vec(), tensor.to_f32s()?);
        tensor.release();
        let as_one = recipe == Recipe::Qnn && dims.len() == 2;
        Some(Numbers { dims, numbers, axis, as_one })
    }

    /// Of the weight of a layer.
    pub fn of_layer(graph: &Graph, node: NodeId, recipe: Recipe) -> Option<Numbers> {
        Numbers::of(graph, graph.node(node).input(1), output_axis(graph, node), recipe)
    }

    pub fn outputs(&self) -> usize {
        self.dims[self.axis]
    }

    pub fn inputs(&self) -> usize {
        self.numbers.len() / self.outputs().max(1)
    }

    /// Which input and which output a number belongs to.
    pub fn place(&self, at: usize) -> (usize, usize) {
        match self.axis {
            0 => (at % self.inputs(), at / self.inputs()),
            _ => (at / self.outputs(), at % self.outputs()),
        }
    }

    /// Which scale a number has.
    pub fn scale_of(&self, at: usize) -> usize {
        if self.as_one { 0 } else { self.place(at).1 }
    }

    /// The codes nearest to the numbers, or those that were fitted, with no scale below the least of its output.
    pub fn codes(&self, largest: u8, least: Option<&[f32]>, fitted: Option<&Codes>) -> Option<Codes> {
        let none = vec![0.0; self.outputs()];
        let mut least = least.unwrap_or(&none).to_vec();
        if self.as_one {
            least = vec![least.into_iter().fold(0.0, f32::max)];
        }
        let nearest = Codes::of(&self.numbers, |at| self.scale_of(at), largest, &least)?;
        let Some(fitted) = fitted.filter(|fitted| fitted.scales.len() == least.len()) else { return Some(nearest) };
        let keeps = |output: usize| fitted.scales[output] >= least[output];
        Some(self.join(fitted, &nearest, keeps))
    }

    /// The codes of one, where `takes` says so of their output, and of the other elsewhere.
    fn join(&self, one: &Codes, other: &Codes, takes: impl Fn(usize) -> bool) -> Codes {
        let from = |output: usize| if takes(output) { one } else { other };
        Codes {
            codes: (0..self.numbers.len()).map(|at| from(self.scale_of(at)).codes[at]).collect(),
            scales: (0..one.scales.len()).map(|output| from(output).scales[output]).collect(),
        }
    }

    /// What codes take of every number, `[inputs, outputs]`.
    fn lost(&self, codes: &Codes) -> Mat<f64> {
        let mut lost = Mat::zeros(self.inputs(), self.outputs());
        for (at, &w) in self.numbers.iter().enumerate() {
            let (input, output) = self.place(at);
            lost[(input, output)] = f64::from(w - codes.restored(at, self.scale_of(at)));
        }
        lost
    }

    /// What codes lose under second moments of what was read before it was divided by factors.
    pub fn lost_under(&self, codes: &Codes, gram: &Gram, factors: Option<&[f32]>) -> f64 {
        energies(self.lost(codes).as_ref(), scaled(square(gram), factors).as_ref()).iter().sum()
    }

    /// Codes that lose less than the nearest under what was seen, for every output by itself; `None` where there are none.
    pub fn fit(&self, largest: u8, seen: &Moments) -> Option<Codes> {
        let (k, n) = (self.inputs(), self.outputs());
        let fits = !self.as_one && seen.fits.nrows() == k && seen.judges.nrows() == k;
        if !fits || self.numbers.iter().any(|w| !w.is_finite()) {
            return None;
        }
        let nearest = self.codes(largest, None, None)?;
        let scheme = Scheme::new(if largest < i8::MAX as u8 { 7 } else { 8 }, usize::MAX);
        let layout = match self.axis {
            0 => Layout { outer: n, length: k, inner: 1, axis: 1 },
            _ => Layout { outer: 1, length: k, inner: n, axis: 0 },
        };
        let importance: Vec<f64> = (0..k).map(|i| seen.fits[(i, i)]).collect();
        let mut blocks = quantize(&self.numbers, layout, scheme, &importance);
        Gptq::new(seen.fits.as_ref())?.round(&self.numbers, layout, scheme, &mut blocks);
        // Codes are as many on either side of zero.
        blocks.codes.iter_mut().for_each(|code| *code = (*code).max(-(largest.min(i8::MAX as u8) as i8)));
        let usable = blocks.scales.iter().map(|scale| scale.is_normal()).collect::<Vec<bool>>();
        let fitted = Codes { codes: blocks.codes, scales: blocks.scales };
        let [by_fit, plain] =
            [&fitted, &nearest].map(|codes| energies(self.lost(codes).as_ref(), seen.judges.as_ref()));
        let takes = |output: usize| usable[output] && by_fit[output] < plain[output];
        (0..n).any(takes).then(|| self.join(&fitted, &nearest, takes))
    }
}

/// Second moments of what a weight is multiplied with, of samples that codes are fitted to and of others that judge them.
pub(super) struct Moments {
    pub fits: Mat<f64>,
    pub judges: Mat<f64>,
}

fn square(gram: &Gram) -> Mat<f64> {
    let k = gram.matrix.size();
    Mat::from_fn(k, k, |i, j| gram.matrix.get(i, j))
}

impl Moments {
    /// Of all uses of a weight, each by its share of its own output, with what is read divided by these factors.
    pub fn of_uses(seen: &LayerStatistics, divided: Option<&[f32]>) -> Option<Moments> {
        let judges = seen.judges().ok()?;
        let sum = |all: &mut dyn Iterator<Item = (&Gram, f64)>| {
            let each = all.map(|(gram, output)| square(gram) * faer::Scale(1.0 / output));
            each.reduce(|sum, own| sum + own).map(|sum| scaled(sum, divided))
        };
        Some(Moments {
            fits: sum(&mut seen.grams.iter().zip(seen.outputs.iter().copied()))?,
            judges: sum(&mut judges.iter().map(|judge| (judge.gram, judge.output)))?,
        })
    }

    /// Of what one layer reads. Without samples that judge, more rows than inputs have to have been seen.
    fn of_rows(calibration: &dyn Calibrate, rows: &Rows, divided: Option<&[f32]>) -> Result<Option<Moments>, Error> {
        let finite = |gram: &Gram| gram.matrix.upper().iter().all(|x| x.is_finite());
        let Some(gram) = calibration.gram(rows)?.filter(finite) else { return Ok(None) };
        let fits = square(&gram);
        let judges = match calibration.held_gram(rows)?.filter(finite) {
            Some(held) => square(&held),
            None if gram.rows as usize > 2 * gram.matrix.size() => fits.clone(),
            None => return Ok(None),
        };
        Ok(Some(Moments { fits: scaled(fits, divided), judges: scaled(judges, divided) }))
    }
}

/// Second moments of what is divided by factors, one for each of equal parts of it.
fn scaled(moments: Mat<f64>, divided: Option<&[f32]>) -> Mat<f64> {
    let Some(factors) = divided.filter(|factors| !factors.is_empty()) else { return moments };
    let k = moments.nrows();
    let taps = (k / factors.len()).max(1);
    let factor = |i: usize| f64::from(factors[(i / taps).min(factors.len() - 1)]);
    Mat::from_fn(k, k, |i, j| moments[(i, j)] / factor(i) / factor(j))
}

/// What a layer multiplies its weight with; `None` where that is not watched.
pub(super) fn read_rows(graph: &Graph, unit: &Unit) -> Option<Rows> {
    let x = graph.node(unit.node).input(0)?;
    let inputs = unit.weight(graph).and_then(|weight| graph.constant(weight)).map(Tensor::dims)?;
    match unit.form {
        Form::Conv if graph.node(unit.node).int("group").unwrap_or(1) != 1 => Rows::of_depthwise(graph, unit.node),
        Form::Conv if inputs[1..].iter().product::<usize>() <= MOST_INPUTS => Rows::of_conv(graph, unit.node),
        Form::Gemm | Form::MatMul if inputs.iter().all(|&size| size <= MOST_INPUTS) => {
            Some(Rows::last(graph.value(x).name.clone()))
        }
        _ => None,
    }
}

/// Where the mean of everything that a layer multiplies its weight with is told: by input, or for a depthwise convolution by
/// channel.
pub(super) fn mean_rows(graph: &Graph, unit: &Unit) -> Option<Rows> {
    let rows = read_rows(graph, unit)?;
    let depthwise = Rows::of_depthwise(graph, unit.node).is_some();
    Some(if depthwise { Rows::channels(rows.value) } else { rows })
}

/// The factors that what a layer reads was divided by.
pub(super) fn divided<'a>(graph: &Graph, unit: &Unit, scaled: &'a [Scaled]) -> Option<&'a [f32]> {
    let name = &graph.value(unit.weight(graph)?).name;
    let own = scaled.iter().find(|scaled| scaled.name == *name && scaled.reads);
    own.map(|scaled| scaled.factors.as_slice())
}

/// Codes of a layer that lose less than the nearest; `None` where there are none, or nothing was seen of what it reads.
pub(super) fn fit_layer(
    graph: &Graph,
    unit: &Unit,
    edit: &StaticEdit,
    cx: &MethodContext,
) -> Result<Option<Codes>, Error> {
    let alone = |value: &ValueId| graph.value(*value).uses().len() == 1;
    let (Some(calibration), Some(_)) = (cx.calibration, unit.weight(graph).filter(alone)) else { return Ok(None) };
    let Some(rows) = read_rows(graph, unit) else { return Ok(None) };
    // To a filter that reads one channel alone the size of the channel is nothing.
    let factors = divided(graph, unit, &edit.scaled).filter(|_| Rows::of_depthwise(graph, unit.node).is_none());
    let Some(seen) = Moments::of_rows(calibration, &rows, factors)? else { return Ok(None) };
    let numbers = Numbers::of_layer(graph, unit.node, edit.recipe);
    Ok(numbers.and_then(|numbers| numbers.fit(edit.largest, &seen)))
}

/// The fits that an edit of a region asks for, of a graph whose constants are scaled already.
pub(super) fn fits(graph: &Graph, edit: &StaticEdit, cx: &MethodContext) -> Result<Fits, Error> {
    let mut all = Fits::new();
    if cx.only_timed {
        return Ok(all);
    }
    for unit in &edit.units {
        let Some(node) = edit.layer_of(graph, unit) else { continue };
        let Some(weight) = graph.node(node).input(1) else { continue };
        let name = &graph.value(weight).name;
        if !edit.fitted.contains(name) {
            continue;
        }
        let layer = Unit { node, form: unit.form, activation: None, most: None, output: weight };
        all.extend(fit_layer(graph, &layer, edit, cx)?.map(|codes| (name.clone(), codes)));
    }
    Ok(all)
}

/// The same for the products with a weight.
pub(super) fn fits_of_products(
    graph: &Graph,
    weight: &Weight,
    edit: &StaticEdit,
    cx: &MethodContext,
) -> Result<Fits, Error> {
    let name = &graph.value(weight.value).name;
    if cx.only_timed || !edit.fitted.contains(name) {
        return Ok(Fits::new());
    }
    let Ok(seen) = products_seen(graph, weight, cx)? else { return Ok(Fits::new()) };
    let factors = edit.smoothed.values().next().map(Vec::as_slice);
    let codes = fit_products(graph, weight, &seen, (edit.largest, factors));
    Ok(codes.map(|codes| (name.clone(), codes)).into_iter().collect())
}

/// Codes of a weight that lose less than the nearest, with the weight multiplied by factors along its inputs, which what it is
/// multiplied with was divided by.
pub(super) fn fit_products(
    graph: &Graph,
    weight: &Weight,
    seen: &LayerStatistics,
    (largest, factors): (u8, Option<&[f32]>),
) -> Option<Codes> {
    let numbers = product_numbers(graph, weight, factors).ok()?;
    numbers.fit(largest, &Moments::of_uses(seen, factors)?)
}

/// A weight's numbers, multiplied with factors along its inputs.
pub(super) fn product_numbers(
    graph: &Graph,
    weight: &Weight,
    factors: Option<&[f32]>,
) -> Result<Numbers, &'static str> {
    let axis = 1 - weight.inputs_axis();
    let mut own = Numbers::of(graph, Some(weight.value), axis, Recipe::Cpu).ok_or(CHANGED)?;
    if let Some(factors) = factors {
        if factors.len() != own.inputs() {
            return Err(CHANGED);
        }
        let inputs: Vec<usize> = (0..own.numbers.len()).map(|at| own.place(at).0).collect();
        own.numbers.iter_mut().zip(inputs).for_each(|(w, input)| *w *= factors[input]);
    }
    Ok(own)
}
