//! Which nodes compute in half precision: a minimum cut between those that must not and what the others save.

use petgraph::{
    algo::dinics,
    graph::{DiGraph, NodeIndex},
    visit::EdgeRef,
};

/// A choice between float32 and half precision for every one of a number of nodes.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// What a node saves in half precision; `None` where it must stay in float32.
    pub saves: Vec<Option<u64>>,
    /// Values, each of which costs once where it is narrowed and once where it is widened.
    pub values: Vec<Value>,
}

/// A value that would have to be cast.
#[derive(Debug)]
pub(super) struct Value {
    /// What a cast of it costs.
    pub cost: u64,
    /// Who makes it.
    pub producer: End,
    /// Who reads it.
    pub consumers: Vec<End>,
}

/// Who makes or reads a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Something that is float32.
    Float,
    /// Something that is half precision.
    Half,
    /// This node.
    Node(usize),
}

impl Choice {
    /// Which nodes compute in half precision: the cheapest choice, and of several the one with the most of them.
    pub fn solve(&self) -> Vec<bool> {
        let mut network: DiGraph<(), u64> = DiGraph::new();
        let (float, half) = (network.add_node(()), network.add_node(()));
        let nodes: Vec<NodeIndex> = self.saves.iter().map(|_| network.add_node(())).collect();
        let at = |end: End| match end {
            End::Float => float,
            End::Half => half,
            End::Node(index) => nodes[index],
        };
        let total = |sum: u64, cost: u64| sum.saturating_add(cost);
        let casts = self.values.iter().map(|value| value.cost.saturating_mul(2));
        let never = self.saves.iter().flatten().copied().chain(casts).fold(1, total);
        for (index, saves) in self.saves.iter().enumerate() {
            match saves {
                Some(saves) => network.add_edge(nodes[index], half, *saves),
                None => network.add_edge(float, nodes[index], never),
            };
        }
        for value in &self.values {
            let (narrowed, widened) = (network.add_node(()), network.add_node(()));
            network.add_edge(at(value.producer), narrowed, value.cost);
            network.add_edge(widened, at(value.producer), value.cost);
            for &consumer in &value.consumers {
                network.add_edge(narrowed, at(consumer), never);
                network.add_edge(at(consumer), widened, never);
            }
        }
        let (_, flows) = dinics(&network, float, half);
        let stays = reached(&network, &flows, float);
        nodes.iter().zip(&self.saves).map(|(node, saves)| saves.is_some() && !stays[node.index()]).collect()
    }

    /// What a choice costs; `None` where it puts a node where it must not be.
    #[cfg(test)]
    pub fn cost(&self, in_half: &[bool]) -> Option<u64> {
        let mut cost = 0;
        for (saves, &half) in self.saves.iter().zip(in_half) {
            cost += match (saves, half) {
                (None, true) => return None,
                (Some(saves), false) => *saves,
                _ => 0,
            };
        }
        let is_half = |end: End| match end {
            End::Float => false,
            End::Half => true,
            End::Node(index) => in_half[index],
        };
        for value in &self.values {
            let crosses = value.consumers.iter().any(|&consumer| is_half(consumer) != is_half(value.producer));
            cost += if crosses { value.cost } else { 0 };
        }
        Some(cost)
    }
}

/// The nodes that more could flow to.
fn reached(network: &DiGraph<(), u64>, flows: &[u64], from: NodeIndex) -> Vec<bool> {
    let mut found = vec![false; network.node_count()];
    found[from.index()] = true;
    let mut stack = vec![from];
    while let Some(node) = stack.pop() {
        let ahead =
            network.edges(node).filter(|edge| flows[edge.id().index()] < *edge.weight()).map(|edge| edge.target());
        let back = network.edges_directed(node, petgraph::Direction::Incoming);
        let back = back.filter(|edge| flows[edge.id().index()] > 0).map(|edge| edge.source());
        for next in ahead.chain(back) {
            if !std::mem::replace(&mut found[next.index()], true) {
                stack.push(next);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_analysis::Random;

    /// Random acyclic graphs: nodes read values of earlier ones, of an input or of both.
    fn random(seed: u64) -> Choice {
        let mut random = Random::new(seed);
        let count = 1 + random.index(10);
        let saves = (0..count).map(|_| (!random.one_in(4)).then(|| random.below(40))).collect();
        let mut values = vec![Value { cost: 1 + random.below(20), producer: End::Float, consumers: Vec::new() }];
        values.extend((0..count).map(|index| Value {
            cost: random.below(30),
            producer: End::Node(index),
            consumers: Vec::new(),
        }));
        for index in 0..count {
            for _ in 0..1 + random.index(2) {
                let read = random.index(index + 1);
                values[read].consumers.push(End::Node(index));
            }
        }
        let last = values.len() - 1;
        values[last].consumers.push(if random.one_in(2) { End::Float } else { End::Half });
        Choice { saves, values }
    }

    #[test]
    fn the_cut_is_the_cheapest_of_all_choices() {
        for seed in 0..300 {
            let choice = random(seed);
            let count = choice.saves.len();
            let all = (0..1u32 << count).map(|bits| (0..count).map(|at| bits >> at & 1 == 1).collect::<Vec<bool>>());
            let (best, most) = all
                .filter_map(|in_half| Some((choice.cost(&in_half)?, in_half.iter().filter(|&&half| half).count())))
                .min_by_key(|&(cost, halves)| (cost, std::cmp::Reverse(halves)))
                .unwrap();
            let found = choice.solve();
            assert_eq!(choice.cost(&found), Some(best), "seed {seed}: {choice:?}");
            assert_eq!(found.iter().filter(|&&half| half).count(), most, "seed {seed}: {choice:?}");
        }
    }

    #[test]
    fn a_value_is_cast_once_however_many_read_it() {
        let value = |producer, consumers| Value { cost: 10, producer, consumers };
        let choice = Choice {
            saves: vec![Some(4), Some(4), Some(4)],
            values: vec![value(End::Float, vec![End::Node(0), End::Node(1), End::Node(2)])],
        };
        assert_eq!(choice.solve(), [true; 3]);
        let alone = Choice { saves: vec![Some(4)], values: vec![value(End::Float, vec![End::Node(0)])] };
        assert_eq!(alone.solve(), [false]);
    }
}
