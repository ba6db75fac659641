//! Attention whose weights are constants: their mean over the calibration set.

use super::{Work, fitted::Fitted};
use crate::{
    Error,
    lossy::{Candidate, Cost, Edit, Loss, Proposal, Site, prune_units::own_values},
};
use lathe_analysis::{Calibrate, Facts, Rows, Unit, UnitKind, Units};
use lathe_ir::{DataType, Graph, Model, Node, NodeId, ScopeId, Tensor, Use, ValueId};
use std::collections::BTreeSet;

/// Floating-point operations that trying all attentions may take.
const MOST_FLOPS: f64 = 2e12;

/// Weights of an attention.
struct Attention {
    name: String,
    /// `[batch, …, tokens, tokens]`.
    weights: ValueId,
    /// The node that takes the weighted sums.
    sums: NodeId,
    /// Sizes without the batch.
    sizes: Vec<usize>,
}

/// Adds a site for every attention whose weights could be constants.
pub(super) fn propose(work: &Work<'_>, calibration: &dyn Calibrate, proposal: &mut Proposal) -> Result<(), Error> {
    let model = work.model;
    let units = Units::find(model, &work.facts);
    let mut found = Vec::new();
    for (id, unit) in units.iter().filter(|(_, unit)| unit.kind == UnitKind::Attention) {
        let name = units.label(&model.graph, id);
        match attention(&model.graph, &work.facts, unit, name.clone()) {
            Ok(attention) => found.push(attention),
            Err(reason) => proposal.outcome.refuse(reason, format!("`{name}`")),
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    if calibration.trial_flops() * found.len() as f64 > MOST_FLOPS {
        proposal.outcome.refuse("trying constant weights takes longer than a budget is worth", "the model");
        return Ok(());
    }
    for (attention, mean) in found.iter().zip(means(model, &found, calibration)?) {
        let site = site(work, attention, mean, calibration)?;
        match site {
            Ok(site) => proposal.sites.push(site),
            Err(reason) => proposal.outcome.refuse(reason, format!("`{}`", attention.name)),
        }
    }
    Ok(())
}

fn attention(graph: &Graph, facts: &Facts, unit: &Unit, name: String) -> Result<Attention, &'static str> {
    let softmax = |id: &&NodeId| graph.node(**id).is("Softmax");
    let mut all = unit.nodes.iter().filter(softmax);
    let (Some(&id), None) = (all.next(), all.next()) else {
        return Err("its attention is not spelled out, so that its weights cannot be constants");
    };
    let node = graph.node(id);
    let weights = node.output(0).ok_or("its softmax gives nothing")?;
    let uses = graph.value(weights).uses();
    let sums = match uses.first() {
        Some(&Use::Node(sums, 0)) if uses.len() == 1 && graph.node(sums).is("MatMul") => sums,
        _ => return Err("its weights are read by other than the weighted sums"),
    };
    let shape = facts.shape(weights).filter(|s| s.len() > 2).ok_or("the shape of its weights is not known")?;
    let sizes: Option<Vec<usize>> = shape[1..].iter().map(|d| usize::try_from(d.as_known()?).ok()).collect();
    let sizes = sizes.ok_or("its number of tokens is not fixed")?;
    let last = node.int("axis").unwrap_or(-1);
    if sizes[sizes.len() - 1] != sizes[sizes.len() - 2] || last != -1 && last != shape.len() as i64 - 1 {
        return Err("its weights are not of tokens for tokens");
    }
    if facts.elem(weights) != Some(DataType::Float) {
        return Err("its weights are no float32");
    }
    Ok(Attention { name, weights, sums, sizes })
}

/// The mean weights of every attention.
fn means(model: &Model, found: &[Attention], calibration: &dyn Calibrate) -> Result<Vec<Tensor>, Error> {
    let mut variant = model.clone();
    let graph = &mut variant.graph;
    let mut pairs = Vec::new();
    for attention in found {
        let mut ints = |numbers: &[i64]| {
            let name = graph.fresh_name("weights_of");
            graph.add_initializer(ScopeId::MAIN, &name, Tensor::int64s(numbers))
        };
        let (flat, first) = (ints(&[0, -1]), ints(&[0]));
        let row = graph.append(ScopeId::MAIN, Node::new("Reshape"), &[attention.weights, flat], "weights");
        // A mean comes with moments, and moments with one number are few.
        let one = graph.append(ScopeId::MAIN, Node::new("Gather").with("axis", 1i64), &[row, first], "weight");
        let rows = |value: ValueId| Rows::last(graph.value(value).name.clone());
        pairs.push((rows(one), rows(row)));
    }
    graph.sort()?;
    let moments = calibration.cross(&variant, &pairs)?;
    let tensor = |(attention, moments): (&Attention, &lathe_analysis::Cross)| {
        let numbers: Vec<f32> = moments.y_mean.iter().map(|&x| x as f32).collect();
        let dims: Vec<usize> = std::iter::once(1).chain(attention.sizes.iter().copied()).collect();
        Tensor::from_f32s(&dims, &numbers)
    };
    Ok(found.iter().zip(&moments).map(tensor).collect())
}

fn site(
    work: &Work<'_>,
    attention: &Attention,
    mean: Tensor,
    calibration: &dyn Calibrate,
) -> Result<Result<Site, &'static str>, Error> {
    let graph = &work.model.graph;
    let numbers = mean.len() as u64;
    let mut fragment = Graph::new("piece");
    let constant = fragment.add_initializer(ScopeId::MAIN, "mean", mean);
    fragment.add_output(ScopeId::MAIN, constant);
    let fitted = Fitted { inputs: Vec::new(), output: graph.value(attention.weights).name.clone(), fragment };
    let mut variant = work.model.clone();
    if let Err(reason) = fitted.splice(&mut variant.graph) {
        return Ok(Err(reason));
    }
    let loss = calibration.trials(&variant, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY);
    if !loss.is_finite() {
        return Ok(Err("outputs are not finite with constant weights"));
    }
    let gone: BTreeSet<NodeId> = graph.nodes(ScopeId::MAIN).filter(|&id| variant.graph.get(id).is_none()).collect();
    let mut nodes = gone.clone();
    nodes.insert(attention.sums);
    let nodes: Vec<NodeId> = graph.nodes(ScopeId::MAIN).filter(|id| nodes.contains(id)).collect();
    let baseline = work.baseline(&nodes);
    let saved = work.baseline(&gone.iter().copied().collect::<Vec<_>>());
    let cost = Cost {
        bytes: (baseline.bytes + 4 * numbers).saturating_sub(saved.bytes),
        parameters: (baseline.parameters + numbers).saturating_sub(saved.parameters),
        flops_per_row: baseline.flops_per_row.saturating_sub(saved.flops_per_row),
    };
    let taps = graph.node(attention.sums).output(0).into_iter().collect();
    let candidate = Candidate {
        label: "constant attention weights".to_owned(),
        cost,
        loss: Loss::Measured(loss),
        edit: Edit::new(fitted),
    };
    Ok(Ok(Site {
        weight: None,
        footprint: own_values(graph, &gone).into_iter().collect(),
        nodes,
        name: format!("{}, attention weights", attention.name),
        taps,
        baseline,
        candidates: vec![candidate],
        required: false,
        isolatable: true,
    }))
}
