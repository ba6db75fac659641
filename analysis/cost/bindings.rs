//! Sizes for dimensions that a model leaves open.

use crate::{
    dim::{DimExpr, Symbol},
    shapes::Facts,
};
use lathe_ir::{Graph, NodeId, ScopeId, Shape, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Sizes for dimensions that the model leaves open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bindings {
    /// The size of batches: dimensions whose name says so (`batch`, `batch_size`, `N`, `bs` and the like), and those
    /// that [`Bindings::for_inputs`] finds.
    pub batch: i64,
    /// The size of all others.
    pub other: i64,
    named: BTreeMap<String, i64>,
    batches: BTreeSet<Symbol>,
    /// Sizes that only a run decides and that have something to share out.
    shares: BTreeMap<Symbol, i64>,
}

impl Default for Bindings {
    /// Batch 1, every other open size 128.
    fn default() -> Bindings {
        Bindings { batch: 1, other: 128, named: BTreeMap::new(), batches: BTreeSet::new(), shares: BTreeMap::new() }
    }
}

impl Bindings {
    /// Gives the dimension `name` a size.
    pub fn set(&mut self, name: impl Into<String>, size: i64) {
        self.named.insert(name.into(), size);
    }

    /// Gives the open dimensions of an input, as the file states it, the sizes that it has in a run.
    pub fn set_input(&mut self, stated: &Shape, sizes: &[usize]) {
        for (axis, (dim, &size)) in stated.dims.iter().zip(sizes).enumerate() {
            match dim.name() {
                Some(name) => self.set(name, size as i64),
                None if axis == 0 && dim.known().is_none() => self.batch = size as i64,
                None => {}
            }
        }
    }

    /// Also counts as batch what stands where batches stand in the inputs of a graph, whatever its name: the first axis
    /// of images, and the first axis that all other inputs of two axes or more share. Exporters call it `s33` or
    /// `unk__214`, and need not notice that two first axes are equal: such names count as shared where they name no
    /// other axis. A graph in which some name says batch means that dimension and no other. The parts of a Split whose
    /// sizes are computed, as of the rows of experts, count as equal.
    pub fn for_inputs(self, graph: &Graph, facts: &Facts) -> Bindings {
        let mut bindings = self.with_batches(graph, facts);
        for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
            bindings.share_out(graph, facts, id);
        }
        bindings
    }

    /// Gives the parts of a Split whose sizes are not known equal shares of what there is.
    fn share_out(&mut self, graph: &Graph, facts: &Facts, id: NodeId) {
        let node = graph.node(id);
        let Some(shape) = node.input(0).filter(|_| node.is("Split")).and_then(|x| facts.shape(x)) else { return };
        let axis = node.int("axis").unwrap_or(0);
        let axis = if axis < 0 { axis + shape.len() as i64 } else { axis };
        let Some(axis) = usize::try_from(axis).ok().filter(|&axis| axis < shape.len()) else { return };
        let Some(total) = self.evaluate(&shape[axis]) else { return };
        let share = total.div_ceil(node.outputs().len().max(1) as u64);
        for part in node.outputs().iter().flatten() {
            let Some(size) = facts.shape(*part).and_then(|shape| shape.get(axis)?.as_symbol()) else { continue };
            if !matches!(size, Symbol::Named(_)) {
                self.shares.insert(size.clone(), i64::try_from(share).unwrap_or(i64::MAX));
            }
        }
    }

    fn with_batches(mut self, graph: &Graph, facts: &Facts) -> Bindings {
        let required = graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_none());
        let shapes: Vec<(ValueId, &[DimExpr])> = required.filter_map(|v| Some((v, facts.shape(v)?))).collect();
        let named = |dim: &DimExpr| matches!(dim.as_symbol(), Some(Symbol::Named(name)) if is_batch(name));
        if shapes.iter().any(|(_, shape)| shape.iter().any(named)) {
            return self;
        }
        let elsewhere: BTreeSet<&Symbol> =
            shapes.iter().flat_map(|(_, shape)| shape.iter().skip(1).filter_map(DimExpr::as_symbol)).collect();
        let firsts = |images: bool| {
            let wanted =
                shapes.iter().filter(move |(v, shape)| shape.len() >= 2 && is_image(facts, *v, shape) == images);
            wanted.map(|(_, shape)| shape[0].as_symbol().filter(|s| may_be_batch(s)))
        };
        self.batches.extend(firsts(true).flatten().cloned());
        let shared = |pair: &[&Symbol]| {
            pair[0] == pair[1] || pair.iter().all(|symbol| is_generated(symbol) && !elsewhere.contains(symbol))
        };
        let all: Option<Vec<&Symbol>> = firsts(false).collect();
        if let Some(all) = all.filter(|all| all.windows(2).all(shared)) {
            self.batches.extend(all.into_iter().cloned());
        }
        self
    }

    /// What stands for a symbol.
    pub fn size(&self, symbol: &Symbol) -> i64 {
        let named = match symbol {
            Symbol::Named(name) => self.named.get(&**name).copied(),
            _ => self.shares.get(symbol).copied(),
        };
        let batch = || self.batches.contains(symbol) || matches!(symbol, Symbol::Named(name) if is_batch(name));
        named.unwrap_or_else(|| if batch() { self.batch } else { self.other })
    }

    /// The size that a dimension then has; `None` if it overflows.
    pub fn evaluate(&self, dim: &DimExpr) -> Option<u64> {
        dim.evaluate(&|symbol| Some(self.size(symbol))).map(|size| u64::try_from(size).unwrap_or(0))
    }

    /// The sizes of a value's axes.
    pub(super) fn sizes(&self, facts: &Facts, value: ValueId) -> Option<Vec<u64>> {
        facts.shape(value)?.iter().map(|dim| self.evaluate(dim)).collect()
    }
}

fn is_batch(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    lower.contains("batch") || matches!(lower.as_str(), "n" | "b" | "bs" | "bsz")
}

/// Whether nothing in the name says that it is something else.
fn may_be_batch(symbol: &Symbol) -> bool {
    const OTHERS: &[&str] = &["seq", "len", "time", "token", "frame", "step", "past", "height", "width"];
    let Symbol::Named(name) = symbol else { return true };
    let lower = name.to_ascii_lowercase();
    !OTHERS.iter().any(|word| lower.contains(word))
}

/// Whether nobody chose the name: there is none, or the exporter counted.
fn is_generated(symbol: &Symbol) -> bool {
    let Symbol::Named(name) = symbol else { return true };
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    stem.len() < name.len() && (["s", "u", "unk_", "unk__", "dim_"].contains(&stem) || stem.ends_with("dynamic_axes_"))
}

/// Whether a value looks like images: floats of four axes, one of them holding 1, 3 or 4 channels.
fn is_image(facts: &Facts, value: ValueId, shape: &[DimExpr]) -> bool {
    let channels = |axis: usize| matches!(shape[axis].as_known(), Some(1 | 3 | 4));
    let float = facts.elem(value).is_some_and(|elem| elem.is_float());
    float && shape.len() == 4 && (channels(1) || channels(3))
}
