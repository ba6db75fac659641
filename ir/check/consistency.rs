//! The parts of a graph agree with one another: uses, origins, owners.

use super::CheckError;
use crate::{Graph, NodeId, Origin, ScopeId, Use, ValueId};

/// Checks the graph and returns its scopes, each after the one around it.
pub(super) fn check(graph: &Graph) -> Result<Vec<ScopeId>, CheckError> {
    let mut checker = Checker {
        graph,
        placed: vec![false; graph.node_bound()],
        defined: vec![false; graph.value_bound()],
        scopes: vec![ScopeId::MAIN],
        entered: vec![false; graph.scope_bound()],
    };
    checker.entered[ScopeId::MAIN.index()] = true;
    let mut next = 0;
    while let Some(&scope) = checker.scopes.get(next) {
        checker.define(scope)?;
        next += 1;
    }
    // Uses are looked at when every definition is known, because a scope may use what comes later.
    for &scope in &checker.scopes {
        checker.uses_in(scope)?;
    }
    checker.nothing_is_left_over()?;
    Ok(checker.scopes)
}

struct Checker<'a> {
    graph: &'a Graph,
    /// Whether a node is listed in a scope.
    placed: Vec<bool>,
    /// Whether a value is an input, an initializer or an output of a listed node.
    defined: Vec<bool>,
    scopes: Vec<ScopeId>,
    entered: Vec<bool>,
}

impl Checker<'_> {
    fn error<T>(&self, what: String) -> Result<T, CheckError> {
        Err(CheckError::Inconsistent { graph: self.graph.main().name.clone(), what })
    }

    fn name(&self, value: ValueId) -> &str {
        &self.graph.value(value).name
    }

    fn define_value(&mut self, value: ValueId, origin: Origin) -> Result<(), CheckError> {
        if value.index() >= self.defined.len() {
            return self.error("a value is of another graph".to_owned());
        }
        let found = self.graph.value(value).origin();
        if found != origin {
            let name = self.name(value);
            return self.error(format!("`{name}` should come from {origin:?}, but says {found:?}"));
        }
        if std::mem::replace(&mut self.defined[value.index()], true) {
            return self.error(format!("`{}` is listed twice", self.name(value)));
        }
        Ok(())
    }

    fn define(&mut self, scope: ScopeId) -> Result<(), CheckError> {
        let graph = self.graph;
        for &input in graph.scope(scope).inputs() {
            self.define_value(input, Origin::Input(scope))?;
        }
        for initializer in graph.initializers(scope) {
            self.define_value(initializer, Origin::Initializer(scope))?;
            if graph.value(initializer).initializer().is_none() {
                return self.error(format!("initializer `{}` has no data", self.name(initializer)));
            }
        }
        for id in graph.nodes(scope) {
            if std::mem::replace(&mut self.placed[id.index()], true) {
                return self.error(format!("{} is listed twice", graph.describe(id)));
            }
            for (index, output) in graph.node(id).outputs().iter().enumerate() {
                if let Some(output) = *output {
                    self.define_value(output, Origin::Node(id, index))?;
                }
            }
            for inner in graph.node(id).subgraphs() {
                // Entered before: two attributes hold the same subgraph.
                let fresh = self.entered.get(inner.index()) == Some(&false);
                if !fresh || graph.scope(inner).owner() != Some(id) {
                    return self.error(format!("a subgraph of {} belongs to another node", graph.describe(id)));
                }
                self.entered[inner.index()] = true;
                self.scopes.push(inner);
            }
        }
        Ok(())
    }

    fn uses_in(&self, scope: ScopeId) -> Result<(), CheckError> {
        let graph = self.graph;
        for id in graph.nodes(scope) {
            for (index, input) in graph.node(id).inputs().iter().enumerate() {
                let Some(value) = *input else { continue };
                self.recorded(value, Use::Node(id, index))?;
                let (node, name) = (|| graph.describe(id), || self.name(value).to_owned());
                match graph.scope_of(value) {
                    None => return Err(CheckError::Dangling { node: node(), index, value: name() }),
                    Some(from) if !graph.is_within(scope, from) => {
                        return Err(CheckError::OutOfSight { node: node(), index, value: name() });
                    }
                    Some(_) => {}
                }
            }
        }
        for (index, &value) in graph.scope(scope).outputs().iter().enumerate() {
            self.recorded(value, Use::Output(scope, index))?;
            let (here, name) = (|| graph.scope(scope).name.clone(), || self.name(value).to_owned());
            match graph.scope_of(value) {
                None => return Err(CheckError::DanglingOutput { graph: here(), value: name() }),
                Some(from) if !graph.is_within(scope, from) => {
                    return Err(CheckError::OutputOutOfSight { graph: here(), value: name() });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// The value exists, is defined where it says, and knows of this use.
    fn recorded(&self, value: ValueId, place: Use) -> Result<(), CheckError> {
        if value.index() >= self.defined.len() {
            return self.error("a value is of another graph".to_owned());
        }
        let found = self.graph.value(value);
        if !self.defined[value.index()] && found.origin() != Origin::None {
            return self.error(format!("`{}` is used, but nothing that is left defines it", found.name));
        }
        if !found.uses().contains(&place) {
            return self.error(format!("`{}` does not know of its use {place:?}", found.name));
        }
        Ok(())
    }

    /// No value or node exists outside the scopes, and no use is recorded that is not there.
    fn nothing_is_left_over(&self) -> Result<(), CheckError> {
        let graph = self.graph;
        for index in 0..graph.node_bound() {
            let id = NodeId::from_index(index);
            if graph.get(id).is_some() && !self.placed[index] {
                return self.error(format!("{} stands in no graph", graph.describe(id)));
            }
        }
        for index in 0..graph.value_bound() {
            let id = ValueId::from_index(index);
            let value = graph.value(id);
            if value.origin() != Origin::None && !self.defined[index] {
                return self.error(format!("`{}` says it comes from {:?}", value.name, value.origin()));
            }
            for place in value.uses() {
                let used = match *place {
                    Use::Node(node, index) => graph.get(node).and_then(|n| n.input(index)) == Some(id),
                    Use::Output(scope, index) => {
                        self.entered.get(scope.index()) == Some(&true)
                            && graph.scope(scope).outputs().get(index) == Some(&id)
                    }
                    Use::Annotation(of) => graph.value(of).quantization().iter().any(|(_, parameter)| *parameter == id),
                };
                if !used {
                    return self.error(format!("`{}` lists the use {place:?}, which is not there", value.name));
                }
            }
            for (_, parameter) in value.quantization() {
                self.recorded(*parameter, Use::Annotation(id))?;
            }
        }
        Ok(())
    }
}
