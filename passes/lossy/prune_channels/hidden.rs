//! Hidden units: from the layers that make them, through what treats each by itself, to the one layer that reads them.

use super::super::Weight;
use lathe_analysis::Trait;
use lathe_ir::{Graph, Node, NodeId, ScopeId, Use, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Whether a node treats every unit by itself; other inputs are constants or further hidden values.
fn elementwise(node: &Node) -> bool {
    node.is_standard() && Trait::Elementwise.of(node) && !Trait::Random.of(node)
}

/// Operators that treat every channel by itself.
const PER_CHANNEL: [&str; 3] = ["MaxPool", "AveragePool", "GlobalAveragePool"];

/// Hidden units from the layers that make them to the one that reads them.
pub(in crate::lossy) struct Hidden<'a> {
    /// The layer that reads them.
    pub reader: &'a Weight,
    /// The layers that make them.
    pub makers: Vec<&'a Weight>,
    /// Constants with a number per unit and the axis of the units.
    pub sliced: BTreeMap<ValueId, usize>,
    /// Depthwise convolutions.
    pub depthwise: Vec<NodeId>,
    /// All nodes, in order.
    pub nodes: Vec<NodeId>,
    pub units: usize,
    /// Numbers that the reader multiplies per unit: the window of a convolution.
    pub window: usize,
}

/// Walks from what a layer reads to the layers that make it.
pub(in crate::lossy) fn hidden<'a>(
    graph: &Graph,
    reader: &'a Weight,
    layers: &BTreeMap<NodeId, &'a Weight>,
) -> Result<Hidden<'a>, &'static str> {
    let [tap] = reader.taps.as_slice() else { return Err("several layers share the weight") };
    if tap.rows.is_none() {
        return Err("rows are picked of the constant");
    }
    let conv = graph.node(tap.node).is("Conv");
    let units = if conv { reader.dims[1] } else { reader.sides().0 };
    let window = reader.sides().0 / units;
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
            if maker.taps.len() != 1 || maker.sides().1 != units || node.is("Conv") != conv {
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
        } else if elementwise(node) || conv && PER_CHANNEL.iter().any(|op| node.is(op)) {
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
