//! A model in the making: parts of a pipeline, and what stands between them.

use super::{Part, merge};
use crate::{
    Pass as _, PassContext,
    exact::DropDead,
    sampler::{Error, OPSET},
};
use lathe_analysis::Facts;
use lathe_ir::{AttributeValue, DataType, Dim, Initializer, Model, Node, Pasted, ScopeId, Tensor, Type, ValueId};
use std::collections::BTreeMap;

/// What a part gave, by name.
#[derive(Debug, Clone)]
pub struct Given {
    part: String,
    outputs: Vec<(String, ValueId)>,
}

impl Given {
    /// The output of one of these names, the first of them that there is.
    pub fn output(&self, names: &[&str]) -> Result<ValueId, Error> {
        let find = |name: &&str| self.outputs.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
        names.iter().find_map(find).ok_or_else(|| {
            let known: Vec<&str> = self.outputs.iter().map(|(name, _)| name.as_str()).collect();
            let (part, wanted, known) = (&self.part, names.join("` or `"), known.join("`, `"));
            Error::Pipeline(format!("`{part}` has no output `{wanted}`, it has `{known}`"))
        })
    }

    /// The state that many layers before the last: `hidden_states.10` of 12 layers where `back` is 2, since the first one is
    /// what the layers begin with.
    pub fn hidden(&self, back: usize) -> Result<ValueId, Error> {
        let number = |name: &str| name.strip_prefix("hidden_states.").and_then(|k| k.parse::<usize>().ok());
        let last = self.outputs.iter().filter_map(|(name, _)| number(name)).max();
        let wanted = last.and_then(|last| (last + 1).checked_sub(back));
        let found = self.outputs.iter().find(|(name, _)| number(name).is_some() && number(name) == wanted);
        found.map(|(_, value)| *value).ok_or_else(|| {
            let part = &self.part;
            Error::Pipeline(format!(
                "`{part}` has no outputs `hidden_states.0` to the last one, of which the pipeline reads the one {back} \
                 from the end; export it with hidden states"
            ))
        })
    }

    /// Two of the same part, output by output as one value.
    pub fn joined(&self, other: &Given, mut join: impl FnMut(ValueId, ValueId) -> ValueId) -> Given {
        let outputs = self.outputs.iter().zip(&other.outputs);
        let outputs = outputs.map(|((name, a), (_, b))| (name.clone(), join(*a, *b))).collect();
        Given { part: self.part.clone(), outputs }
    }

    /// The first output.
    pub fn first(&self) -> Result<ValueId, Error> {
        let first = self.outputs.first().map(|(_, value)| *value);
        first.ok_or_else(|| Error::Pipeline(format!("`{}` has no output", self.part)))
    }
}

/// A model in the making. Floats between parts are float32.
pub struct Stage<'a> {
    model: Model,
    parts: &'a [Part],
    /// What constants of a part became, so that a part that is there twice has them once.
    constants: BTreeMap<String, BTreeMap<ValueId, ValueId>>,
    elems: BTreeMap<ValueId, DataType>,
    runs: usize,
}

impl<'a> Stage<'a> {
    /// Nothing yet, in the operator set that all parts are in.
    pub fn new(name: &str, parts: &'a [Part]) -> Stage<'a> {
        let opset = parts.iter().map(|part| part.model.opset()).max().unwrap_or(OPSET);
        Stage::of(name, parts, opset)
    }

    /// Nothing yet, in this operator set.
    pub fn of(name: &str, parts: &'a [Part], opset: i64) -> Stage<'a> {
        let mut model = merge::empty(name);
        model.import("", opset);
        Stage { model, parts, constants: BTreeMap::new(), elems: BTreeMap::new(), runs: 0 }
    }

    /// A part by its folder.
    pub fn part(&self, name: &str) -> Result<&'a Part, Error> {
        let found = self.parts.iter().find(|part| part.name == name);
        found.ok_or_else(|| Error::Pipeline(format!("the pipeline has no part `{name}`")))
    }

    /// A new input.
    pub fn input(&mut self, name: &str, elem: DataType, dims: Vec<Dim>) -> ValueId {
        let graph = &mut self.model.graph;
        let value = graph.add_value(name, Some(Type::tensor(elem, dims)));
        graph.add_input(ScopeId::MAIN, value);
        self.elems.insert(value, elem);
        value
    }

    /// Makes a value an output of this name.
    pub fn output(&mut self, name: &str, value: ValueId) {
        let elem = self.elem(value);
        let graph = &mut self.model.graph;
        if let Some(other) = graph.find_value(name) {
            let fresh = graph.fresh_name(&format!("{name}.value"));
            graph.rename(other, fresh);
        }
        let value = graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], "output");
        graph.rename(value, name);
        graph.value_mut(value).ty = Some(Type::unshaped(elem));
        graph.add_output(ScopeId::MAIN, value);
        self.elems.insert(value, elem);
    }

    /// The element type of a value.
    pub fn elem(&self, value: ValueId) -> DataType {
        self.elems.get(&value).copied().unwrap_or(DataType::Float)
    }

    /// A node whose output has the type of its first input.
    pub fn node(&mut self, node: Node, inputs: &[ValueId], name: &str) -> ValueId {
        let elem = inputs.first().map_or(DataType::Float, |&v| self.elem(v));
        let value = self.model.graph.append(ScopeId::MAIN, node, inputs, name);
        self.elems.insert(value, elem);
        value
    }

    /// Says what the element type of a value is, where it is not that of what it was made of.
    pub fn retype(&mut self, value: ValueId, elem: DataType) {
        self.elems.insert(value, elem);
    }

    /// A constant.
    pub fn constant(&mut self, tensor: Tensor, name: &str) -> ValueId {
        let elem = tensor.dtype();
        let value = self.model.graph.add_initializer(ScopeId::MAIN, name, tensor);
        self.elems.insert(value, elem);
        value
    }

    /// Whole numbers.
    pub fn int64s(&mut self, numbers: &[i64], name: &str) -> ValueId {
        self.constant(Tensor::int64s(numbers), name)
    }

    /// A conversion, unless the value is of the type already.
    pub fn cast(&mut self, value: ValueId, to: DataType) -> ValueId {
        if self.elem(value) == to {
            return value;
        }
        let cast = self.node(Node::new("Cast").with("to", to), &[value], "cast");
        self.elems.insert(cast, to);
        cast
    }

    /// Values one after the other along an axis.
    pub fn concat(&mut self, values: &[ValueId], axis: i64, name: &str) -> ValueId {
        match values {
            [only] => *only,
            _ => self.node(Node::new("Concat").with("axis", axis), values, name),
        }
    }

    /// The same elements in another shape; of the shape at most one size is -1, and 0 keeps what there is.
    pub fn reshape(&mut self, value: ValueId, shape: &[i64]) -> ValueId {
        let shape = self.int64s(shape, "shape");
        self.node(Node::new("Reshape"), &[value, shape], "reshaped")
    }

    /// The axes in another order.
    pub fn transpose(&mut self, value: ValueId, perm: &[i64]) -> ValueId {
        self.node(Node::new("Transpose").with("perm", AttributeValue::Ints(perm.to_vec())), &[value], "transposed")
    }

    /// The halves along the first axis.
    pub fn halves(&mut self, value: ValueId, name: &str) -> [ValueId; 2] {
        let elem = self.elem(value);
        let graph = &mut self.model.graph;
        let outputs = ["first", "second"].map(|half| {
            let name = graph.fresh_name(&format!("{name}.{half}"));
            graph.add_value(name, None)
        });
        let node = Node::new("Split").with("axis", 0).with("num_outputs", 2);
        graph.add_node(ScopeId::MAIN, node, vec![Some(value)], outputs.map(Some).to_vec());
        self.elems.extend(outputs.map(|v| (v, elem)));
        outputs
    }

    /// `value · factor + offset` in float32, the same everywhere or one of each per channel, which is axis `axis` of `ndim`.
    pub fn affine(&mut self, value: ValueId, factor: &[f64], offset: &[f64], (axis, ndim): (usize, usize)) -> ValueId {
        let mut apply = |value: ValueId, op: &str, numbers: &[f64], neutral: f64| {
            if numbers.iter().all(|&n| n == neutral) {
                return value;
            }
            let numbers: Vec<f32> = numbers.iter().map(|&n| n as f32).collect();
            // One number for all is a scalar, whatever the axes are.
            let size = |k: usize| if k == axis { numbers.len() } else { 1 };
            let dims: Vec<usize> = if numbers.len() == 1 { Vec::new() } else { (0..ndim).map(size).collect() };
            let constant = self.constant(Tensor::from_f32s(&dims, &numbers), "number");
            self.node(Node::new(op), &[value, constant], "scaled")
        };
        let value = apply(value, "Mul", factor, 1.0);
        apply(value, "Add", offset, 0.0)
    }

    /// A tensor with one row for each sample, `rows` long as the batch of `like`.
    pub fn per_sample(&mut self, row: Tensor, like: ValueId, name: &str) -> ValueId {
        let tail: Vec<i64> = row.dims().iter().map(|&d| d as i64).collect();
        let mut dims = vec![1];
        dims.extend(row.dims());
        let row = row.reshaped(dims).expect("an axis of size 1 changes no count");
        let row = self.constant(row, name);
        let batch = self.batch(like);
        let shape = if tail.is_empty() {
            batch
        } else {
            let tail = self.int64s(&tail, "sizes");
            self.concat(&[batch, tail], 0, "shape")
        };
        self.node(Node::new("Expand"), &[row, shape], name)
    }

    /// How many samples a value holds, as a list of one number.
    pub fn batch(&mut self, value: ValueId) -> ValueId {
        let batch = self.node(Node::new("Shape").with("start", 0).with("end", 1), &[value], "batch");
        self.elems.insert(batch, DataType::Int64);
        batch
    }

    /// The value filled with a number.
    pub fn filled(&mut self, like: ValueId, number: f64) -> Result<ValueId, Error> {
        let elem = self.elem(like);
        let tensor = Tensor::from_f64s(elem, &[], &[number]);
        let tensor = tensor.ok_or_else(|| Error::Pipeline(format!("{elem} cannot be filled with {number}")))?;
        let number = self.constant(tensor, "number");
        let shape = self.node(Node::new("Shape"), &[like], "shape");
        self.elems.insert(shape, DataType::Int64);
        Ok(self.node(Node::new("Expand"), &[number, shape], "filled"))
    }

    /// Fails where a value cannot have the sizes that an input of a part has.
    pub fn fits(&self, value: ValueId, name: &str, input: &str) -> Result<(), Error> {
        let part = self.part(name)?;
        let facts = Facts::infer(&self.model);
        let (Some(found), Some(wanted)) = (facts.shape(value), part.dims(part.need(input)?)) else { return Ok(()) };
        let found: Vec<Option<i64>> = found.iter().map(|d| d.as_known()).collect();
        let same = |(found, wanted): (&Option<i64>, &Dim)| found.zip(wanted.known()).is_none_or(|(a, b)| a == b);
        if found.len() == wanted.len() && found.iter().zip(wanted).all(same) {
            return Ok(());
        }
        let found: Vec<String> = found.iter().map(|d| d.map_or("?".to_owned(), |d| d.to_string())).collect();
        let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        let (found, wanted) = (found.join(", "), wanted.join(", "));
        Err(Error::Pipeline(format!("`{name}` takes `{input}` of shape [{wanted}], and is given [{found}]")))
    }

    /// Runs a part. Inputs get the types that the part takes; floats that it gives become float32.
    pub fn run(&mut self, name: &str, given: &[(&str, ValueId)]) -> Result<Given, Error> {
        let part = self.part(name)?;
        let fragment = merge::absorb(&mut self.model, &part.model, name)?;
        let graph = &part.model.graph;
        let mut arguments = Vec::new();
        for &input in fragment.inputs() {
            let input_name = &graph.value(input).name;
            let value = match given.iter().find(|(known, _)| known == input_name) {
                Some(&(_, value)) => match part.elem(input) {
                    Some(elem) => self.cast(value, elem),
                    None => value,
                },
                None => match graph.value(input).initializer() {
                    Some(Initializer::Dense(default)) => self.constant(default.clone(), input_name),
                    _ => {
                        let message =
                            format!("`{name}` takes `{input_name}`, which pipelines of this class do not give");
                        return Err(Error::Pipeline(message));
                    }
                },
            };
            arguments.push(Some(value));
        }
        let prefix = format!("{name}.");
        let known = match self.constants.get(name) {
            Some(known) => known.clone(),
            None => {
                let known = self.model.graph.paste_constants(&fragment, ScopeId::MAIN, &prefix);
                self.constants.insert(name.to_owned(), known.clone());
                known
            }
        };
        self.runs += 1;
        let prefix = if self.runs == 1 { prefix } else { format!("{name}.{}.", self.runs) };
        let Pasted { outputs, .. } = self.model.graph.paste(&fragment, ScopeId::MAIN, &arguments, &known, &prefix);
        let mut found = Vec::new();
        for (&old, new) in graph.main().outputs().iter().zip(outputs) {
            let Some(new) = new else { continue };
            let elem = part.elem(old).unwrap_or(DataType::Float);
            self.elems.insert(new, elem);
            found.push((graph.value(old).name.clone(), new));
        }
        // Only what is read is converted.
        for (_, value) in &mut found {
            if self.elem(*value).is_float() {
                *value = self.cast(*value, DataType::Float);
            }
        }
        Ok(Given { part: name.to_owned(), outputs: found })
    }

    /// The model, without what nothing needs.
    pub fn finish(mut self) -> Result<Model, Error> {
        let wrong = |e: &dyn std::fmt::Display| Error::Pipeline(e.to_string());
        DropDead.apply(&mut self.model, &PassContext::default()).map_err(|e| wrong(&e))?;
        self.model.graph.sort().map_err(|e| wrong(&e))?;
        self.model.graph.make_names_unique();
        Ok(self.model)
    }
}
