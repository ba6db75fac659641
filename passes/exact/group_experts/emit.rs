//! Writing a layer of experts with rows grouped by expert.

use super::region::{Layout, Operand, Region, Step};
use lathe_ir::{DataType, Graph, Node, Tensor, ValueId};
use std::collections::BTreeMap;

/// A name for what is made of a value.
fn name(graph: &Graph, value: ValueId, what: &str) -> String {
    format!("{}_{what}", graph.value(value).name)
}

/// Puts the grouped layer in the place of the gathered one.
pub(super) fn emit(graph: &mut Graph, region: &Region) {
    let (scope, numbers, experts) = (region.scope, region.numbers, region.experts);
    let (exit, layout, width) = region.exit;
    let elem = region.steps.iter().find_map(|step| match step {
        Step::Product { table, .. } => graph.constant(*table).map(Tensor::dtype),
        _ => None,
    });
    let constant = |graph: &mut Graph, what: &str, tensor: Tensor| {
        let base = name(graph, numbers, what);
        graph.add_initializer(scope, &base, tensor)
    };
    let first_axis = constant(graph, "first_axis", Tensor::int64s(&[0]));
    let second_axis = constant(graph, "second_axis", Tensor::int64s(&[1]));
    let base = |graph: &Graph, what: &str| name(graph, numbers, what);

    // Pairs in the order of their experts.
    let count_name = base(graph, "count");
    let count = graph.append(scope, Node::new("Shape"), &[numbers], &count_name);
    let node = Node::new("TopK").with("axis", 0).with("largest", 0).with("sorted", 1);
    let outputs: Vec<ValueId> = ["sorted", "order"].map(|what| made(graph, numbers, what)).to_vec();
    let order = outputs[1];
    graph.add_node(scope, node, vec![Some(numbers), Some(count)], outputs.into_iter().map(Some).collect());

    // How many rows every expert has.
    let all: Vec<i64> = (0..experts as i64).collect();
    let all = constant(graph, "experts", Tensor::from_i64s(&[1, experts], &all));
    let column = base(graph, "column");
    let column = graph.append(scope, Node::new("Unsqueeze"), &[numbers, second_axis], &column);
    let hits = base(graph, "hits");
    let hits = graph.append(scope, Node::new("Equal"), &[column, all], &hits);
    let ones = base(graph, "ones");
    let cast = Node::new("Cast").with("to", i64::from(DataType::Int64.code()));
    let ones = graph.append(scope, cast, &[hits], &ones);
    let counts = base(graph, "counts");
    let counts = graph.append(scope, Node::new("ReduceSum").with("keepdims", 0), &[ones, first_axis], &counts);

    // The rows of every expert, of every value that comes from outside.
    let mut rows: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
    for (&entry, &features) in &region.entries {
        let target = constant(graph, "rows", Tensor::int64s(&[-1, features as i64]));
        let flat = name(graph, entry, "pairs");
        let flat = graph.append(scope, Node::new("Reshape"), &[entry, target], &flat);
        let sorted = name(graph, entry, "sorted");
        let sorted = graph.append(scope, Node::new("Gather").with("axis", 0), &[flat, order], &sorted);
        let parts: Vec<ValueId> = (0..experts).map(|e| made(graph, entry, &format!("expert_{e}"))).collect();
        let split = Node::new("Split").with("axis", 0);
        graph.add_node(scope, split, vec![Some(sorted), Some(counts)], parts.iter().map(|&part| Some(part)).collect());
        rows.insert(entry, parts);
    }

    let cut = Tables::of(graph, region);
    let mut ends = Vec::with_capacity(experts);
    for e in 0..experts {
        let inside = rows.iter().map(|(&entry, parts)| (entry, parts[e])).collect();
        ends.push(Expert { graph, region, cut: &cut, e, inside }.run());
    }

    // Back to where their pairs are.
    let node = Node::new("Concat").with("axis", 0);
    let joined = made(graph, exit, "by_expert");
    graph.add_node(scope, node, ends.into_iter().map(Some).collect(), vec![Some(joined)]);
    let places = base(graph, "places");
    let places = graph.append(scope, Node::new("Unsqueeze"), &[order, second_axis], &places);
    let features = constant(graph, "features", Tensor::int64s(&[width as i64]));
    let size = base(graph, "size");
    let size = graph.append(scope, Node::new("Concat").with("axis", 0), &[count, features], &size);
    let zero =
        elem.and_then(|elem| Tensor::from_f64s(elem, &[1], &[0.0])).unwrap_or_else(|| Tensor::from_f32s(&[1], &[0.0]));
    let empty = base(graph, "empty");
    let empty = graph.append(scope, Node::new("ConstantOfShape").with("value", zero), &[size], &empty);
    let result = name(graph, exit, "grouped");
    let mut result = graph.append(scope, Node::new("ScatterND"), &[empty, places, joined], &result);
    if layout != Layout::Flat {
        let dims = if layout == Layout::Column { [-1, width as i64, 1] } else { [-1, 1, width as i64] };
        let target = constant(graph, "layout", Tensor::int64s(&dims));
        let shaped = name(graph, exit, "shaped");
        result = graph.append(scope, Node::new("Reshape"), &[result, target], &shaped);
    }
    graph.replace(exit, result);
    graph.remove_unused(region.replaced.iter().rev().copied().collect());
}

/// A new value, named after another.
fn made(graph: &mut Graph, value: ValueId, what: &str) -> ValueId {
    let name = name(graph, value, what);
    let name = graph.fresh_name(&name);
    graph.add_value(name, None)
}

/// The parts of tables, which are cut once: two products may be with one table.
struct Tables {
    /// By table and expert.
    parts: BTreeMap<(ValueId, usize), ValueId>,
    /// Constants of one number for each feature, as a row.
    constants: BTreeMap<ValueId, ValueId>,
}

impl Tables {
    fn of(graph: &mut Graph, region: &Region) -> Tables {
        let mut tables = Tables { parts: BTreeMap::new(), constants: BTreeMap::new() };
        let mut wanted = Vec::new();
        for step in &region.steps {
            match step {
                Step::Product { table, .. } => wanted.push(*table),
                Step::Node { operands, .. } => {
                    for operand in operands {
                        match operand {
                            Operand::Rows(table) => wanted.push(*table),
                            Operand::Constant(value) => tables.constant(graph, region, *value),
                            Operand::Pairs(_) | Operand::Absent => {}
                        }
                    }
                }
                Step::Alias { .. } | Step::Cut { .. } => {}
            }
        }
        for table in wanted {
            if tables.parts.contains_key(&(table, 0)) {
                continue;
            }
            let Some(tensor) = graph.constant(table).cloned() else { continue };
            let dims = tensor.dims()[1..].to_vec();
            let bytes = tensor.shared_bytes();
            let each = bytes.len() / region.experts;
            for e in 0..region.experts {
                // A part of the same bytes: what is mapped stays mapped.
                let part = Tensor::new(tensor.dtype(), dims.clone(), bytes.slice(e * each..(e + 1) * each));
                let base = name(graph, table, &format!("expert_{e}"));
                let part = part.expect("an equal part of a table has as many bytes as its type needs");
                tables.parts.insert((table, e), graph.add_initializer(region.scope, &base, part));
            }
        }
        tables
    }

    /// A constant of one number for each feature lies along the last axis of rows.
    fn constant(&mut self, graph: &mut Graph, region: &Region, value: ValueId) {
        let Some(tensor) = graph.constant(value).filter(|tensor| tensor.len() > 1).cloned() else { return };
        if let Ok(row) = tensor.reshaped(vec![tensor.len()]) {
            let base = name(graph, value, "row");
            self.constants.entry(value).or_insert_with(|| graph.add_initializer(region.scope, &base, row));
        }
    }
}

/// The steps of one expert.
struct Expert<'a> {
    graph: &'a mut Graph,
    region: &'a Region,
    cut: &'a Tables,
    e: usize,
    /// What stands for the values of the pairs.
    inside: BTreeMap<ValueId, ValueId>,
}

impl Expert<'_> {
    /// Writes all steps and returns the rows of the exit.
    fn run(mut self) -> ValueId {
        for step in &self.region.steps {
            self.step(step);
        }
        self.inside[&self.region.exit.0]
    }

    fn step(&mut self, step: &Step) {
        let (scope, e) = (self.region.scope, self.e);
        match step {
            Step::Alias { x, made } => _ = self.inside.insert(*made, self.inside[x]),
            Step::Product { table, transposed, x, made } => {
                let node = Node::new("Gemm").with("transB", i64::from(*transposed));
                let base = name(self.graph, *made, &format!("expert_{e}"));
                let inputs = [self.inside[x], self.cut.parts[&(*table, e)]];
                let product = self.graph.append(scope, node, &inputs, &base);
                self.inside.insert(*made, product);
            }
            Step::Node { node, operands } => {
                let operand = |operand: &Operand| match operand {
                    Operand::Pairs(value) => Some(self.inside[value]),
                    Operand::Rows(table) => Some(self.cut.parts[&(*table, e)]),
                    Operand::Constant(value) => Some(self.cut.constants.get(value).copied().unwrap_or(*value)),
                    Operand::Absent => None,
                };
                let inputs = operands.iter().map(operand).collect();
                self.copy(*node, inputs, None);
            }
            Step::Cut { node, x } => {
                let old = self.graph.node(*node);
                let mut inputs: Vec<Option<ValueId>> = old.inputs().to_vec();
                inputs[0] = Some(self.inside[x]);
                let is_slice = old.is("Slice");
                if is_slice {
                    let base = name(self.graph, *x, "axis");
                    let axis = self.graph.add_initializer(scope, &base, Tensor::int64s(&[1]));
                    inputs.resize(inputs.len().max(4), None);
                    inputs[3] = Some(axis);
                }
                self.copy(*node, inputs, (!is_slice).then_some(1));
            }
        }
    }

    /// Writes a node of the layer over the rows of this expert.
    fn copy(&mut self, id: lathe_ir::NodeId, inputs: Vec<Option<ValueId>>, axis: Option<i64>) {
        let old = self.graph.node(id).clone();
        let mut node = Node::new(old.op_type.clone());
        node.attributes = old.attributes.clone();
        if let Some(axis) = axis {
            node.set_attribute("axis", axis);
        }
        let outputs: Vec<Option<ValueId>> = old
            .outputs()
            .iter()
            .map(|output| {
                let output = (*output)?;
                let new = made(self.graph, output, &format!("expert_{}", self.e));
                self.inside.insert(output, new);
                Some(new)
            })
            .collect();
        self.graph.add_node(self.region.scope, node, inputs, outputs);
    }
}
