//! What a model is like, and which recipes that suggests.

use lathe_analysis::{Bindings, Cost, Facts, UnitKind, Units};
use lathe_ir::{Model, ScopeId};
use lathe_passes::Quantity;

/// Share of the operations that an operator must take for a recipe that works on it.
const MUCH: f64 = 0.2;

/// Residual units that there must be before some may go.
const ENOUGH_UNITS: usize = 4;

/// Lossy methods that are tried together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recipe {
    pub name: &'static str,
    /// The methods; all if none is named.
    pub methods: &'static [&'static str],
}

/// Everything at once.
const EVERYTHING: Recipe = Recipe { name: "everything", methods: &[] };
const WEIGHTS: Recipe = Recipe { name: "weights of few bits", methods: &["quantize", "compensate", "convert-floats"] };
const INTEGERS: Recipe =
    Recipe { name: "whole numbers", methods: &["quantize", "quantize-dynamic", "quantize-static", "convert-floats"] };
const THIN: Recipe =
    Recipe { name: "thinner layers", methods: &["factorize", "factorize-jointly", "dictionary", "prune-channels"] };
const TOKENS: Recipe = Recipe { name: "fewer tokens", methods: &["reduce-tokens"] };
const UNITS: Recipe = Recipe { name: "fewer units", methods: &["prune-units"] };
const SUBSTITUTES: Recipe = Recipe { name: "substitutes", methods: &["substitute", "prune-channels"] };

/// What a model is like.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Features {
    /// Share of the operations in convolutions with a window, in other products, and of units that attend.
    windows: f64,
    products: f64,
    attention: usize,
    /// Whether attentions are over a fixed number of tokens.
    fixed_tokens: bool,
    units: usize,
    parameters: u64,
    flops: u64,
}

impl Features {
    pub fn of(model: &Model) -> Features {
        let graph = &model.graph;
        let facts = Facts::infer(model);
        let cost = Cost::of(model, &facts, &Bindings::default());
        let units = Units::find(model, &facts);
        let share = |wanted: &dyn Fn(lathe_ir::NodeId) -> bool| {
            let own: u64 =
                graph.nodes(ScopeId::MAIN).filter(|&id| wanted(id)).map(|id| cost.by_node[id.index()].flops).sum();
            own as f64 / cost.flops.max(1) as f64
        };
        let windows = |id| {
            let node = graph.node(id);
            let weight = node.input(1).filter(|_| node.is("Conv")).and_then(|w| graph.constant(w));
            weight.is_some_and(|w| w.dims().iter().skip(2).any(|&k| k > 1))
        };
        let products = |id| ["MatMul", "Gemm", "MatMulNBits"].contains(&graph.node(id).op_type.as_str());
        let attention: Vec<_> = units.iter().filter(|(_, unit)| unit.kind == UnitKind::Attention).collect();
        let fixed = |value| facts.shape(value).is_some_and(|s| s.len() == 3 && s[1].as_known().is_some());
        Features {
            windows: share(&windows),
            products: share(&products),
            attention: attention.len(),
            fixed_tokens: attention.first().is_some_and(|(_, unit)| fixed(unit.stream_in)),
            units: units.iter().filter(|(_, unit)| unit.barrier.is_none()).count(),
            parameters: cost.parameters,
            flops: cost.flops,
        }
    }

    /// Models of one family are alike in what they are made of and within a factor of two in size.
    pub fn family(&self) -> String {
        let kind = match (self.attention > 0, self.windows > MUCH, self.fixed_tokens) {
            (true, true, _) => "convolutions and attention",
            (true, false, true) => "attention over fixed tokens",
            (true, false, false) => "attention over open tokens",
            (false, true, _) => "convolutions",
            (false, false, _) => "layers",
        };
        let power = |x: u64| 63 - u64::leading_zeros(x.max(1)).min(63);
        format!("{kind}, 2^{} parameters, 2^{} FLOPs", power(self.parameters), power(self.flops))
    }

    /// What is worth a try, most promising first.
    pub fn recipes(&self, measure: Quantity) -> Vec<Recipe> {
        let layers = self.products + self.windows > MUCH;
        let mut found = vec![EVERYTHING];
        let size = measure == Quantity::Size;
        let mut add = |recipe: Recipe, wanted: bool| found.extend(wanted.then_some(recipe));
        add(WEIGHTS, size);
        add(TOKENS, self.fixed_tokens && matches!(measure, Quantity::Flops | Quantity::Latency));
        add(INTEGERS, measure == Quantity::Latency && self.products > MUCH);
        add(THIN, layers);
        add(UNITS, self.units >= ENOUGH_UNITS);
        add(SUBSTITUTES, !size && self.windows > MUCH);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;
    use lathe_passes::lossy::METHODS;

    #[test]
    fn recipes_follow_from_what_a_model_is_made_of() {
        let zeros = |count: usize| vec!["0"; count].join(", ");
        let model = text::parse(&format!(
            "<ir_version: 10, opset_import: [\"\" : 20]> g (float[1,4,8,8] x) => (float[1,4,8,8] y)
             <float[4,4,3,3] w = {{{}}}> {{ y = Conv <pads = [1, 1, 1, 1]> (x, w) }}",
            zeros(144)
        ))
        .unwrap();
        let features = Features::of(&model);
        assert_eq!(features.family(), "convolutions, 2^7 parameters, 2^14 FLOPs");
        let names = |measure| features.recipes(measure).iter().map(|r| r.name).collect::<Vec<_>>();
        assert_eq!(names(Quantity::Latency), ["everything", "thinner layers", "substitutes"]);
        assert_eq!(names(Quantity::Size), ["everything", "weights of few bits", "thinner layers"]);
        let vision =
            Features { windows: 0.01, products: 0.9, attention: 12, fixed_tokens: true, units: 24, ..features };
        let names: Vec<&str> = vision.recipes(Quantity::Latency).iter().map(|r| r.name).collect();
        assert_eq!(names, ["everything", "fewer tokens", "whole numbers", "thinner layers", "fewer units"]);
    }

    #[test]
    fn recipes_name_methods_that_there_are() {
        for recipe in [EVERYTHING, WEIGHTS, INTEGERS, THIN, TOKENS, UNITS, SUBSTITUTES] {
            for name in recipe.methods {
                assert!(METHODS.iter().any(|m| m.info().name == *name), "{name}");
            }
        }
    }
}
