//! From text to a tree of graphs, nodes and attributes.

use super::{
    is_special_float,
    scan::{Number, Parsed, Scanner},
    tree::{Header, RawAttribute, RawAttributeValue, RawFunction, RawGraph, RawModel, RawName, RawNode, RawValue},
};
use crate::{AttributeValue, Initializer, SparseTensor, Tensor, Type, TypeKind};
use bytes::Bytes;

/// One attribute value, or one entry of a list.
enum Single<'a> {
    Number(Number<'a>),
    String(Bytes),
    Tensor(Tensor),
    Sparse(SparseTensor),
    Type(Type),
    Graph(RawGraph),
    Reference(String),
}

impl Single<'_> {
    /// The ONNX attribute type of this value alone.
    fn kind(&self) -> &'static str {
        match self {
            Single::Number(number) if number.is_float => "float",
            Single::Number(_) => "int",
            Single::String(_) => "string",
            Single::Tensor(_) => "tensor",
            Single::Sparse(_) => "sparse_tensor",
            Single::Type(_) => "type_proto",
            Single::Graph(_) => "graph",
            Single::Reference(_) => "undefined",
        }
    }
}

impl<'a> Scanner<'a> {
    /// A model: a header, or none, a graph and functions.
    pub fn model(&mut self) -> Parsed<RawModel> {
        let header = self.optional_header()?;
        let graph = self.graph()?;
        let mut functions = Vec::new();
        while self.peek().is_some() {
            functions.push(self.function()?);
        }
        Ok(RawModel { header, graph, functions })
    }

    fn optional_header(&mut self) -> Parsed<Option<Header>> {
        if !self.eat(b'<') {
            return Ok(None);
        }
        let mut header = Header::default();
        loop {
            self.skip();
            let at = self.at;
            let key = self.name("a header field")?;
            self.expect(b':')?;
            match key.as_str() {
                "ir_version" => header.ir_version = Some(self.integer()?),
                "opset_import" => header.opsets = Some(self.opsets()?),
                "producer_name" => header.producer_name = self.string()?,
                "producer_version" => header.producer_version = self.string()?,
                "domain" => header.domain = self.string()?,
                "overload" => header.overload = self.string()?,
                "model_version" => header.model_version = Some(self.integer()?),
                "doc_string" => header.doc = self.string()?,
                "metadata_props" => {
                    self.expect(b'[')?;
                    header.metadata = self.entries()?;
                }
                _ => return self.error_at(at, format!("`{key}` is not a header field")),
            }
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(b'>')?;
        Ok(Some(header))
    }

    fn opsets(&mut self) -> Parsed<Vec<(String, i64)>> {
        let mut opsets = Vec::new();
        self.expect(b'[')?;
        if self.eat(b']') {
            return Ok(opsets);
        }
        loop {
            let domain = self.string()?;
            self.expect(b':')?;
            opsets.push((domain, self.integer()?));
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(b']')?;
        Ok(opsets)
    }

    fn function(&mut self) -> Parsed<RawFunction> {
        let header = self.optional_header()?.unwrap_or_default();
        let name = self.name("the name of a function")?;
        let (mut attributes, mut defaults) = (Vec::new(), Vec::new());
        if self.eat(b'<') && !self.eat(b'>') {
            loop {
                self.skip();
                let at = self.at;
                let name = self.name("the name of an attribute")?;
                match self.peek() {
                    Some(b':' | b'=') => defaults.push(self.attribute_after(at, name)?),
                    _ => attributes.push(name),
                }
                if !self.eat(b',') {
                    break;
                }
            }
            self.expect(b'>')?;
        }
        let graph = self.graph_after(name)?;
        Ok(RawFunction { header, attributes, defaults, graph })
    }

    fn graph(&mut self) -> Parsed<RawGraph> {
        let name = self.name("the name of a graph")?;
        self.graph_after(name)
    }

    /// A graph whose name was read.
    fn graph_after(&mut self, name: String) -> Parsed<RawGraph> {
        self.nested(|s| {
            let inputs = s.values(b'(', b')')?;
            s.arrow()?;
            let outputs = s.values(b'(', b')')?;
            if let Some(output) = outputs.iter().find(|output| output.initializer.is_some()) {
                return s.error_at(output.at, format!("output `{}` is given data", output.name));
            }
            let values = if s.peek() == Some(b'<') { s.values(b'<', b'>')? } else { Vec::new() };
            let mut nodes = Vec::new();
            s.expect(b'{')?;
            while !s.eat(b'}') {
                nodes.push(s.node()?);
            }
            Ok(RawGraph { name, inputs, outputs, values, nodes })
        })
    }

    /// Declared values, each with a type or data or both or neither.
    fn values(&mut self, open: u8, close: u8) -> Parsed<Vec<RawValue>> {
        let mut values = Vec::new();
        self.expect(open)?;
        if self.eat(close) {
            return Ok(values);
        }
        loop {
            let ty = self.optional_type()?;
            self.skip();
            let at = self.at;
            let name = self.name("the name of a value")?;
            if name.is_empty() {
                return self.error_at(at, "a declared value needs a name");
            }
            let mut initializer = None;
            if self.eat(b'=') {
                let Some(ty) = &ty else { return self.error_at(at, format!("`{name}` has data but no type")) };
                initializer = Some(self.initializer(ty, &name)?);
            }
            values.push(RawValue { at, name, ty, initializer });
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(close)?;
        Ok(values)
    }

    fn node(&mut self) -> Parsed<RawNode> {
        let mut label = String::new();
        if self.eat(b'[') {
            label = self.optional_name()?.unwrap_or_default();
            self.expect(b']')?;
        }
        let outputs = self.names()?;
        self.expect(b'=')?;
        let mut domain = String::new();
        let mut op_type = self.name("an operator")?;
        let mut dotted = false;
        while self.eat(b'.') {
            if dotted {
                domain.push('.');
            }
            dotted = true;
            domain.push_str(&op_type);
            op_type = self.name("an operator")?;
        }
        let overload = if self.eat(b':') { self.name("an overload")? } else { String::new() };
        let mut attributes = self.attributes()?;
        self.expect(b'(')?;
        let inputs = self.names()?;
        self.expect(b')')?;
        if attributes.is_empty() {
            attributes = self.attributes()?;
        }
        Ok(RawNode { label, domain, op_type, overload, attributes, inputs, outputs })
    }

    /// Names separated by commas; an empty string, or nothing before a comma, is one left out.
    fn names(&mut self) -> Parsed<Vec<RawName>> {
        let mut names = Vec::new();
        loop {
            self.skip();
            let at = self.at;
            match self.optional_name()? {
                Some(name) => names.push(RawName { at, name }),
                None if self.peek() == Some(b',') => names.push(RawName { at, name: String::new() }),
                None => return Ok(names),
            }
            if !self.eat(b',') {
                return Ok(names);
            }
        }
    }

    fn attributes(&mut self) -> Parsed<Vec<RawAttribute>> {
        let mut attributes = Vec::new();
        if !self.eat(b'<') || self.eat(b'>') {
            return Ok(attributes);
        }
        loop {
            self.skip();
            let at = self.at;
            let name = self.name("the name of an attribute")?;
            attributes.push(self.attribute_after(at, name)?);
            if !self.eat(b',') {
                break;
            }
        }
        self.expect(b'>')?;
        Ok(attributes)
    }

    /// An attribute whose name was read.
    fn attribute_after(&mut self, at: usize, name: String) -> Parsed<RawAttribute> {
        let mut stated = None;
        if self.eat(b':') {
            self.skip();
            let at = self.at;
            let kind = self.identifier().unwrap_or_default();
            stated = super::ATTRIBUTE_TYPES.iter().position(|k| *k == kind).filter(|&code| code != 0);
            if stated.is_none() {
                return self.error_at(at, format!("`{kind}` is not an attribute type"));
            }
        }
        self.expect(b'=')?;
        self.skip();
        let value_at = self.at;
        let stated_name = stated.map(|code| super::ATTRIBUTE_TYPES[code]);
        if self.eat(b'[') {
            let value = self.list(value_at, stated_name)?;
            return Ok(RawAttribute { at, name, value });
        }
        let single = self.single()?;
        let value = match single {
            Single::Reference(name) => AttributeValue::Reference { name, kind: stated.unwrap_or_default() as i32 },
            single => {
                let stated = stated_name.unwrap_or(single.kind());
                match (stated, single) {
                    ("int", Single::Number(number)) => AttributeValue::Int(self.int(number)?),
                    ("float", Single::Number(number)) => AttributeValue::Float(self.float(number)?),
                    ("string", Single::String(value)) => AttributeValue::String(value),
                    ("tensor", Single::Tensor(value)) => AttributeValue::Tensor(value),
                    ("sparse_tensor", Single::Sparse(value)) => AttributeValue::SparseTensor(value),
                    ("type_proto", Single::Type(value)) => AttributeValue::Type(value),
                    ("graph", Single::Graph(graph)) => {
                        return Ok(RawAttribute { at, name, value: RawAttributeValue::Graph(graph) });
                    }
                    (stated, single) => return self.mismatch(value_at, stated, single.kind()),
                }
            }
        };
        Ok(RawAttribute { at, name, value: RawAttributeValue::Plain(value) })
    }

    fn mismatch<T>(&self, at: usize, stated: &str, found: &str) -> Parsed<T> {
        self.error_at(at, format!("expected a value of attribute type {stated}, found {found}"))
    }

    /// The rest of a list whose `[` was read. Its type is the stated one or that of its entries.
    fn list(&mut self, at: usize, stated: Option<&'static str>) -> Parsed<RawAttributeValue> {
        let mut entries = Vec::new();
        if !self.eat(b']') {
            loop {
                self.skip();
                entries.push((self.at, self.single()?));
                if !self.eat(b',') {
                    break;
                }
            }
            self.expect(b']')?;
        }
        let entry_kind = || {
            // Whole numbers among floats are floats.
            let float = entries.iter().any(|(_, entry)| entry.kind() == "float");
            let first = entries.first().map(|(_, entry)| entry.kind());
            first.map(|kind| if kind == "int" && float { "float" } else { kind })
        };
        let kind = match stated {
            Some(stated) => stated.strip_suffix('s'),
            None => entry_kind(),
        };
        let Some(kind) = kind else {
            let message = match stated {
                Some(stated) => format!("an attribute of type {stated} cannot be a list"),
                None => "an empty list needs an attribute type, as in `axes: ints = []`".to_owned(),
            };
            return self.error_at(at, message);
        };
        let mut graphs = Vec::new();
        let (mut ints, mut floats, mut strings) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tensors, mut sparse, mut types) = (Vec::new(), Vec::new(), Vec::new());
        for (at, entry) in entries {
            match (kind, entry) {
                ("int", Single::Number(number)) => ints.push(self.int(number)?),
                ("float", Single::Number(number)) => floats.push(self.float(number)?),
                ("string", Single::String(value)) => strings.push(value),
                ("tensor", Single::Tensor(value)) => tensors.push(value),
                ("sparse_tensor", Single::Sparse(value)) => sparse.push(value),
                ("type_proto", Single::Type(value)) => types.push(value),
                ("graph", Single::Graph(graph)) => graphs.push(graph),
                (kind, entry) => return self.mismatch(at, kind, entry.kind()),
            }
        }
        Ok(RawAttributeValue::Plain(match kind {
            "int" => AttributeValue::Ints(ints),
            "float" => AttributeValue::Floats(floats),
            "string" => AttributeValue::Strings(strings),
            "tensor" => AttributeValue::Tensors(tensors),
            "sparse_tensor" => AttributeValue::SparseTensors(sparse),
            "type_proto" => AttributeValue::Types(types),
            "graph" => return Ok(RawAttributeValue::Graphs(graphs)),
            _ => return self.error_at(at, "an attribute reference cannot stand in a list"),
        }))
    }

    fn single(&mut self) -> Parsed<Single<'a>> {
        match self.peek() {
            Some(b'"') => {
                let at = self.at;
                let value = self.bytes()?;
                if self.peek() != Some(b'(') {
                    return Ok(Single::String(value.into()));
                }
                let Ok(name) = String::from_utf8(value) else { return self.error_at(at, "the name is not UTF-8") };
                return Ok(Single::Graph(self.graph_after(name)?));
            }
            Some(b'@') => {
                self.at += 1;
                return Ok(Single::Reference(self.name("the name of an attribute")?));
            }
            _ => {}
        }
        if self.at_type() {
            let ty = self.ty()?;
            let data = matches!(self.peek(), Some(b'{' | b'=' | b'"')) || self.peek_identifier().is_some();
            if !data || !matches!(ty.kind, TypeKind::Tensor { .. } | TypeKind::SparseTensor { .. }) {
                return Ok(Single::Type(ty));
            }
            // A tensor may have a name, which means nothing in an attribute.
            let name = self.optional_name()?.unwrap_or_default();
            self.eat(b'=');
            return Ok(match self.initializer(&ty, &name)? {
                Initializer::Dense(tensor) => Single::Tensor(tensor),
                Initializer::Sparse(tensor) => Single::Sparse(tensor),
            });
        }
        match self.peek_identifier() {
            Some(word) if !is_special_float(word) => Ok(Single::Graph(self.graph()?)),
            _ => Ok(Single::Number(self.number()?)),
        }
    }
}
