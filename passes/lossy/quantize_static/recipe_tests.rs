//! What runtimes other than ONNX Runtime's CPU provider want of a file, and what becomes of a file that has pairs already.

use super::{
    tests::{DIMS, IMAGE, LAYER, OTHER, Seen, context, distance, model},
    *,
};
use crate::{PASSES, PassContext};
use lathe_ir::{DataType, Node, NodeId, ScopeId, Tensor, Use, text};

/// The graph of a file with pairs, as rules look at it.
struct File<'a>(&'a Graph);

impl<'a> File<'a> {
    fn nodes(&self, op: &'static str) -> impl Iterator<Item = (NodeId, &'a Node)> {
        let graph = self.0;
        graph.nodes(ScopeId::MAIN).map(|id| (id, graph.node(id))).filter(move |(_, node)| node.is(op))
    }

    fn constant(&self, node: &Node, index: usize) -> Option<&'a Tensor> {
        self.0.constant(node.input(index)?)
    }

    fn maker(&self, value: Option<ValueId>) -> Option<&'a Node> {
        Some(self.0.node(self.0.producer(value?)?))
    }

    fn readers(&self, value: Option<ValueId>) -> Vec<(&'a Node, usize)> {
        let uses = value.map(|value| self.0.value(value).uses().iter()).into_iter().flatten();
        uses.filter_map(|place| if let Use::Node(id, at) = *place { Some((self.0.node(id), at)) } else { None })
            .collect()
    }

    /// Nodes that multiply with a constant weight in codes, and the node that restores it.
    fn layers(&self) -> Vec<(&'a Node, &'a Node)> {
        let all = ["Conv", "Gemm", "MatMul"].into_iter().flat_map(|op| self.nodes(op));
        all.filter_map(|(_, node)| Some((node, self.maker(node.input(1))?)))
            .filter(|(_, maker)| maker.is("DequantizeLinear") && self.constant(maker, 0).is_some())
            .collect()
    }

    /// How many scales a weight has, and whether they lie along its outputs.
    fn scales(&self, layer: &Node, restores: &Node) -> (usize, bool) {
        let (codes, scales) = (self.constant(restores, 0).unwrap(), self.constant(restores, 1).unwrap());
        let turned = layer.is("MatMul") || layer.is("Gemm") && layer.int("transB").unwrap_or(0) == 0;
        let axis = usize::from(turned);
        let fits = restores.int("axis") == Some(axis as i64) && scales.dims() == [codes.dims()[axis]];
        (scales.len(), fits)
    }

    /// Rules of TensorRT that the file breaks.
    fn broken_for_tensorrt(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut must = |holds: bool, rule: &str| {
            if !holds {
                broken.push(rule.to_owned());
            }
        };
        for (_, node) in self.nodes("QuantizeLinear").chain(self.nodes("DequantizeLinear")) {
            let zeros = self.constant(node, 2);
            must(zeros.is_none_or(|z| z.bytes().iter().all(|&b| b == 0)), "a zero point is not zero");
            must(zeros.is_none_or(|z| z.dtype() == DataType::Int8), "codes have no sign");
            let codes = self.constant(node, 0).map(Tensor::dtype);
            must(codes != Some(DataType::Int32), "a bias is in codes");
            let scale = self.constant(node, 1).unwrap();
            must(scale.len() > 1 || node.attribute("axis").is_none() || codes.is_some(), "one scale has an axis");
            must(scale.dtype() == DataType::Float, "a scale is not float32");
        }
        for (_, node) in self.nodes("QuantizeLinear") {
            let of_layer =
                self.maker(node.input(0)).is_some_and(|maker| ["Conv", "Gemm", "MatMul"].iter().any(|op| maker.is(op)));
            let restored = self.readers(node.output(0)).into_iter().flat_map(|(node, _)| self.readers(node.output(0)));
            let (mut sums, mut others) = (false, false);
            for (reader, at) in restored {
                sums |= reader.is("Add");
                others |= !reader.is("Add");
                let allowed = at == 0 && ["Conv", "Gemm", "MatMul"].iter().any(|op| reader.is(op)) || reader.is("Add");
                must(allowed, "something else than a layer or a sum reads codes");
            }
            must(
                !(of_layer && sums && !others && self.sums_of_one_layer(node)),
                "codes stand between a layer and its sum",
            );
        }
        for (layer, restores) in self.layers() {
            must(self.scales(layer, restores).1, "a weight has not one scale for every output");
            let read = self.maker(layer.input(0)).is_some_and(|maker| maker.is("DequantizeLinear"));
            must(read, "a layer with a weight in codes reads floats");
        }
        broken
    }

    /// Whether the sum that reads these codes has no other operand of a layer.
    fn sums_of_one_layer(&self, rounds: &Node) -> bool {
        let restored = self.readers(rounds.output(0)).into_iter().flat_map(|(node, _)| self.readers(node.output(0)));
        let mut sums = restored.filter(|(node, _)| node.is("Add"));
        sums.any(|(node, _)| {
            let layers = [0, 1].into_iter().filter(|&at| self.maker(node.input(at)).is_some_and(|m| m.is("Conv")));
            layers.count() == 0
        })
    }

    /// Element types of codes that a file for Qualcomm's HTP must not hold, with activations of this type.
    fn wrong_types(&self, activations: DataType) -> Vec<String> {
        let mut wrong = Vec::new();
        let is_layer = |node: &Node| ["Conv", "Gemm", "MatMul"].iter().any(|op| node.is(op));
        for (_, node) in self.nodes("QuantizeLinear") {
            let found = self.constant(node, 2).map(Tensor::dtype);
            if found != Some(activations) || self.constant(node, 1).is_none_or(|scale| !scale.dims().is_empty()) {
                wrong.push(format!("an activation is {found:?}, or has more than one scale"));
            }
        }
        for (_, node) in self.nodes("DequantizeLinear") {
            let Some(codes) = self.constant(node, 0) else {
                let types =
                    [self.maker(node.input(0)).and_then(|maker| self.constant(maker, 2)), self.constant(node, 2)];
                if types[0] != types[1] {
                    wrong.push("codes are restored with another zero point".to_owned());
                }
                continue;
            };
            let (reader, at) = self.readers(node.output(0))[0];
            let expected = match (is_layer(reader), at) {
                (true, 1) => DataType::Int8,
                (true, _) => DataType::Int32,
                (false, _) => activations,
            };
            if codes.dtype() != expected {
                wrong.push(format!("a constant of {} is {:?}", reader.op_type, codes.dtype()));
            }
        }
        wrong
    }

    /// Rules of Qualcomm's HTP that the file breaks.
    fn broken_for_qnn(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut must = |holds: bool, rule: String| {
            if !holds {
                broken.push(rule);
            }
        };
        let pairs = ["QuantizeLinear", "DequantizeLinear"];
        for id in self.0.nodes(ScopeId::MAIN) {
            let node = self.0.node(id);
            if pairs.iter().any(|op| node.is(op)) {
                continue;
            }
            let coded = |&value: &ValueId| self.maker(Some(value)).is_some_and(|maker| maker.is("DequantizeLinear"));
            let whole = |value: &ValueId| self.0.constant(*value).is_some_and(|t| t.dtype().is_integer());
            let all = node.inputs().iter().flatten().all(|value| coded(value) || whole(value));
            must(all, format!("{} reads floats", node.op_type));
            let rounded = node.outputs().iter().flatten().all(|&output| {
                let readers = self.readers(Some(output));
                readers.len() == 1 && readers[0].0.is("QuantizeLinear")
            });
            must(rounded, format!("{} gives floats", node.op_type));
        }
        for (layer, restores) in self.layers() {
            let (scales, fits) = self.scales(layer, restores);
            let right = if layer.is("Conv") { fits } else { scales == 1 && restores.attribute("axis").is_none() };
            must(right, format!("the weight of {} has {scales} scales", layer.op_type));
            let Some(bias) = self.maker(layer.input(2)) else { continue };
            let input = self.constant(self.maker(layer.input(0)).unwrap(), 1).unwrap().to_f32s().unwrap()[0];
            let weights = self.constant(restores, 1).unwrap().to_f32s().unwrap();
            let steps = self.constant(bias, 1).unwrap().to_f32s().unwrap();
            let product = steps.iter().enumerate().all(|(at, &step)| step == input * weights[at % weights.len()]);
            must(
                product && self.constant(bias, 0).unwrap().dtype() == DataType::Int32,
                "a bias has other steps".into(),
            );
        }
        broken
    }
}

const EVERYWHERE: &[(&str, &str)] = &[("quantize-static.everywhere", "true")];

/// A model as a recipe wants it, in every place.
fn written(model: &Model, seen: &Seen, recipe: Recipe) -> Model {
    written_with(model, seen, (recipe, EVERYWHERE))
}

fn written_with(model: &Model, seen: &Seen, (recipe, settings): (Recipe, &[(&str, &str)])) -> Model {
    let cx = context(seen, settings).with_quantities(Vec::new()).with_recipe(recipe);
    assert!(QuantizeStatic.is_requested(&cx).unwrap());
    let proposal = QuantizeStatic.propose(model, &cx).unwrap();
    let mut changed = model.clone();
    for site in &proposal.sites {
        assert!(site.required && site.candidates.len() == 1);
        let outcome = QuantizeStatic.apply(&mut changed, site, &site.candidates[0], &cx).unwrap();
        assert_eq!(outcome.changes.len(), 1, "{:?}", outcome.refusals);
    }
    assert!(!proposal.sites.is_empty(), "{:?}", proposal.outcome.refusals);
    changed.check().unwrap_or_else(|error| panic!("{error}\n{}", text::print(&changed)));
    changed
}

/// A residual block with a head: convolutions, a sum with what skips them, a mean and a layer.
fn network() -> (Model, Seen) {
    let constants = [LAYER[0], LAYER[1], OTHER[0], OTHER[1], "float[8, 5] u", "float[5] d"];
    let body = "a = Conv (x, w, b) h = Relu (a) e = Conv <pads = [1, 1, 1, 1]> (h, v, c) s = Add (e, h) r = Relu (s) \
                m = GlobalAveragePool (r) f = Flatten (m) y = Gemm (f, u, d)";
    let model = model(IMAGE, "float[1, 5]", &constants, body);
    let seen = Seen::new(&model, &DIMS);
    (model, seen)
}

#[test]
fn tensorrt_reads_what_is_written_for_it() {
    let (model, seen) = network();
    let changed = written(&model, &seen, Recipe::TensorRt);
    assert!(distance(&model, &changed, &seen.sample) < 0.05);
    let file = File(&changed.graph);
    assert_eq!(file.broken_for_tensorrt(), Vec::<String>::new(), "{}", text::print(&changed));
    // The input, what the second convolution and the sum read together, and what the head reads.
    assert_eq!((file.nodes("QuantizeLinear").count(), file.layers().len()), (3, 3));
    // What the CPU provider wants is nothing for it, and the other way round.
    let other = written(&model, &seen, Recipe::Cpu);
    let broken = File(&other.graph).broken_for_tensorrt();
    assert!(
        broken.iter().any(|rule| rule == "a bias is in codes")
            && broken.iter().any(|rule| rule == "codes have no sign")
    );
}

#[test]
fn openvino_reads_pairs_before_layers_alone() {
    let (model, seen) = network();
    let changed = written(&model, &seen, Recipe::OpenVino);
    assert!(distance(&model, &changed, &seen.sample) < 0.05);
    let file = File(&changed.graph);
    assert_eq!((file.nodes("QuantizeLinear").count(), file.layers().len()), (3, 3));
    for (_, node) in file.nodes("QuantizeLinear") {
        assert_eq!(file.constant(node, 2).unwrap().dtype(), DataType::Uint8);
        let restored = file.readers(node.output(0)).into_iter().flat_map(|(node, _)| file.readers(node.output(0)));
        let layers = ["Conv", "Gemm", "MatMul"];
        assert!(
            restored.clone().count() > 0
                && restored.clone().all(|(reader, at)| at == 0 && layers.iter().any(|op| reader.is(op)))
        );
    }
    for (layer, restores) in file.layers() {
        assert_eq!(file.constant(restores, 0).unwrap().dtype(), DataType::Int8);
        assert!(file.scales(layer, restores).1);
        assert!(layer.input(2).is_none_or(|bias| changed.graph.constant(bias).is_some()), "biases stay floats");
    }
    let sums = file.nodes("Add").next().unwrap().1;
    assert!(!sums.inputs().iter().flatten().any(|&v| file.maker(Some(v)).unwrap().is("DequantizeLinear")));
}

#[test]
fn qnn_reads_codes_everywhere() {
    let (model, seen) = network();
    let changed = written(&model, &seen, Recipe::Qnn);
    assert!(distance(&model, &changed, &seen.sample) < 0.05);
    assert_eq!(File(&changed.graph).broken_for_qnn(), Vec::<String>::new(), "{}", text::print(&changed));
    let constants = ["float[64, 72] w", "float[72] b"];
    let body = "h = MatMul (x, w) a = Add (h, b) t = Tanh (a) y = Softmax (t)";
    let linear = super::tests::model("float[5, 64]", "float[5, 72]", &constants, body);
    let seen = Seen::new(&linear, &[5, 64]);
    let changed = written(&linear, &seen, Recipe::Qnn);
    assert_eq!(File(&changed.graph).broken_for_qnn(), Vec::<String>::new(), "{}", text::print(&changed));
    assert!(!File(&written(&linear, &seen, Recipe::TensorRt).graph).broken_for_qnn().is_empty());
}

const WIDE: &[(&str, &str)] = &[("quantize-static.everywhere", "true"), ("quantize-static.activations", "16")];

#[test]
fn qnn_reads_activations_of_sixteen_bits() {
    let (image, _) = network();
    let constants = ["float[64, 72] w", "float[72] b"];
    let body = "h = MatMul (x, w) a = Add (h, b) t = Tanh (a) s = Sigmoid (t) y = Softmax (s)";
    let linear = super::tests::model("float[5, 64]", "float[5, 72]", &constants, body);
    for (mut model, dims) in [(image, DIMS.to_vec()), (linear, vec![5, 64])] {
        model.opsets = vec![(String::new(), 21)];
        let seen = Seen::new(&model, &dims);
        let [wide, narrow] = [WIDE, EVERYWHERE].map(|settings| written_with(&model, &seen, (Recipe::Qnn, settings)));
        for (changed, activations) in [(&wide, DataType::Uint16), (&narrow, DataType::Uint8)] {
            let file = File(&changed.graph);
            assert_eq!(file.broken_for_qnn(), Vec::<String>::new(), "{}", text::print(changed));
            assert_eq!(file.wrong_types(activations), Vec::<String>::new(), "{}", text::print(changed));
        }
        assert!(!File(&narrow.graph).wrong_types(DataType::Uint16).is_empty());
        // Weights keep their 8 bits; what activations lose is next to nothing.
        let [fine, coarse] = [&wide, &narrow].map(|changed| distance(&model, changed, &seen.sample));
        assert!(fine < coarse, "{fine} {coarse}");
        for (op, scale, zero) in [("Sigmoid", 1.0 / 65536.0, 0), ("Tanh", 1.0 / 32768.0, 32768)] {
            let file = File(&wide.graph);
            for (_, node) in file.nodes(op) {
                let rounds = file.readers(node.output(0))[0].0;
                let [step, point] = [1, 2].map(|at| file.constant(rounds, at).unwrap().scalar_f64().unwrap());
                assert_eq!((step, point), (scale, f64::from(zero)), "{op}");
            }
        }
    }
}

#[test]
fn activations_of_sixteen_bits_are_refused_where_nothing_reads_them() {
    let (model, seen) = network();
    let refused = |model: &Model, recipe: Recipe| {
        let cx = context(&seen, WIDE).with_quantities(Vec::new()).with_recipe(recipe);
        assert!(QuantizeStatic.spreads(model, &cx).unwrap().is_empty());
        QuantizeStatic.propose(model, &cx).unwrap().outcome.refusals.into_keys().next().unwrap()
    };
    assert!(refused(&model, Recipe::Qnn).contains("--opset 21 upgrades"));
    for recipe in [Recipe::Cpu, Recipe::TensorRt, Recipe::OpenVino] {
        assert!(refused(&model, recipe).contains("for --target qnn"));
    }
}

#[test]
fn what_is_quantized_already_is_left_alone_and_exact_passes_keep_it() {
    let (model, seen) = network();
    let quantized = written(&model, &seen, Recipe::Cpu);
    let again = Seen::new(&quantized, &DIMS);
    let proposal = QuantizeStatic.propose(&quantized, &context(&again, &[])).unwrap();
    assert!(proposal.sites.is_empty());
    assert!(proposal.outcome.refusals.contains_key("it is quantized already"), "{:?}", proposal.outcome.refusals);
    let constants = ["float[64, 72] w", "float[72] b"];
    let linear = super::tests::model("float[5, 64]", "float[5, 72]", &constants, "h = MatMul (x, w) y = Add (h, b)");
    let linear_seen = Seen::new(&linear, &[5, 64]);
    let products = written(&linear, &linear_seen, Recipe::Cpu);
    for (quantized, sample) in [(&quantized, &seen.sample), (&products, &linear_seen.sample)] {
        let mut passed = quantized.clone();
        let cx = PassContext::default().with_evaluator(lathe_testkit::evaluator()).with_max_growth(1 << 30);
        for _ in 0..2 {
            for pass in PASSES {
                pass.apply(&mut passed, &cx).unwrap();
            }
        }
        passed.check().unwrap();
        let [before, after] = [quantized, &passed].map(|model| lathe_testkit::kernels(model, sample));
        assert_eq!(before, after, "{}", text::print(&passed));
        assert!(distance(quantized, &passed, sample) < 1e-6);
    }
}
