//! Which attentions have a cache that can be kept in other numbers.

use super::CacheType;
use crate::precision::Kept;
use lathe_analysis::Facts;
use lathe_ir::{DataType, Graph, Model, Node, NodeId, Origin, ScopeId, Use, ValueId};

/// An attention whose cache can change.
#[derive(Debug, Clone)]
pub struct CacheNode {
    /// The node.
    pub node: NodeId,
    /// Heads of keys and values.
    pub heads: usize,
    /// Numbers in each.
    pub size: usize,
    /// The keys and values of earlier positions.
    pub past: [ValueId; 2],
    /// The same with the new ones.
    pub present: [ValueId; 2],
}

/// The caches of a model.
#[derive(Debug, Clone, Default)]
pub struct Caches {
    /// Those that can change, in the graph's order.
    pub nodes: Vec<CacheNode>,
    /// Attentions with a cache that stays, and why.
    pub kept: Vec<Kept>,
}

/// Where `GroupQueryAttention` reads and gives keys and values.
pub(super) const PAST: [usize; 2] = [3, 4];
pub(super) const PRESENT: [usize; 2] = [1, 2];

/// The oldest operator set in which codes can be computed beside the model.
const LEAST_OPSET: i64 = 13;

impl Caches {
    /// Looks for caches that can become `wanted`; one sentence where there is none.
    pub fn find(model: &Model, wanted: CacheType) -> Result<Caches, String> {
        let graph = &model.graph;
        let facts = Facts::infer(model);
        let mut found = Caches::default();
        let mut without = 0;
        for id in graph.all_nodes() {
            let node = graph.node(id);
            if !is_grouped(node) {
                continue;
            }
            if PAST.iter().all(|&at| node.input(at).is_none()) {
                without += 1;
                continue;
            }
            match cache(model, &facts, id, wanted) {
                Ok(cache) => found.nodes.push(cache),
                Err(reason) => found.kept.push(Kept { node: graph.describe(id), reason }),
            }
        }
        if !found.nodes.is_empty() {
            return Ok(found);
        }
        let others = graph.all_nodes().into_iter().filter(|&id| takes_cache(graph.node(id))).count();
        Err(match (found.kept.first(), without, others) {
            (Some(kept), ..) => format!("no cache can be {wanted}: of {}, {}", kept.node, kept.reason),
            (None, 0, 0) => {
                "the model has no GroupQueryAttention with a cache, whose kernels alone read whole numbers; \
                             --target ort writes it where a decoder takes keys and values and returns them"
                    .to_owned()
            }
            (None, 0, others) => format!(
                "the model has no GroupQueryAttention, whose kernels alone read a cache of whole numbers: {others} caches \
                 belong to other attention operators"
            ),
            (None, without, _) => {
                format!("none of the model's {without} GroupQueryAttention takes a cache as an input of the model")
            }
        })
    }
}

fn is_grouped(node: &Node) -> bool {
    node.domain == "com.microsoft" && node.op_type == "GroupQueryAttention"
}

/// Whether another attention operator takes keys and values of earlier positions.
fn takes_cache(node: &Node) -> bool {
    let past: &[usize] = match (node.domain.as_str(), node.op_type.as_str()) {
        ("com.microsoft", "MultiHeadAttention") => &[6, 7],
        ("com.microsoft", "Attention") => &[4],
        ("" | "ai.onnx", "Attention") => &[4, 5],
        _ => &[],
    };
    past.iter().any(|&at| node.input(at).is_some())
}

fn cache(model: &Model, facts: &Facts, id: NodeId, wanted: CacheType) -> Result<CacheNode, String> {
    let graph = &model.graph;
    let node = graph.node(id);
    let is_set = |name: &str| node.string(name).is_some_and(|kind| !kind.is_empty() && kind != "NONE");
    if is_set("k_quant_type") || is_set("v_quant_type") {
        return Err("its cache is quantized already".to_owned());
    }
    if node.scope() != ScopeId::MAIN {
        return Err("it is in a subgraph".to_owned());
    }
    if model.opset() < LEAST_OPSET {
        return Err(format!("it needs operator set {LEAST_OPSET}, and the model has {}", model.opset()));
    }
    let (Some(keys), Some(values)) = (node.input(PAST[0]), node.input(PAST[1])) else {
        return Err("it takes keys without values".to_owned());
    };
    let (Some(present_keys), Some(present_values)) = (node.output(PRESENT[0]), node.output(PRESENT[1])) else {
        return Err("it does not return its cache".to_owned());
    };
    let past = [keys, values];
    for value in past {
        let name = &graph.value(value).name;
        let is_input = matches!(graph.value(value).origin(), Origin::Input(ScopeId::MAIN));
        if !is_input || graph.value(value).initializer().is_some() {
            return Err(format!("`{name}` is no input of the model, or one with a default"));
        }
        if facts.elem(value) != Some(DataType::Float) {
            return Err(format!("`{name}` is not float32"));
        }
    }
    let present = [present_keys, present_values];
    if let Some(&value) = present.iter().find(|&&value| !graph.is_output(value)) {
        return Err(format!("`{}` is no output of the model", graph.value(value).name));
    }
    for value in past.into_iter().chain(present) {
        used_elsewhere(graph, id, value)?;
    }
    let known = |axis: usize| facts.shape(keys)?.get(axis)?.as_known().and_then(|size| usize::try_from(size).ok());
    let sizes = known(1).zip(known(3)).filter(|&(heads, size)| heads > 0 && size > 0);
    let Some((heads, size)) = sizes else { return Err("the heads of its cache are of unknown size".to_owned()) };
    if !size.is_multiple_of(2) && wanted.bits == 4 {
        return Err(format!("its heads have {size} numbers, which do not go into pairs"));
    }
    Ok(CacheNode { node: id, heads, size, past, present })
}

/// Whoever else reads a cache would get codes for numbers; only the sizes of the first axes are the same.
fn used_elsewhere(graph: &Graph, id: NodeId, value: ValueId) -> Result<(), String> {
    let mut outputs = 0;
    for place in graph.value(value).uses() {
        let fits = match *place {
            Use::Node(reader, at) => (reader == id && PAST.contains(&at)) || reads_first_sizes(graph, reader),
            Use::Output(scope, _) => {
                outputs += 1;
                scope == ScopeId::MAIN && outputs == 1
            }
            Use::Annotation(_) => false,
        };
        if !fits {
            return Err(format!("`{}` has other uses", graph.value(value).name));
        }
    }
    Ok(())
}

/// Whether a node only tells sizes of a value, and not that of its last axis.
fn reads_first_sizes(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    if !node.is("Shape") {
        return false;
    }
    if node.int("end").is_some_and(|end| (0..=3).contains(&end) || end == -1) {
        return true;
    }
    let Some(sizes) = node.output(0) else { return false };
    graph.value(sizes).uses().iter().all(|place| {
        let Use::Node(reader, 0) = *place else { return false };
        let reader = graph.node(reader);
        let index = reader.input(1).and_then(|index| graph.constant(index)).and_then(lathe_ir::Tensor::to_i64s);
        reader.is("Gather") && index.is_some_and(|all| all.iter().all(|at| matches!(at, 0..=2 | -4..=-2)))
    })
}
