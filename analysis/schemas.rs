//! Which element types the parameters of operators take, by the version of the operator set.
//!
//! The table is `schemas.txt`, which `schemas.py` writes from the schemas of ONNX and ONNX Runtime.

use lathe_ir::{DataType, Node};
use std::{collections::BTreeMap, sync::LazyLock};

/// The parameters of one version of an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    /// The version of its operator set that has this form first.
    pub since: i64,
    inputs: Vec<Parameter>,
    outputs: Vec<Parameter>,
    variables: Vec<TypeVariable>,
}

/// A name that stands for one type wherever it is used in a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeVariable {
    /// Its name: `T`.
    pub name: &'static str,
    /// One bit per element type, by the number that ONNX gives it.
    types: u64,
}

/// What one input or output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Formal {
    /// Tensors of the type that this variable of the schema stands for.
    Variable(usize),
    /// Tensors of this type.
    Fixed(DataType),
    /// No tensor, or one of any type.
    Any,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parameter {
    formal: Formal,
    repeats: bool,
}

impl TypeVariable {
    /// Whether it may stand for tensors of this element type.
    pub fn allows(&self, elem: DataType) -> bool {
        self.types & (1 << elem.code()) != 0
    }
}

impl Schema {
    /// The schema of a node where its domain is imported at `version`; `None` where none is known.
    pub fn of(node: &Node, version: i64) -> Option<&'static Schema> {
        let versions = versions(node)?;
        versions.iter().rev().find(|schema| schema.since <= version)
    }

    /// The first version of the operator in which a parameter that is `elem` somewhere may be: of all newer ones.
    pub fn first_with(node: &Node, elem: DataType) -> Option<i64> {
        let versions = versions(node)?;
        versions.iter().find(|s| s.variables.iter().any(|v| v.allows(elem))).map(|schema| schema.since)
    }

    /// What input `index` holds; `None` where the operator has no such input.
    pub fn input(&self, index: usize) -> Option<Formal> {
        at(&self.inputs, index)
    }

    /// What output `index` holds; `None` where the operator has no such output.
    pub fn output(&self, index: usize) -> Option<Formal> {
        at(&self.outputs, index)
    }

    /// The variables that [`Formal::Variable`] counts.
    pub fn variables(&self) -> &[TypeVariable] {
        &self.variables
    }
}

fn at(parameters: &[Parameter], index: usize) -> Option<Formal> {
    let repeated = || parameters.last().filter(|p| p.repeats);
    parameters.get(index).or_else(repeated).map(|p| p.formal)
}

/// The versions of a node's operator, oldest first.
fn versions(node: &Node) -> Option<&'static [Schema]> {
    let domain = if node.is_standard() { "" } else { node.domain.as_str() };
    TABLE.get(domain)?.get(node.op_type.as_str()).map(Vec::as_slice)
}

/// Versions of operators by domain and name.
type Table = BTreeMap<&'static str, BTreeMap<&'static str, Vec<Schema>>>;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = Table::new();
    for line in include_str!("schemas.txt").lines() {
        let ((domain, name), schema) = read(line).expect("the table is written by `schemas.py`");
        table.entry(domain).or_default().entry(name).or_default().push(schema);
    }
    table
});

fn read(line: &'static str) -> Option<((&'static str, &'static str), Schema)> {
    let mut fields = line.split(' ');
    let mut field = || Some(fields.next()?).map(|text| if text == "-" { "" } else { text });
    let (domain, name, since) = (field()?, field()?, field()?.parse().ok()?);
    let (inputs, outputs) = (field()?, field()?);
    let variables: Vec<TypeVariable> = field()?.split(';').filter_map(variable).collect();
    let list = |text: &str| -> Option<Vec<Parameter>> {
        text.split(',').filter(|text| !text.is_empty()).map(|text| parameter(text, &variables)).collect()
    };
    let (inputs, outputs) = (list(inputs)?, list(outputs)?);
    Some(((domain, name), Schema { since, inputs, outputs, variables }))
}

fn variable(text: &'static str) -> Option<TypeVariable> {
    let (name, letters) = text.split_once('=')?;
    let types = letters.chars().filter_map(elem_of).fold(0, |types, elem| types | 1 << elem.code());
    Some(TypeVariable { name, types })
}

fn parameter(text: &str, variables: &[TypeVariable]) -> Option<Parameter> {
    let own_types = text.starts_with('~');
    let repeats = own_types || text.starts_with('*');
    let text = text.trim_start_matches(['*', '~']);
    let formal = match text {
        "?" => Formal::Any,
        _ if own_types => Formal::Any,
        _ => match text.strip_prefix('=') {
            Some(letter) => Formal::Fixed(elem_of(letter.chars().next()?)?),
            None => Formal::Variable(variables.iter().position(|v| v.name == text)?),
        },
    };
    Some(Parameter { formal, repeats })
}

/// `a` is the first element type.
fn elem_of(letter: char) -> Option<DataType> {
    DataType::from_code(letter as i32 - 'a' as i32 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OPERATORS, operators::Operator};

    fn schema(name: &str, version: i64) -> &'static Schema {
        Schema::of(&Node::new(name), version).unwrap()
    }

    #[test]
    fn every_standard_operator_has_a_schema() {
        let missing: Vec<&str> = OPERATORS
            .iter()
            .filter(|operator: &&Operator| operator.domain.is_empty())
            .filter(|operator| versions(&Node::new(operator.name)).is_none())
            .map(|operator| operator.name)
            .collect();
        assert_eq!(missing, [] as [&str; 0]);
    }

    #[test]
    fn types_are_those_of_the_version() {
        let allows = |name: &str, version: i64, elem: DataType| schema(name, version).variables()[0].allows(elem);
        assert!(!allows("Range", 17, DataType::Float16) && allows("Range", 27, DataType::Float16));
        assert!(!allows("Conv", 21, DataType::Bfloat16) && allows("Conv", 22, DataType::Bfloat16));
        assert_eq!(Schema::first_with(&Node::new("Conv"), DataType::Bfloat16), Some(22));
        assert_eq!(schema("Resize", 13).input(2), Some(Formal::Fixed(DataType::Float)));
        assert_eq!(schema("Concat", 13).input(40), Some(Formal::Variable(0)));
        assert_eq!(schema("Relu", 13).input(1), None);
        assert!(!schema("SequenceLength", 17).variables()[0].allows(DataType::Float));
        assert_eq!(schema("Loop", 13).input(7), Some(Formal::Any));
        assert!(Schema::of(&Node::new("Gelu"), 19).is_none());
        assert!(Schema::of(&Node::new("MatMulNBits").in_domain("com.microsoft"), 1).is_some());
    }
}
