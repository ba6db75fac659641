//! Which units to keep, the fit of the layer that reads them to those that are kept, and the edit.

use super::{
    super::{
        factors,
        factors::{Judge, Layer},
        spectrum,
    },
    hidden::Hidden,
};
use faer::{
    Mat, MatRef, Side,
    linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place},
};
use lathe_ir::{Graph, Tensor};

/// Part of the mean square that is added to every direction, so that units that are spanned by others do no harm.
const RIDGE: f64 = 1e-9;

/// The order in which units are taken, and what keeping the first of them costs.
pub(super) struct Chosen {
    /// All units, the ones to keep first.
    pub order: Vec<usize>,
    /// `1` and then the numbers of the units, in that order: their second moments as `lower · lowerᵀ`.
    lower: Mat<f64>,
    /// The reader's weight in that order, `[1 + k, n]`; the first row is its bias, as a change.
    matrix: Mat<f64>,
    /// The squared relative error of the output when only that many rows are kept, on the rows that judge.
    tails: Vec<f64>,
}

/// Indices that are taken before what they span is removed from all others at once.
const PIVOTS: usize = 64;

/// All indices, at every step the one with most left that those before it do not span.
fn pivoted(mut kernel: Mat<f64>) -> Vec<usize> {
    let mut left: Vec<usize> = (0..kernel.nrows()).collect();
    let mut order = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let size = left.len();
        let several = PIVOTS.min(size);
        let mut rest: Vec<f64> = (0..size).map(|at| kernel[(at, at)]).collect();
        let mut taken = vec![false; size];
        let mut spanned = Mat::<f64>::zeros(size, several);
        for step in 0..several {
            let open = (0..size).filter(|&at| !taken[at]);
            let best = open.reduce(|best, at| if rest[at] > rest[best] { at } else { best });
            let pivot = best.expect("fewer are taken than there are");
            taken[pivot] = true;
            order.push(left[pivot]);
            if rest[pivot] <= 0.0 {
                continue;
            }
            let mut column = kernel.col(pivot).to_owned();
            for before in 0..step {
                let factor = spanned[(pivot, before)];
                column -= faer::Scale(factor) * spanned.col(before);
            }
            let scale = 1.0 / rest[pivot].sqrt();
            for at in 0..size {
                spanned[(at, step)] = column[at] * scale;
                rest[at] -= spanned[(at, step)] * spanned[(at, step)];
            }
        }
        let stay: Vec<usize> = (0..size).filter(|&at| !taken[at]).collect();
        let rows = Mat::from_fn(stay.len(), several, |i, step| spanned[(stay[i], step)]);
        kernel = Mat::from_fn(stay.len(), stay.len(), |i, j| kernel[(stay[i], stay[j])])
            - spectrum::product(rows.as_ref(), rows.transpose());
        left = stay.iter().map(|&at| left[at]).collect();
    }
    order
}

impl Chosen {
    /// Of a layer that reads `window` numbers of each unit; `mean` is of what it reads, `output` the mean square norm of
    /// what it gives. Errors are those on the rows of `judge`.
    pub fn of(
        layer: &Layer,
        mean: &[f64],
        output: f64,
        judge: &Judge<'_>,
        units: usize,
        window: usize,
    ) -> Option<Chosen> {
        let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
        let gram = &layer.joint;
        // Units without their mean, which the bias takes, times what the reader makes of them.
        let weight: Vec<f64> =
            (0..k).map(|row| layer.matrix.row(row).iter().map(|w| w * w).sum::<f64>().sqrt()).collect();
        let kernel = Mat::from_fn(units, units, |a, b| {
            let at = |o: usize| (a * window + o, b * window + o);
            let moment = |(i, j): (usize, usize)| (gram[(i, j)] - mean[i] * mean[j] / output) * weight[i] * weight[j];
            (0..window).map(|o| moment(at(o))).sum()
        });
        let order = pivoted(kernel);
        let from: Vec<usize> = order.iter().flat_map(|&unit| (0..window).map(move |o| unit * window + o)).collect();
        let moments = Mat::from_fn(k + 1, k + 1, |i, j| match (i.checked_sub(1), j.checked_sub(1)) {
            (None, None) => 1.0 / output,
            (None, Some(one)) | (Some(one), None) => mean[from[one]] / output,
            (Some(i), Some(j)) => gram[(from[i], from[j])],
        });
        let level = (0..=k).map(|i| moments[(i, i)]).sum::<f64>() / (k + 1) as f64;
        let mut ridge = RIDGE * level;
        let lower = loop {
            let mut damped = moments.clone();
            (1..=k).for_each(|i| damped[(i, i)] += ridge);
            match damped.llt(Side::Lower) {
                Ok(found) => break found.L().to_owned(),
                Err(_) if ridge < 1e-3 * level => ridge *= 10.0,
                Err(_) => return None,
            }
        };
        let matrix =
            Mat::from_fn(k + 1, n, |i, column| i.checked_sub(1).map_or(0.0, |i| layer.matrix[(from[i], column)]));
        // What the first rows leave is what the others add to them, each without what those before it span.
        let turned = spectrum::product(lower.transpose(), matrix.as_ref());
        let mut products = spectrum::product(turned.as_ref(), turned.transpose());
        let moment = |i: usize, j: usize| match (i.checked_sub(1), j.checked_sub(1)) {
            (None, None) => 1.0 / judge.output,
            (None, Some(one)) | (Some(one), None) => judge.gram.mean[from[one]] / judge.output,
            (Some(i), Some(j)) => judge.gram.matrix.get(from[i], from[j]) / judge.output,
        };
        let mut statistics = Mat::from_fn(k + 1, k + 1, moment);
        solve_lower_triangular_in_place(lower.as_ref(), statistics.as_mut(), faer::Par::Seq);
        let mut statistics = statistics.transpose().to_owned();
        solve_lower_triangular_in_place(lower.as_ref(), statistics.as_mut(), faer::Par::Seq);
        for column in 0..=k {
            products.col_mut(column).iter_mut().zip(statistics.col(column).iter()).for_each(|(x, y)| *x *= y);
        }
        let tails = spectrum::tails_of_products(products.as_ref());
        Some(Chosen { order, lower, matrix, tails })
    }

    /// The relative error of the output where the first `rows` numbers are read, and the bias is fitted.
    pub fn error(&self, rows: usize) -> f64 {
        self.tails[1 + rows].max(0.0).sqrt()
    }

    /// The reader's weight and the change of its bias for the first `rows` rows (with that of the bias), fitted to all.
    pub fn fitted(&self, rows: usize) -> Mat<f64> {
        let (all, n) = (self.matrix.nrows(), self.matrix.ncols());
        let rest = self.matrix.as_ref().subrows(rows, all - rows);
        let below = self.lower.as_ref().submatrix(rows, 0, all - rows, rows);
        let mut fitted = spectrum::product(below.transpose(), rest);
        let corner: MatRef<'_, f64> = self.lower.as_ref().submatrix(0, 0, rows, rows);
        solve_upper_triangular_in_place(corner.transpose(), fitted.as_mut(), faer::Par::Seq);
        fitted += self.matrix.as_ref().submatrix(0, 0, rows, n);
        fitted
    }

    /// Keeps the first `count` units: slices all that makes them, and fits the reader's weight and bias anew.
    pub fn emit(&self, graph: &mut Graph, hidden: &Hidden<'_>, count: usize) {
        let (reader, window) = (hidden.reader, hidden.window);
        let fitted = self.fitted(1 + count * window);
        let mut kept: Vec<(usize, usize)> =
            self.order[..count].iter().copied().enumerate().map(|(at, u)| (u, at)).collect();
        kept.sort_unstable();
        let units: Vec<usize> = kept.iter().map(|(unit, _)| *unit).collect();
        for (&value, &axis) in &hidden.sliced {
            let tensor = factors::along(graph.constant(value).expect("only constants are sliced"), axis, &units);
            factors::replace(graph, value, tensor, &hidden.nodes);
        }
        for &id in &hidden.depthwise {
            graph.node_mut(id).set_attribute("group", count as i64);
        }
        let n = fitted.ncols();
        let row = |unit: usize, o: usize| 1 + kept[unit].1 * window + o;
        let tap = &reader.taps[0];
        let mut dims = reader.dims.clone();
        let numbers: Vec<f32> = if reader.inputs_axis() == 0 {
            dims[0] = count;
            (0..count)
                .flat_map(|unit| (0..n).map(move |column| (unit, column)))
                .map(|(u, c)| fitted[(row(u, 0), c)] as f32)
                .collect()
        } else {
            dims[1] = count;
            let at = (0..n).flat_map(|c| (0..count).flat_map(move |u| (0..window).map(move |o| (c, u, o))));
            at.map(|(c, u, o)| fitted[(row(u, o), c)] as f32).collect()
        };
        // The weight may stand behind a transposition.
        let readers = factors::readers(graph, reader.value);
        factors::replace(graph, reader.value, Tensor::from_f32s(&dims, &numbers), &readers);
        let bias: Vec<f32> = (0..n).map(|column| fitted[(0, column)] as f32).collect();
        factors::add_to_bias(graph, tap, &bias);
    }
}
