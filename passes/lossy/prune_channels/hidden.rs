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
    /// Whether the reader is a convolution.
    conv: bool,
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
    let mut found = Hidden {
        conv,
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
        match layers.get(&id) {
            Some(&maker) => found.add_maker(graph, id, maker)?,
            None => open.extend(found.add_between(graph, id)?),
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

impl<'a> Hidden<'a> {
    /// Where the axis of the units is in constants that are added or multiplied, from the end.
    fn axis_from_end(&self) -> usize {
        if self.conv { self.reader.dims.len() - 1 } else { 1 }
    }

    /// Takes in a layer that makes the units.
    fn add_maker(&mut self, graph: &Graph, id: NodeId, maker: &'a Weight) -> Result<(), &'static str> {
        let node = graph.node(id);
        if maker.taps.len() != 1 || maker.sides().1 != self.units || node.is("Conv") != self.conv {
            return Err("what makes the units shares its weight or has another shape");
        }
        if node.input(1) != Some(maker.value) {
            return Err("the weight of what makes the units is turned");
        }
        self.makers.push(maker);
        self.sliced.insert(maker.value, if self.conv { 0 } else { 1 - maker.inputs_axis() });
        match node.input(2) {
            Some(bias) => slice(graph, self, bias, if self.conv { 1 } else { self.axis_from_end() }),
            None => Ok(()),
        }
    }

    /// Takes in a node between the layers, and says what it reads of the units.
    fn add_between(&mut self, graph: &Graph, id: NodeId) -> Result<Vec<ValueId>, &'static str> {
        let node = graph.node(id);
        let data = || vec![node.input(0).expect("a convolution or a normalization has data")];
        let constants = || node.inputs().iter().skip(1).flatten().copied();
        if node.is("Conv") && self.conv && node.int("group").unwrap_or(1) == self.units as i64 {
            for input in constants() {
                let dims = graph.constant(input).ok_or("a depthwise convolution's weight is no constant")?.dims();
                if dims.first() != Some(&self.units) {
                    return Err("a convolution makes several channels of one");
                }
                self.sliced.insert(input, 0);
            }
            self.depthwise.push(id);
            return Ok(data());
        }
        if node.is("BatchNormalization") && self.conv {
            constants().try_for_each(|input| slice(graph, self, input, 1))?;
            return Ok(data());
        }
        if !(elementwise(node) || self.conv && PER_CHANNEL.iter().any(|op| node.is(op))) {
            return Err("other than layers and element-wise operators make the units");
        }
        let (known, read): (Vec<ValueId>, Vec<ValueId>) =
            node.inputs().iter().flatten().partition(|input| graph.constant(**input).is_some());
        known.into_iter().try_for_each(|input| slice(graph, self, input, self.axis_from_end()))?;
        Ok(read)
    }
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
