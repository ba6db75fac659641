//! How much work a run of a model is.

use super::Sizes;
use lathe_analysis::{Bindings, Cost, Facts};
use lathe_ir::Model;

/// Reading a byte of weights takes as long as this many floating-point operations.
const OPERATIONS_PER_BYTE: u64 = 4;

/// What one run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunWork {
    /// Floating-point operations, with those in whose time the weights are read.
    pub operations: u64,
    /// The most bytes that values hold at a time.
    pub bytes: u64,
}

/// What runs of a model take, estimated from its graph.
pub(crate) struct Estimate<'a> {
    model: &'a Model,
    facts: Facts,
}

impl Estimate<'_> {
    pub(crate) fn of(model: &Model) -> Estimate<'_> {
        Estimate { model, facts: Facts::infer(model) }
    }

    /// The work of a run at these sizes.
    pub(crate) fn at(&self, sizes: &Sizes) -> RunWork {
        let mut bindings = Bindings::default();
        let unnamed = |first: bool, least: usize| {
            let known =
                sizes.named.iter().filter(|(name, _)| name.starts_with('?') && name.starts_with("?0/") == first);
            known.map(|(_, &size)| size).max().unwrap_or(least) as i64
        };
        (bindings.batch, bindings.other) = (unnamed(true, sizes.first), unnamed(false, sizes.rest));
        for (name, &size) in &sizes.named {
            bindings.set(name.clone(), size as i64);
        }
        let cost = Cost::unfolded(self.model, &self.facts, &bindings);
        let reading = cost.weight_bytes.saturating_mul(OPERATIONS_PER_BYTE);
        RunWork { operations: cost.flops.saturating_add(reading), bytes: cost.activation_peak_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        inputs::{InputSpec, Style, sizes_to_try},
        testing::Build,
    };
    use lathe_ir::{DataType, Node, Tensor, Type};

    #[test]
    fn work_is_estimated_at_the_sizes_of_a_run() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "64"]);
        let w = build.constant("w", Tensor::from_f32s(&[64, 64], &[0.0; 4096]));
        let y = build.node(Node::new("MatMul"), &[x, w], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let estimate = Estimate::of(&model);
        let at = |n: usize| {
            let named = [("n".to_owned(), n)].into();
            estimate.at(&Sizes { named, first: 1, rest: 4, style: Style::Usual, masked: false })
        };
        let weights = 4096 * 4 * OPERATIONS_PER_BYTE;
        assert_eq!(at(1), RunWork { operations: 8192 + weights, bytes: 2 * 64 * 4 });
        assert_eq!(at(1000), RunWork { operations: 8_192_000 + weights, bytes: 1000 * 2 * 64 * 4 });
        // Axes without a name count as well.
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["?", "3", "?", "?"]);
        let y = build.node(Node::new("Identity"), &[x], "y");
        let image = build.output(y, Type::unshaped(DataType::Float)).model();
        let sizes = &sizes_to_try(&image, &InputSpec::default())[0];
        assert_eq!(Estimate::of(&image).at(sizes).bytes, 2 * 3 * 64 * 64 * 4);
    }
}
