//! Scopes, nodes and functions as messages.

use super::{
    convert::{self, entries, imports, text, type_proto},
    proto,
};
use crate::{Attribute, AttributeValue, Function, Graph, Initializer, NodeId, ScopeId, ValueId};
use std::collections::BTreeMap;

pub(super) fn name_of(graph: &Graph, value: ValueId) -> String {
    graph.value(value).name.clone()
}

pub(super) fn value_info(graph: &Graph, value: ValueId) -> proto::ValueInfoProto {
    let value = graph.value(value);
    proto::ValueInfoProto {
        name: Some(value.name.clone()),
        r#type: value.ty.as_ref().map(|t| Box::new(type_proto(t))),
        doc_string: text(&value.doc),
        metadata_props: entries(&value.metadata),
    }
}

/// A scope as a message. The main graph's dense initializers are left out: the plan streams them.
pub(super) fn scope_proto(graph: &Graph, scope: ScopeId) -> proto::GraphProto {
    let here = graph.scope(scope);
    let info = |&value: &ValueId| value_info(graph, value);
    let mut file = proto::GraphProto {
        name: text(&here.name),
        doc_string: text(&here.doc),
        metadata_props: entries(&here.metadata),
        input: here.inputs().iter().map(info).collect(),
        output: here.outputs().iter().map(info).collect(),
        ..Default::default()
    };
    let mut annotated: Vec<ValueId> = here.inputs().to_vec();
    let constants: Vec<ValueId> = graph.initializers(scope).collect();
    for &value in here.inputs().iter().chain(&constants) {
        let name = &graph.value(value).name;
        match graph.value(value).initializer() {
            Some(Initializer::Sparse(sparse)) => file.sparse_initializer.push(convert::sparse_proto(name, sparse)),
            Some(Initializer::Dense(tensor)) if scope != ScopeId::MAIN => {
                file.initializer.push(convert::tensor_proto(name, tensor));
            }
            _ => {}
        }
    }
    annotated.extend(&constants);
    let described = |value: ValueId| {
        let v = graph.value(value);
        v.ty.is_some() && !here.outputs().contains(&value)
    };
    file.value_info.extend(constants.iter().filter(|&&v| described(v)).map(info));
    for id in graph.nodes(scope) {
        file.node.push(node_proto(graph, id));
        for value in graph.node(id).outputs().iter().flatten() {
            annotated.push(*value);
            if described(*value) {
                file.value_info.push(value_info(graph, *value));
            }
        }
    }
    for value in annotated {
        let parameters = graph.value(value).quantization();
        if !parameters.is_empty() {
            let names: Vec<(String, String)> =
                parameters.iter().map(|(k, v)| (k.clone(), name_of(graph, *v))).collect();
            file.quantization_annotation.push(proto::TensorAnnotation {
                tensor_name: Some(name_of(graph, value)),
                quant_parameter_tensor_names: entries(&names),
            });
        }
    }
    file
}

pub(super) fn node_proto(graph: &Graph, id: NodeId) -> proto::NodeProto {
    let node = graph.node(id);
    let names = |values: &[Option<ValueId>]| -> Vec<String> {
        values.iter().map(|v| v.map(|v| name_of(graph, v)).unwrap_or_default()).collect()
    };
    let (input, output) = (names(node.inputs()), names(node.outputs()));
    proto::NodeProto {
        name: text(&node.name),
        op_type: Some(node.op_type.clone()),
        domain: text(&node.domain),
        overload: text(&node.overload),
        attribute: node.attributes.iter().map(|a| attribute_proto(graph, a)).collect(),
        doc_string: text(&node.doc),
        metadata_props: entries(&node.metadata),
        device_configurations: node.placements.iter().map(|p| convert::placement_proto(p, &input, &output)).collect(),
        input,
        output,
    }
}

pub(super) fn attribute_proto(graph: &Graph, attribute: &Attribute) -> proto::AttributeProto {
    let mut file = proto::AttributeProto {
        name: Some(attribute.name.clone()),
        doc_string: text(&attribute.doc),
        ..Default::default()
    };
    let kind = match &attribute.value {
        AttributeValue::Float(v) => {
            file.f = Some(*v);
            1
        }
        AttributeValue::Int(v) => {
            file.i = Some(*v);
            2
        }
        AttributeValue::String(v) => {
            file.s = Some(v.clone());
            3
        }
        AttributeValue::Tensor(v) => {
            file.t = Some(Box::new(convert::tensor_proto("", v)));
            4
        }
        AttributeValue::Graph(scope) => {
            file.g = Some(Box::new(scope_proto(graph, *scope)));
            5
        }
        AttributeValue::Floats(v) => {
            file.floats = v.clone();
            6
        }
        AttributeValue::Ints(v) => {
            file.ints = v.clone();
            7
        }
        AttributeValue::Strings(v) => {
            file.strings = v.clone();
            8
        }
        AttributeValue::Tensors(v) => {
            file.tensors = v.iter().map(|t| convert::tensor_proto("", t)).collect();
            9
        }
        AttributeValue::Graphs(scopes) => {
            file.graphs = scopes.iter().map(|&s| scope_proto(graph, s)).collect();
            10
        }
        AttributeValue::SparseTensor(v) => {
            file.sparse_tensor = Some(Box::new(convert::sparse_proto("", v)));
            11
        }
        AttributeValue::SparseTensors(v) => {
            file.sparse_tensors = v.iter().map(|s| convert::sparse_proto("", s)).collect();
            12
        }
        AttributeValue::Type(v) => {
            file.tp = Some(Box::new(type_proto(v)));
            13
        }
        AttributeValue::Types(v) => {
            file.type_protos = v.iter().map(type_proto).collect();
            14
        }
        AttributeValue::Reference { name, kind } => {
            file.ref_attr_name = Some(name.clone());
            *kind
        }
    };
    file.r#type = Some(kind);
    file
}

pub(super) fn function_proto(function: &Function) -> proto::FunctionProto {
    let body = scope_proto(&function.graph, ScopeId::MAIN);
    let main = function.graph.main();
    let names = |values: &[ValueId]| values.iter().map(|&v| name_of(&function.graph, v)).collect();
    // Constants that passes put into a body become nodes: a function has no initializers.
    let constants = function.graph.initializers(ScopeId::MAIN).filter_map(|value| {
        let Some(Initializer::Dense(tensor)) = function.graph.value(value).initializer() else { return None };
        let value_attribute = Attribute::new("value", tensor.clone());
        Some(proto::NodeProto {
            output: vec![name_of(&function.graph, value)],
            op_type: Some("Constant".to_owned()),
            attribute: vec![attribute_proto(&function.graph, &value_attribute)],
            ..Default::default()
        })
    });
    let mut node: Vec<proto::NodeProto> = constants.collect();
    node.extend(body.node);
    let typed_ends = main.inputs().iter().chain(main.outputs()).filter(|&&v| function.graph.value(v).ty.is_some());
    let mut value_info: BTreeMap<String, proto::ValueInfoProto> = BTreeMap::new();
    for &value in typed_ends {
        value_info.insert(name_of(&function.graph, value), self::value_info(&function.graph, value));
    }
    let mut value_info: Vec<proto::ValueInfoProto> = value_info.into_values().collect();
    value_info.extend(body.value_info);
    proto::FunctionProto {
        name: Some(function.name.clone()),
        input: names(main.inputs()),
        output: names(main.outputs()),
        attribute: function.attributes.clone(),
        attribute_proto: function.defaults.iter().map(|a| attribute_proto(&function.graph, a)).collect(),
        node,
        doc_string: text(&function.doc),
        opset_import: imports(&function.opsets),
        domain: text(&function.domain),
        overload: text(&function.overload),
        value_info,
        metadata_props: entries(&function.metadata),
    }
}
