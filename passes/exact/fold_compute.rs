//! Computes constant results: by the kernels of our own where they are certain, else in one run of a runtime.

use super::fold_plan::Candidates;
use crate::PassContext;
use lathe_analysis::{Evaluate, EvaluateError, Facts, kernels};
use lathe_ir::{Graph, Initializer, Model, Node, NodeId, ScopeId, Tensor, ValueId, imported};
use std::collections::{BTreeMap, BTreeSet};

/// Results up to this size are computed even if they are thrown away again.
const WORKSPACE: usize = 256 << 20;
/// Bytes of constants that go to a runtime at once.
const LARGEST_BATCH: usize = if cfg!(test) { 1 << 20 } else { 1 << 30 };
/// How many results are tried one by one after a runtime has refused all of them together.
const SINGLE_TRIES: usize = 32;

/// What the computation works on.
pub(super) struct Source<'a> {
    pub graph: &'a Graph,
    pub opsets: &'a [(String, i64)],
    pub ir_version: i64,
    pub facts: &'a Facts,
    pub found: &'a Candidates,
}

/// Nodes that could not be computed, with the reason.
pub(super) type Failures = Vec<(NodeId, String)>;

/// Computes `wanted` and whatever they need into `done`, in which only `wanted` stay.
pub(super) fn compute(
    source: &Source,
    cx: &PassContext,
    evaluator: Option<&dyn Evaluate>,
    wanted: &[ValueId],
    done: &mut BTreeMap<ValueId, Tensor>,
) -> Failures {
    let Source { graph, found, .. } = *source;
    done.extend(found.told.iter().map(|(&v, t)| (v, t.clone())));
    let needed = needed(source, wanted, done);
    let mut kept: BTreeSet<ValueId> = wanted.iter().copied().chain(done.keys().copied()).collect();
    let mut readers: BTreeMap<ValueId, usize> = BTreeMap::new();
    for &value in needed.iter().flat_map(|&id| graph.node(id).inputs().iter().flatten()) {
        *readers.entry(value).or_default() += 1;
    }
    let mut failures = Failures::new();
    let mut pending: Vec<NodeId> = Vec::new();
    let mut lost: BTreeSet<ValueId> = BTreeSet::new();
    for id in needed {
        let node = graph.node(id);
        let outputs = || node.outputs().iter().flatten().copied();
        if node.inputs().iter().flatten().any(|v| lost.contains(v)) {
            lost.extend(outputs());
            continue;
        }
        // An input that is not there yet comes from a node that the runtime computes.
        let Some(inputs) = inputs(graph, node, done) else {
            pending.push(id);
            kept.extend(node.inputs().iter().flatten());
            continue;
        };
        let fed: usize = inputs.iter().flatten().map(|t| t.byte_len()).sum();
        let limit =
            WORKSPACE.max(fed.saturating_mul(2)).saturating_add(usize::try_from(cx.max_growth).unwrap_or(usize::MAX));
        let opset = imported(source.opsets, "").unwrap_or(0);
        let result = kernels::evaluate(node, opset, &inputs, limit);
        inputs.iter().flatten().for_each(|t| t.release());
        match result {
            Ok(tensors) if tensors.len() >= node.outputs().len() => {
                let pairs = node.outputs().iter().zip(tensors);
                done.extend(pairs.filter_map(|(v, tensor)| Some(((*v)?, tensor.spilled()))));
            }
            Err(kernels::Unsupported::TooLarge { .. }) => {
                failures.push((id, "the result is too large to be computed ahead".to_owned()));
                lost.extend(outputs());
                continue;
            }
            _ if evaluator.is_some() => {
                pending.push(id);
                kept.extend(node.inputs().iter().flatten());
                continue;
            }
            _ => {
                failures.push((id, "no runtime is there to compute it".to_owned()));
                lost.extend(outputs());
                continue;
            }
        }
        for value in node.inputs().iter().flatten() {
            if let Some(count) = readers.get_mut(value) {
                *count -= 1;
                if *count == 0 && !kept.contains(value) {
                    done.remove(value);
                }
            }
        }
    }
    if let Some(evaluator) = evaluator.filter(|_| !pending.is_empty()) {
        run_pending(source, evaluator, &pending, wanted, done, &mut failures);
    }
    let wanted: BTreeSet<ValueId> = wanted.iter().copied().collect();
    done.retain(|v, _| wanted.contains(v) || found.told.contains_key(v));
    failures
}

/// The constant inputs of a node; `None` where one is not computed yet.
fn inputs<'a>(graph: &'a Graph, node: &Node, done: &'a BTreeMap<ValueId, Tensor>) -> Option<Vec<Option<&'a Tensor>>> {
    let tensor = |value: &Option<ValueId>| match value {
        Some(value) => done.get(value).or_else(|| graph.constant(*value)).map(Some),
        None => Some(None),
    };
    node.inputs().iter().map(tensor).collect()
}

/// The nodes that `wanted` need, in order.
fn needed(source: &Source, wanted: &[ValueId], done: &BTreeMap<ValueId, Tensor>) -> Vec<NodeId> {
    let Source { graph, found, .. } = *source;
    let mut marked: BTreeSet<NodeId> = BTreeSet::new();
    let mut stack: Vec<ValueId> = wanted.to_vec();
    while let Some(value) = stack.pop() {
        let producer = graph.producer(value).filter(|&p| found.contains(p) && !done.contains_key(&value));
        if let Some(id) = producer.filter(|&id| marked.insert(id)) {
            stack.extend(graph.node(id).inputs().iter().flatten());
        }
    }
    found.nodes.iter().copied().filter(|id| marked.contains(id)).collect()
}

/// Computes all of `pending` in one run; if the runtime refuses, one wanted result at a time.
fn run_pending(
    source: &Source,
    evaluator: &dyn Evaluate,
    pending: &[NodeId],
    wanted: &[ValueId],
    done: &mut BTreeMap<ValueId, Tensor>,
    failures: &mut Failures,
) {
    let graph = source.graph;
    let asked = |v: &ValueId| graph.producer(*v).is_some_and(|p| pending.contains(&p));
    let outputs: Vec<ValueId> = wanted.iter().copied().filter(asked).collect();
    let problem = match run(source, evaluator, pending, &outputs, done) {
        Ok(results) => return done.extend(results),
        Err(problem) => problem,
    };
    for (index, &value) in outputs.iter().enumerate() {
        let Some(producer) = graph.producer(value) else { continue };
        let result = match index {
            _ if outputs.len() == 1 => Err(problem.clone()),
            ..SINGLE_TRIES => {
                let own: Vec<NodeId> =
                    needed(source, &[value], done).into_iter().filter(|id| pending.contains(id)).collect();
                run(source, evaluator, &own, &[value], done)
            }
            _ => Err(problem.clone()),
        };
        match result {
            Ok(results) => done.extend(results),
            Err(problem) => {
                failures.push((producer, format!("{} declines to compute it: {problem}", evaluator.name())))
            }
        }
    }
}

/// Runs `nodes` as a model without inputs.
fn run(
    source: &Source,
    evaluator: &dyn Evaluate,
    nodes: &[NodeId],
    outputs: &[ValueId],
    done: &BTreeMap<ValueId, Tensor>,
) -> Result<Vec<(ValueId, Tensor)>, EvaluateError> {
    let outer = source.graph;
    let mut graph = Graph::new("constants");
    let mut values: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let mut bytes = 0usize;
    let name = |v: ValueId| format!("v{}", v.index());
    for &id in nodes {
        let node = outer.node(id);
        for &value in node.inputs().iter().flatten() {
            if values.contains_key(&value) {
                continue;
            }
            let tensor = done.get(&value).or_else(|| outer.constant(value));
            let tensor = tensor.expect("what no pending node makes is computed or constant");
            bytes = bytes.saturating_add(tensor.byte_len());
            let new = graph.add_value(name(value), None);
            graph.make_initializer(ScopeId::MAIN, new, Initializer::Dense(tensor.clone()));
            values.insert(value, new);
        }
        if bytes > LARGEST_BATCH {
            return Err(EvaluateError { message: "its constants are too large to be copied".to_owned() });
        }
        let inputs = node.inputs().iter().map(|v| v.and_then(|v| values.get(&v).copied())).collect();
        let made: Vec<Option<ValueId>> = node
            .outputs()
            .iter()
            .map(|v| {
                let value = (*v)?;
                let new = graph.add_value(name(value), source.facts.ty(value));
                values.insert(value, new);
                Some(new)
            })
            .collect();
        let mut copy = Node::new(node.op_type.clone()).in_domain(node.domain.clone());
        copy.attributes = node.attributes.clone();
        graph.add_node(ScopeId::MAIN, copy, inputs, made);
    }
    for value in outputs {
        graph.add_output(ScopeId::MAIN, values[value]);
    }
    let model =
        Model { ir_version: source.ir_version.max(4), opsets: source.opsets.to_vec(), graph, ..Model::default() };
    let mut results: BTreeMap<String, Tensor> = evaluator.run(&model, &[])?.into_iter().collect();
    let take = |&v: &ValueId| Some((v, results.remove(&name(v))?.spilled()));
    outputs
        .iter()
        .map(take)
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| EvaluateError { message: "an output is missing".to_owned() })
}
