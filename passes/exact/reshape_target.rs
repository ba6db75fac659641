//! Targets of Reshapes that are right for empty axes too.

use crate::{Match, PassContext, Refusal};
use lathe_analysis::{DimExpr, Facts, Symbol, dead_nodes};
use lathe_ir::{Model, Node, ScopeId, ValueId};
use std::{cell::RefCell, collections::BTreeSet};

/// The target that reshapes `x` into the shape of `result`: a known size, 0 for the size of the same axis of `x`, and
/// -1 for at most one more. Beside -1, runtimes refuse a size of 0: the others must certainly not be 0, or be among `full`.
pub(super) fn target(m: &Match, x: ValueId, result: ValueId, full: &[DimExpr]) -> Result<Vec<i64>, Refusal> {
    let from = m.facts().shape(x);
    let Some(to) = m.facts().shape(result) else {
        return Err("the number of axes of the result is unknown".into());
    };
    let mut sizes = Vec::with_capacity(to.len());
    for (axis, size) in to.iter().enumerate() {
        let same = from.and_then(|from| from.get(axis)) == Some(size);
        sizes.push(match size.as_known() {
            Some(0) if !same => return Err("a size is 0, which would copy one of the input".into()),
            Some(known) => known,
            None if same => 0,
            None => -1,
        });
    }
    let free = sizes.iter().filter(|&&size| size == -1).count();
    m.require(free <= 1, "more than one size is neither known nor the same as before")?;
    let nonempty = m.context().nonempty.get();
    let certain = |size: &DimExpr| full.contains(size) || is_positive(size, nonempty);
    let inferred = to.iter().zip(&sizes).all(|(size, &written)| written == -1 || certain(size));
    m.require(free == 0 || inferred, "a size is inferred beside one that may be 0")?;
    Ok(sizes)
}

/// Whether a size is not 0 where none of the dimensions `nonempty` is.
fn is_positive(size: &DimExpr, nonempty: Option<&BTreeSet<String>>) -> bool {
    let more = |symbol: &Symbol| match symbol {
        Symbol::Named(name) if nonempty.is_some_and(|all| all.contains(&**name)) => DimExpr::named(name).offset(1),
        _ => None,
    };
    size.is_positive() || size.substitute(&more).is_some_and(|size| size.is_positive())
}

/// The sizes that cannot be 0 where a Reshape runs at all: those beside the one it infers. With `allowzero` ONNX Runtime
/// infers a size beside 0 too.
pub(super) fn full_axes(facts: &Facts, node: &Node) -> Vec<DimExpr> {
    let refuses = node.is("Reshape") && node.int("allowzero").unwrap_or(0) == 0;
    let inferred = || {
        let sizes = facts.contents(node.input(1).filter(|_| refuses)?)?;
        sizes.elements().iter().position(|size| size.as_ref().and_then(DimExpr::as_known) == Some(-1))
    };
    let shape = node.output(0).and_then(|v| facts.shape(v));
    let (Some(inferred), Some(mut shape)) = (inferred(), shape.map(<[DimExpr]>::to_vec)) else { return Vec::new() };
    shape.remove(inferred);
    shape
}

/// The named dimensions that cannot be 0 where a model runs at all, because a Reshape that always runs infers a size
/// beside them.
pub(super) fn nonempty(model: &Model, cx: &PassContext) -> BTreeSet<String> {
    let graph = &model.graph;
    let facts = cx.facts.take(graph, &model.opsets, &model.functions);
    let dead: BTreeSet<_> = dead_nodes(graph).into_iter().collect();
    let mut found = BTreeSet::new();
    for id in graph.nodes(ScopeId::MAIN).filter(|id| !dead.contains(id)) {
        for size in full_axes(&facts, graph.node(id)) {
            found.extend(names(&size).into_iter().filter(|name| vanishes_with(&size, name)));
        }
    }
    cx.facts.keep(graph, facts);
    found
}

/// The named dimensions in a size.
fn names(size: &DimExpr) -> BTreeSet<String> {
    let found = RefCell::new(BTreeSet::new());
    size.all_symbols(&|symbol| {
        if let Symbol::Named(name) = symbol {
            found.borrow_mut().insert(name.to_string());
        }
        true
    });
    found.into_inner()
}

/// Whether a size is 0 where the dimension `name` is.
fn vanishes_with(size: &DimExpr, name: &str) -> bool {
    let none = |symbol: &Symbol| matches!(symbol, Symbol::Named(n) if **n == *name).then(|| DimExpr::from(0));
    size.substitute(&none).is_some_and(|size| size.as_known() == Some(0))
}
