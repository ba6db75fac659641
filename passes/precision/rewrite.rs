//! Carries out what was chosen: types of constants and attributes, and one cast per value and direction.

use super::{
    Precision,
    constants::{OpenBound, is_open_bound},
    survey::{Kept, Survey},
};
use crate::Error;
use lathe_ir::{
    AttributeValue, DataType, Graph, Initializer, Model, Node, NodeId, Origin, ScopeId, Tensor, Type, TypeKind, Use,
    ValueId,
};
use std::collections::{BTreeMap, BTreeSet};

/// A model with half precision in it.
#[derive(Debug)]
pub struct Converted {
    /// The model.
    pub model: Model,
    /// Nodes that compute in half precision.
    pub nodes: BTreeSet<NodeId>,
    /// Values that are half precision and were float32.
    pub values: BTreeSet<ValueId>,
    /// The constants that were rounded: as they are now, and as they are called in the model before.
    pub constants: BTreeMap<ValueId, ValueId>,
    /// Nodes that stay in float32, in the graph's order, with the reasons.
    pub kept: Vec<Kept>,
    /// Casts that were added.
    pub casts: usize,
    /// Casts of the model that were dropped.
    pub dropped_casts: usize,
    pub(super) precision: Precision,
}

pub(super) fn rewrite(survey: Survey, halves: &BTreeSet<NodeId>) -> Result<Converted, Error> {
    let mut rewrite = Rewrite {
        model: survey.model.clone(),
        survey: &survey,
        halves,
        values: BTreeSet::new(),
        constants: BTreeMap::new(),
        casts: 0,
        dropped_casts: 0,
        same_casts: Vec::new(),
    };
    rewrite.open_bounds();
    let graph = survey.graph;
    let made = graph.nodes(ScopeId::MAIN).flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    let given = graph.main().inputs().iter().copied().chain(graph.initializers(ScopeId::MAIN));
    for value in given.chain(made).filter(|&value| survey.is_float(value)) {
        rewrite.value(value);
    }
    for &id in halves {
        rewrite.attributes(id);
    }
    rewrite.drop_same_casts();
    let Rewrite { mut model, values, constants, casts, dropped_casts, .. } = rewrite;
    model.graph.sort()?;
    let live = |id: &&NodeId| model.graph.get(**id).is_some();
    let nodes = halves.iter().filter(live).copied().collect();
    let kept = survey.kept();
    Ok(Converted { nodes, model, values, constants, kept, casts, dropped_casts, precision: survey.precision })
}

struct Rewrite<'a> {
    model: Model,
    survey: &'a Survey<'a>,
    halves: &'a BTreeSet<NodeId>,
    values: BTreeSet<ValueId>,
    constants: BTreeMap<ValueId, ValueId>,
    casts: usize,
    dropped_casts: usize,
    /// Casts whose input has become what they cast to.
    same_casts: Vec<NodeId>,
}

/// Uses of a value, by the type that they want.
#[derive(Default)]
struct Uses {
    half: Vec<Use>,
    float: Vec<Use>,
    /// Casts of the model to half precision, which take either.
    casts: Vec<NodeId>,
}

impl Rewrite<'_> {
    fn dtype(&self) -> DataType {
        self.survey.precision.dtype
    }

    fn ports_of(&self, id: NodeId) -> Option<&super::ports::Ports> {
        self.survey.ports(id).filter(|_| self.halves.contains(&id))
    }

    /// Takes bounds away that bound nothing in half precision.
    fn open_bounds(&mut self) {
        for &id in self.halves {
            let count = self.model.graph.node(id).inputs().len();
            for at in 0..count {
                let node = self.model.graph.node(id);
                let Some(value) = node.input(at) else { continue };
                let tensor = self.model.graph.constant(value);
                match is_open_bound(node, at, tensor, self.survey.precision) {
                    Some(OpenBound::Absent) => self.model.graph.set_input(id, at, None),
                    Some(OpenBound::Infinite(bound)) => {
                        let dims = tensor.map_or(Vec::new(), |tensor| tensor.dims().to_vec());
                        let bounds = vec![bound; dims.iter().product()];
                        let tensor = Tensor::from_f64s(self.dtype(), &dims, &bounds).expect("it is a float type");
                        let name = format!("{}_half", self.survey.name(value));
                        let open = self.model.graph.add_initializer(ScopeId::MAIN, &name, tensor);
                        self.values.insert(open);
                        self.model.graph.set_input(id, at, Some(open));
                    }
                    None => {}
                }
            }
        }
    }

    fn uses(&self, value: ValueId) -> Uses {
        let mut found = Uses::default();
        for &place in self.model.graph.value(value).uses() {
            match place {
                Use::Node(id, at) if self.ports_of(id).is_some_and(|ports| ports.inputs[at]) => found.half.push(place),
                Use::Node(id, _) if self.is_same_cast(id) => found.casts.push(id),
                Use::Output(ScopeId::MAIN, _) if self.survey.precision.interface => found.half.push(place),
                Use::Annotation(_) => {}
                _ => found.float.push(place),
            }
        }
        found
    }

    /// Whether a node of the main graph is a cast of the model's own to the type that others are converted to.
    fn is_same_cast(&self, id: NodeId) -> bool {
        let node = self.model.graph.node(id);
        let to = Some(i64::from(self.dtype().code()));
        node.is("Cast") && node.int("to") == to && node.scope() == ScopeId::MAIN
    }

    /// Gives everything that uses a float32 value the type that it wants.
    fn value(&mut self, value: ValueId) {
        let uses = self.uses(value);
        let origin = self.model.graph.value(value).origin();
        let is_half = match origin {
            Origin::Input(ScopeId::MAIN) => self.survey.precision.interface,
            Origin::Initializer(_) if self.model.graph.constant(value).is_some() => {
                return self.constant(value, &uses);
            }
            Origin::Node(id, at) => self.ports_of(id).is_some_and(|ports| ports.outputs[at]),
            _ => false,
        };
        match is_half {
            true => self.widen(value, uses),
            false => self.narrow(value, uses),
        }
    }

    /// A constant is stored in every type that is read.
    fn constant(&mut self, value: ValueId, uses: &Uses) {
        if uses.half.is_empty() {
            return;
        }
        let tensor = self.model.graph.constant(value).expect("the caller has looked");
        let half = rounded(tensor, self.dtype());
        tensor.release();
        let name = self.survey.name(value).to_owned();
        let graph = &mut self.model.graph;
        let stored = graph.add_initializer(ScopeId::MAIN, &format!("{name}_half"), half);
        self.values.insert(stored);
        self.constants.insert(stored, value);
        self.give(&uses.half, value, stored);
        let graph = &mut self.model.graph;
        if graph.value(value).uses().is_empty() {
            graph.remove_initializer(value);
            graph.rename(stored, name);
        }
    }

    /// Casts a float32 value for those who want it in half precision.
    fn narrow(&mut self, value: ValueId, uses: Uses) {
        if uses.half.is_empty() {
            return;
        }
        // What the model has cast up is there in half precision.
        let before = self.model.graph.producer(value).map(|id| self.model.graph.node(id));
        let source =
            before.filter(|node| node.is("Cast") && node.scope() == ScopeId::MAIN).and_then(|node| node.input(0));
        let known = source.filter(|&source| {
            self.survey.facts.elem(source) == Some(self.dtype()) && uses.half.iter().all(|u| matches!(u, Use::Node(..)))
        });
        let maker = self.model.graph.producer(value).filter(|_| known.is_some());
        let narrow = known.unwrap_or_else(|| {
            let name = format!("{}_half", self.survey.name(value));
            self.casts += 1;
            let narrow = self.model.graph.append(ScopeId::MAIN, cast_to(self.dtype()), &[value], &name);
            self.values.insert(narrow);
            narrow
        });
        self.give(&uses.half, value, narrow);
        if let Some(maker) = maker.filter(|_| self.model.graph.value(value).uses().is_empty()) {
            self.model.graph.remove_node(maker);
            self.dropped_casts += 1;
        }
    }

    /// Makes a value half precision, and casts it for those who want float32.
    fn widen(&mut self, value: ValueId, uses: Uses) {
        let dtype = self.dtype();
        self.values.insert(value);
        let stated = self.model.graph.value(value).ty.clone();
        if let Some(ty) = &stated {
            self.model.graph.value_mut(value).ty = Some(with_elem(ty, dtype));
        }
        if let Some(Initializer::Dense(tensor)) = self.model.graph.value(value).initializer().cloned() {
            self.model.graph.set_default(value, Some(Initializer::Dense(rounded(&tensor, dtype))));
        }
        self.same_casts.extend(&uses.casts);
        if uses.float.is_empty() {
            return;
        }
        let name = format!("{}_float", self.survey.name(value));
        self.casts += 1;
        let wide = self.model.graph.append(ScopeId::MAIN, cast_to(DataType::Float), &[value], &name);
        self.model.graph.value_mut(wide).ty = stated;
        self.give(&uses.float, value, wide);
    }

    /// Lets these uses of a value take another. An output of the model keeps its name.
    fn give(&mut self, uses: &[Use], old: ValueId, new: ValueId) {
        let dtype = self.dtype();
        let graph = &mut self.model.graph;
        for &place in uses {
            match place {
                Use::Node(id, at) => graph.set_input(id, at, Some(new)),
                Use::Output(scope, at) => {
                    let is_first = graph.value(new).name != graph.value(old).name && scope == ScopeId::MAIN;
                    if is_first && !graph.is_output(new) {
                        let name = graph.value(old).name.clone();
                        let spare = graph.fresh_name(&name);
                        graph.rename(old, spare);
                        graph.rename(new, name);
                        let elem = if self.values.contains(&new) { dtype } else { DataType::Float };
                        let ty = graph.value(old).ty.clone().map(|ty| with_elem(&ty, elem));
                        graph.value_mut(new).ty = ty;
                    }
                    graph.set_output(scope, at, new);
                }
                Use::Annotation(_) => {}
            }
        }
    }

    /// States the type of what a node makes of nothing.
    fn attributes(&mut self, id: NodeId) {
        let dtype = self.dtype();
        let node = self.model.graph.node(id);
        if node.is("ConstantOfShape") {
            let value = match node.attribute("value") {
                Some(AttributeValue::Tensor(tensor)) => rounded(tensor, dtype),
                _ => Tensor::from_f64s(dtype, &[1], &[0.0]).expect("it is a float type"),
            };
            self.model.graph.node_mut(id).set_attribute("value", value);
        } else if node.is("EyeLike") {
            self.model.graph.node_mut(id).set_attribute("dtype", dtype);
        } else if node.is("Cast") {
            self.model.graph.node_mut(id).set_attribute("to", dtype);
            if node_reads(&self.model.graph, id).is_some_and(|value| self.values.contains(&value)) {
                self.same_casts.push(id);
            }
        }
    }

    /// Removes casts of half precision to itself, but those that give outputs of the model.
    fn drop_same_casts(&mut self) {
        for id in std::mem::take(&mut self.same_casts) {
            let graph = &mut self.model.graph;
            let (Some(read), Some(made)) = (node_reads(graph, id), graph.node(id).output(0)) else { continue };
            if graph.is_output(made) {
                continue;
            }
            graph.replace_uses(made, read);
            graph.remove_node(id);
            self.values.remove(&made);
            self.dropped_casts += 1;
        }
    }
}

fn node_reads(graph: &Graph, id: NodeId) -> Option<ValueId> {
    graph.node(id).input(0)
}

pub(super) fn cast_to(dtype: DataType) -> Node {
    Node::new("Cast").with("to", dtype)
}

/// The same type with other elements.
pub(super) fn with_elem(ty: &Type, dtype: DataType) -> Type {
    let mut ty = ty.clone();
    if let TypeKind::Tensor { elem, .. } = &mut ty.kind {
        *elem = Some(dtype);
    }
    ty
}

/// A float tensor in another float type, a part at a time.
pub(super) fn rounded(tensor: &Tensor, dtype: DataType) -> Tensor {
    const LINE: usize = 1 << 16;
    let wide = || tensor.to_f64s().map(|numbers| numbers.into_iter().map(|x| x as f32).collect::<Vec<f32>>());
    let numbers = tensor.to_f32s().or_else(wide).expect("only floats are converted");
    let mut bytes = Vec::with_capacity(numbers.len() * dtype.bits() / 8);
    for line in numbers.chunks(LINE) {
        let wide: Vec<f64> = line.iter().map(|&x| f64::from(x)).collect();
        bytes.extend_from_slice(Tensor::from_f64s(dtype, &[line.len()], &wide).expect("it is a float type").bytes());
    }
    let mut made = Tensor::new(dtype, tensor.dims().to_vec(), bytes).expect("every number has as many bytes");
    (made.doc, made.metadata) = (tensor.doc.clone(), tensor.metadata.clone());
    made
}

/// Nodes by the reason for which they stay, with how many there are and the first of them.
pub fn by_reason(kept: &[Kept]) -> BTreeMap<&str, (usize, &str)> {
    let mut reasons: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for one in kept {
        reasons.entry(&one.reason).or_insert((0, &one.node)).0 += 1;
    }
    reasons
}
