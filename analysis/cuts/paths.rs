//! Weighted sums over all paths of a graph, modulo a prime.

use super::Skip;
use crate::units::flow::Flow;
use lathe_ir::ValueId;

/// The Mersenne prime 2⁶¹ − 1.
const PRIME: u64 = (1 << 61) - 1;
const SEEDS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xd1b5_4a32_d192_ed03];

/// Two independent sums.
pub(super) type Sum = [u64; 2];

/// For every value the sum over all paths that lead from a start to an end through it.
pub(super) struct Sums {
    through: Vec<Sum>,
    /// The sum over all paths.
    pub total: Sum,
}

impl Sums {
    /// Paths follow the edges that carry data, but not from the source of one of `aside` into its concatenation.
    pub fn of(flow: &Flow, start: ValueId, end: ValueId, aside: &[Skip]) -> Sums {
        let count = flow.graph.value_bound();
        let mut left_out = vec![None; flow.order.len()];
        for skip in aside {
            if let Some(at) = flow.place_of(skip.join) {
                left_out[at] = Some(skip.source);
            }
        }
        let (mut to, mut from) = (vec![[0; 2]; count], vec![[0; 2]; count]);
        (to[start.index()], from[end.index()]) = ([1; 2], [1; 2]);
        let outputs = |at: usize| flow.graph.node(flow.order[at]).outputs().iter().flatten();
        let left_out = &left_out;
        let reads = |at: usize| flow.reads[at].iter().filter(move |v| left_out[at] != Some(**v));
        for at in 0..flow.order.len() {
            for &output in outputs(at) {
                for (index, &read) in reads(at).enumerate() {
                    let step = times(weight(at, index, output), to[read.index()]);
                    to[output.index()] = plus(to[output.index()], step);
                }
            }
        }
        for at in (0..flow.order.len()).rev() {
            for &output in outputs(at) {
                for (index, &read) in reads(at).enumerate() {
                    let step = times(weight(at, index, output), from[output.index()]);
                    from[read.index()] = plus(from[read.index()], step);
                }
            }
        }
        let total = to[end.index()];
        let through = to.iter().zip(&from).map(|(&a, &b)| times(a, b)).collect();
        Sums { through, total }
    }

    /// The sum over the paths through a value.
    pub fn through(&self, value: ValueId) -> Sum {
        self.through[value.index()]
    }

    /// What is missing from the sum of one value to that of all paths.
    pub fn rest(&self, value: ValueId) -> Sum {
        let own = self.through(value);
        [0, 1].map(|i| (self.total[i] + PRIME - own[i]) % PRIME)
    }

    /// The values that all paths pass, in the order they are computed; empty if there are no paths.
    pub fn spine(&self, flow: &Flow, start: ValueId) -> Vec<ValueId> {
        if self.total == [0; 2] {
            return Vec::new();
        }
        let made = flow.order.iter().flat_map(|&id| flow.graph.node(id).outputs().iter().flatten().copied());
        std::iter::once(start).chain(made).filter(|&v| self.through(v) == self.total).collect()
    }
}

fn plus(a: Sum, b: Sum) -> Sum {
    [0, 1].map(|i| (a[i] + b[i]) % PRIME)
}

fn times(a: Sum, b: Sum) -> Sum {
    [0, 1].map(|i| (u128::from(a[i]) * u128::from(b[i]) % u128::from(PRIME)) as u64)
}

/// The weight of the edge from read `index` of the node at `at` to one of its outputs, never zero.
fn weight(at: usize, index: usize, output: ValueId) -> Sum {
    SEEDS.map(|seed| {
        let mut x = seed;
        for part in [at, index, output.index()] {
            // The finalizer of SplitMix64.
            x = (x ^ part as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^= x >> 31;
        }
        1 + x % (PRIME - 1)
    })
}
