//! Hidden units that the others can stand in for: fewer of them, and the next layer fitted anew.

use super::{
    Choice, Method, OVERHEAD, Proposal, Site, Spent, Weight,
    factors::{self, Layer, Seen},
    on_all_cores, take_over, weights,
};
use crate::{Context, Error, Info, Kind, Outcome, Quantity};
use faer::{Mat, MatRef, Side, linalg::triangular_solve::solve_upper_triangular_in_place};
use lathe_ir::{Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Keeps the hidden units that span what the layer after them reads.
pub struct PruneChannels;

static INFO: Info = Info {
    name: "prune-channels",
    summary: "keep fewer hidden units between two layers and fit the second anew",
    doc: "Between layers with nothing but element-wise operators, gates, normalizations with constants, depthwise \
          convolutions or pooling in between, offers to keep fewer hidden units or channels: those that a pivoted \
          Cholesky factorization of their covariance on the calibration set, weighed by what the next layer makes of \
          them, takes first. The next layer's weight and bias are then fitted in closed form to its old output. All \
          that makes the dropped units goes. Declines where anything else reads the units, where layers share their \
          weights, and where no activations were collected.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Quantity::Parameters, Quantity::Flops],
    source: Some("column subset selection by pivoted Cholesky with least-squares refit"),
};

/// Shares of the units that are offered, in hundredths.
const SHARES: [usize; 8] = [95, 90, 80, 70, 60, 50, 40, 30];

/// More units take too long to order.
const MOST_UNITS: usize = 4096;

/// Part of the mean square that is added to every direction, so that units that are spanned by others do no harm.
const RIDGE: f64 = 1e-9;

/// Operators that treat every unit by itself; other inputs are constants or further hidden values.
const ELEMENTWISE: [&str; 25] = [
    "Relu",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "HardSwish",
    "HardSigmoid",
    "LeakyRelu",
    "Clip",
    "Elu",
    "Selu",
    "Softplus",
    "Softsign",
    "Mish",
    "Identity",
    "Abs",
    "Neg",
    "Exp",
    "Sqrt",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "PRelu",
];

/// Operators that treat every channel by itself.
const PER_CHANNEL: [&str; 3] = ["MaxPool", "AveragePool", "GlobalAveragePool"];

/// Hidden units from the layers that make them to the one that reads them.
struct Hidden<'a> {
    /// The layer that reads them.
    reader: &'a Weight,
    /// The layers that make them.
    makers: Vec<&'a Weight>,
    /// Constants with a number per unit and the axis of the units.
    sliced: BTreeMap<ValueId, usize>,
    /// Depthwise convolutions.
    depthwise: Vec<NodeId>,
    /// All nodes, in order.
    nodes: Vec<NodeId>,
    units: usize,
    /// Numbers that the reader multiplies per unit: the window of a convolution.
    window: usize,
}

/// Walks from what a layer reads to the layers that make it.
fn hidden<'a>(
    graph: &Graph,
    reader: &'a Weight,
    layers: &BTreeMap<NodeId, &'a Weight>,
) -> Result<Hidden<'a>, &'static str> {
    let [tap] = reader.taps.as_slice() else { return Err("several layers share the weight") };
    if tap.rows.is_none() {
        return Err("rows are picked of the constant");
    }
    let conv = graph.node(tap.node).is("Conv");
    let units = if conv { reader.dims[1] } else { factors::sides(reader).0 };
    let window = factors::sides(reader).0 / units;
    let from_end = if conv { reader.dims.len() - 1 } else { 1 };
    let mut found = Hidden {
        reader,
        makers: Vec::new(),
        sliced: BTreeMap::new(),
        depthwise: Vec::new(),
        nodes: vec![],
        units,
        window,
    };
    let read = graph.node(tap.node).input(0).expect("a tap multiplies data");
    let (mut open, mut values, mut region) = (vec![read], BTreeSet::new(), BTreeSet::from([tap.node]));
    while let Some(value) = open.pop() {
        if !values.insert(value) {
            continue;
        }
        let id = graph.producer(value).ok_or("an input of the model or a constant is read")?;
        let node = graph.node(id);
        if node.scope() != ScopeId::MAIN || node.outputs().iter().flatten().count() != 1 {
            return Err("an operator with several outputs makes the units");
        }
        if !region.insert(id) {
            continue;
        }
        if let Some(&maker) = layers.get(&id) {
            let turned = maker.inputs_axis();
            if maker.taps.len() != 1 || factors::sides(maker).1 != units || node.is("Conv") != conv {
                return Err("what makes the units shares its weight or has another shape");
            }
            if node.input(1) != Some(maker.value) {
                return Err("the weight of what makes the units is turned");
            }
            found.makers.push(maker);
            found.sliced.insert(maker.value, if conv { 0 } else { 1 - turned });
            if let Some(bias) = node.input(2) {
                slice(graph, &mut found, bias, if conv { 1 } else { from_end })?;
            }
            continue;
        }
        let depthwise = node.is("Conv") && conv && node.int("group").unwrap_or(1) == units as i64;
        if depthwise {
            for input in node.inputs().iter().skip(1).flatten() {
                let dims = graph.constant(*input).ok_or("a depthwise convolution's weight is no constant")?.dims();
                if dims.first() != Some(&units) {
                    return Err("a convolution makes several channels of one");
                }
                found.sliced.insert(*input, 0);
            }
            found.depthwise.push(id);
            open.push(node.input(0).expect("a convolution has data"));
        } else if node.is("BatchNormalization") && conv {
            for input in node.inputs().iter().skip(1).flatten() {
                slice(graph, &mut found, *input, 1)?;
            }
            open.push(node.input(0).expect("a normalization has data"));
        } else if ELEMENTWISE.iter().any(|op| node.is(op)) || conv && PER_CHANNEL.iter().any(|op| node.is(op)) {
            for input in node.inputs().iter().flatten() {
                match graph.constant(*input) {
                    Some(_) => slice(graph, &mut found, *input, from_end)?,
                    None => open.push(*input),
                }
            }
        } else {
            return Err("other than layers and element-wise operators make the units");
        }
    }
    let inside = |place: &Use| match *place {
        Use::Node(id, index) => region.contains(&id) && (id != tap.node || index == 0),
        _ => false,
    };
    if values.iter().any(|&v| !graph.value(v).uses().iter().all(inside)) {
        return Err("something else reads the units too");
    }
    if found.makers.is_empty() {
        return Err("no layer makes the units");
    }
    found.nodes = graph.nodes(ScopeId::MAIN).filter(|id| region.contains(id)).collect();
    Ok(found)
}

/// Notes that a constant has a number per unit, if it has.
fn slice(graph: &Graph, found: &mut Hidden<'_>, value: ValueId, from_end: usize) -> Result<(), &'static str> {
    let dims = graph.constant(value).ok_or("a factor or sum of the units is no constant")?.dims();
    match dims.len().checked_sub(from_end).map(|axis| (axis, dims[axis])) {
        None | Some((_, 1)) => Ok(()),
        Some((axis, size)) if size == found.units => {
            found.sliced.insert(value, axis);
            Ok(())
        }
        _ => Err("a constant does not fit the units"),
    }
}

/// The order in which units are taken, and what keeping the first of them costs.
struct Chosen {
    /// All units, the ones to keep first.
    order: Vec<usize>,
    /// `1` and then the numbers of the units, in that order: their second moments as `lower · lowerᵀ`.
    lower: Mat<f64>,
    /// The reader's weight in that order, `[1 + k, n]`; the first row is its bias, as a change.
    matrix: Mat<f64>,
    /// The squared relative error of the output when only that many rows are kept.
    tails: Vec<f64>,
}

fn chosen(layer: &Layer, mean: &[f64], output: f64, units: usize, window: usize) -> Option<Chosen> {
    let (k, n) = (layer.matrix.nrows(), layer.matrix.ncols());
    let gram = &layer.joint;
    // Units without their mean, which the bias takes, times what the reader makes of them.
    let weight: Vec<f64> = (0..k).map(|row| layer.matrix.row(row).iter().map(|w| w * w).sum::<f64>().sqrt()).collect();
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
    let matrix = Mat::from_fn(k + 1, n, |i, column| i.checked_sub(1).map_or(0.0, |i| layer.matrix[(from[i], column)]));
    let turned = super::spectrum::product(lower.transpose(), matrix.as_ref());
    let energy: Vec<f64> = (0..=k).map(|row| turned.row(row).iter().map(|x| x * x).sum()).collect();
    let tails = super::spectrum::Spectrum::tails(&energy);
    Some(Chosen { order, lower, matrix, tails })
}

/// All indices, at every step the one with most left that those before it do not span.
fn pivoted(mut kernel: Mat<f64>) -> Vec<usize> {
    let size = kernel.nrows();
    let mut left: Vec<usize> = (0..size).collect();
    let mut order = Vec::with_capacity(size);
    while !left.is_empty() {
        let best = (0..left.len()).fold(0, |best, at| {
            if kernel[(left[at], left[at])] > kernel[(left[best], left[best])] { at } else { best }
        });
        let pivot = left.remove(best);
        order.push(pivot);
        let size = kernel[(pivot, pivot)];
        if size > 0.0 {
            let column: Vec<f64> = left.iter().map(|&row| kernel[(row, pivot)]).collect();
            for (at, &j) in left.iter().enumerate() {
                let factor = column[at] / size;
                for (&i, c) in left.iter().zip(&column) {
                    kernel[(i, j)] -= c * factor;
                }
            }
        }
    }
    order
}

impl Chosen {
    /// The reader's weight and the change of its bias for the first `rows` rows (with that of the bias), fitted to all.
    fn fitted(&self, rows: usize) -> Mat<f64> {
        let (all, n) = (self.matrix.nrows(), self.matrix.ncols());
        let rest = self.matrix.as_ref().subrows(rows, all - rows);
        let below = self.lower.as_ref().submatrix(rows, 0, all - rows, rows);
        let mut fitted = super::spectrum::product(below.transpose(), rest);
        let corner: MatRef<'_, f64> = self.lower.as_ref().submatrix(0, 0, rows, rows);
        solve_upper_triangular_in_place(corner.transpose(), fitted.as_mut(), faer::Par::Seq);
        fitted += self.matrix.as_ref().submatrix(0, 0, rows, n);
        fitted
    }
}

/// Numbers of units that are offered.
fn counts(units: usize, tails: &[f64], window: usize) -> Vec<usize> {
    let step = if units >= 64 { 8 } else { 4 };
    let mut counts: Vec<usize> = SHARES.iter().map(|share| units * share / 100 / step * step).collect();
    // As few as lose nothing at all.
    let whole = (1..units).find(|&count| tails[1 + count * window] <= 1e-10);
    counts.extend(whole.map(|count| count.next_multiple_of(step)));
    counts.retain(|&count| count > 0 && count < units);
    counts.sort_unstable();
    counts.dedup();
    counts
}

fn prepare(graph: &Graph, found: &Hidden<'_>, seen: &Seen) -> Result<(Layer, Chosen), &'static str> {
    let layer = Layer::new(graph, found.reader, seen)?;
    let (mean, output) = (&seen.grams[0].mean, seen.outputs[0]);
    let chosen =
        chosen(&layer, mean, output, found.units, found.window).ok_or("its decomposition does not converge")?;
    Ok((layer, chosen))
}

fn site(graph: &Graph, found: &Hidden<'_>, seen: &Seen, rows: &BTreeMap<ValueId, u64>) -> Result<Site, &'static str> {
    let (layer, chosen) = prepare(graph, found, seen)?;
    let n = layer.matrix.ncols();
    let own_rows = rows.get(&found.reader.value).copied().unwrap_or(1).max(1);
    let spent = |count: usize| {
        let part = |weight: &&Weight| {
            let elements = weight.dims.iter().product::<usize>() * count / found.units;
            (elements as u64, 2 * elements as u64 * rows.get(&weight.value).copied().unwrap_or(own_rows))
        };
        let parts: Vec<(u64, u64)> = found.makers.iter().chain([&found.reader]).map(part).collect();
        let elements: u64 = parts.iter().map(|p| p.0).sum();
        let flops: u64 = parts.iter().map(|p| p.1).sum();
        Spent { bytes: 4 * elements, parameters: elements, flops_per_row: flops / own_rows }
    };
    let choice = |count: usize| {
        let all = spent(count);
        let spent = Spent { bytes: all.bytes + 4 * n as u64 + OVERHEAD, parameters: all.parameters + n as u64, ..all };
        let errors = vec![chosen.tails[1 + count * found.window].max(0.0).sqrt()];
        Choice { name: format!("keep {count} of {} units", found.units), spent, errors }
    };
    let mut covers: Vec<ValueId> = found.makers.iter().map(|w| w.value).chain([found.reader.value]).collect();
    covers.sort_unstable();
    let choices = counts(found.units, &chosen.tails, found.window).into_iter().map(choice).collect();
    Ok(Site { kept: spent(found.units), covers, nodes: found.nodes.clone(), ..found.reader.site(graph, choices) })
}

fn by_node(found: &[Weight]) -> BTreeMap<NodeId, &Weight> {
    let layers = found.iter().filter(|w| w.taps.iter().all(|tap| tap.rows.is_some()));
    layers.flat_map(|w| w.taps.iter().map(move |tap| (tap.node, w))).collect()
}

impl Method for PruneChannels {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn propose(&self, model: &Model, cx: &Context) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let graph = &model.graph;
        let place = |value: ValueId| format!("`{}`", graph.value(value).name);
        let (found, _) = weights(graph);
        let layers = by_node(&found);
        let mut taken: BTreeSet<ValueId> = BTreeSet::new();
        let mut work = Vec::new();
        for reader in &found {
            let ready = hidden(graph, reader, &layers).and_then(|hidden| {
                if hidden.units > MOST_UNITS {
                    return Err("there are too many units to put in order");
                }
                let constants = || hidden.makers.iter().map(|w| w.value).chain([reader.value]);
                if constants().any(|value| taken.contains(&value)) {
                    return Err("a layer beside it is one that units may be dropped of already");
                }
                Ok(hidden)
            });
            let ready = match ready {
                Ok(hidden) => factors::seen(graph, reader, cx)?.map(|seen| (hidden, seen)),
                Err(reason) => Err(reason),
            };
            match ready {
                Ok((hidden, seen)) => {
                    taken.extend(hidden.makers.iter().map(|w| w.value).chain([reader.value]));
                    work.push((hidden, seen));
                }
                Err(reason) => proposal.outcome.refuse(reason, place(reader.value)),
            }
        }
        for batch in work.chunks(super::BATCH) {
            let rows = &cx.rows;
            let sites = on_all_cores(batch, |(hidden, seen)| site(graph, hidden, seen, rows));
            for ((hidden, _), site) in batch.iter().zip(sites) {
                match site {
                    Ok(site) => proposal.sites.push(site),
                    Err(reason) => proposal.outcome.refuse(reason, place(hidden.reader.value)),
                }
            }
        }
        Ok(proposal)
    }

    fn rewrite(&self, model: &mut Model, site: &Site, choice: usize, cx: &Context) -> Result<Outcome, Error> {
        let name = &site.choices[choice].name;
        let count: usize = name.split(' ').nth(1).and_then(|c| c.parse().ok()).expect("a choice names its units");
        let place = || format!("`{}`", site.name);
        let mut outcome = Outcome::default();
        let (found, _) = weights(&model.graph);
        let Some(reader) = found.iter().find(|w| w.value == site.weight) else {
            outcome.refuse("the constant is no longer used as it was", place());
            return Ok(outcome);
        };
        let made = match hidden(&model.graph, reader, &by_node(&found)) {
            Ok(hidden) => factors::seen(&model.graph, reader, cx)?.and_then(|seen| {
                let (_, chosen) = prepare(&model.graph, &hidden, &seen)?;
                Ok((hidden, chosen))
            }),
            Err(reason) => Err(reason),
        };
        match made {
            Ok((hidden, chosen)) => {
                emit(&mut model.graph, &hidden, &chosen, count);
                outcome.change(name.clone(), place());
            }
            Err(reason) => outcome.refuse(reason, place()),
        }
        Ok(outcome)
    }
}

/// Numbers of a constant along an axis at these indices.
fn along(tensor: &Tensor, axis: usize, kept: &[usize]) -> Tensor {
    let numbers = tensor.to_f32s().expect("constants of float layers are floats");
    let mut dims = tensor.dims().to_vec();
    let inner: usize = dims[axis + 1..].iter().product();
    let (outer, size): (usize, usize) = (dims[..axis].iter().product(), dims[axis]);
    let line = |o: usize, at: usize| &numbers[(o * size + at) * inner..][..inner];
    let sliced: Vec<f32> =
        (0..outer).flat_map(|o| kept.iter().flat_map(move |&at| line(o, at).iter().copied())).collect();
    dims[axis] = kept.len();
    Tensor::from_f32s(&dims, &sliced)
}

fn emit(graph: &mut Graph, hidden: &Hidden<'_>, chosen: &Chosen, count: usize) {
    let (reader, window) = (hidden.reader, hidden.window);
    let fitted = chosen.fitted(1 + count * window);
    let mut kept: Vec<(usize, usize)> =
        chosen.order[..count].iter().copied().enumerate().map(|(at, u)| (u, at)).collect();
    kept.sort_unstable();
    let units: Vec<usize> = kept.iter().map(|(unit, _)| *unit).collect();
    let replace = |graph: &mut Graph, old: ValueId, tensor: Tensor, nodes: &[NodeId]| {
        let name = graph.fresh_name(&format!("{}_kept", graph.value(old).name));
        let new = graph.add_initializer(ScopeId::MAIN, &name, tensor);
        for &id in nodes {
            for index in 0..graph.node(id).inputs().len() {
                if graph.node(id).input(index) == Some(old) {
                    graph.set_input(id, index, Some(new));
                }
            }
        }
        if graph.value(old).uses().is_empty() {
            graph.remove_initializer(old);
        }
    };
    for (&value, &axis) in &hidden.sliced {
        let tensor = along(graph.constant(value).expect("only constants are sliced"), axis, &units);
        replace(graph, value, tensor, &hidden.nodes);
    }
    for &id in &hidden.depthwise {
        graph.node_mut(id).set_attribute("group", count as i64);
    }
    let n = fitted.ncols();
    let row = |unit: usize, o: usize| 1 + kept[unit].1 * window + o;
    let tap = &reader.taps[0];
    let conv = graph.node(tap.node).is("Conv");
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
    let readers: Vec<NodeId> = graph.value(reader.value).uses().iter().filter_map(node_of).collect();
    replace(graph, reader.value, Tensor::from_f32s(&dims, &numbers), &readers);
    let bias: Vec<f32> = (0..n).map(|column| fitted[(0, column)] as f32).collect();
    let name = graph.value(tap.output).name.clone();
    if let Some(old) = graph.node(tap.node).input(2).filter(|_| conv)
        && let Some(numbers) = graph.constant(old).and_then(Tensor::to_f32s)
    {
        let sum: Vec<f32> = numbers.iter().zip(&bias).map(|(a, b)| a + b).collect();
        return replace(graph, old, Tensor::from_f32s(&[n], &sum), &[tap.node]);
    }
    let fresh = graph.fresh_name(&format!("{name}_bias"));
    if conv && graph.node(tap.node).input(2).is_none() {
        let bias = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&[n], &bias));
        let (data, weight) = (graph.node(tap.node).input(0), graph.node(tap.node).input(1));
        return graph.set_inputs(tap.node, vec![data, weight, Some(bias)]);
    }
    let dims = if conv { [vec![n], vec![1; reader.dims.len() - 2]].concat() } else { vec![n] };
    let bias = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&dims, &bias));
    let sum = graph.append(ScopeId::MAIN, Node::new("Add"), &[tap.output, bias], &format!("{name}_whole"));
    let add = graph.producer(sum).expect("it was just added");
    take_over(graph, tap.output, sum);
    graph.set_input(add, 0, Some(tap.output));
}

fn node_of(place: &Use) -> Option<NodeId> {
    match *place {
        Use::Node(id, _) => Some(id),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::{
        product,
        tests::{gram, random},
    };
    use super::*;
    use lathe_analysis::{Gram, SymMatrix};
    use lathe_ir::text;

    const X: usize = 64;
    const HIDDEN: usize = 128;

    /// Two layers whose hidden units 64 to 127 repeat 0 to 63, and what 200 rows make of them.
    fn planted() -> (Model, Mat<f64>, Mat<f64>) {
        let (half, down) = (random(X, 64, 1), random(HIDDEN, 64, 2));
        let up = Mat::from_fn(X, HIDDEN, |row, unit| half[(row, unit % 64)]);
        let list =
            |m: &Mat<f64>| factors::numbers(m.as_ref()).iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ");
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, 64] x) => (float[3, 64] z) \
             <float[64, 128] up = {{{}}}, float[128, 64] down = {{{}}}> \
             {{ h = MatMul (x, up) a = Relu (h) y = MatMul (a, down) z = Tanh (y) }}",
            list(&up),
            list(&down)
        );
        let hidden = product(random(200, X, 3).as_ref(), up.as_ref());
        let hidden = Mat::from_fn(200, HIDDEN, |row, unit| hidden[(row, unit)].max(0.0));
        (text::parse(&source).unwrap(), hidden, down)
    }

    fn seen(hidden: &Mat<f64>, down: &Mat<f64>) -> Seen {
        let full = gram(hidden);
        let upper = (0..HIDDEN).flat_map(|i| (i..HIDDEN).map(move |j| (i, j))).map(|at| full[at]).collect();
        let mean = (0..HIDDEN).map(|unit| hidden.col(unit).iter().sum::<f64>() / 200.0).collect();
        let output = product(hidden.as_ref(), down.as_ref()).squared_norm_l2() / 200.0;
        let gram = Gram { matrix: SymMatrix::from_upper(HIDDEN, upper).unwrap(), mean, rows: 200 };
        Seen { grams: vec![gram], outputs: vec![output] }
    }

    fn pruned(count: usize) -> (Model, Model, f64, Vec<usize>, Mat<f64>) {
        let (model, rows, down) = planted();
        let mut changed = model.clone();
        let found = weights(&model.graph).0;
        let reader = found.iter().find(|w| w.dims[0] == HIDDEN).unwrap();
        let hidden = hidden(&model.graph, reader, &by_node(&found)).unwrap();
        let seen = seen(&rows, &down);
        let (_, chosen) = prepare(&model.graph, &hidden, &seen).unwrap();
        assert!(counts(hidden.units, &chosen.tails, hidden.window).contains(&64));
        emit(&mut changed.graph, &hidden, &chosen, count);
        changed.check().unwrap();
        (model, changed, chosen.tails[1 + count], chosen.order[..count].to_vec(), chosen.fitted(1 + count))
    }

    #[test]
    fn repeated_units_go_without_loss() {
        let (model, changed, lost, order, _) = pruned(64);
        assert!(lost < 1e-8, "{lost}");
        assert_eq!(order.iter().map(|unit| unit % 64).collect::<BTreeSet<_>>().len(), 64);
        lathe_testkit::equivalent(&model, &changed, Some(1e-4), 1).unwrap();
        let kept = |name: &str| {
            let value = changed.graph.find_value(name).unwrap();
            changed.graph.constant(value).unwrap().dims().to_vec()
        };
        assert_eq!((kept("up_kept"), kept("down_kept")), (vec![64, 64], vec![64, 64]));
    }

    #[test]
    fn the_error_of_fewer_units_is_the_one_told() {
        let (_, rows, down) = planted();
        let (_, _, lost, order, fitted) = pruned(40);
        let read = Mat::from_fn(200, 41, |row, at| at.checked_sub(1).map_or(1.0, |at| rows[(row, order[at])]));
        let whole = product(rows.as_ref(), down.as_ref());
        let off = &whole - product(read.as_ref(), fitted.as_ref());
        let found = off.squared_norm_l2() / whole.squared_norm_l2();
        assert!(found > 1e-3 && (found - lost).abs() < 1e-4 * found, "{found} {lost}");
    }

    #[test]
    fn units_that_something_else_reads_stay() {
        let source = "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, 64] x) => (float[3, 64] z) \
             <float[64, 128] up = {0.5}, float[128, 64] down = {0.5}> \
             { h = MatMul (x, up) a = Relu (h) y = MatMul (a, down) s = ReduceSum <keepdims = 1> (h) z = Add (y, s) }";
        let zeros = |count: usize| vec!["0.5"; count].join(", ");
        let model = text::parse(&source.replace("{0.5}", &format!("{{{}}}", zeros(64 * 128)))).unwrap();
        let found = weights(&model.graph).0;
        let reader = found.iter().find(|w| w.dims[0] == HIDDEN).unwrap();
        let refused = hidden(&model.graph, reader, &by_node(&found)).err();
        assert_eq!(refused, Some("something else reads the units too"));
    }
}
