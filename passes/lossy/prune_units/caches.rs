//! Key-value caches of attention that goes: inputs and outputs of the model that nothing computes with any more.

use super::surgery::maker;
use crate::{Error, Pass as _, exact::DropDead, lossy::MethodContext};
use lathe_analysis::may_leave;
use lathe_ir::{AttributeValue, Graph, Model, Node, NodeId, RENAMED, ScopeId, Tensor, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caches {
    /// They go, and the others are numbered anew.
    Compact,
    /// They stay: inputs are not read, outputs are zeros of the length of another cache.
    KeepIo,
}

impl std::str::FromStr for Caches {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "compact" => Ok(Caches::Compact),
            "keep-io" => Ok(Caches::KeepIo),
            _ => Err(()),
        }
    }
}

/// Removes what only `nodes` needed or gave, whose summands have been left out already. Returns how many inputs and
/// outputs went.
pub(super) fn settle(
    model: &mut Model,
    nodes: &BTreeSet<NodeId>,
    mode: Caches,
    cx: &MethodContext,
) -> Result<Result<usize, &'static str>, Error> {
    let graph = &mut model.graph;
    let name = |graph: &Graph, v: ValueId| graph.value(v).name.clone();
    let inside = |graph: &Graph, v: ValueId| maker(graph, v).is_some_and(|id| nodes.contains(&id));
    let outputs: Vec<ValueId> = graph.main().outputs().to_vec();
    let going: Vec<ValueId> =
        outputs.iter().copied().filter(|&v| inside(graph, v) && may_leave(&name(graph, v))).collect();
    let fed: Vec<ValueId> = graph.main().inputs().to_vec();
    let fed: Vec<ValueId> = fed
        .into_iter()
        .filter(|&v| may_leave(&name(graph, v)) && graph.value(v).uses().iter().any(|u| reads_inside(u, nodes)))
        .collect();
    let lengths = fed.iter().all(|&input| read_another_length(graph, input, nodes, &fed));
    if !lengths {
        return Ok(Err("the length of a cache that goes is read elsewhere, and no other cache has the same"));
    }
    match mode {
        Caches::Compact => {
            for index in (0..outputs.len()).rev().filter(|&i| going.contains(&outputs[i])) {
                graph.remove_output(ScopeId::MAIN, index);
            }
        }
        Caches::KeepIo => {
            for &output in &going {
                if !zeros(graph, output, &outputs, &going) {
                    return Ok(Err("no cache is left whose length those that go could have"));
                }
            }
        }
    }
    // Removed values lose their names.
    let mut gone: Vec<String> = going.iter().map(|&v| name(graph, v)).collect();
    DropDead.apply(model, &cx.pass_context())?;
    if mode == Caches::KeepIo {
        return Ok(Ok(going.len()));
    }
    let graph = &mut model.graph;
    for &input in fed.iter().filter(|&&v| graph.value(v).uses().is_empty()).collect::<Vec<_>>() {
        let at = graph.main().inputs().iter().position(|&v| v == input).expect("it is an input");
        gone.push(name(graph, input));
        graph.remove_input(ScopeId::MAIN, at);
    }
    let count = gone.len();
    if count > 0 {
        number_anew(model, &gone);
    }
    Ok(Ok(count))
}

fn reads_inside(place: &Use, nodes: &BTreeSet<NodeId>) -> bool {
    matches!(place, Use::Node(id, _) if nodes.contains(id))
}

/// Lets what reads only the shape of an input, apart from `nodes`, read that of another input of the same kind.
fn read_another_length(graph: &mut Graph, input: ValueId, nodes: &BTreeSet<NodeId>, going: &[ValueId]) -> bool {
    let others: Vec<NodeId> = graph
        .value(input)
        .uses()
        .iter()
        .filter_map(|place| match *place {
            Use::Node(id, _) if !nodes.contains(&id) => Some(id),
            _ => None,
        })
        .collect();
    if others.is_empty() || !others.iter().all(|&id| graph.node(id).is("Shape") || graph.node(id).is("Size")) {
        // A value that something computes with is not the dropped unit's alone, and stays.
        return true;
    }
    let kind = family(&graph.value(input).name).map(|(before, _, after)| (before.to_owned(), after.to_owned()));
    let dims = |v: ValueId| graph.value(v).ty.as_ref().and_then(|ty| ty.shape()).map(|s| s.dims.clone());
    let same = |&v: &ValueId| {
        let own = family(&graph.value(v).name).map(|(before, _, after)| (before.to_owned(), after.to_owned()));
        !going.contains(&v) && own == kind && kind.is_some() && dims(v) == dims(input)
    };
    let Some(other) = graph.main().inputs().iter().copied().find(same) else { return false };
    others.into_iter().for_each(|id| graph.set_input(id, 0, Some(other)));
    true
}

/// Makes an output zeros of the shape of another cache that stays.
fn zeros(graph: &mut Graph, output: ValueId, outputs: &[ValueId], going: &[ValueId]) -> bool {
    let kind =
        |v: ValueId| family(&graph.value(v).name).map(|(before, _, after)| (before.to_owned(), after.to_owned()));
    let sibling =
        outputs.iter().copied().find(|&v| !going.contains(&v) && kind(v).is_some() && kind(v) == kind(output));
    let Some(sibling) = sibling else { return false };
    let dtype = graph.value(output).ty.as_ref().and_then(|ty| ty.elem()).unwrap_or(lathe_ir::DataType::Float);
    let Some(zero) = Tensor::from_f64s(dtype, &[1], &[0.0]) else { return false };
    let name = graph.value(output).name.clone();
    let shape = graph.append(ScopeId::MAIN, Node::new("Shape"), &[sibling], &format!("{name}_shape"));
    let filled = Node::new("ConstantOfShape").with("value", AttributeValue::Tensor(zero));
    let made = graph.append(ScopeId::MAIN, filled, &[shape], &format!("{name}_zeros"));
    let ty = graph.value(output).ty.clone();
    let at = graph.main().outputs().iter().position(|&v| v == output).expect("it is an output");
    let spare = graph.fresh_name(&format!("{name}_gone"));
    graph.set_output(ScopeId::MAIN, at, made);
    graph.rename(output, spare);
    graph.rename(made, name);
    graph.value_mut(made).ty = ty;
    true
}

/// A name around its first number: `past_key_values.`, 3, `.key`.
fn family(name: &str) -> Option<(&str, u64, &str)> {
    let start = name.find(|c: char| c.is_ascii_digit())?;
    let length = name[start..].find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len() - start);
    let number = name[start..start + length].parse().ok()?;
    Some((&name[..start], number, &name[start + length..]))
}

/// Closes the gaps in the numbers of inputs and outputs of which some are gone, and notes old and new names in the
/// metadata of the model.
fn number_anew(model: &mut Model, gone: &[String]) {
    let graph = &mut model.graph;
    let kinds: BTreeSet<(String, String)> =
        gone.iter().filter_map(|n| family(n)).map(|(a, _, b)| (a.to_owned(), b.to_owned())).collect();
    let mut kept: BTreeMap<(String, String), Vec<(u64, ValueId)>> = BTreeMap::new();
    let main = graph.main();
    for &value in main.inputs().iter().chain(main.outputs()) {
        let Some((before, number, after)) = family(&graph.value(value).name) else { continue };
        let kind = (before.to_owned(), after.to_owned());
        if kinds.contains(&kind) {
            kept.entry(kind).or_default().push((number, value));
        }
    }
    let mut lines: Vec<String> = gone.iter().map(|name| format!("{name}=")).collect();
    for ((before, after), mut values) in kept {
        values.sort_unstable();
        let same = |n: &&String| family(n).is_some_and(|(a, _, b)| a == before && b == after);
        let lost = gone.iter().filter(same).filter_map(|n| family(n)).map(|(_, number, _)| number);
        let first = values.iter().map(|(number, _)| *number).chain(lost).min().unwrap_or(0);
        for (place, (_, value)) in (first..).zip(values) {
            let (old, new) = (graph.value(value).name.clone(), format!("{before}{place}{after}"));
            if old != new {
                // Smaller numbers are free by now; an inner value may still have the name.
                if let Some(other) = graph.find_value(&new).filter(|&v| v != value) {
                    let spare = graph.fresh_name(&new);
                    graph.rename(other, spare);
                }
                graph.rename(value, new.clone());
            }
            lines.push(format!("{old}={new}"));
        }
    }
    let before = model.metadata.iter().position(|(key, _)| key == RENAMED);
    let note = (RENAMED.to_owned(), lines.join("\n"));
    match before {
        Some(at) => model.metadata[at] = note,
        None => model.metadata.push(note),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_apart_at_their_first_number() {
        assert_eq!(family("past_key_values.12.key"), Some(("past_key_values.", 12, ".key")));
        assert_eq!(family("cache_k_3"), Some(("cache_k_", 3, "")));
        assert_eq!(family("logits"), None);
    }
}
