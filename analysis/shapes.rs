//! What is known about every value before anything runs: element type, symbolic shape, and the elements of small
//! integer tensors.
//!
//! Everything here is proved from the types of the graph inputs, the constants and the definitions of the operators.
//! What cannot be proved is unknown; an operator that is not known makes its outputs unknown. Types that the file states
//! for other values only fill gaps: an element type, a number of axes or a size that inference does not find. The names
//! it gives to their dimensions are not believed, because exporters give equal names to different sizes.
//!
//! Sizes are symbolic and never negative. Some things are taken for granted, because a model that breaks them fails or
//! has an empty or undefined result anyway: the model runs without error; a symbolic size in the target of a `Reshape`
//! is that size (and not the 0 that means "copy"); the window of a pooling fits into the padded data; a single size
//! passes through float32 arithmetic unrounded; and sizes fit 31 bits.

mod contents;
mod contrib;
mod control;
mod convolution;
mod dispatch;
mod elementwise;
mod generators;
mod indexing;
mod layout;
mod linear;
mod ml;
mod neural;
mod node;
mod quantized;
mod recurrent;
mod reduce;
mod resample;
mod sequences;
mod signal;
mod slicing;
#[cfg(test)]
mod tests;

use crate::dim::{DimExpr, Symbol};
use lathe_ir::{
    Attribute, AttributeValue, DataType, Dim, Function, Graph, Initializer, Model, Node, NodeId, Origin, ScopeId,
    Shape, Tensor, Type, TypeKind, ValueId, element_count,
};
use node::{Cx, Out, ValueType};
use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Tensors with more elements than this have no [`Contents`].
const MAX_CONTENTS: usize = 1024;
/// Whole-number tensors up to this size get symbols for elements that are unknown.
const MAX_SYMBOLIC_ELEMENTS: usize = 16;
/// Shapes with more axes than this are unknown: `Gather` can double them node after node.
const MAX_NDIM: usize = 256;
/// Sequences and optional values nested deeper than this are unknown.
const MAX_TYPE_DEPTH: usize = 16;
/// How deeply calls of local functions may nest before their outputs count as unknown.
const MAX_CALL_DEPTH: usize = 8;
/// How many nodes inside called functions and repeated loop bodies are looked at in all.
const MAX_INNER_NODES: usize = 400_000;

/// The elements of a small tensor of whole numbers or booleans (0 and 1), row-major, each as far as it is known.
///
/// Tensors of floats have contents only where every known element is a whole number.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    elements: Vec<Option<DimExpr>>,
}

impl Contents {
    /// The elements, row-major; `None` where nothing is known.
    pub fn elements(&self) -> &[Option<DimExpr>] {
        &self.elements
    }

    /// All elements as numbers, if every one is known.
    pub fn known(&self) -> Option<Vec<i64>> {
        self.elements.iter().map(|e| e.as_ref()?.as_known()).collect()
    }
}

#[derive(Debug, Clone, Default)]
enum Fact {
    #[default]
    Unknown,
    Tensor {
        elem: Option<DataType>,
        shape: Option<Vec<DimExpr>>,
        contents: Option<Arc<Contents>>,
    },
    Other(Box<ValueType>),
}

/// What is known about the values of one graph and the subgraphs in it.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    facts: Vec<Fact>,
    /// Expressions that could be negative for some symbols, but are sizes of values that every run computes.
    sizes: HashSet<DimExpr>,
}

impl Facts {
    /// Infers everything about the main graph of a model.
    pub fn infer(model: &Model) -> Facts {
        Facts::of(&model.graph, &model.opsets, &model.functions)
    }

    /// Infers everything about a graph that uses these operator sets and may call these functions.
    pub fn of(graph: &Graph, opsets: &[(String, i64)], functions: &[Function]) -> Facts {
        let shared = Shared::new(functions);
        let mut engine = Engine::new(graph, opsets, &shared);
        engine.scope_inputs();
        engine.run_scope(ScopeId::MAIN);
        engine.facts
    }

    /// Infers the outputs of one node that was added after the facts were made, from the facts about its inputs.
    ///
    /// Constants among the inputs may be new as well.
    pub fn update(&mut self, graph: &Graph, opsets: &[(String, i64)], functions: &[Function], node: NodeId) {
        let shared = Shared::new(functions);
        let mut engine = Engine::with(std::mem::take(self), graph, opsets, &shared);
        for value in graph.node(node).inputs().iter().flatten() {
            if matches!(engine.facts.fact(*value), Fact::Unknown) {
                engine.initializer(*value);
            }
        }
        engine.run_node(node);
        *self = engine.facts;
    }

    /// Learns that `new` has taken the place of `old`, so that what is known about `old` holds for it.
    ///
    /// Sizes keep the form they have for `old`: the facts of its users are stated in the same symbols.
    pub fn inherit(&mut self, new: ValueId, old: ValueId) {
        let merged = match (self.fact(new).clone(), self.fact(old).clone()) {
            (fact, Fact::Unknown) => fact,
            (Fact::Unknown, fact) => fact,
            (Fact::Tensor { elem, shape, contents }, Fact::Tensor { elem: e, shape: s, contents: c }) => {
                Fact::Tensor { elem: e.or(elem), shape: s.or(shape), contents: contents.or(c) }
            }
            (fact, _) => fact,
        };
        self.set(new, merged);
    }

    /// The body of the local function that a node calls, with what is known about its values in this call.
    pub(crate) fn of_call<'f>(
        &self,
        graph: &'f Graph,
        functions: &'f [Function],
        node: NodeId,
        depth: usize,
    ) -> Option<(&'f Graph, Facts)> {
        if functions.is_empty() || depth >= MAX_CALL_DEPTH {
            return None;
        }
        let shared = Shared::new(functions);
        let function = shared.called(graph.node(node))?;
        let call = Cx { node: graph.node(node), graph, facts: self, opset: 0, bindings: &[] };
        let mut inner = Engine::called(function, &call, &shared, depth + 1)?;
        inner.run_scope(ScopeId::MAIN);
        Some((&function.graph, inner.facts))
    }

    fn fact(&self, value: ValueId) -> &Fact {
        self.facts.get(value.index()).unwrap_or(&Fact::Unknown)
    }

    /// The type in the file's terms; `None` if nothing is known. Sizes that depend on unnamed things are unknown.
    pub fn ty(&self, value: ValueId) -> Option<Type> {
        match self.fact(value) {
            Fact::Unknown => None,
            Fact::Tensor { elem, shape, .. } => {
                let shape = shape.as_ref().map(|dims| Shape::new(dims.iter().map(stated_dim).collect()));
                Some(TypeKind::Tensor { elem: *elem, shape }.into())
            }
            Fact::Other(ty) => ty.stated(),
        }
    }

    /// The element type of a tensor.
    pub fn elem(&self, value: ValueId) -> Option<DataType> {
        match self.fact(value) {
            Fact::Tensor { elem, .. } => *elem,
            _ => None,
        }
    }

    /// The sizes of the axes of a tensor.
    pub fn shape(&self, value: ValueId) -> Option<&[DimExpr]> {
        match self.fact(value) {
            Fact::Tensor { shape, .. } => shape.as_deref(),
            _ => None,
        }
    }

    /// The sizes of the axes, if they are all known numbers.
    pub fn sizes(&self, value: ValueId) -> Option<Vec<usize>> {
        self.shape(value)?.iter().map(|d| usize::try_from(d.as_known()?).ok()).collect()
    }

    /// The number of axes of a tensor.
    pub fn ndim(&self, value: ValueId) -> Option<usize> {
        self.shape(value).map(<[DimExpr]>::len)
    }

    /// The elements of a small tensor as far as they are known.
    pub fn contents(&self, value: ValueId) -> Option<&Contents> {
        match self.fact(value) {
            Fact::Tensor { contents, .. } => contents.as_deref(),
            _ => None,
        }
    }

    /// Whether both are tensors of provably equal shape.
    pub fn same_shape(&self, a: ValueId, b: ValueId) -> bool {
        match (self.shape(a), self.shape(b)) {
            (Some(left), Some(right)) => left == right,
            _ => false,
        }
    }

    /// A tensor's type as people write it: `float[batch,ceil(x.shape[2]/16),?]`. Sizes that the model does not name are
    /// called after the input whose axis or element they are; an input's own are unknown, and what only a run tells.
    pub fn described(&self, graph: &Graph, value: ValueId) -> Option<Type> {
        let Fact::Tensor { elem, shape, .. } = self.fact(value) else { return self.ty(value) };
        let input = |of: ValueId| graph.main().inputs().contains(&of).then(|| graph.value(of).name.as_str());
        let name = |symbol: &Symbol| match *symbol {
            Symbol::Named(ref name) => Some(name.to_string()),
            Symbol::Size { space: 0, value: of, axis } if of != value => Some(format!("{}.shape[{axis}]", input(of)?)),
            Symbol::Element { space: 0, value: of, index } => match self.ndim(of) {
                Some(0) => input(of).map(str::to_owned),
                _ => Some(format!("{}[{index}]", input(of)?)),
            },
            _ => None,
        };
        let dim = |dim: &DimExpr| match dim.as_known() {
            Some(size) => Dim::Known(size),
            None => dim.written(&name).map_or(Dim::Unknown, Dim::Symbol),
        };
        let shape = shape.as_ref().map(|dims| Shape::new(dims.iter().map(dim).collect()));
        Some(TypeKind::Tensor { elem: *elem, shape }.into())
    }

    /// Whether the number is certainly a size, and so not negative: a convolution's `h - 2` where the model runs at all.
    pub fn is_size(&self, dim: &DimExpr) -> bool {
        dim.is_nonnegative() || self.sizes.contains(dim)
    }

    /// The number, or 0 where that is negative.
    pub(crate) fn at_least_zero(&self, dim: DimExpr) -> Option<DimExpr> {
        if self.is_size(&dim) { Some(dim) } else { dim.larger(&0.into()) }
    }

    /// What is known about a value, as an output that another value can take over.
    fn out_of(&self, value: ValueId) -> Out {
        match self.fact(value) {
            Fact::Unknown => Out::unknown(),
            Fact::Tensor { elem, shape, contents } => {
                let dims = shape.as_ref().map(|dims| dims.iter().cloned().map(Some).collect());
                let contents = contents.as_ref().map(|c| c.elements.clone());
                Out { ty: ValueType::Tensor { elem: *elem, dims }, contents }
            }
            Fact::Other(ty) => Out { ty: (**ty).clone(), contents: None },
        }
    }

    fn set(&mut self, value: ValueId, fact: Fact) {
        if self.facts.len() <= value.index() {
            self.facts.resize(value.index() + 1, Fact::Unknown);
        }
        self.facts[value.index()] = fact;
    }
}

fn stated_dim(dim: &DimExpr) -> Dim {
    match dim.as_known() {
        Some(size) => Dim::Known(size),
        None if dim.all_symbols(&|s| matches!(s, Symbol::Named(_))) => Dim::Symbol(dim.to_string()),
        None => Dim::Unknown,
    }
}

/// What every engine of one inference shares.
struct Shared<'a> {
    functions: HashMap<(&'a str, &'a str, &'a str), &'a Function>,
    next_space: Cell<u32>,
    inner_nodes: Cell<usize>,
}

impl<'a> Shared<'a> {
    fn new(functions: &'a [Function]) -> Shared<'a> {
        let key = |f: &'a Function| (standard_domain(&f.domain), f.name.as_str(), f.overload.as_str());
        // The first of several equal definitions is the one that `Model::function` finds.
        let functions = functions.iter().rev().map(|f| (key(f), f)).collect();
        Shared { functions, next_space: Cell::new(1), inner_nodes: Cell::new(MAX_INNER_NODES) }
    }
}

impl<'a> Shared<'a> {
    /// The local function that a node calls.
    fn called(&self, node: &Node) -> Option<&'a Function> {
        if self.functions.is_empty() {
            return None;
        }
        let key = (standard_domain(&node.domain), node.op_type.as_str(), node.overload.as_str());
        self.functions.get(&key).copied()
    }
}

fn standard_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// One walk over a graph.
struct Engine<'a> {
    graph: &'a Graph,
    opsets: &'a [(String, i64)],
    shared: &'a Shared<'a>,
    /// Tells symbols of this graph from those of graphs of other functions.
    space: u32,
    /// In a called function: the attributes of the call, with defaults.
    bindings: Vec<Attribute>,
    depth: usize,
    facts: Facts,
}

impl<'a> Engine<'a> {
    /// A walk over the body of a function that knows the inputs and attributes of a call.
    fn called(function: &'a Function, call: &Cx, shared: &'a Shared<'a>, depth: usize) -> Option<Engine<'a>> {
        let space = shared.next_space.get();
        shared.next_space.set(space.checked_add(1)?);
        let mut inner = Engine::new(&function.graph, &function.opsets, shared);
        inner.space = space;
        inner.depth = depth;
        let given = call.node.attributes.iter().filter_map(|a| {
            let value = match call.attribute(&a.name) {
                Ok(value) => value?.clone(),
                // Stays a reference, which the body then finds unknown.
                Err(node::Unbound) => a.value.clone(),
            };
            Some(Attribute { name: a.name.clone(), value, doc: String::new() })
        });
        inner.bindings = given.collect();
        for default in &function.defaults {
            // An attribute that was passed on but has no value must not turn into the default.
            if call.node.attribute(&default.name).is_none() {
                inner.bindings.push(default.clone());
            }
        }
        // A graph attribute belongs to the caller's arena and means nothing inside.
        let graph = |a: &Attribute| matches!(a.value, AttributeValue::Graph(_) | AttributeValue::Graphs(_));
        inner.bindings.retain(|a| !graph(a));
        for (index, &value) in function.graph.main().inputs().iter().enumerate() {
            let out = call.node.input(index).map_or_else(Out::unknown, |v| call.facts.out_of(v));
            inner.store(value, out);
        }
        Some(inner)
    }

    fn new(graph: &'a Graph, opsets: &'a [(String, i64)], shared: &'a Shared<'a>) -> Engine<'a> {
        Engine::with(Facts::default(), graph, opsets, shared)
    }

    /// A walk that goes on from `facts`, without another table of its own.
    fn with(mut facts: Facts, graph: &'a Graph, opsets: &'a [(String, i64)], shared: &'a Shared<'a>) -> Engine<'a> {
        facts.facts.resize(graph.value_bound(), Fact::Unknown);
        Engine { graph, opsets, shared, space: 0, bindings: Vec::new(), depth: 0, facts }
    }

    /// Takes the stated types of the main graph's inputs as facts.
    fn scope_inputs(&mut self) {
        for &value in self.graph.main().inputs() {
            let info = self.graph.value(value);
            let out = match (&info.ty, info.initializer()) {
                (Some(ty), _) => Out::of_type(&ValueType::believed(ty)),
                // A caller may override the default with one of another shape.
                (None, Some(Initializer::Dense(tensor))) => Out::unshaped(Some(tensor.dtype())),
                _ => Out::unknown(),
            };
            self.store(value, out);
        }
    }

    /// Infers a scope whose inputs are set. Nodes may stand in any order.
    fn run_scope(&mut self, scope: ScopeId) {
        for value in self.graph.initializers(scope) {
            self.initializer(value);
        }
        // In a cycle nothing can be inferred; what is not yet known when it is read counts as unknown.
        let order = self.graph.sorted(scope).unwrap_or_default();
        for node in order {
            if scope != ScopeId::MAIN || self.space != 0 {
                let left = self.shared.inner_nodes.get();
                self.shared.inner_nodes.set(left.saturating_sub(1));
                if left == 0 {
                    self.forget_node(node);
                    continue;
                }
            }
            self.run_node(node);
        }
    }

    fn forget_node(&mut self, node: NodeId) {
        for value in self.graph.node(node).outputs().iter().flatten() {
            self.facts.set(*value, Fact::Unknown);
        }
    }

    fn initializer(&mut self, value: ValueId) {
        if !matches!(self.graph.value(value).origin(), Origin::Initializer(_)) {
            return;
        }
        match self.graph.value(value).initializer() {
            Some(Initializer::Dense(tensor)) => self.store(value, constant(tensor)),
            Some(Initializer::Sparse(sparse)) => {
                let dims = sparse.dims.iter().map(|&d| i64::try_from(d).ok().map(DimExpr::from)).collect();
                self.store(value, Out::tensor(Some(sparse.values.dtype()), Some(dims)));
            }
            None => {}
        }
    }

    fn run_node(&mut self, id: NodeId) {
        let node = self.graph.node(id);
        let outs = match self.call(id) {
            Some(outs) => outs,
            None => self.operator(id),
        };
        let mut outs = outs.into_iter();
        for value in node.outputs() {
            let out = outs.next().unwrap_or_else(Out::unknown);
            if let Some(value) = value {
                self.store(*value, out);
            }
        }
    }

    fn operator(&mut self, id: NodeId) -> Vec<Out> {
        if let Some(outs) = control::infer(self, id) {
            return outs;
        }
        dispatch::infer(&self.cx(id)).unwrap_or_default()
    }

    fn cx(&self, id: NodeId) -> Cx<'_> {
        let node = self.graph.node(id);
        let opset = lathe_ir::imported(self.opsets, &node.domain).unwrap_or(1);
        Cx { node, graph: self.graph, facts: &self.facts, opset, bindings: &self.bindings }
    }

    /// Infers a call of a local function through its body. `None` if the node calls no local function.
    fn call(&mut self, id: NodeId) -> Option<Vec<Out>> {
        let function = self.shared.called(self.graph.node(id))?;
        if self.depth >= MAX_CALL_DEPTH {
            return Some(Vec::new());
        }
        let mut inner = Engine::called(function, &self.cx(id), self.shared, self.depth + 1)?;
        inner.run_scope(ScopeId::MAIN);
        let space = inner.space;
        let own = |symbol: &Symbol| match symbol {
            Symbol::Named(_) => true,
            Symbol::Size { space: s, .. } | Symbol::Element { space: s, .. } => *s != space,
        };
        Some(function.graph.main().outputs().iter().map(|&v| inner.facts.out_of(v).keeping(&own)).collect())
    }

    /// Makes what was inferred a fact: gaps are filled from the stated type, then unknown sizes get symbols.
    fn store(&mut self, value: ValueId, out: Out) {
        self.store_as(value, out, self.space == 0);
    }

    /// The same, with what the file states used only if it is believed.
    fn store_as(&mut self, value: ValueId, out: Out, believed: bool) {
        let stated = self.graph.value(value).ty.as_ref().filter(|_| believed).map(ValueType::stated_sizes);
        let ty = match stated {
            Some(stated) => out.ty.filled_from(stated),
            None => out.ty,
        };
        let space = self.space;
        let fact = match ty {
            ValueType::Unknown => Fact::Unknown,
            ValueType::Tensor { elem, dims } => {
                let size = |(axis, dim): (usize, Option<DimExpr>)| {
                    let valid = dim.filter(|d| d.range().1.is_none_or(|high| high >= 0));
                    valid.unwrap_or_else(|| Symbol::Size { space, value, axis: axis as u32 }.into())
                };
                let dims = dims.filter(|dims| dims.len() <= MAX_NDIM);
                let shape: Option<Vec<DimExpr>> = dims.map(|dims| dims.into_iter().enumerate().map(size).collect());
                if space == 0 && self.graph.scope_of(value) == Some(ScopeId::MAIN) {
                    let odd = shape.iter().flatten().filter(|dim| !dim.is_nonnegative());
                    self.facts.sizes.extend(odd.cloned());
                }
                let contents =
                    shape.as_deref().and_then(|shape| element_contents(shape, elem, out.contents, space, value));
                Fact::Tensor { elem, shape, contents: contents.map(Arc::new) }
            }
            other if other.depth() > MAX_TYPE_DEPTH => Fact::Unknown,
            other => Fact::Other(Box::new(other)),
        };
        self.facts.set(value, fact);
    }
}

/// The contents of a value: what was inferred, with symbols for elements that are unknown where that is worth it.
fn element_contents(
    shape: &[DimExpr],
    elem: Option<DataType>,
    inferred: Option<Vec<Option<DimExpr>>>,
    space: u32,
    value: ValueId,
) -> Option<Contents> {
    let dims: Vec<usize> = shape.iter().map(|d| usize::try_from(d.as_known()?).ok()).collect::<Option<_>>()?;
    let count = element_count(&dims).filter(|&count| count <= MAX_CONTENTS)?;
    let symbolic = matches!(elem, Some(DataType::Int64 | DataType::Int32)) && count <= MAX_SYMBOLIC_ELEMENTS;
    let elements = match inferred.filter(|elements| elements.len() == count) {
        Some(elements) => elements,
        None if symbolic => vec![None; count],
        None => return None,
    };
    let name = |(index, element): (usize, Option<DimExpr>)| {
        element.or_else(|| symbolic.then(|| Symbol::Element { space, value, index: index as u32 }.into()))
    };
    Some(Contents { elements: elements.into_iter().enumerate().map(name).collect() })
}

/// What a constant tensor is. Only small tensors of whole numbers are read.
fn constant(tensor: &Tensor) -> Out {
    let dims = tensor.dims().iter().map(|&d| i64::try_from(d).ok().map(DimExpr::from)).collect();
    let mut out = Out::tensor(Some(tensor.dtype()), Some(dims));
    let dtype = tensor.dtype();
    if tensor.len() > MAX_CONTENTS {
        return out;
    }
    if dtype.is_integer() || dtype == DataType::Bool {
        out.contents = tensor.to_i64s().map(|all| all.into_iter().map(|v| Some(v.into())).collect());
    } else if dtype.is_float() && tensor.len() <= MAX_SYMBOLIC_ELEMENTS {
        let whole = |v: f64| contents::whole(v).map(DimExpr::from);
        out.contents = tensor.to_f64s().map(|all| all.into_iter().map(whole).collect());
    }
    out
}
