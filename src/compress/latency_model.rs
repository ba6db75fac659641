//! How long options take: each one's own small graph, timed on the provider at the shapes of a run.

use super::{
    calibration::sizes,
    candidates::{Offer, Region},
    setup::Setup,
};
use crate::{Failure, PassRecord};
use anyhow::{Context as _, anyhow};
use lathe_analysis::{Bindings, Facts, KeyBuilder, kept_or};
use lathe_ir::{
    DataType, Dim, External, Graph, Model, Node, NodeId, ScopeId, Tensor, Type, Use, ValueId, WriteOptions,
};
use lathe_passes::lossy::{MethodContext, Site};
use lathe_runtime::{BenchInputs, BenchResult, BenchTask, InputSpec, LoadOptions, SampleSet, machine};
use std::{collections::BTreeMap, path::PathBuf};

/// Times every option of every place; equal shapes and options are timed once.
pub(super) fn time_candidates(
    setup: &Setup<'_>,
    model: &Model,
    regions: &mut [Region],
    cx: &MethodContext,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    let mut cx = cx.clone();
    cx.only_timed = true;
    let cx = &cx;
    let facts = Facts::infer(model);
    let bindings = run_sizes(setup, model)?;
    let known_values = Known { facts: &facts, bindings: &bindings };
    let mut known: BTreeMap<String, Vec<Option<u64>>> = BTreeMap::new();
    let mut untimed: Vec<String> = Vec::new();
    for region in regions.iter_mut() {
        let Some(fragment) = Fragment::of(model, region.site(), &known_values) else {
            untimed.push(region.site().name.clone());
            continue;
        };
        let name = |(offer, own): (&Offer, usize)| {
            format!("{} {}", offer.method.info().name, offer.site.candidates[own].label)
        };
        let names: Vec<String> = region.candidates().map(name).collect();
        let key = format!("{} {}", fragment.key, names.join(", "));
        if !known.contains_key(&key) {
            let times = kept_or(setup.cx.kept, "timings", &timing_key(setup, model, &key)?, || {
                time_fragment(setup, &fragment, region, cx)
            })?;
            known.insert(key.clone(), times);
        }
        region.latency = known[&key].clone();
    }
    // Times of a place of several values are told in those of its parts, so that both add up alike.
    let own: BTreeMap<ValueId, u64> = regions
        .iter()
        .filter(|p| p.site().footprint.len() == 1)
        .filter_map(|p| Some((p.site().footprint[0], p.latency.first().copied().flatten()?)))
        .collect();
    for region in regions.iter_mut().filter(|p| p.site().footprint.len() > 1) {
        let known: Vec<u64> = region.site().footprint.iter().filter_map(|value| own.get(value).copied()).collect();
        let parts: u64 = known.iter().sum();
        let Some(whole) = region.latency.first().copied().flatten() else { continue };
        if !region.site().isolatable {
            // It takes what its parts take at least.
            region.latency[0] = Some(whole.max(parts));
            continue;
        }
        let all = known.len() == region.site().footprint.len();
        let factor = parts as f64 / whole as f64;
        let factor = if all { factor } else { factor.max(1.0) };
        region.latency.iter_mut().flatten().for_each(|ns| *ns = (*ns as f64 * factor) as u64);
    }
    if let Some(first) = untimed.first() {
        warnings.push(untimed_places(untimed.len(), first));
    }
    Ok(())
}

/// That some places stay as they are.
fn untimed_places(count: usize, first: &str) -> String {
    format!(
        "{count} places, first `{first}`, stay as they are: what is there cannot be timed by itself; budgets of --size, \
         --params and --flops reach them"
    )
}

/// The sizes that symbols have in a run that is timed: as given, or of the first batch of the calibration set.
fn run_sizes(setup: &Setup<'_>, model: &Model) -> Result<Bindings, Failure> {
    if let BenchInputs::Random(spec) = &setup.inputs {
        let mut bindings = Bindings::default();
        for (name, sizes) in &spec.shapes {
            let input = model.graph.find_value(name).map(|v| model.graph.value(v));
            if let Some(stated) = input.and_then(|v| v.ty.as_ref()).and_then(|ty| ty.shape()) {
                bindings.set_input(stated, sizes);
            }
        }
        return Ok(bindings);
    }
    let set = SampleSet::open(setup.set, model).map_err(anyhow::Error::from)?;
    let batch = set.batches().next().transpose().map_err(anyhow::Error::from)?;
    let batch = batch.ok_or_else(|| anyhow!("the calibration set is empty"))?;
    Ok(sizes(model, &batch.inputs))
}

/// What times of a fragment depend on: what is in it, what runs it, and where.
fn timing_key(setup: &Setup<'_>, model: &Model, fragment: &str) -> Result<KeyBuilder, Failure> {
    let (engine, _) = setup.runner.child().hello().map_err(anyhow::Error::from)?;
    let LoadOptions { threads, provider, device, .. } = setup.load;
    Ok(KeyBuilder::new()
        .text(&engine)
        .text(&machine())
        .value(&(threads, provider, device))
        .text(&format!("{:?} {}", setup.cx.target, model.opset()))
        .text(fragment))
}

fn time_fragment(
    setup: &Setup<'_>,
    fragment: &Fragment,
    region: &Region,
    cx: &MethodContext,
) -> Result<Vec<Option<u64>>, Failure> {
    let folder = setup.runner.child().scratch().context("there is no place for small models")?;
    let mut files: Vec<PathBuf> = Vec::new();
    let mut of: Vec<usize> = Vec::new();
    let mut save = |index: usize, model: &Model| -> Result<(), Failure> {
        let path = folder.path().join(format!("{index}.onnx"));
        let staged = model.stage(&path, &WriteOptions { external: External::Auto });
        staged.and_then(|s| s.commit()).map_err(|e| Failure::Error(e.into()))?;
        files.push(path);
        of.push(index);
        Ok(())
    };
    save(0, &fragment.model)?;
    // What is left of several units is timed by its share of the operations.
    for (index, (offer, own)) in region.candidates().enumerate().filter(|(_, (offer, _))| offer.site.isolatable) {
        let mut changed = fragment.model.clone();
        let weight = changed.graph.find_value(&offer.site.name);
        let site = Site { weight, ..offer.site.clone() };
        let outcome =
            offer.method.apply(&mut changed, &site, &site.candidates[own], cx).map_err(anyhow::Error::from)?;
        if !outcome.changes.is_empty() {
            save(index + 1, &changed)?;
        }
    }
    let inputs = BenchInputs::Random(InputSpec { seed: setup.seed, ..InputSpec::default() });
    let measured = setup.runner.bench(&files, &inputs, BenchTask::Each)?;
    let BenchResult::Each(medians) = measured else {
        return Err(Failure::Error(anyhow!("the worker measured something else")));
    };
    let mut latency = vec![None; region.candidates().count() + 1];
    let nanoseconds: Vec<u64> = medians.iter().map(|ms| (ms * 1e6).round().max(1.0) as u64).collect();
    for (&index, &ns) in of.iter().zip(&nanoseconds) {
        latency[index] = Some(unless_chance(ns, nanoseconds[0]));
    }
    if let Some(whole) = latency[0] {
        for (index, (offer, own)) in region.candidates().enumerate().filter(|(_, (offer, _))| !offer.site.isolatable) {
            let (left, kept) = (offer.site.candidates[own].cost.flops_per_row, offer.site.baseline.flops_per_row);
            latency[index + 1] = Some((whole as f64 * left as f64 / kept.max(1) as f64) as u64);
        }
    }
    Ok(latency)
}

/// Part of the time of what is there above which a shorter time may be chance.
const CHANCE: f64 = 0.97;

/// The time of an option, or that of what is there where the option is hardly faster: nothing is to be lost for chance.
fn unless_chance(option: u64, there: u64) -> u64 {
    if option as f64 > CHANCE * there as f64 { option.max(there) } else { option }
}

/// Part of the time of what is there that a choice of a method that must be faster may take at most.
const FASTER: f64 = 0.95;

/// Drops the choices of methods that must be faster and are not, and says so.
pub(super) fn decline_slower(regions: &mut [Region], records: &mut BTreeMap<&'static str, PassRecord>) {
    for region in regions {
        let whole = region.latency.first().copied().flatten();
        let mut times = region.latency.iter().skip(1);
        let faster = |ns: Option<u64>| whole.zip(ns).is_some_and(|(whole, ns)| ns as f64 <= FASTER * whole as f64);
        let mut all: Vec<Vec<bool>> = Vec::new();
        for offer in &region.offers {
            let own = offer.site.candidates.iter().map(|_| times.next().copied().flatten());
            let stays: Vec<bool> = own.map(|ns| !offer.needs.speedup || faster(ns)).collect();
            if !stays.is_empty() && !stays.contains(&true) {
                let reason = match whole {
                    Some(_) => "as measured, nothing it could do is faster than what is there",
                    None => "what is there cannot be timed by itself",
                };
                let record = records.get_mut(offer.method.info().name).expect("a method that proposes has a record");
                record.outcome.refuse(reason, format!("`{}`", offer.site.name));
            }
            all.push(stays);
        }
        region.retain(&all);
    }
}

/// The nodes of a site and nothing else.
struct Fragment {
    model: Model,
    /// What its time depends on.
    key: String,
}

/// What is known of values at the sizes of a run.
struct Known<'a> {
    facts: &'a Facts,
    bindings: &'a Bindings,
}

impl Known<'_> {
    /// A type with sizes in numbers, for values that may be anything, or rows of a table.
    fn ty(&self, value: ValueId, rows: bool) -> Option<Type> {
        let sizes = self.facts.shape(value)?.iter().map(|dim| self.bindings.evaluate(dim));
        let dims = sizes.map(|size| Some(Dim::Known(size? as i64))).collect::<Option<Vec<_>>>()?;
        let elem = self.facts.elem(value).filter(|t| t.is_float() || *t == DataType::Bool || rows)?;
        Some(Type::tensor(elem, dims))
    }

    /// Sizes and other whole numbers that follow from the sizes of a run.
    fn numbers(&self, value: ValueId) -> Option<Tensor> {
        let contents = self.facts.contents(value)?;
        let numbers = contents.elements().iter().map(|e| self.bindings.evaluate(e.as_ref()?).map(|n| n as i64));
        let numbers = numbers.collect::<Option<Vec<i64>>>()?;
        let scalar = self.facts.ndim(value)? == 0;
        let dims = if scalar { Vec::new() } else { vec![numbers.len()] };
        (self.facts.elem(value)? == DataType::Int64).then(|| Tensor::from_i64s(&dims, &numbers))
    }
}

impl Fragment {
    /// `None` where something that a node reads is not known well enough to make it up, or only rows are picked of the
    /// weight.
    fn of(model: &Model, site: &Site, known: &Known<'_>) -> Option<Fragment> {
        let from = &model.graph;
        let mut graph = Graph::new("fragment");
        let mut key = String::new();
        let name = |value: ValueId| from.value(value).name.clone();
        // Nodes may stand in any order, so what they give is there before the first of them reads it.
        // Looking rows up takes next to nothing beside products with the same table.
        let picks = |id: NodeId| from.node(id).is("Gather");
        let only_picks = site.nodes.iter().all(|&id| picks(id));
        let nodes: Vec<NodeId> =
            site.nodes.iter().copied().filter(|&id| site.weight.is_none() || only_picks || !picks(id)).collect();
        let given = nodes.iter().flat_map(|&id| from.node(id).outputs().iter().flatten());
        let mut copied: BTreeMap<ValueId, ValueId> =
            given.map(|&output| (output, graph.add_value(name(output), None))).collect();
        for &id in &nodes {
            let node = from.node(id);
            let called = model.function(&node.domain, &node.op_type, &node.overload).is_some();
            if called || !node.subgraphs().is_empty() {
                return None;
            }
            let mut inputs = Vec::new();
            for input in node.inputs() {
                let Some(input) = *input else {
                    inputs.push(None);
                    continue;
                };
                let value = match (copied.get(&input), from.constant(input)) {
                    (Some(&value), _) => value,
                    (None, Some(tensor)) => {
                        key += &format!(" {:?}", tensor.dims());
                        graph.add_initializer(ScopeId::MAIN, &name(input), tensor.clone())
                    }
                    (None, None) => match (known.ty(input, only_picks), known.numbers(input)) {
                        (Some(ty), _) => {
                            key += &format!(" {ty:?}");
                            let value = graph.add_value(name(input), Some(ty));
                            graph.add_input(ScopeId::MAIN, value);
                            value
                        }
                        (None, Some(numbers)) => {
                            key += &format!(" {:?}", numbers.to_i64s());
                            graph.add_initializer(ScopeId::MAIN, &name(input), numbers)
                        }
                        (None, None) => return None,
                    },
                };
                copied.insert(input, value);
                inputs.push(Some(value));
            }
            let mut own = node.clone();
            own.name.clear();
            key += &format!(" {} {:?}", own.op_type, own.attributes);
            let outputs = node.outputs().iter().map(|output| output.map(|output| copied[&output])).collect();
            graph.add_node(ScopeId::MAIN, own, inputs, outputs);
        }
        graph.sort().ok()?;
        // What is read inside alone is not shown: a copy for somebody else would keep nodes from becoming one.
        let read = leaving(from, &nodes).filter(|&value| known.facts.elem(value) == Some(DataType::Float));
        let mut shown: Vec<ValueId> = read.filter_map(|value| copied.get(&value).copied()).collect();
        if shown.is_empty() {
            shown = site.taps.iter().filter_map(|tap| copied.get(tap).copied()).collect();
        }
        if shown.is_empty() {
            return None;
        }
        for value in shown {
            // A layer that gives the model's output is left alone by some methods.
            let shown = graph.append(ScopeId::MAIN, Node::new("Abs"), &[value], "shown");
            graph.value_mut(shown).ty = Some(Type::unshaped(DataType::Float));
            graph.add_output(ScopeId::MAIN, shown);
        }
        let fragment = Model { graph, functions: Vec::new(), training: Vec::new(), ..model.clone() };
        Some(Fragment { model: fragment, key })
    }
}

/// What nodes give that something else reads.
fn leaving<'g>(graph: &'g Graph, nodes: &'g [NodeId]) -> impl Iterator<Item = ValueId> + 'g {
    let inside = |place: &Use| matches!(place, Use::Node(id, _) if nodes.contains(id));
    let given = nodes.iter().flat_map(|&id| graph.node(id).outputs().iter().flatten().copied());
    given.filter(move |&value| !graph.value(value).uses().iter().all(inside))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use lathe_passes::{
        Kind, Outcome,
        lossy::{Candidate, Cost, Edit, Loss, METHODS, Method, MethodContext},
    };
    use std::time::Duration;

    fn method(name: &str) -> &'static dyn Method {
        METHODS.iter().copied().find(|m| m.info().name == name).unwrap()
    }

    /// An offer of a method with candidates of these names. What their edits are is not looked at.
    pub fn offer(name: &'static str, labels: &[&str]) -> Offer {
        let edit = Edit::new(());
        let candidate = |label: &&str| Candidate {
            label: (*label).to_owned(),
            cost: Cost::default(),
            loss: Loss::PerTap(Vec::new()),
            edit: edit.clone(),
        };
        let site = Site {
            weight: None,
            footprint: Vec::new(),
            nodes: Vec::new(),
            name: "place".to_owned(),
            taps: Vec::new(),
            baseline: Cost::default(),
            candidates: labels.iter().map(candidate).collect(),
            required: false,
            isolatable: true,
        };
        Offer {
            method: method(name),
            site,
            needs: method(name).needs(&MethodContext::default()),
            sensitivity: vec![],
            rows: 1,
            nested: vec![],
        }
    }

    #[test]
    fn places_that_cannot_be_timed_are_named_with_what_reaches_them() {
        assert_eq!(
            untimed_places(3, "table"),
            "3 places, first `table`, stay as they are: what is there cannot be timed by itself; budgets of --size, \
             --params and --flops reach them"
        );
    }

    #[test]
    fn what_is_hardly_faster_takes_as_long() {
        let times = [100, 120, 98, 97, 60].map(|ns| unless_chance(ns, 100));
        assert_eq!(times, [100, 120, 100, 97, 60]);
    }

    #[test]
    fn what_must_be_faster_and_is_not_is_declined_and_the_rest_keeps_its_time() {
        let region = |times: &[u64], substitutes: &[&str]| Region {
            offers: vec![offer("quantize", &["int8", "int4"]), offer("substitute", substitutes)],
            latency: times.iter().map(|&ns| Some(ns)).collect(),
        };
        let mut regions = [
            region(&[100, 120, 90, 97, 60], &["max pool", "identity"]),
            region(&[100, 120, 90, 130], &["max pool"]),
            Region { latency: Vec::new(), ..region(&[], &["max pool"]) },
        ];
        let record = PassRecord {
            name: "substitute",
            kind: Kind::Lossy,
            outcome: Outcome::default(),
            time: Duration::ZERO,
            nodes_delta: 0,
            weight_bytes_delta: 0,
            flops_delta: 0,
            error: None,
            dropped: None,
        };
        let mut records = BTreeMap::from([("substitute", record)]);
        decline_slower(&mut regions, &mut records);
        let names = |region: &Region| -> Vec<String> {
            region.candidates().map(|(offer, own)| offer.site.candidates[own].label.clone()).collect()
        };
        assert_eq!(names(&regions[0]), ["int8", "int4", "identity"]);
        assert_eq!(regions[0].latency, [100, 120, 90, 60].map(Some));
        assert_eq!((names(&regions[1]).len(), regions[1].latency.len()), (2, 3));
        assert_eq!((names(&regions[2]).len(), regions[2].latency.len()), (2, 0));
        let refusals: Vec<&String> = records["substitute"].outcome.refusals.keys().collect();
        assert_eq!(
            refusals,
            [
                "as measured, nothing it could do is faster than what is there",
                "what is there cannot be timed by itself"
            ]
        );
    }
}
