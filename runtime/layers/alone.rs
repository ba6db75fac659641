//! One node of the candidate on the inputs that the reference computes for it.

use super::{
    Common, Layers, cast,
    tapped::{Tapped, run_copy, run_tapped},
};
use lathe_ir::{Graph, Origin, ScopeId, Tensor, Type, ValueId};
use std::collections::BTreeMap;

/// What the reference and the node alone say of `value`, or why that cannot be told. `known` are values of the reference by
/// name.
pub(super) fn run_alone(
    layers: &Layers<'_>,
    value: &Common,
    known: &BTreeMap<&str, ValueId>,
) -> Result<(Tensor, Tensor), String> {
    let graph = &layers.candidate.graph;
    let node = graph.node(value.node);
    if !node.subgraphs().is_empty() {
        return Err("it has subgraphs".to_owned());
    }
    // What it reads: constants, inputs of the model, values that the reference computes too.
    let mut wanted = vec![value.before];
    let mut given: Vec<(ValueId, Option<usize>)> = Vec::new();
    for &input in node.inputs().iter().flatten() {
        if graph.constant(input).is_some() || given.iter().any(|(seen, _)| *seen == input) {
            continue;
        }
        let name = graph.value(input).name.as_str();
        let place = match (graph.value(input).origin(), known.get(name)) {
            (Origin::Input(_), _) => None,
            (_, Some(&before)) => {
                wanted.push(before);
                Some(wanted.len() - 1)
            }
            _ => return Err(format!("it reads `{name}`, which the original does not compute")),
        };
        given.push((input, place));
    }
    let tapped = Tapped { model: &layers.reference, facts: &layers.facts.0, values: wanted };
    let before = run_tapped(layers.engine, &tapped, &layers.sample, &layers.job.reference_options);
    let before = before.map_err(|error| error.to_string())?;

    let mut copy = Graph::new("alone");
    let (mut sample, mut inputs) = (Vec::new(), BTreeMap::new());
    for (input, place) in given {
        let name = &graph.value(input).name;
        let fed = |name: &String| layers.sample.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
        let tensor = place.map_or_else(|| fed(name), |place| Some(&before[place]));
        let tensor = tensor.ok_or_else(|| format!("`{name}` has no value"))?;
        let dtype = layers.facts.1.elem(input).unwrap_or(tensor.dtype());
        let tensor = if dtype == tensor.dtype() { Some(tensor.clone()) } else { cast(tensor, dtype) };
        let tensor = tensor.ok_or_else(|| format!("`{name}` cannot be made {dtype}"))?;
        let fresh = copy.add_value(name.clone(), Some(Type::unshaped(dtype)));
        copy.add_input(ScopeId::MAIN, fresh);
        inputs.insert(input, fresh);
        sample.push((name.clone(), tensor));
    }
    for &input in node.inputs().iter().flatten() {
        if let Some(constant) = graph.constant(input)
            && !inputs.contains_key(&input)
        {
            inputs.insert(input, copy.add_initializer(ScopeId::MAIN, &graph.value(input).name, constant.clone()));
        }
    }
    let made = |&value: &ValueId| graph.value(value).name.clone();
    let outputs: Vec<Option<ValueId>> =
        node.outputs().iter().map(|output| output.as_ref().map(|v| copy.add_value(made(v), None))).collect();
    let asked = node.outputs().iter().position(|&output| output == Some(value.after));
    let asked = asked.and_then(|at| outputs[at]).ok_or("its output is not found")?;
    copy.value_mut(asked).ty = layers.facts.1.elem(value.after).map(Type::unshaped);
    let reads = node.inputs().iter().map(|input| input.and_then(|v| inputs.get(&v).copied())).collect();
    copy.add_node(ScopeId::MAIN, node.clone(), reads, outputs);
    let after = run_copy(layers.engine, &layers.candidate, copy, &[asked], &sample, &layers.job.options);
    let after = after.map_err(|error| error.to_string())?.pop().ok_or("it returned nothing")?;
    let expected = before.into_iter().next().ok_or("the original returned nothing")?;
    Ok((expected, after))
}
