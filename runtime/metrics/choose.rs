//! Which metric says most about a model, and on which outputs.

use super::{Case, FAMILIES, Family, Metric, OutputInfo, metrics};
use lathe_ir::Graph;

/// The metric of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChosenMetric {
    pub metric: &'static str,
    /// The outputs whose worst score counts.
    pub outputs: Vec<String>,
    /// Why, where this program chose it.
    pub why: Option<String>,
}

/// Why there is no metric.
#[derive(Debug, thiserror::Error)]
pub enum MetricError {
    /// It has another name, if it is one.
    #[error("there is no metric `{wanted}`; there are auto, {available}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// No output of the model fits.
    #[error("{metric} cannot be measured here: {reasons}")]
    Unfit {
        /// What was asked for.
        metric: &'static str,
        /// Why no output fits.
        reasons: String,
    },
}

/// Resolves a metric by its name; `auto` chooses by what the model is.
pub(crate) fn choose(wanted: &str, case: &mut Case<'_>) -> Result<ChosenMetric, MetricError> {
    if wanted != "auto" {
        return named(wanted, case, None);
    }
    let mut families = FAMILIES.to_vec();
    families.sort_by_key(|family| std::cmp::Reverse(family.precedence()));
    let suggested = families.iter().find_map(|family| family.suggest(case));
    let (metric, why) = suggested.expect("distances are suggested for whatever there is");
    named(metric, case, Some(why))
}

fn named(wanted: &str, case: &Case<'_>, why: Option<String>) -> Result<ChosenMetric, MetricError> {
    let families = FAMILIES.iter().flat_map(|&family| family.metrics().iter().map(move |metric| (family, metric)));
    let (family, metric) = families.into_iter().find(|(_, metric)| metric.name == wanted).ok_or_else(|| {
        let all: Vec<&str> = metrics().map(|m| m.name).collect();
        MetricError::Unknown { wanted: wanted.to_owned(), available: all.join(", ") }
    })?;
    let mut fitting = fitting(family, metric, case.outputs)?;
    // Beside its logits a model may hand out features, whose largest element means nothing.
    if metric.of_logits && fitting.iter().any(|o| holds_logits(case.graph, o.name)) {
        fitting.retain(|o| holds_logits(case.graph, o.name));
    }
    if family.single() {
        fitting.truncate(1);
    }
    Ok(ChosenMetric { metric: metric.name, outputs: fitting.iter().map(|o| o.name.to_owned()).collect(), why })
}

/// The outputs that a metric can be measured on; if there are none, why.
fn fitting<'a, 'b>(
    family: &dyn Family,
    metric: &'static Metric,
    outputs: &'a [OutputInfo<'b>],
) -> Result<Vec<&'a OutputInfo<'b>>, MetricError> {
    let mut reasons: Vec<String> = Vec::new();
    let mut fitting = Vec::new();
    for output in outputs {
        match family.fits(output).map_err(|reason| reason.to_string()) {
            Ok(()) => fitting.push(output),
            Err(reason) if !reasons.contains(&reason) => reasons.push(reason),
            Err(_) => {}
        }
    }
    if outputs.is_empty() {
        reasons.push("no output of the model holds numbers".to_owned());
    }
    if fitting.is_empty() {
        return Err(MetricError::Unfit { metric: metric.name, reasons: reasons.join("; ") });
    }
    Ok(fitting)
}

/// Whether an output is called logits or the like, or is made as a classifier makes them.
pub(super) fn holds_logits(graph: &Graph, output: &str) -> bool {
    let lower = output.to_ascii_lowercase();
    let called = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if called(&["logit", "prob", "class", "score", "softmax"]) {
        return true;
    }
    if called(&["embed", "feature", "hidden", "latent", "pool", "state"]) {
        return false;
    }
    let outputs = graph.main().outputs();
    let mut next = outputs.iter().copied().find(|&v| graph.value(v).name == output);
    let mut steps = 0;
    // Bounded: a chain of reshapes is short, and a malformed graph may hold a cycle.
    while let (Some(value), 0..8) = (next, steps) {
        steps += 1;
        let Some(node) = graph.producer(value).map(|id| graph.node(id)) else { return false };
        let is_constant = |v: &lathe_ir::ValueId| graph.constant(*v).is_some();
        next = match node.op_type.as_str() {
            "Softmax" | "LogSoftmax" | "Gemm" | "MatMul" | "FusedMatMul" => return true,
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Cast" => node.input(0),
            // The bias of a layer; a sum of two computed values is a stream of features.
            "Add" if node.inputs().iter().flatten().any(is_constant) => {
                node.inputs().iter().flatten().copied().find(|v| !is_constant(v))
            }
            _ => None,
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::{super::Tokens, *};
    use crate::testing::Build;
    use lathe_ir::{DataType, Node, Tensor, Type};

    fn output<'a>(name: &'a str, dims: &'a [usize]) -> OutputInfo<'a> {
        OutputInfo { name, dtype: DataType::Float, dims, labels: None, tokens: None }
    }

    fn classifier(last: &str) -> Graph {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        let w = build.constant("w", Tensor::from_f32s(&[3, 3], &[0.0; 9]));
        let h = build.node(Node::new(last), &[x, w], "h");
        let y = build.node(Node::new("Identity"), &[h], "y");
        build.output(y, Type::unshaped(DataType::Float)).graph
    }

    fn wanted(metric: &str, graph: &Graph, outputs: &[OutputInfo<'_>], causal: bool) -> Result<ChosenMetric, String> {
        let mut case = Case { graph, outputs, samples: 8, is_causal: &mut |_| causal };
        choose(metric, &mut case).map_err(|e| e.to_string())
    }

    fn auto(graph: &Graph, outputs: &[OutputInfo<'_>], samples: usize, causal: bool) -> String {
        let mut case = Case { graph, outputs, samples, is_causal: &mut |_| causal };
        let chosen = choose("auto", &mut case).unwrap();
        format!("{}: {}", chosen.metric, chosen.why.unwrap())
    }

    #[test]
    fn auto_goes_by_what_the_model_is() {
        let (matmul, mul) = (classifier("MatMul"), classifier("Mul"));
        let y = output("y", &[8, 3]);
        let labels = Tensor::int64s(&[0; 8]);
        assert_eq!(auto(&matmul, &[OutputInfo { labels: Some(&labels), ..y }], 8, false), "accuracy: labels are given");
        assert_eq!(auto(&matmul, &[y], 500, false), "top1: `y` has logits of classes and no labels are given");
        assert_eq!(
            auto(&matmul, &[y], 8, false),
            "kl: `y` has logits of classes, and 8 samples are too few to count winners"
        );
        assert_eq!(auto(&mul, &[y], 8, false), "rel-l2: no output is known to be logits or images");
        assert_eq!(
            auto(&mul, &[output("y", &[1, 3, 64, 64])], 8, false),
            "psnr: `y` of shape [1, 3, 64, 64] holds images"
        );
        let ids = Tokens { ids: "ids", vocabulary: Some(64), mask: None };
        let tokens = OutputInfo { tokens: Some(ids), ..output("y", &[1, 5, 64]) };
        assert_eq!(
            auto(&mul, &[tokens], 8, true),
            "perplexity: `y` has logits for every token of `ids` and none depends on later tokens"
        );
        assert_eq!(auto(&mul, &[tokens], 8, false), "rel-l2: no output is known to be logits or images");
        // Classes of tokens are no vocabulary.
        let classes = OutputInfo { dims: &[1, 5, 9], ..tokens };
        assert_eq!(
            auto(&matmul, &[classes], 8, true),
            "kl: `y` has logits of classes, and 8 samples are too few to count winners"
        );
        let refused = wanted("perplexity", &matmul, &[classes], true).unwrap_err();
        assert_eq!(
            refused,
            "perplexity cannot be measured here: output `y` has 9 numbers for every token of `ids`, which are 64 different \
             ones"
        );
    }

    #[test]
    fn logits_count_and_features_do_not() {
        let graph = classifier("Mul");
        let outputs = [output("features", &[8, 3]), output("logits", &[8, 3])];
        let chosen = wanted("top1", &graph, &outputs, false).unwrap();
        assert_eq!((chosen.outputs, chosen.why), (vec!["logits".to_owned()], None));
        let chosen = wanted("rel-l2", &graph, &outputs, false).unwrap();
        assert_eq!(chosen.outputs.len(), 2);
    }

    #[test]
    fn what_cannot_be_measured_is_said() {
        let graph = classifier("Mul");
        let outputs = [output("y", &[8, 3])];
        let refused = |metric| wanted(metric, &graph, &outputs, false).unwrap_err();
        assert_eq!(
            refused("accuracy"),
            "accuracy cannot be measured here: there are no labels (--labels NAME names them)"
        );
        assert_eq!(refused("psnr"), "psnr cannot be measured here: output `y` of shape [8, 3] is no batch of images");
        let nothing = wanted("rel-l2", &graph, &[], false).unwrap_err();
        assert_eq!(nothing, "rel-l2 cannot be measured here: no output of the model holds numbers");
        assert!(refused("bleu").starts_with("there is no metric `bleu`; there are auto, max-abs, rel-l2"));
    }
}
