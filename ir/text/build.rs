//! From the tree to a model: every name becomes the value it means.

use super::{
    ParseError,
    scan::{Parsed, Scanner},
    tree::{Header, RawAttributeValue, RawFunction, RawGraph, RawModel, RawName, RawNode, RawValue},
};
use crate::{Attribute, AttributeValue, Function, Graph, Initializer, Model, Node, Origin, ScopeId, Type, ValueId};
use std::collections::{BTreeSet, HashMap};

/// The file format of a text that names none.
const IR_VERSION: i64 = 10;
/// The operator set of a text that names none.
const OPSET: i64 = 21;

/// Reads a model or a bare graph, which may be followed by local functions.
pub fn parse(text: &str) -> Result<Model, ParseError> {
    let raw = Scanner::new(text).model()?;
    model(text, raw)
}

fn model(text: &str, raw: RawModel) -> Parsed<Model> {
    let bare = raw.header.is_none();
    let header = raw.header.unwrap_or_default();
    let mut opsets = header.opsets.unwrap_or_else(|| vec![(String::new(), OPSET)]);
    if bare {
        let mut domains = BTreeSet::new();
        collect_domains(&raw.graph, &mut domains);
        raw.functions.iter().for_each(|f| collect_domains(&f.graph, &mut domains));
        domains.retain(|domain| !domain.is_empty() && domain != "ai.onnx");
        opsets.extend(domains.into_iter().map(|domain| (domain, 1)));
    }
    let functions = raw.functions.into_iter().map(|raw| function(text, raw, &opsets)).collect::<Parsed<_>>()?;
    Ok(Model {
        ir_version: header.ir_version.unwrap_or(IR_VERSION),
        producer_name: header.producer_name,
        producer_version: header.producer_version,
        domain: header.domain,
        model_version: header.model_version,
        doc: header.doc,
        metadata: header.metadata,
        graph: graph(text, raw.graph)?,
        functions,
        opsets,
        ..Model::default()
    })
}

fn collect_domains(graph: &RawGraph, domains: &mut BTreeSet<String>) {
    for node in &graph.nodes {
        domains.insert(node.domain.clone());
        for attribute in &node.attributes {
            match &attribute.value {
                RawAttributeValue::Graph(inner) => collect_domains(inner, domains),
                RawAttributeValue::Graphs(several) => several.iter().for_each(|g| collect_domains(g, domains)),
                RawAttributeValue::Plain(_) => {}
            }
        }
    }
}

fn function(text: &str, raw: RawFunction, opsets: &[(String, i64)]) -> Parsed<Function> {
    let mut defaults = Vec::new();
    for attribute in raw.defaults {
        let RawAttributeValue::Plain(value) = attribute.value else {
            return Err(ParseError::at(text, attribute.at, "a graph cannot be the default of an attribute"));
        };
        defaults.push(Attribute::new(attribute.name, value));
    }
    let Header { opsets: own, domain, overload, doc, metadata, .. } = raw.header;
    let declared = raw.graph.inputs.iter().chain(&raw.graph.values);
    if let Some(value) = declared.into_iter().find(|value| value.initializer.is_some()) {
        let message = format!("`{}` of function `{}` is given data", value.name, raw.graph.name);
        return Err(ParseError::at(text, value.at, message));
    }
    Ok(Function {
        name: raw.graph.name.clone(),
        domain,
        overload,
        attributes: raw.attributes,
        defaults,
        opsets: own.unwrap_or_else(|| opsets.to_vec()),
        graph: graph(text, raw.graph)?,
        doc,
        metadata,
    })
}

fn graph(text: &str, raw: RawGraph) -> Parsed<Graph> {
    let mut builder = Builder { text, graph: Graph::new(raw.name.clone()), visible: Vec::new() };
    builder.fill(ScopeId::MAIN, raw)?;
    Ok(builder.graph)
}

struct Builder<'a> {
    text: &'a str,
    graph: Graph,
    /// The names of each scope around the current place, outermost first.
    visible: Vec<HashMap<String, ValueId>>,
}

impl Builder<'_> {
    fn error<T>(&self, at: usize, message: String) -> Parsed<T> {
        Err(ParseError::at(self.text, at, message))
    }

    /// Declares everything that `raw` defines, then its nodes and outputs with names resolved from here outwards.
    fn fill(&mut self, scope: ScopeId, raw: RawGraph) -> Parsed<()> {
        let mut names = HashMap::new();
        for RawValue { at, name, ty, initializer } in raw.inputs {
            let value = self.declare(&mut names, at, name, ty)?;
            self.graph.add_input(scope, value);
            self.graph.set_default(value, initializer);
        }
        let mut stated = Vec::new();
        for value in raw.values {
            match value.initializer {
                None => stated.push((value.name, value.ty)),
                Some(initializer) => self.initializer(scope, &mut names, value.at, value.name, initializer)?,
            }
        }
        let mut outputs = Vec::with_capacity(raw.nodes.len());
        for node in &raw.nodes {
            let mut produced = Vec::with_capacity(node.outputs.len());
            for RawName { at, name } in &node.outputs {
                let given = !name.is_empty();
                produced.push(given.then(|| self.declare(&mut names, *at, name.clone(), None)).transpose()?);
            }
            outputs.push(produced);
        }
        let returned = raw.outputs.iter().map(|output| (&output.name, &output.ty));
        for (name, ty) in returned.chain(stated.iter().map(|(name, ty)| (name, ty))) {
            // A type for a name that nothing defines is left over from an edit and means nothing.
            let Some(&value) = names.get(name) else { continue };
            let value = self.graph.value_mut(value);
            if value.ty.is_none() {
                value.ty = ty.clone();
            }
        }
        self.visible.push(names);
        for (node, outputs) in raw.nodes.into_iter().zip(outputs) {
            self.node(scope, node, outputs)?;
        }
        for output in raw.outputs {
            let Some(value) = self.resolve(&output.name) else {
                let message = format!("output `{}` of graph `{}` is produced by nothing", output.name, raw.name);
                return self.error(output.at, message);
            };
            self.graph.add_output(scope, value);
        }
        self.visible.pop();
        Ok(())
    }

    fn declare(
        &mut self,
        names: &mut HashMap<String, ValueId>,
        at: usize,
        name: String,
        ty: Option<Type>,
    ) -> Parsed<ValueId> {
        if names.contains_key(&name) {
            return self.error(at, format!("`{name}` is defined twice"));
        }
        let value = self.graph.add_value(name.clone(), ty);
        names.insert(name, value);
        Ok(value)
    }

    /// An initializer; one with the name of an input is that input's default.
    fn initializer(
        &mut self,
        scope: ScopeId,
        names: &mut HashMap<String, ValueId>,
        at: usize,
        name: String,
        initializer: Initializer,
    ) -> Parsed<()> {
        if let Some(&input) = names.get(&name)
            && matches!(self.graph.value(input).origin(), Origin::Input(_))
            && self.graph.value(input).initializer().is_none()
        {
            self.graph.set_default(input, Some(initializer));
            return Ok(());
        }
        let value = self.declare(names, at, name, None)?;
        self.graph.make_initializer(scope, value, initializer);
        Ok(())
    }

    fn resolve(&self, name: &str) -> Option<ValueId> {
        self.visible.iter().rev().find_map(|names| names.get(name).copied())
    }

    fn node(&mut self, scope: ScopeId, raw: RawNode, outputs: Vec<Option<ValueId>>) -> Parsed<()> {
        let mut inputs = Vec::with_capacity(raw.inputs.len());
        for (index, input) in raw.inputs.iter().enumerate() {
            let value = self.resolve(&input.name);
            if value.is_none() && !input.name.is_empty() {
                let output = raw.outputs.iter().map(|output| &output.name).find(|name| !name.is_empty());
                let node = if raw.label.is_empty() { output.unwrap_or(&raw.label) } else { &raw.label };
                let (op, name) = (&raw.op_type, &input.name);
                let message = format!("input {index} of node `{node}` ({op}) is `{name}`, which nothing produces");
                return self.error(input.at, message);
            }
            inputs.push(value);
        }
        let mut node = Node::new(raw.op_type).in_domain(raw.domain);
        node.overload = raw.overload;
        node.name = raw.label;
        for attribute in raw.attributes {
            let value = match attribute.value {
                RawAttributeValue::Plain(value) => value,
                RawAttributeValue::Graph(inner) => AttributeValue::Graph(self.subgraph(inner)?),
                RawAttributeValue::Graphs(several) => {
                    let scopes = several.into_iter().map(|inner| self.subgraph(inner)).collect::<Parsed<_>>()?;
                    AttributeValue::Graphs(scopes)
                }
            };
            node.attributes.push(Attribute::new(attribute.name, value));
        }
        self.graph.add_node(scope, node, inputs, outputs);
        Ok(())
    }

    fn subgraph(&mut self, raw: RawGraph) -> Parsed<ScopeId> {
        let scope = self.graph.add_scope(raw.name.clone());
        self.fill(scope, raw)?;
        Ok(scope)
    }
}
