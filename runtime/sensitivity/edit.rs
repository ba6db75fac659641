//! Copies of a model with errors added to values inside it.

use crate::sensitivity::Probe;
use lathe_analysis::{DimExpr, Facts, Random, View};
use lathe_ir::{AttributeValue, DataType, Model, Node, Origin, ScopeId, Tensor, Use, ValueId};

/// The copy under construction, and where nodes are added to it.
pub(super) struct Editor {
    pub model: Model,
    scope: ScopeId,
    random: Random,
}

/// An error that can be added to a value: its own features in another order with random signs, times an amplitude.
pub(super) struct InjectedError {
    pub value: ValueId,
    dtype: DataType,
    ndim: usize,
    /// The axis of the features, and how many there are.
    axis: usize,
    features: usize,
    /// The only position along axis 1 that is disturbed, and how many there are.
    position: Option<(usize, usize)>,
}

impl InjectedError {
    /// `None` where the value holds no floats, or the size of its features is not known.
    pub fn of(facts: &Facts, value: ValueId, probe: &Probe) -> Option<InjectedError> {
        let shape = facts.shape(value)?;
        let (axis, position) = match probe.view {
            View::Axis(axis) => (axis, None),
            View::Position(position) => (-1, Some(position)),
            View::Patches(_) => return None,
        };
        let known = |axis: usize| usize::try_from(shape.get(axis)?.as_known()?).ok().filter(|&size| size > 0);
        let position = match position {
            Some(at) => Some((at, known(1).filter(|&count| shape.len() >= 3 && at < count)?)),
            None => None,
        };
        let axis =
            if axis < 0 { shape.len().checked_add_signed(axis as isize)? } else { usize::try_from(axis).ok()? };
        let dtype = facts.elem(value).filter(|t| matches!(t, DataType::Float | DataType::Float16))?;
        Some(InjectedError { value, dtype, ndim: shape.len(), axis, features: known(axis)?, position })
    }

    /// Axes of the value.
    pub fn ndim(&self) -> usize {
        self.ndim
    }

    /// Whether the first axis is the given one, and is not that of the features.
    pub fn is_per_sample(&self, facts: &Facts, samples: &DimExpr) -> bool {
        self.axis > 0 && facts.shape(self.value).and_then(|shape| shape.first()) == Some(samples)
    }
}

impl Editor {
    pub fn new(model: &Model, seed: u64) -> Editor {
        let model = Model { training: Vec::new(), ..model.clone() };
        Editor { model, scope: ScopeId::MAIN, random: Random::new(seed) }
    }

    /// Adds the error to its value for everyone who reads it, where `disturbs` is true. `amplitude` makes what the error
    /// is multiplied with: a number of float32 that spreads over the value, or one for every sample.
    pub fn disturb(
        &mut self,
        error: &InjectedError,
        disturbs: ValueId,
        amplitude: impl FnOnce(&mut Editor) -> ValueId,
    ) {
        let &InjectedError { value, dtype, ndim, axis, features, position } = error;
        // What a caller hands in, a model may hand back as it is.
        let given = matches!(self.model.graph.value(value).origin(), Origin::Input(_));
        let uses = self.model.graph.value(value).uses().iter().copied();
        let uses: Vec<Use> = uses.filter(|place| !given || !matches!(place, Use::Output(..))).collect();
        let mut order: Vec<i64> = (0..features as i64).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.random.below(last as u64 + 1) as usize);
        }
        let signs: Vec<f64> = order.iter().map(|_| if self.random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
        let along = |axis: usize, size: usize, numbers: &[f64]| {
            let mut dims = vec![1; ndim];
            dims[axis] = size;
            Tensor::from_f64s(dtype, &dims, numbers).expect("small whole numbers are of every float type")
        };
        let signs = along(axis, features, &signs);
        let only = position.map(|(at, count)| {
            let hit: Vec<f64> = (0..count).map(|other| f64::from(u8::from(other == at))).collect();
            along(1, count, &hit)
        });
        let zero = along(0, 1, &[0.0]);
        let only = only.map(|tensor| self.constant(tensor));
        let order = self.constant(Tensor::int64s(&order));
        let signs = self.constant(signs);
        let added = self.inside("error", |copy| {
            let moved = copy.op(Node::new("Gather").with("axis", axis as i64), &[value, order]);
            let mut moved = copy.op(Node::new("Mul"), &[moved, signs]);
            if let Some(only) = only {
                moved = copy.op(Node::new("Mul"), &[moved, only]);
            }
            let mut amplitude = amplitude(copy);
            if dtype != DataType::Float {
                amplitude = copy.cast(amplitude, dtype);
            }
            copy.op(Node::new("Mul"), &[moved, amplitude])
        });
        let none = self.inside("none", |copy| copy.constant(zero));
        let branch = AttributeValue::Graph;
        let either = Node::new("If").with("then_branch", branch(added)).with("else_branch", branch(none));
        let added = self.op(either, &[disturbs]);
        let disturbed = self.op(Node::new("Add"), &[value, added]);
        if uses.iter().any(|place| matches!(place, Use::Output(..))) {
            self.hand_over(value, disturbed);
        }
        self.redirect(uses, disturbed);
    }

    /// Forgets the shapes that are stated of what nodes give: they are those without errors.
    pub fn forget_shapes(&mut self) {
        let graph = &mut self.model.graph;
        let nodes: Vec<_> = graph.scopes().into_iter().flat_map(|scope| graph.nodes(scope)).collect();
        let outputs: Vec<ValueId> = nodes.iter().flat_map(|&id| graph.node(id).outputs()).flatten().copied().collect();
        outputs.into_iter().for_each(|value| graph.value_mut(value).ty = None);
    }

    /// Gives a value the name and the type of another, as outputs have to have them.
    fn hand_over(&mut self, old: ValueId, new: ValueId) {
        let graph = &mut self.model.graph;
        let (name, ty) = (graph.value(old).name.clone(), graph.value(old).ty.clone());
        let spare = graph.fresh_name(&name);
        graph.rename(old, spare);
        graph.rename(new, name);
        graph.value_mut(new).ty = ty;
    }

    /// Makes those who read a value at `uses` read another.
    pub fn redirect(&mut self, uses: Vec<Use>, value: ValueId) {
        for place in uses {
            match place {
                Use::Node(node, index) => self.model.graph.set_input(node, index, Some(value)),
                Use::Output(scope, index) => self.model.graph.set_output(scope, index, value),
                Use::Annotation(_) => {}
            }
        }
    }

    /// A subgraph that gives what `build` adds.
    fn inside(&mut self, name: &str, build: impl FnOnce(&mut Editor) -> ValueId) -> ScopeId {
        let scope = self.model.graph.add_scope(name);
        let outer = std::mem::replace(&mut self.scope, scope);
        let result = build(self);
        self.scope = outer;
        self.model.graph.add_output(scope, result);
        scope
    }

    pub fn sum(&mut self, value: ValueId, axis: i64, keep: bool) -> ValueId {
        let axes = self.constant(Tensor::int64s(&[axis]));
        self.op(Node::new("ReduceSum").with("keepdims", i64::from(keep)), &[value, axes])
    }

    pub fn cast(&mut self, value: ValueId, dtype: DataType) -> ValueId {
        self.op(Node::new("Cast").with("to", AttributeValue::Int(i64::from(dtype.code()))), &[value])
    }

    pub fn op(&mut self, node: Node, inputs: &[ValueId]) -> ValueId {
        self.model.graph.append(self.scope, node, inputs, "probe")
    }

    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        self.model.graph.add_initializer(self.scope, "probe", tensor)
    }
}
