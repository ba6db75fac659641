//! What in a denoiser changes from step to step: which values depend on the latent, on the time, and on the conditions.

use crate::{operators::Trait, units::flow::reads_shape};
use lathe_ir::{Function, Graph, Model, Node, NodeId, ScopeId, ValueId};

/// What a value of a denoiser depends on. Reading the shape of a value is no dependence on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cone {
    /// No input: the same in every run.
    Constant,
    /// The time only: a constant at every step of a fixed grid.
    Time,
    /// Conditions only: the same at every step of a run.
    Condition,
    /// The time and conditions.
    Mixed,
    /// The latent, or a random generator: new at every step.
    Latent,
}

impl Cone {
    /// Every cone, from what is computed least often to what is computed most often.
    pub const ALL: [Cone; 5] = [Cone::Constant, Cone::Time, Cone::Condition, Cone::Mixed, Cone::Latent];

    /// The cone of something that depends on both.
    pub fn join(self, other: Cone) -> Cone {
        match (self, other) {
            (Cone::Latent, _) | (_, Cone::Latent) => Cone::Latent,
            (Cone::Constant, one) | (one, Cone::Constant) => one,
            (one, same) if one == same => one,
            _ => Cone::Mixed,
        }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Cone::Constant => "constant",
            Cone::Time => "time",
            Cone::Condition => "condition",
            Cone::Mixed => "mixed",
            Cone::Latent => "latent",
        }
    }
}

/// The cone of every value of a denoiser.
#[derive(Debug, Clone)]
pub struct Cones {
    of: Vec<Cone>,
}

impl Cones {
    /// Follows the inputs of the main graph through it. Inputs that are neither `latent` nor `time` are conditions,
    /// unless they have a default: those count as constants. `None` if the nodes form a cycle.
    pub fn find(model: &Model, latent: &[ValueId], time: &[ValueId]) -> Option<Cones> {
        let graph = &model.graph;
        let mut cones = Cones { of: vec![Cone::Constant; graph.value_bound()] };
        for &input in graph.main().inputs() {
            cones.of[input.index()] = match () {
                () if latent.contains(&input) => Cone::Latent,
                () if time.contains(&input) => Cone::Time,
                () if graph.value(input).initializer().is_some() => Cone::Constant,
                () => Cone::Condition,
            };
        }
        for id in graph.sorted(ScopeId::MAIN).ok()? {
            let cone = cones.of_node(graph, id).join(drawn(model, graph, id, 0));
            for value in graph.node(id).outputs().iter().flatten() {
                cones.of[value.index()] = cone;
            }
            // What a subgraph computes may depend on all that its node reads.
            let mut inside = graph.node(id).subgraphs();
            while let Some(scope) = inside.pop() {
                for &input in graph.scope(scope).inputs() {
                    cones.of[input.index()] = cone;
                }
                for inner in graph.nodes(scope) {
                    for value in graph.node(inner).outputs().iter().flatten() {
                        cones.of[value.index()] = cone;
                    }
                    inside.extend(graph.node(inner).subgraphs());
                }
            }
        }
        Some(cones)
    }

    /// What a value depends on.
    pub fn of(&self, value: ValueId) -> Cone {
        self.of.get(value.index()).copied().unwrap_or(Cone::Latent)
    }

    /// What the inputs of a node and the captures of its subgraphs depend on.
    pub fn of_node(&self, graph: &Graph, id: NodeId) -> Cone {
        let node = graph.node(id);
        let direct = node.inputs().iter().enumerate().filter(|(index, _)| !reads_shape(graph, id, *index));
        let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
        let read = direct.filter_map(|(_, value)| *value).chain(captured);
        read.map(|value| self.of(value)).fold(Cone::Constant, Cone::join)
    }

    /// The values of a cone that nodes of the main graph in other cones read, or that the model returns: what to
    /// compute beforehand so that the rest runs without this cone. Initializers and inputs are not among them.
    pub fn border(&self, graph: &Graph, cone: Cone) -> Vec<ValueId> {
        let mut found = Vec::new();
        for id in graph.nodes(ScopeId::MAIN) {
            for &value in graph.node(id).outputs().iter().flatten().filter(|v| self.of(**v) == cone) {
                let outside = |user: &lathe_ir::Use| match *user {
                    lathe_ir::Use::Node(user, _) => graph.get(user).is_some_and(|n| self.leaves(graph, n, user, cone)),
                    lathe_ir::Use::Output(scope, _) => scope == ScopeId::MAIN,
                    lathe_ir::Use::Annotation(_) => false,
                };
                if graph.value(value).uses().iter().any(outside) {
                    found.push(value);
                }
            }
        }
        found
    }

    fn leaves(&self, graph: &Graph, node: &Node, id: NodeId, cone: Cone) -> bool {
        let outputs = node.outputs().iter().flatten().map(|&v| self.of(v));
        outputs.reduce(Cone::join).unwrap_or_else(|| self.of_node(graph, id)) != cone
    }
}

/// How deeply calls of local functions are followed.
const MAX_CALL_DEPTH: usize = 8;

/// [`Cone::Latent`] if a node or what it holds or calls draws random numbers.
fn drawn(model: &Model, graph: &Graph, id: NodeId, depth: usize) -> Cone {
    let node = graph.node(id);
    let draws = |graph: &Graph, inner: NodeId, depth| drawn(model, graph, inner, depth) == Cone::Latent;
    let body = || -> Option<&Function> { model.function(&node.domain, &node.op_type, &node.overload) };
    let random = (node.is_standard() && Trait::Random.of(node) && !node.is("Dropout"))
        || node.subgraphs().into_iter().any(|s| graph.nodes(s).any(|inner| draws(graph, inner, depth)))
        || (!model.functions.is_empty()
            && body().is_some_and(|f| {
                depth >= MAX_CALL_DEPTH || f.graph.nodes(ScopeId::MAIN).any(|i| draws(&f.graph, i, depth + 1))
            }));
    if random { Cone::Latent } else { Cone::Constant }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn told(body: &str) -> Vec<String> {
        let model = text::parse(&format!(
            r#"<ir_version: 10, opset_import: ["" : 20]>
            g (float[n,4] x, float[n] t, float[n,4] c, bool flag) => (float y) <float[4,4] w = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}}>
            {{ {body} }}"#
        ))
        .unwrap();
        let graph = &model.graph;
        let find = |name: &str| graph.find_value(name).unwrap();
        let cones = Cones::find(&model, &[find("x")], &[find("t")]).unwrap();
        let line = |cone: Cone| {
            let names: Vec<&str> = cones.border(graph, cone).iter().map(|&v| graph.value(v).name.as_str()).collect();
            format!("{}: {}", cone.name(), names.join(" "))
        };
        Cone::ALL.map(line).to_vec()
    }

    #[test]
    fn separates_what_is_computed_once_from_what_changes() {
        let found = told(
            "axis = Constant <value_ints = [1]> () e = Unsqueeze (t, axis) f = Sin (e) k = MatMul (c, w)
             m = Add (f, k) q = MatMul (x, w) s = Add (q, m) p = Mul (s, k) y = Mul (p, f)",
        );
        assert_eq!(found, ["constant: axis", "time: f", "condition: k", "mixed: m", "latent: y"]);
    }

    #[test]
    fn shapes_of_the_latent_do_not_depend_on_it_and_noise_does() {
        let found = told(
            "s = Shape (x) o = ConstantOfShape (s) z = RandomNormalLike (x) a = Add (o, c) b = Add (a, z) y = Add (b, x)",
        );
        assert_eq!(found, ["constant: o", "time: ", "condition: a", "mixed: ", "latent: y"]);
    }

    #[test]
    fn subgraphs_depend_on_what_they_capture() {
        let found = told(
            "k = If (flag) <then_branch = a () => (float u) { u = Abs (c) }, else_branch = b () => (float v) { v = Neg (c) }>
             h = If (flag) <then_branch = d () => (float i) { i = Abs (x) }, else_branch = e () => (float j) { j = Neg (c) }>
             y = Add (k, h)",
        );
        assert_eq!(found, ["constant: ", "time: ", "condition: k", "mixed: ", "latent: y"]);
    }
}
