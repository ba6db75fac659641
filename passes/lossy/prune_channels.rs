//! Hidden units that the others can stand in for: fewer of them, and the next layer fitted anew.

mod hidden;
mod keep;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, OVERHEAD, Proposal, Site, Weight, batches,
    factors::{self, Layer},
    layers, weights, within_memory,
};
use crate::{Error, Info, Kind, Outcome, Saving};
use hidden::{Hidden, hidden};
use keep::Chosen;
use lathe_ir::{Graph, Model, NodeId, ValueId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Keeps the hidden units that span what the layer after them reads.
pub struct PruneChannels;

static INFO: Info = Info {
    name: "prune-channels",
    summary: "keep fewer hidden units between two layers and fit the second anew",
    doc: "Between layers with nothing but element-wise operators, gates, normalizations with constants, depthwise \
          convolutions or pooling in between, offers to keep fewer hidden units or channels: those that a pivoted \
          Cholesky factorization of their covariance on the calibration set, weighed by what the next layer makes of \
          them, takes first. The next layer's weight and bias are then fitted in closed form to its old output, and \
          judged on samples that the fit has not seen. All that makes the dropped units goes. Of three layers in a row, as in a bottleneck of convolutions, both places \
          between them are offered together. Declines where anything else reads the units, where layers share their \
          weights, and where no activations were collected.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some("column subset selection by pivoted Cholesky with least-squares refit"),
};

/// Shares of the units that are offered, in hundredths.
const SHARES: [usize; 8] = [95, 90, 80, 70, 60, 50, 40, 30];

/// The same where two places are offered together.
const SHARES_OF_TWO: [usize; 5] = [90, 75, 60, 45, 30];

/// More units take too long to order.
const MOST_UNITS: usize = 4096;

/// One place with hidden units, or two in a row: the layer that reads the first makes the second.
struct Run<'a> {
    steps: Vec<Hidden<'a>>,
}

impl<'a> Run<'a> {
    /// Every weight that changes: those of the layers that make units and of those that read them.
    fn weights(&self) -> Vec<&'a Weight> {
        let of = |step: &Hidden<'a>| step.makers.iter().copied().chain([step.reader]).collect::<Vec<_>>();
        let mut all: Vec<&Weight> = self.steps.iter().flat_map(of).collect();
        all.sort_unstable_by_key(|weight| weight.value);
        all.dedup_by_key(|weight| weight.value);
        all
    }

    /// Whether `next` reads what the last reader of the run makes, and that alone.
    fn continues_with(&self, next: &Hidden<'_>) -> bool {
        let last = self.steps.last().map(|step| step.reader.value);
        next.makers.len() == 1 && last == next.makers.first().map(|maker| maker.value)
    }

    /// What was seen of what every step's units are read by, or why there is nothing.
    fn statistics(
        &self,
        graph: &Graph,
        cx: &MethodContext,
    ) -> Result<Result<Vec<factors::LayerStatistics>, &'static str>, Error> {
        let mut all = Vec::new();
        for step in &self.steps {
            match factors::statistics(graph, step.reader, cx)? {
                Ok(statistics) => all.push(statistics),
                Err(reason) => return Ok(Err(reason)),
            }
        }
        Ok(Ok(all))
    }

    fn site(
        &self,
        graph: &Graph,
        statistics: &[factors::LayerStatistics],
        rows: &BTreeMap<ValueId, u64>,
    ) -> Result<Site, &'static str> {
        let prepared = self.steps.iter().zip(statistics).map(|(step, statistics)| prepare(graph, step, statistics));
        let chosen: Vec<Chosen> = prepared.collect::<Result<_, _>>()?;
        let first = self.steps[0].reader;
        let own_rows = rows.get(&first.value).copied().unwrap_or(1).max(1);
        let weights = self.weights();
        let cost = |counts: &[usize]| {
            let part = |weight: &&Weight| {
                let mut elements = weight.dims.iter().product::<usize>();
                for (step, count) in self.steps.iter().zip(counts) {
                    let touched =
                        step.reader.value == weight.value || step.makers.iter().any(|m| m.value == weight.value);
                    elements = if touched { elements / step.units * count } else { elements };
                }
                (elements as u64, 2 * elements as u64 * rows.get(&weight.value).copied().unwrap_or(own_rows))
            };
            let parts: Vec<(u64, u64)> = weights.iter().map(part).collect();
            let elements: u64 = parts.iter().map(|p| p.0).sum();
            let flops: u64 = parts.iter().map(|p| p.1).sum();
            Cost { bytes: 4 * elements, parameters: elements, flops_per_row: flops / own_rows }
        };
        let candidate = |counts: Vec<usize>| {
            let mut cost = cost(&counts);
            let mut errors = Vec::new();
            for ((step, chosen), &count) in self.steps.iter().zip(&chosen).zip(&counts) {
                let fewer = count < step.units;
                if fewer {
                    let outputs = step.reader.sides().1 as u64;
                    cost.bytes += 4 * outputs + OVERHEAD;
                    cost.parameters += outputs;
                }
                errors.push(if fewer { chosen.error(count * step.window) } else { 0.0 });
            }
            Candidate {
                label: self.label(&counts),
                cost,
                loss: Loss::PerTap(errors),
                edit: Edit::new(UnitCounts(counts)),
            }
        };
        let all: Vec<usize> = self.steps.iter().map(|step| step.units).collect();
        let candidates = self.combinations(&chosen).into_iter().map(candidate).collect();
        let region: BTreeSet<NodeId> = self.steps.iter().flat_map(|step| step.nodes.iter().copied()).collect();
        Ok(Site {
            baseline: cost(&all),
            footprint: weights.iter().map(|weight| weight.value).collect(),
            nodes: graph.nodes(lathe_ir::ScopeId::MAIN).filter(|id| region.contains(id)).collect(),
            taps: self.steps.iter().map(|step| step.reader.taps[0].output).collect(),
            ..first.site(graph, candidates)
        })
    }

    /// `keep 48 of 64 units`, `keep 48 of 64 and 40 of 64 units`.
    fn label(&self, counts: &[usize]) -> String {
        let part = |(step, count): (&Hidden<'_>, &usize)| format!("{count} of {}", step.units);
        let parts: Vec<String> = self.steps.iter().zip(counts).map(part).collect();
        format!("keep {} units", parts.join(" and "))
    }

    /// Numbers of units that are offered, all steps as they are left out.
    fn combinations(&self, chosen: &[Chosen]) -> Vec<Vec<usize>> {
        let shares: &[usize] = if self.steps.len() == 1 { &SHARES } else { &SHARES_OF_TWO };
        let mut all: Vec<Vec<usize>> = vec![Vec::new()];
        for (step, chosen) in self.steps.iter().zip(chosen) {
            let mut counts = counts(step, chosen, shares);
            counts.push(step.units);
            let with = |before: &Vec<usize>| {
                let before = before.clone();
                counts.iter().map(move |&count| [before.as_slice(), &[count]].concat()).collect::<Vec<_>>()
            };
            all = all.iter().flat_map(with).collect();
        }
        all.retain(|counts| counts.iter().zip(&self.steps).any(|(&count, step)| count < step.units));
        all
    }
}

/// How many units every step of a run keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct UnitCounts(Vec<usize>);

/// Numbers of units of one place.
fn counts(step: &Hidden<'_>, chosen: &Chosen, shares: &[usize]) -> Vec<usize> {
    let units = step.units;
    let multiple = if units >= 64 { 8 } else { 4 };
    let mut counts: Vec<usize> = shares.iter().map(|share| units * share / 100 / multiple * multiple).collect();
    // As few as lose nothing at all.
    let whole = (1..units).find(|&count| chosen.error(count * step.window) <= 1e-5);
    counts.extend(whole.map(|count| count.next_multiple_of(multiple)));
    counts.retain(|&count| count > 0 && count < units);
    counts.sort_unstable();
    counts.dedup();
    counts
}

fn prepare(graph: &Graph, step: &Hidden<'_>, statistics: &factors::LayerStatistics) -> Result<Chosen, &'static str> {
    let layer = Layer::new(graph, step.reader, statistics)?;
    let (mean, output) = (&statistics.grams[0].mean, statistics.outputs[0]);
    let judge = statistics.judges()?.swap_remove(0);
    Chosen::of(&layer, mean, output, &judge, step.units, step.window).ok_or("its decomposition does not converge")
}

fn by_node(found: &[Weight]) -> BTreeMap<NodeId, &Weight> {
    let layers = found.iter().filter(|w| w.taps.iter().all(|tap| tap.rows.is_some()));
    layers.flat_map(|w| w.taps.iter().map(move |tap| (tap.node, w))).collect()
}

/// Every place with hidden units, in runs that share no weight; why there is none before the other layers.
fn runs<'a>(graph: &Graph, found: &'a [Weight], outcome: &mut Outcome) -> Vec<Run<'a>> {
    let layers = by_node(found);
    let mut runs: Vec<Run> = Vec::new();
    let mut taken: BTreeSet<ValueId> = BTreeSet::new();
    for reader in found {
        let fits = hidden(graph, reader, &layers).and_then(|step| {
            if step.units > MOST_UNITS {
                return Err("there are too many units to put in order");
            }
            let before = runs.iter().position(|run| run.steps.len() == 1 && run.continues_with(&step));
            let mut values = step.makers.iter().map(|w| w.value).filter(|_| before.is_none()).chain([reader.value]);
            match values.any(|value| taken.contains(&value)) {
                true => Err("a layer beside it is one that units may be dropped of already"),
                false => Ok((step, before)),
            }
        });
        match fits {
            Ok((step, before)) => {
                taken.extend(step.makers.iter().map(|w| w.value).chain([reader.value]));
                match before {
                    Some(index) => runs[index].steps.push(step),
                    None => runs.push(Run { steps: vec![step] }),
                }
            }
            Err(reason) => outcome.refuse(reason, format!("`{}`", graph.value(reader.value).name)),
        }
    }
    runs
}

/// The run that starts with the layer that reads with this weight, of one or two steps.
fn run_of<'a>(graph: &Graph, found: &'a [Weight], first: ValueId, steps: usize) -> Option<Run<'a>> {
    let layers = by_node(found);
    let first = found.iter().find(|w| w.value == first)?;
    let mut run = Run { steps: vec![hidden(graph, first, &layers).ok()?] };
    if steps > 1 {
        let next = found.iter().filter_map(|reader| hidden(graph, reader, &layers).ok());
        run.steps.push(next.into_iter().find(|step| run.continues_with(step))?);
    }
    Some(run)
}

impl Method for PruneChannels {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<UnitCounts>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let graph = &model.graph;
        let (found, _) = weights(graph);
        let runs = runs(graph, &found, &mut proposal.outcome);
        let statistics_bytes = |run: &Run| run.steps.iter().map(|s| factors::statistics_bytes(s.reader)).sum();
        for batch in batches(&runs, cx, statistics_bytes) {
            let statistics =
                batch.iter().map(|run| Ok((run, run.statistics(graph, cx)?))).collect::<Result<Vec<_>, Error>>()?;
            let rows = &cx.rows;
            let bytes = |(run, _): &(&Run, _)| {
                run.steps.iter().map(|s| factors::working_bytes(s.reader.sides())).max().unwrap_or(0)
            };
            let sites = within_memory(&statistics, cx, bytes, |(run, statistics)| {
                run.site(graph, statistics.as_ref().map_err(|reason| *reason)?, rows)
            });
            for (run, site) in batch.iter().zip(sites) {
                match site {
                    Ok(site) => proposal.sites.push(site),
                    Err(reason) => {
                        let name = &graph.value(run.steps[0].reader.value).name;
                        proposal.outcome.refuse(reason, format!("`{name}`"));
                    }
                }
            }
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
        let UnitCounts(counts) = candidate.edit.of();
        let mut outcome = Outcome::default();
        let place = format!("`{}`", site.name);
        let graph = &mut model.graph;
        let (found, _) = weights(graph);
        let Some(run) = site.weight.and_then(|first| run_of(graph, &found, first, counts.len())) else {
            outcome.refuse("the constants are no longer used as they were", place);
            return Ok(outcome);
        };
        let statistics = match run.statistics(graph, cx)? {
            Ok(statistics) => statistics,
            Err(reason) => {
                outcome.refuse(reason, place);
                return Ok(outcome);
            }
        };
        for ((step, statistics), count) in run.steps.iter().zip(&statistics).zip(counts) {
            if *count == step.units {
                continue;
            }
            // The step before has changed the layer that makes these units, perhaps below what is worth a site.
            let now = layers::of_any_size(graph);
            let reader = now.iter().find(|w| w.value == step.reader.value);
            let again = reader.ok_or("the constants are no longer used as they were");
            let again = again.and_then(|reader| hidden(graph, reader, &by_node(&now)));
            let made = again.and_then(|step| Ok((prepare(graph, &step, statistics)?, step)));
            match made {
                Ok((chosen, step)) => chosen.emit(graph, &step, *count),
                Err(reason) => {
                    outcome.refuse(reason, place);
                    return Ok(outcome);
                }
            }
        }
        outcome.change(candidate.label.clone(), place);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::{
        product,
        tests::{gram, random},
    };
    use super::{factors::LayerStatistics, *};
    use faer::Mat;
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

    fn statistics(hidden: &Mat<f64>, down: &Mat<f64>) -> LayerStatistics {
        let full = gram(hidden);
        let upper = (0..HIDDEN).flat_map(|i| (i..HIDDEN).map(move |j| (i, j))).map(|at| full[at]).collect();
        let mean = (0..HIDDEN).map(|unit| hidden.col(unit).iter().sum::<f64>() / 200.0).collect();
        let output = product(hidden.as_ref(), down.as_ref()).squared_norm_l2() / 200.0;
        let gram = Gram { matrix: SymMatrix::from_upper(HIDDEN, upper).unwrap(), mean, rows: 200 };
        LayerStatistics { held: vec![(gram.clone(), output)], grams: vec![gram], outputs: vec![output] }
    }

    fn pruned(count: usize) -> (Model, Model, f64, Vec<usize>, Mat<f64>) {
        let (model, rows, down) = planted();
        let mut changed = model.clone();
        let found = weights(&model.graph).0;
        let reader = found.iter().find(|w| w.dims[0] == HIDDEN).unwrap();
        let hidden = hidden(&model.graph, reader, &by_node(&found)).unwrap();
        let statistics = statistics(&rows, &down);
        let chosen = prepare(&model.graph, &hidden, &statistics).unwrap();
        assert!(counts(&hidden, &chosen, &SHARES).contains(&64));
        chosen.emit(&mut changed.graph, &hidden, count);
        changed.check().unwrap();
        (model, changed, chosen.error(count).powi(2), chosen.order[..count].to_vec(), chosen.fitted(1 + count))
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
    fn three_layers_in_a_row_are_one_site() {
        let noise = |count: usize, seed: u64| {
            let numbers = factors::numbers(random(1, count, seed).as_ref());
            numbers.iter().map(|x| format!("{:e}", x * 0.1)).collect::<Vec<_>>().join(", ")
        };
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[n, 64, 5, 5] x) => (float[n, 64, 5, 5] z) \
             <float[64, 64, 1, 1] a = {{{}}}, float[64, 64, 3, 3] b = {{{}}}, float[64] c = {{{}}}, float[64, 64, 1, 1] d = {{{}}}> \
             {{ p = Conv (x, a) q = Relu (p) r = Conv <pads = [1, 1, 1, 1]> (q, b, c) s = Relu (r) t = Conv (s, d) u = Add (t, x) z = Relu (u) }}",
            noise(4096, 1),
            noise(9 * 4096, 2),
            noise(64, 3),
            noise(4096, 4)
        );
        let model = text::parse(&source).unwrap();
        let found = weights(&model.graph).0;
        let all = runs(&model.graph, &found, &mut Outcome::default());
        assert_eq!((all.len(), all[0].steps.len(), all[0].weights().len()), (1, 2, 3));
        let statistics: Vec<LayerStatistics> = all[0]
            .steps
            .iter()
            .map(|step| {
                let rows = random(900, step.units * step.window, 5);
                let full = gram(&rows);
                let k = rows.ncols();
                let upper = (0..k).flat_map(|i| (i..k).map(move |j| (i, j))).map(|at| full[at]).collect();
                let weight = factors::matrix(&model.graph, step.reader).unwrap();
                let output = product(rows.as_ref(), weight.as_ref()).squared_norm_l2() / 900.0;
                let gram = Gram { matrix: SymMatrix::from_upper(k, upper).unwrap(), mean: vec![0.0; k], rows: 900 };
                LayerStatistics { held: vec![(gram.clone(), output)], grams: vec![gram], outputs: vec![output] }
            })
            .collect();
        let site = all[0].site(&model.graph, &statistics, &BTreeMap::new()).unwrap();
        let at = |name: &str| site.candidates.iter().find(|c| c.label == name).unwrap();
        let both = at("keep 32 of 64 and 16 of 64 units");
        // Half the 1 x 1 kernels, an eighth of the 3 x 3 ones, a quarter of the last; and a bias for each reader.
        assert_eq!(both.cost.parameters, 2048 + 9 * 512 + 1024 + 128);
        assert!(both.loss.per_tap().unwrap().iter().all(|&e| e > 0.0));
        let one = at("keep 32 of 64 and 64 of 64 units");
        let errors = |candidate: &Candidate| candidate.loss.per_tap().unwrap().to_vec();
        assert_eq!((errors(one)[1], errors(one)[0]), (0.0, errors(both)[0]));
        assert_eq!((site.footprint.len(), site.taps.len(), &both.edit), (3, 2, &Edit::new(UnitCounts(vec![32, 16]))));
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
