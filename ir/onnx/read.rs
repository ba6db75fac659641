//! From an ONNX file to a [`Model`]: decode, resolve names, check what must hold.

use super::{
    convert::{self, TensorSource},
    external::ExternalFiles,
    proto,
    read_error::{NEWEST_IR, ReadError},
    scan,
};
use crate::{
    Attribute, AttributeValue, Function, Graph, Initializer, Model, Node, ScopeId, SparseTensor, Tensor, Type, ValueId,
    mapping::Mapping,
};
use bytes::Bytes;
use prost::Message;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A model with what was odd about its file.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: Model,
    /// What was untidy and has been repaired, one sentence each.
    pub warnings: Vec<String>,
    /// The external data files in use, as canonical paths.
    pub data_files: Vec<PathBuf>,
    /// The size of the model file itself.
    pub file_bytes: u64,
}

impl Model {
    /// Reads the model at `path`. Weights stay in the file until they are touched.
    pub fn read(path: &Path) -> Result<Loaded, ReadError> {
        if std::fs::metadata(path)?.len() == 0 {
            return Err(ReadError::Empty);
        }
        let mapping = Mapping::open(path)?;
        let folder = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
            Some(parent) => parent.to_owned(),
            None => PathBuf::from("."),
        };
        read(mapping.bytes(), Some(&mapping), Some(folder))
    }

    /// Reads a model from memory; it cannot have external data.
    pub fn from_bytes(bytes: Bytes) -> Result<Loaded, ReadError> {
        read(bytes, None, None)
    }
}

impl Tensor {
    /// Reads a tensor from a file of its own, as ONNX test data comes, with its name. Raw data stays in the file until it
    /// is touched.
    pub fn read(path: &Path) -> Result<(String, Tensor), ReadError> {
        let mapping = Mapping::open(path)?;
        let file = proto::TensorProto::decode(mapping.bytes()).map_err(ReadError::DecodeTensor)?;
        let name = file.name().to_owned();
        let mut external = ExternalFiles::new(None);
        let source = TensorSource { mapping: Some(&mapping), external: &mut external };
        Ok((name, convert::tensor(file, source)?))
    }
}

/// The decoder follows a hundred messages into each other, which is three for every graph in a graph.
fn decode_error(error: prost::DecodeError) -> ReadError {
    match error.to_string().contains("recursion limit") {
        true => ReadError::TooDeep,
        false => ReadError::Decode(error),
    }
}

fn read(bytes: Bytes, mapping: Option<&Arc<Mapping>>, folder: Option<PathBuf>) -> Result<Loaded, ReadError> {
    if bytes.is_empty() {
        return Err(ReadError::Empty);
    }
    let file_bytes = bytes.len() as u64;
    let unknown = scan::unknown_field(&bytes);
    let file = proto::ModelProto::decode(bytes.clone()).map_err(decode_error)?;
    if file.ir_version() > NEWEST_IR && file.graph.is_some() {
        return Err(ReadError::TooNew { found: file.ir_version() });
    }
    if let Some((message, field)) = unknown {
        return Err(ReadError::UnknownField { message, field });
    }
    let mut reader = Reader { mapping, external: ExternalFiles::new(folder), warnings: Vec::new() };
    let model = reader.model(file)?;
    if let Some(mapping) = mapping {
        mapping.release(&bytes);
    }
    Ok(Loaded { model, warnings: reader.warnings, data_files: reader.external.paths(), file_bytes })
}

struct Reader<'a> {
    mapping: Option<&'a Arc<Mapping>>,
    external: ExternalFiles,
    warnings: Vec<String>,
}

/// Names visible at one place: one table per scope, innermost last.
type Visible = Vec<HashMap<String, ValueId>>;

impl Reader<'_> {
    fn model(&mut self, file: proto::ModelProto) -> Result<Model, ReadError> {
        let graph = *file.graph.ok_or(ReadError::NoGraph)?;
        let mut functions = Vec::with_capacity(file.functions.len());
        for function in file.functions {
            functions.push(self.function(function)?);
        }
        let mut main = Graph::new("");
        self.scope(&mut main, ScopeId::MAIN, graph, &mut Vec::new())?;
        Ok(Model {
            ir_version: file.ir_version.unwrap_or(0),
            opsets: convert::opsets(file.opset_import),
            producer_name: file.producer_name.unwrap_or_default(),
            producer_version: file.producer_version.unwrap_or_default(),
            domain: file.domain.unwrap_or_default(),
            model_version: file.model_version,
            doc: file.doc_string.unwrap_or_default(),
            metadata: convert::metadata(file.metadata_props),
            graph: main,
            functions,
            configurations: file.configuration.into_iter().map(convert::configuration).collect(),
            training: file.training_info.iter().map(|t| t.encode_to_vec().into()).collect(),
        })
    }

    fn function(&mut self, file: proto::FunctionProto) -> Result<Function, ReadError> {
        let name = file.name.unwrap_or_default();
        let body = proto::GraphProto {
            name: Some(name.clone()),
            node: file.node,
            input: file.input.into_iter().map(named).collect(),
            output: file.output.into_iter().map(named).collect(),
            value_info: file.value_info,
            ..Default::default()
        };
        let mut graph = Graph::new("");
        self.scope(&mut graph, ScopeId::MAIN, body, &mut Vec::new())?;
        let mut defaults = Vec::new();
        for attribute in file.attribute_proto {
            defaults.push(self.attribute(&mut graph, attribute, &name, &mut Vec::new())?);
        }
        Ok(Function {
            name,
            domain: file.domain.unwrap_or_default(),
            overload: file.overload.unwrap_or_default(),
            attributes: file.attribute,
            defaults,
            opsets: convert::opsets(file.opset_import),
            graph,
            doc: file.doc_string.unwrap_or_default(),
            metadata: convert::metadata(file.metadata_props),
        })
    }

    /// Fills `scope` from `file`. Every name of the scope is declared before any is looked up, so order is free.
    fn scope(
        &mut self,
        graph: &mut Graph,
        scope: ScopeId,
        file: proto::GraphProto,
        visible: &mut Visible,
    ) -> Result<(), ReadError> {
        let name = file.name.unwrap_or_default();
        visible.push(HashMap::new());
        for input in file.input {
            let value = self.declare(graph, visible, &name, "graph input", input)?;
            graph.add_input(scope, value);
        }
        for tensor in file.initializer {
            let label = tensor.name().to_owned();
            let source = TensorSource { mapping: self.mapping, external: &mut self.external };
            let tensor = convert::tensor(tensor, source)?;
            self.initializer(graph, scope, visible, &name, label, Initializer::Dense(tensor))?;
        }
        for sparse in file.sparse_initializer {
            let label = sparse.values.as_ref().map(|v| v.name().to_owned()).unwrap_or_default();
            let sparse = self.sparse(sparse, &label)?;
            self.initializer(graph, scope, visible, &name, label, Initializer::Sparse(sparse))?;
        }
        for node in &file.node {
            for output in node.output.iter().filter(|output| !output.is_empty()) {
                let value = graph.add_value(output.clone(), None);
                if here(visible).insert(output.clone(), value).is_some() {
                    return Err(ReadError::Duplicate { what: "value", name: output.clone() });
                }
            }
        }
        let mut strays = 0;
        for info in file.value_info {
            match here(visible).get(info.name()) {
                Some(&value) if graph.value(value).ty.is_none() => describe_value(graph, value, info)?,
                Some(_) => {}
                None => strays += 1,
            }
        }
        if strays > 0 {
            self.warnings.push(format!("graph `{name}` describes {strays} values that do not exist; dropped"));
        }
        for annotation in file.quantization_annotation {
            self.annotation(graph, visible, &name, annotation);
        }
        for node in file.node {
            self.node(graph, scope, node, visible)?;
        }
        for output in file.output {
            let Some(value) = lookup(visible, output.name()) else {
                return Err(ReadError::DanglingOutput { graph: name, value: output.name().to_owned() });
            };
            graph.add_output(scope, value);
            // The declared output speaks for the value unless an input declaration already did.
            if graph.scope_of(value) == Some(scope) && !graph.scope(scope).inputs().contains(&value) {
                describe_value(graph, value, output)?;
            }
        }
        visible.pop();
        let here = graph.scope_mut(scope);
        here.name = name;
        here.doc = file.doc_string.unwrap_or_default();
        here.metadata = convert::metadata(file.metadata_props);
        Ok(())
    }

    fn declare(
        &mut self,
        graph: &mut Graph,
        visible: &mut Visible,
        scope_name: &str,
        what: &'static str,
        info: proto::ValueInfoProto,
    ) -> Result<ValueId, ReadError> {
        let name = info.name().to_owned();
        if name.is_empty() {
            return Err(ReadError::Unnamed { what, graph: scope_name.to_owned() });
        }
        let value = graph.add_value(name.clone(), None);
        if here(visible).insert(name.clone(), value).is_some() {
            return Err(ReadError::Duplicate { what, name });
        }
        describe_value(graph, value, info)?;
        Ok(value)
    }

    fn initializer(
        &mut self,
        graph: &mut Graph,
        scope: ScopeId,
        visible: &mut Visible,
        scope_name: &str,
        label: String,
        initializer: Initializer,
    ) -> Result<(), ReadError> {
        if label.is_empty() {
            return Err(ReadError::Unnamed { what: "an initializer", graph: scope_name.to_owned() });
        }
        match here(visible).get(&label) {
            Some(&input) if graph.value(input).initializer().is_none() => graph.set_default(input, Some(initializer)),
            Some(_) => return Err(ReadError::Duplicate { what: "initializer", name: label }),
            None => {
                let value = graph.add_value(label.clone(), None);
                graph.make_initializer(scope, value, initializer);
                here(visible).insert(label, value);
            }
        }
        Ok(())
    }

    fn annotation(
        &mut self,
        graph: &mut Graph,
        visible: &Visible,
        scope_name: &str,
        annotation: proto::TensorAnnotation,
    ) {
        let target = lookup(visible, annotation.tensor_name());
        let entries = annotation.quant_parameter_tensor_names.iter();
        let parameters: Option<Vec<(String, ValueId)>> =
            entries.map(|e| Some((e.key().to_owned(), lookup(visible, e.value())?))).collect();
        match (target, parameters) {
            (Some(target), Some(parameters)) => graph.set_quantization(target, parameters),
            _ => self.warnings.push(format!(
                "graph `{scope_name}` has a quantization annotation of `{}` that names values which do not exist; dropped",
                annotation.tensor_name()
            )),
        }
    }

    fn node(
        &mut self,
        graph: &mut Graph,
        scope: ScopeId,
        file: proto::NodeProto,
        visible: &mut Visible,
    ) -> Result<(), ReadError> {
        let op = file.op_type.unwrap_or_default();
        let name = file.name.unwrap_or_default();
        let label = if name.is_empty() { file.output.first().cloned().unwrap_or_default() } else { name.clone() };
        if op.is_empty() {
            return Err(ReadError::NoOperator { node: label });
        }
        let mut inputs = Vec::with_capacity(file.input.len());
        for (index, value) in file.input.iter().enumerate() {
            let found = lookup(visible, value);
            if found.is_none() && !value.is_empty() {
                return Err(ReadError::Dangling { node: label, op, index, value: value.clone() });
            }
            inputs.push(found);
        }
        let outputs: Vec<Option<ValueId>> = file.output.iter().map(|o| here(visible).get(o).copied()).collect();
        let mut attributes: Vec<Attribute> = Vec::with_capacity(file.attribute.len());
        for attribute in file.attribute {
            let attribute = self.attribute(graph, attribute, &label, visible)?;
            if attributes.iter().any(|a| a.name == attribute.name) {
                let problem = "is given twice".to_owned();
                return Err(ReadError::Attribute { node: label, attribute: attribute.name, problem });
            }
            attributes.push(attribute);
        }
        let placements = file.device_configurations;
        let placements = placements.into_iter().map(|p| convert::placement(p, &file.input, &file.output)).collect();
        let mut node = Node::new(op).in_domain(file.domain.unwrap_or_default());
        node.overload = file.overload.unwrap_or_default();
        node.name = name;
        node.doc = file.doc_string.unwrap_or_default();
        node.attributes = attributes;
        node.metadata = convert::metadata(file.metadata_props);
        node.placements = placements;
        graph.add_node(scope, node, inputs, outputs);
        Ok(())
    }

    fn sparse(&mut self, file: proto::SparseTensorProto, label: &str) -> Result<SparseTensor, ReadError> {
        let dims =
            convert::dims(&file.dims).map_err(|source| ReadError::Tensor { tensor: label.to_owned(), source })?;
        let mut part = |part: Option<proto::TensorProto>| {
            convert::tensor(
                part.unwrap_or_default(),
                TensorSource { mapping: self.mapping, external: &mut self.external },
            )
        };
        Ok(SparseTensor { values: part(file.values)?, indices: part(file.indices)?, dims })
    }

    fn attribute(
        &mut self,
        graph: &mut Graph,
        file: proto::AttributeProto,
        node: &str,
        visible: &mut Visible,
    ) -> Result<Attribute, ReadError> {
        let name = file.name().to_owned();
        let problem = |problem: &str| ReadError::Attribute {
            node: node.to_owned(),
            attribute: name.clone(),
            problem: problem.to_owned(),
        };
        let doc = file.doc_string().to_owned();
        let kind = convert::attribute_kind(&file);
        if !file.ref_attr_name().is_empty() {
            let value = AttributeValue::Reference { name: file.ref_attr_name().to_owned(), kind };
            return Ok(Attribute { name, value, doc });
        }
        let mut tensor = |t: proto::TensorProto| {
            convert::tensor(t, TensorSource { mapping: self.mapping, external: &mut self.external })
        };
        let types = |t: proto::TypeProto| convert::ty(t, &name);
        let value = match kind {
            1 => AttributeValue::Float(file.f()),
            2 => AttributeValue::Int(file.i()),
            3 => AttributeValue::String(file.s.unwrap_or_default()),
            4 => AttributeValue::Tensor(tensor(*file.t.ok_or_else(|| problem("has no tensor"))?)?),
            5 => {
                let body = *file.g.ok_or_else(|| problem("has no graph"))?;
                AttributeValue::Graph(self.subgraph(graph, body, visible)?)
            }
            6 => AttributeValue::Floats(file.floats),
            7 => AttributeValue::Ints(file.ints),
            8 => AttributeValue::Strings(file.strings),
            9 => AttributeValue::Tensors(file.tensors.into_iter().map(tensor).collect::<Result<_, _>>()?),
            10 => {
                let mut scopes = Vec::new();
                for body in file.graphs {
                    scopes.push(self.subgraph(graph, body, visible)?);
                }
                AttributeValue::Graphs(scopes)
            }
            11 => {
                let sparse = *file.sparse_tensor.ok_or_else(|| problem("has no tensor"))?;
                AttributeValue::SparseTensor(self.sparse(sparse, node)?)
            }
            12 => {
                let mut all = Vec::new();
                for sparse in file.sparse_tensors {
                    all.push(self.sparse(sparse, node)?);
                }
                AttributeValue::SparseTensors(all)
            }
            13 => AttributeValue::Type(types(*file.tp.ok_or_else(|| problem("has no type"))?)?),
            14 => AttributeValue::Types(file.type_protos.into_iter().map(types).collect::<Result<_, _>>()?),
            _ => return Err(problem(&format!("has the unknown kind {kind}"))),
        };
        Ok(Attribute { name, value, doc })
    }

    fn subgraph(
        &mut self,
        graph: &mut Graph,
        body: proto::GraphProto,
        visible: &mut Visible,
    ) -> Result<ScopeId, ReadError> {
        let scope = graph.add_scope("");
        self.scope(graph, scope, body, visible)?;
        Ok(scope)
    }
}

fn named(name: String) -> proto::ValueInfoProto {
    proto::ValueInfoProto { name: Some(name), ..Default::default() }
}

fn here(visible: &mut Visible) -> &mut HashMap<String, ValueId> {
    visible.last_mut().expect("a scope is entered before its names are declared")
}

fn lookup(visible: &Visible, name: &str) -> Option<ValueId> {
    if name.is_empty() {
        return None;
    }
    visible.iter().rev().find_map(|names| names.get(name).copied())
}

fn describe_value(graph: &mut Graph, value: ValueId, info: proto::ValueInfoProto) -> Result<(), ReadError> {
    let name = graph.value(value).name.clone();
    let ty: Option<Type> = info.r#type.map(|t| convert::ty(*t, &name)).transpose()?;
    let target = graph.value_mut(value);
    if ty.is_some() {
        target.ty = ty;
    }
    if let Some(doc) = info.doc_string {
        target.doc = doc;
    }
    if !info.metadata_props.is_empty() {
        target.metadata = convert::metadata(info.metadata_props);
    }
    Ok(())
}
