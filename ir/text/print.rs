//! From a model to text.

mod data;

use super::{ATTRIBUTE_TYPES, is_special_float, is_type_word};
use crate::{
    Attribute, AttributeValue, DataType, Dim, Function, Graph, Model, NodeId, ScopeId, Shape, Type, TypeKind, Use,
    ValueId,
};
use std::fmt::Write;

/// What the text of a model shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrintOptions {
    /// Every element of every tensor, and stated types in the syntax rather than in comments: parsing gives the same
    /// model back. Otherwise tensors over eight elements are abbreviated to their number of elements and a hash.
    pub full: bool,
    /// The model's header, `<ir_version: …>`.
    pub header: bool,
    /// The stated types of node outputs, as comments.
    pub types: bool,
    /// Node names.
    pub labels: bool,
}

impl Default for PrintOptions {
    fn default() -> PrintOptions {
        PrintOptions { full: false, header: true, types: true, labels: true }
    }
}

/// The text of a model with large tensors abbreviated.
pub fn print(model: &Model) -> String {
    print_with(model, &PrintOptions::default())
}

/// The text of a model from which [`super::parse`] makes the same model again.
pub fn print_full(model: &Model) -> String {
    print_with(model, &PrintOptions { full: true, ..PrintOptions::default() })
}

/// The text of the graph and the local functions without the model's header, as snapshots want it.
pub fn print_graph(model: &Model) -> String {
    print_with(model, &PrintOptions { header: false, ..PrintOptions::default() })
}

/// The text of a model as `options` say. Ends with a newline.
pub fn print_with(model: &Model, options: &PrintOptions) -> String {
    let mut printer = Printer { out: String::new(), options, in_comment: false };
    if options.header {
        printer.model_header(model);
    }
    printer.scope(&model.graph, ScopeId::MAIN, 0);
    printer.out.push('\n');
    for function in &model.functions {
        printer.out.push('\n');
        printer.function(function);
    }
    printer.out
}

impl std::fmt::Display for Type {
    /// The type as comments of the text form write it: `float[N,3]`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut printer = Printer { out: String::new(), options: &PrintOptions::default(), in_comment: true };
        printer.ty(self);
        f.write_str(&printer.out)
    }
}

/// Appends `items` separated by commas.
macro_rules! join {
    ($self:ident, $items:expr, |$item:pat_param| $body:expr) => {
        for (index, $item) in $items.into_iter().enumerate() {
            if index > 0 {
                $self.out.push_str(", ");
            }
            $body;
        }
    };
}
pub(super) use join;

pub(super) struct Printer<'a> {
    pub out: String,
    pub options: &'a PrintOptions,
    /// What is written is not read back, so that names need no quotes.
    in_comment: bool,
}

impl Printer<'_> {
    pub fn push(&mut self, text: &str) {
        self.out.push_str(text);
    }

    pub fn display(&mut self, value: impl std::fmt::Display) {
        // Writing to a string cannot fail.
        let _ = write!(self.out, "{value}");
    }

    fn indent(&mut self, depth: usize) {
        (0..depth).for_each(|_| self.push("    "));
    }

    /// A quoted name. Control characters are escaped because they would disturb a terminal or end a comment.
    fn quoted(&mut self, name: &str) {
        self.quoted_bytes(name.as_bytes(), |_| false);
    }

    /// A quoted string. Line breaks stay, so that ONNX's own parser reads the same string.
    pub fn string(&mut self, bytes: &[u8]) {
        self.quoted_bytes(bytes, |c| c == '\n' || c == '\t');
    }

    fn quoted_bytes(&mut self, bytes: &[u8], keep: impl Fn(char) -> bool) {
        self.out.push('"');
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '"' | '\\' => self.out.extend(['\\', c]),
                    _ if c.is_ascii_control() && !keep(c) => self.display(format_args!("\\x{:02x}", u32::from(c))),
                    _ => self.out.push(c),
                }
            }
            chunk.invalid().iter().for_each(|byte| self.display(format_args!("\\x{byte:02x}")));
        }
        self.out.push('"');
    }

    fn name(&mut self, name: &str) {
        let word = |rest: &str| rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let plain = !name.is_empty() && !name.as_bytes()[0].is_ascii_digit() && word(name);
        let in_comment = self.in_comment && !name.bytes().any(|b| b.is_ascii_control());
        if in_comment || plain && !is_type_word(name) && !is_special_float(name) {
            self.push(name);
        } else {
            self.quoted(name);
        }
    }

    fn value(&mut self, graph: &Graph, value: Option<ValueId>) {
        self.name(value.map_or("", |v| &graph.value(v).name));
    }

    fn model_header(&mut self, model: &Model) {
        self.push("<\n    ir_version: ");
        self.display(model.ir_version);
        self.push(",\n    opset_import: ");
        self.opsets(&model.opsets);
        let strings = [
            ("producer_name", &model.producer_name),
            ("producer_version", &model.producer_version),
            ("domain", &model.domain),
        ];
        for (key, value) in strings {
            self.header_string(key, value);
        }
        if let Some(version) = model.model_version {
            self.display(format_args!(",\n    model_version: {version}"));
        }
        self.header_string("doc_string", &model.doc);
        if !model.metadata.is_empty() {
            self.push(",\n    metadata_props: [");
            join!(self, &model.metadata, |(key, value)| {
                self.string(key.as_bytes());
                self.push(": ");
                self.string(value.as_bytes());
            });
            self.push("]");
        }
        self.push("\n>\n");
    }

    fn header_string(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.push(",\n    ");
            self.push(key);
            self.push(": ");
            self.string(value.as_bytes());
        }
    }

    fn opsets(&mut self, opsets: &[(String, i64)]) {
        self.push("[");
        join!(self, opsets, |(domain, version)| {
            self.string(domain.as_bytes());
            self.display(format_args!(" : {version}"));
        });
        self.push("]");
    }

    fn function(&mut self, function: &Function) {
        self.push("<\n    domain: ");
        self.string(function.domain.as_bytes());
        self.header_string("overload", &function.overload);
        self.push(",\n    opset_import: ");
        self.opsets(&function.opsets);
        self.header_string("doc_string", &function.doc);
        self.push("\n>\n");
        self.name(&function.name);
        self.push(" ");
        if !function.attributes.is_empty() || !function.defaults.is_empty() {
            self.push("<");
            join!(self, &function.attributes, |name| self.name(name));
            for (index, attribute) in function.defaults.iter().enumerate() {
                if index > 0 || !function.attributes.is_empty() {
                    self.push(", ");
                }
                self.attribute(&function.graph, attribute, 0);
            }
            self.push("> ");
        }
        self.signature_and_body(&function.graph, ScopeId::MAIN, 0);
        self.push("\n");
    }

    fn scope(&mut self, graph: &Graph, scope: ScopeId, depth: usize) {
        self.name(&graph.scope(scope).name);
        self.push(" ");
        self.signature_and_body(graph, scope, depth);
    }

    fn signature_and_body(&mut self, graph: &Graph, scope: ScopeId, depth: usize) {
        self.declarations(graph, graph.scope(scope).inputs());
        self.push(" => ");
        self.declarations(graph, graph.scope(scope).outputs());
        self.stored(graph, scope, depth);
        self.push(" {\n");
        for node in graph.nodes(scope) {
            self.node(graph, node, depth + 1);
        }
        self.indent(depth);
        self.push("}");
    }

    fn declarations(&mut self, graph: &Graph, values: &[ValueId]) {
        self.push("(");
        join!(self, values, |&value| self.declaration(graph, value));
        self.push(")");
    }

    fn declaration(&mut self, graph: &Graph, value: ValueId) {
        // `?` tells an empty type from none, which only files do; ONNX's own parser does not know it.
        let stated = |ty: &&Type| self.options.full || ty.kind != TypeKind::Unstated;
        if let Some(ty) = graph.value(value).ty.as_ref().filter(stated) {
            self.ty(ty);
            self.push(" ");
        }
        self.value(graph, Some(value));
    }

    /// The list of initializers, defaults of inputs and (in full) stated types, one to a line.
    fn stored(&mut self, graph: &Graph, scope: ScopeId, depth: usize) {
        let inputs = graph.scope(scope).inputs().iter().copied();
        let data = inputs.chain(graph.initializers(scope));
        let data: Vec<_> = data.filter_map(|v| Some((v, graph.value(v).initializer()?))).collect();
        let mut types = Vec::new();
        if self.options.full {
            let produced = graph.nodes(scope).flat_map(|n| graph.node(n).outputs().iter().flatten().copied());
            let typed = graph.initializers(scope).chain(produced).filter(|&v| graph.value(v).ty.is_some());
            let declared = |use_: &Use| matches!(use_, Use::Output(at, _) if *at == scope);
            types.extend(typed.filter(|&v| !graph.value(v).uses().iter().any(declared)));
        }
        if data.is_empty() && types.is_empty() {
            return;
        }
        self.push(" <");
        let count = data.len() + types.len();
        let mut done = 0;
        let mut end_line = |printer: &mut Self| {
            done += 1;
            printer.push(if done < count { "," } else { "" });
        };
        for (value, initializer) in data {
            self.push("\n");
            self.indent(depth + 1);
            self.tensor_type(initializer);
            self.push(" ");
            self.value(graph, Some(value));
            self.push(" = ");
            self.data(initializer);
            end_line(self);
        }
        for value in types {
            self.push("\n");
            self.indent(depth + 1);
            self.declaration(graph, value);
            end_line(self);
        }
        self.push("\n");
        self.indent(depth);
        self.push(">");
    }

    fn node(&mut self, graph: &Graph, id: NodeId, depth: usize) {
        let node = graph.node(id);
        self.indent(depth);
        if self.options.labels && !node.name.is_empty() {
            self.push("[");
            self.name(&node.name);
            self.push("] ");
        }
        join!(self, node.outputs(), |&output| self.value(graph, output));
        self.push(if node.outputs().is_empty() { "= " } else { " = " });
        if !node.domain.is_empty() {
            self.dotted(&node.domain);
            self.push(".");
        }
        // Inside a domain, an operator may have any name; alone, its name may also be that of a type.
        if is_type_word(&node.op_type) {
            self.push(&node.op_type)
        } else {
            self.name(&node.op_type)
        };
        if !node.overload.is_empty() {
            self.push(":");
            self.name(&node.overload);
        }
        let nested = !node.subgraphs().is_empty();
        if !nested {
            self.attributes(graph, &node.attributes, depth);
        }
        self.push(" (");
        join!(self, node.inputs(), |&input| self.value(graph, input));
        self.push(")");
        if nested {
            self.attributes(graph, &node.attributes, depth);
        }
        if self.options.types && !self.options.full {
            self.type_comment(graph, node.outputs());
        }
        self.push("\n");
    }

    /// A domain: identifiers joined by points, or quoted.
    fn dotted(&mut self, domain: &str) {
        let identifier = |part: &str| {
            part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && part.bytes().next().is_some_and(|b| !b.is_ascii_digit())
        };
        if self.in_comment && !domain.bytes().any(|b| b.is_ascii_control()) || domain.split('.').all(identifier) {
            self.push(domain)
        } else {
            self.quoted(domain)
        };
    }

    fn type_comment(&mut self, graph: &Graph, outputs: &[Option<ValueId>]) {
        let types: Vec<Option<&Type>> =
            outputs.iter().map(|output| output.and_then(|v| graph.value(v).ty.as_ref())).collect();
        if types.iter().all(|ty| ty.is_none_or(|ty| ty.kind == TypeKind::Unstated)) {
            return;
        }
        self.push("  # ");
        self.in_comment = true;
        join!(self, types, |ty| match ty {
            Some(ty) => self.ty(ty),
            None => self.push("?"),
        });
        self.in_comment = false;
    }

    fn attributes(&mut self, graph: &Graph, attributes: &[Attribute], depth: usize) {
        if !attributes.is_empty() {
            self.push(" <");
            join!(self, attributes, |attribute| self.attribute(graph, attribute, depth));
            self.push(">");
        }
    }

    fn attribute(&mut self, graph: &Graph, attribute: &Attribute, depth: usize) {
        use AttributeValue::*;
        self.name(&attribute.name);
        let stated = match &attribute.value {
            Reference { kind, .. } => usize::try_from(*kind).ok().filter(|&kind| kind > 0),
            Floats(list) if list.is_empty() => Some(6),
            Ints(list) if list.is_empty() => Some(7),
            Strings(list) if list.is_empty() => Some(8),
            Tensors(list) if list.is_empty() => Some(9),
            Graphs(list) if list.is_empty() => Some(10),
            SparseTensors(list) if list.is_empty() => Some(12),
            Types(list) if list.is_empty() => Some(14),
            _ => None,
        };
        if let Some(name) = stated.and_then(|code| ATTRIBUTE_TYPES.get(code)) {
            self.push(": ");
            self.push(name);
        }
        self.push(" = ");
        match &attribute.value {
            Float(value) => self.float(*value, true),
            Int(value) => self.display(value),
            String(value) => self.string(value),
            Tensor(value) => self.tensor(value),
            Graph(scope) => self.scope(graph, *scope, depth),
            SparseTensor(value) => self.sparse(value),
            Type(value) => self.ty(value),
            Reference { name, .. } => {
                self.push("@");
                self.name(name);
            }
            list => {
                self.push("[");
                match list {
                    Floats(list) => join!(self, list, |&value| self.float(value, true)),
                    Ints(list) => join!(self, list, |value| self.display(value)),
                    Strings(list) => join!(self, list, |value| self.string(value)),
                    Tensors(list) => join!(self, list, |value| self.tensor(value)),
                    Graphs(list) => join!(self, list, |&scope| self.scope(graph, scope, depth)),
                    SparseTensors(list) => join!(self, list, |value| self.sparse(value)),
                    Types(list) => join!(self, list, |value| self.ty(value)),
                    _ => {}
                }
                self.push("]");
            }
        }
    }

    fn ty(&mut self, ty: &Type) {
        match &ty.kind {
            TypeKind::Tensor { elem, shape } => self.elem_and_shape(*elem, shape.as_ref()),
            TypeKind::SparseTensor { elem, shape } => {
                self.push("sparse_tensor(");
                self.elem_and_shape(*elem, shape.as_ref());
                self.push(")");
            }
            TypeKind::Sequence(inner) => {
                self.push("seq(");
                self.ty(inner);
                self.push(")");
            }
            TypeKind::Optional(inner) => {
                self.push("optional(");
                self.ty(inner);
                self.push(")");
            }
            TypeKind::Map { key, value } => {
                self.display(format_args!("map({key}, "));
                self.ty(value);
                self.push(")");
            }
            TypeKind::Opaque { domain, name } => {
                self.push("opaque(");
                if !domain.is_empty() {
                    self.dotted(domain);
                    self.push(",");
                }
                if !name.is_empty() {
                    self.dotted(name);
                }
                self.push(")");
            }
            TypeKind::Unstated => self.push("?"),
        }
    }

    pub fn elem_and_shape(&mut self, elem: Option<DataType>, shape: Option<&Shape>) {
        self.push(elem.map_or("undefined", DataType::name));
        let Some(shape) = shape else { return self.push("[]") };
        if shape.dims.is_empty() {
            return;
        }
        self.push("[");
        for (index, dim) in shape.dims.iter().enumerate() {
            if index > 0 {
                self.push(",");
            }
            match dim {
                Dim::Symbol(symbol) => self.name(symbol),
                dim => self.display(dim),
            }
        }
        self.push("]");
    }
}
