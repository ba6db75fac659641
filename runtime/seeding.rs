//! Random operators in two models that are compared: copies of both in which the same operator draws the same numbers.

use lathe_ir::{Graph, Model, Node, NodeId, ScopeId, Tensor, ValueId};
use std::collections::BTreeSet;

/// Copies of two models whose random operators are seeded alike, as far as they are found in both.
pub(crate) struct Seeded {
    /// The reference.
    pub reference: Model,
    /// The candidate.
    pub candidate: Model,
    /// Outputs of the main graph that depend on random numbers.
    pub drawn: BTreeSet<String>,
    /// Those of them that depend on an operator found in only one of the models.
    pub loose: BTreeSet<String>,
}

/// Whether a node draws new numbers in every run, or would without a seed.
fn is_random(graph: &Graph, id: NodeId) -> bool {
    let node = graph.node(id);
    match node.op_type.as_str() {
        "RandomNormal" | "RandomNormalLike" | "RandomUniform" | "RandomUniformLike" | "Bernoulli" | "Multinomial" => {
            node.is_standard()
        }
        "Dropout" if node.is_standard() => {
            let training = node.input(2);
            let constant = training.and_then(|v| graph.constant(v)).and_then(Tensor::scalar_i64);
            training.is_some() && constant != Some(0)
        }
        _ => false,
    }
}

/// Whether anything in a model is random.
pub(crate) fn has_random(model: &Model) -> bool {
    model.graphs().any(|(graph, _)| graph.all_nodes().into_iter().any(|id| is_random(graph, id)))
}

/// A node that draws numbers: which graph of a model (0 is the main one) and which node in it.
type RandomNode = (usize, NodeId);

/// Seeds both models alike. Operators that carry a seed keep it.
pub(crate) fn seeded(reference: &Model, candidate: &Model) -> Seeded {
    let (mut reference, mut candidate) = (reference.clone(), candidate.clone());
    let (mut left, mut right) = (random_nodes(&reference), random_nodes(&candidate));
    let all = drawn(&reference, &left);
    // Names of values are kept where nodes are; inlining gives new ones, and then a node that is alone of its kind is
    // still known.
    let rules: [&Same; 3] = [&|a, b| a == b, &|a, b| a.operator == b.operator && a.output == b.output, &|a, b| {
        a.operator == b.operator && !a.name.is_empty() && a.name == b.name
    }];
    let mut pairs: Vec<(RandomNode, RandomNode)> = Vec::new();
    for same in rules {
        left.retain(|&a| {
            let known = Names::of(&reference, a);
            let fits = (0..right.len()).filter(|&at| same(&known, &Names::of(&candidate, right[at])));
            let &[at] = &fits.collect::<Vec<_>>()[..] else { return true };
            pairs.push((a, right.remove(at)));
            false
        });
    }
    if let (&[a], &[b]) = (&left[..], &right[..])
        && Names::of(&reference, a).operator == Names::of(&candidate, b).operator
    {
        pairs.push((a, b));
        (left, right) = (Vec::new(), Vec::new());
    }
    for (seed, (a, b)) in (1..).zip(pairs) {
        give_seed(&mut reference, a, seed);
        give_seed(&mut candidate, b, seed);
    }
    let mut loose = drawn(&reference, &left);
    loose.extend(drawn(&candidate, &right));
    Seeded { reference, candidate, drawn: all, loose }
}

fn graph_of(model: &Model, index: usize) -> &Graph {
    model.graphs().nth(index).expect("places are in graphs of the model").0
}

fn random_nodes(model: &Model) -> Vec<RandomNode> {
    let all = model.graphs().enumerate();
    let random = |(index, (graph, _)): (usize, (&Graph, _))| -> Vec<RandomNode> {
        let nodes = graph.all_nodes().into_iter().filter(|&id| is_random(graph, id));
        nodes.map(|id| (index, id)).collect()
    };
    all.flat_map(random).collect()
}

/// What a random node is known by.
#[derive(PartialEq, Eq)]
struct Names {
    /// The local function it stands in; empty in the main graph.
    function: String,
    operator: String,
    /// Its first output.
    output: String,
    /// Its own name.
    name: String,
}

/// Whether two nodes are the same one in both models.
type Same = dyn Fn(&Names, &Names) -> bool;

impl Names {
    fn of(model: &Model, (index, id): RandomNode) -> Names {
        let graph = graph_of(model, index);
        let function = index.checked_sub(1).and_then(|at| model.functions.get(at));
        let node = graph.node(id);
        Names {
            function: function.map_or_else(String::new, |f| f.name.clone()),
            operator: node.op_type.clone(),
            output: node.output(0).map(|value| graph.value(value).name.clone()).unwrap_or_default(),
            name: node.name.clone(),
        }
    }
}

fn give_seed(model: &mut Model, (index, id): RandomNode, seed: i32) {
    let (graph, _) = model.graphs_mut().nth(index).expect("places are in graphs of the model");
    let node = graph.node_mut(id);
    if node.attribute("seed").is_some() {
        return;
    }
    match node.op_type.as_str() {
        "Dropout" => node.set_attribute("seed", i64::from(seed)),
        _ => node.set_attribute("seed", seed as f32),
    }
}

/// The main graph's outputs that depend on what these nodes draw. A shape or a type does not.
fn drawn(model: &Model, nodes: &[RandomNode]) -> BTreeSet<String> {
    let graph = &model.graph;
    let mut values: BTreeSet<ValueId> = BTreeSet::new();
    let functions: BTreeSet<usize> = nodes.iter().filter(|(index, _)| *index > 0).map(|(index, _)| index - 1).collect();
    let mut inside: BTreeSet<NodeId> = nodes.iter().filter(|(index, _)| *index == 0).map(|&(_, id)| id).collect();
    inside.extend(graph.all_nodes().into_iter().filter(|&id| calls(model, graph.node(id), &functions, 0)));
    // A node in a subgraph makes the nodes around it random.
    let mut owners: Vec<NodeId> = inside.iter().copied().collect();
    while let Some(owner) = owners.pop().and_then(|id| graph.scope(graph.node(id).scope()).owner()) {
        if inside.insert(owner) {
            owners.push(owner);
        }
    }
    let order = graph.sorted(ScopeId::MAIN).unwrap_or_else(|_| graph.nodes(ScopeId::MAIN).collect());
    for id in order {
        let node = graph.node(id);
        let reads = |value: ValueId| values.contains(&value);
        let captured = || node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
        let forgets = node.is("Shape") || node.is("Size");
        let draws = inside.contains(&id) || node.inputs().iter().flatten().copied().chain(captured()).any(reads);
        if draws && !forgets {
            values.extend(node.outputs().iter().flatten());
        }
    }
    let outputs = graph.main().outputs().iter().filter(|value| values.contains(value));
    outputs.map(|&value| graph.value(value).name.clone()).collect()
}

/// Whether a node calls one of some functions of the model, at any depth.
fn calls(model: &Model, node: &Node, functions: &BTreeSet<usize>, depth: usize) -> bool {
    const DEEPEST: usize = 16;
    let of = |f: &lathe_ir::Function| (f.domain == node.domain && f.name == node.op_type, f.overload == node.overload);
    let Some(at) = model.functions.iter().position(|f| of(f) == (true, true)).filter(|_| depth < DEEPEST) else {
        return false;
    };
    let body = &model.functions[at].graph;
    functions.contains(&at) || body.all_nodes().into_iter().any(|id| calls(model, body.node(id), functions, depth + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    fn parse(body: &str, outputs: &str) -> Model {
        text::parse(&format!("g (float[n,3] x) => ({outputs}) {{ {body} }}")).unwrap()
    }

    fn seeds(model: &Model) -> Vec<Option<f32>> {
        let graph = &model.graph;
        let random = graph.all_nodes().into_iter().filter(|&id| is_random(graph, id));
        random.map(|id| graph.node(id).float("seed")).collect()
    }

    #[test]
    fn operators_that_are_found_in_both_are_seeded_alike() {
        let a = "r = RandomUniformLike (x) q = RandomNormalLike (x) y = Add (r, q)";
        let b = "q = RandomNormalLike (x) r = RandomUniformLike (x) y = Add (q, r)";
        let found = seeded(&parse(a, "float[n,3] y"), &parse(b, "float[n,3] y"));
        assert_eq!(seeds(&found.reference), [Some(1.0), Some(2.0)]);
        assert_eq!(seeds(&found.candidate), [Some(2.0), Some(1.0)]);
        assert!(found.loose.is_empty());
    }

    #[test]
    fn a_seed_that_is_there_is_kept() {
        let model = parse("y = RandomNormalLike <seed = 7.0> (x)", "float[n,3] y");
        assert_eq!(seeds(&seeded(&model, &model).candidate), [Some(7.0)]);
    }

    #[test]
    fn what_draws_from_a_lost_operator_is_loose() {
        let a = "r = RandomUniformLike (x) y = Add (r, x) z = Relu (x) s = Shape (r)";
        let b = "y = Relu (x) z = Relu (x) s = Shape (x)";
        let outputs = "float[n,3] y, float[n,3] z, int64[2] s";
        let found = seeded(&parse(a, outputs), &parse(b, outputs));
        assert_eq!(found.loose.into_iter().collect::<Vec<_>>(), ["y"]);
    }

    #[test]
    fn an_operator_that_was_renamed_is_known_if_it_is_alone() {
        let found = seeded(
            &parse("r = Bernoulli (x) y = Add (r, x)", "float[n,3] y"),
            &parse("q = Bernoulli (x) y = Add (q, x)", "float[n,3] y"),
        );
        assert!(found.loose.is_empty());
        assert_eq!(seeds(&found.candidate), seeds(&found.reference));
    }

    #[test]
    fn dropout_is_random_in_training_only() {
        let random = |training: &str| has_random(&parse(&format!("{training} y = Dropout (x, , t)"), "float[n,3] y"));
        assert!(random("t = Constant <value = bool {1}> ()"));
        assert!(!has_random(&parse("y = Dropout (x)", "float[n,3] y")));
    }
}
