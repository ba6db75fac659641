//! Whether a model is one: what every pass may rely on and must leave behind.

mod consistency;
mod functions;
mod names;
mod nodes;

use crate::{Cycle, Graph, Initializer, Model, ScopeId, Shape, Tensor, Type, TypeKind, imported};

/// The versions of the standard operator set that are understood.
pub const KNOWN_OPSETS: std::ops::RangeInclusive<i64> = 1..=28;

/// Why a model is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum CheckError {
    /// The parts of a graph disagree with one another. No file can cause this: it is a bug of the pass that ran last.
    #[error("the graph `{graph}` is inconsistent: {what}")]
    Inconsistent { graph: String, what: String },
    #[error(transparent)]
    Cycle(#[from] Cycle),
    #[error("input {index} of {node} is `{value}`, which nothing produces")]
    Dangling { node: String, index: usize, value: String },
    #[error("output `{value}` of graph `{graph}` is produced by nothing")]
    DanglingOutput { graph: String, value: String },
    #[error("input {index} of {node} is `{value}`, which belongs to a graph that it cannot see")]
    OutOfSight { node: String, index: usize, value: String },
    #[error("output `{value}` of graph `{graph}` belongs to a graph that it cannot see")]
    OutputOutOfSight { graph: String, value: String },
    #[error("`{name}` is defined twice in graph `{graph}`")]
    Repeated { name: String, graph: String },
    #[error("graph `{graph}` uses a value `{name}` that another one of the same name hides there")]
    Hidden { name: String, graph: String },
    #[error("a value of graph `{graph}` has no name")]
    Unnamed { graph: String },
    #[error("input `{name}` has no type")]
    Untyped { name: String },
    #[error("`{name}` is stated as {stated}, but its data is {found}")]
    Mismatch { name: String, stated: String, found: String },
    #[error("{node} has no operator")]
    NoOperator { node: String },
    #[error("attribute `{attribute}` of {node} is given twice")]
    RepeatedAttribute { node: String, attribute: String },
    #[error("{node} has no subgraph `{attribute}`")]
    NoSubgraph { node: String, attribute: &'static str },
    #[error("subgraph `{attribute}` of {node} has {found} {what}, expected {expected}")]
    Arity { node: String, attribute: &'static str, what: &'static str, expected: String, found: usize },
    #[error("{node} belongs to domain `{domain}`, of which no version is imported")]
    NotImported { node: String, domain: String },
    #[error(
        "version {found} of the standard operator set is unknown; known are {} to {}",
        KNOWN_OPSETS.start(),
        KNOWN_OPSETS.end()
    )]
    UnknownOpset { found: i64 },
    #[error("{node} refers to attribute `{attribute}`, which its function does not have")]
    NoSuchAttribute { node: String, attribute: String },
    #[error("{node} refers to attribute `{attribute}`, but stands in no function")]
    NotInFunction { node: String, attribute: String },
    #[error("function `{function}` is defined twice")]
    RepeatedFunction { function: String },
    #[error("function `{function}` calls itself")]
    Recursion { function: String },
    #[error("in function `{function}`: {source}")]
    Function { function: String, source: Box<CheckError> },
}

impl Model {
    /// Checks everything that holds for a model whatever its operators mean, in time proportional to its size.
    ///
    /// Use lists and origins agree; every used value is visible where it is used and no node needs itself; names are
    /// unique within a graph and mean the value that is used; operators have a name, an imported version, attributes of different names
    /// and, for `If`, `Loop` and `Scan`, subgraphs with as many inputs and outputs as fit; main-graph inputs have
    /// types; stated types agree with data; functions do not call themselves and refer to attributes they have.
    /// What is merely untidy, such as unused nodes or nodes listed in another order than they run in, is no error.
    pub fn check(&self) -> Result<(), CheckError> {
        for &input in self.graph.main().inputs() {
            let value = self.graph.value(input);
            if value.ty.as_ref().is_none_or(|ty| ty.kind == TypeKind::Unstated) {
                return Err(CheckError::Untyped { name: value.name.clone() });
            }
        }
        body(&self.graph, &self.opsets, None)?;
        for function in &self.functions {
            body(&function.graph, &function.opsets, Some(function)).map_err(|source| {
                let function = functions::full_name(function);
                CheckError::Function { function, source: Box::new(source) }
            })?;
        }
        functions::check(&self.functions)
    }
}

/// Checks one graph, which is the body of `function` or the main one.
fn body(graph: &Graph, opsets: &[(String, i64)], function: Option<&crate::Function>) -> Result<(), CheckError> {
    if let Some(found) = imported(opsets, "").filter(|version| !KNOWN_OPSETS.contains(version)) {
        return Err(CheckError::UnknownOpset { found });
    }
    let scopes = consistency::check(graph)?;
    names::check(graph)?;
    for &scope in &scopes {
        graph.sorted(scope)?;
        data(graph, scope)?;
        for id in graph.nodes(scope) {
            nodes::check(graph, id, opsets, function)?;
        }
    }
    Ok(())
}

/// Whether stated types agree with the data of initializers and defaults.
fn data(graph: &Graph, scope: ScopeId) -> Result<(), CheckError> {
    for id in graph.scope(scope).inputs().iter().copied().chain(graph.initializers(scope)) {
        let value = graph.value(id);
        let (Some(stated), Some(data)) = (&value.ty, value.initializer()) else { continue };
        let found = match data {
            Initializer::Dense(tensor) => tensor_type(tensor, tensor.dims()),
            Initializer::Sparse(sparse) => tensor_type(&sparse.values, &sparse.dims),
        };
        if !agrees(stated, &found) {
            let (name, stated, found) = (value.name.clone(), stated.to_string(), found.to_string());
            return Err(CheckError::Mismatch { name, stated, found });
        }
    }
    Ok(())
}

fn tensor_type(tensor: &Tensor, dims: &[usize]) -> Type {
    TypeKind::Tensor { elem: Some(tensor.dtype()), shape: Some(Shape::known(dims)) }.into()
}

/// Whether a tensor of type `found` is what `stated` says, which may say little.
fn agrees(stated: &Type, found: &Type) -> bool {
    let (elem, shape) = match &stated.kind {
        TypeKind::Tensor { elem, shape } | TypeKind::SparseTensor { elem, shape } => (elem, shape),
        TypeKind::Unstated => return true,
        _ => return false,
    };
    let sizes = found.shape().and_then(Shape::sizes).unwrap_or_default();
    let same_size = |(dim, size): (&crate::Dim, &i64)| dim.known().is_none_or(|known| known == *size);
    elem.is_none_or(|elem| found.elem() == Some(elem))
        && shape.as_ref().is_none_or(|s| s.dims.len() == sizes.len() && s.dims.iter().zip(&sizes).all(same_size))
}

#[cfg(test)]
mod tests;
