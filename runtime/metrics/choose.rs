//! Which metric says most about a model, and on which outputs.

use super::{FAMILIES, Metric, Place, metrics};
use crate::similarity;
use lathe_ir::Graph;

/// The metric of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub metric: &'static str,
    /// The outputs whose worst score counts.
    pub outputs: Vec<String>,
    /// Why, where this program chose it.
    pub why: Option<String>,
}

/// Below this many rows one changed prediction is more than a percent, so the divergence says more.
const FEW: usize = 100;

/// Resolves a metric by its name; `auto` chooses by what the model is. `samples` are those of the whole set.
///
/// `causal` runs the model to find out whether the logits of a position depend on later tokens.
pub(crate) fn choose(
    wanted: &str,
    graph: &Graph,
    places: &[Place<'_>],
    samples: usize,
    causal: &mut dyn FnMut(&Place<'_>) -> Result<bool, String>,
) -> Result<Chosen, String> {
    if wanted != "auto" {
        return named(wanted, graph, places, None);
    }
    let because = |metric, why: String| named(metric, graph, places, Some(why));
    let fits = |metric: &str| -> Vec<&Place<'_>> { fitting(metric, places).unwrap_or_default() };
    if places.iter().any(|p| p.labels.is_some()) {
        return because("accuracy", "labels are given".to_owned());
    }
    if let Some(place) = fits("perplexity").first()
        && causal(place)?
    {
        let (name, ids) = (place.name, place.tokens.map_or("", |tokens| tokens.ids));
        return because(
            "perplexity",
            format!("`{name}` has logits for every token of `{ids}` and none depends on later tokens"),
        );
    }
    // A row for every sample, or for every token.
    let rows = |p: &&Place<'_>| p.dims.len() == 2 || p.dims.len() == 3 && p.tokens.is_some();
    let classes = fits("kl").into_iter().find(|p| rows(p) && holds_logits(graph, p.name));
    if let Some(place) = classes {
        let name = place.name;
        return if samples < FEW {
            because("kl", format!("`{name}` has logits of classes, and {samples} samples are too few to count winners"))
        } else {
            because("top1", format!("`{name}` has logits of classes and no labels are given"))
        };
    }
    if let Some(place) = places.iter().find(|p| p.dtype.is_float() && similarity::layout(p.dims).is_some()) {
        return because("psnr", format!("`{}` of shape {:?} holds images", place.name, place.dims));
    }
    because("rel-l2", "no output is known to be logits or images".to_owned())
}

fn named(wanted: &str, graph: &Graph, places: &[Place<'_>], why: Option<String>) -> Result<Chosen, String> {
    let metric: &'static Metric = metrics().find(|m| m.name == wanted).ok_or_else(|| {
        let all: Vec<&str> = metrics().map(|m| m.name).collect();
        format!("there is no metric `{wanted}`; there are auto, {}", all.join(", "))
    })?;
    let mut found = fitting(metric.name, places)?;
    let family = FAMILIES.iter().find(|f| f.metrics().contains(metric)).expect("metrics come from families");
    let about_logits = family.single() || matches!(metric.name, "kl" | "top1");
    // Beside its logits a model may hand out features, whose largest element means nothing.
    if about_logits && found.iter().any(|p| holds_logits(graph, p.name)) {
        found.retain(|p| holds_logits(graph, p.name));
    }
    if family.single() {
        found.truncate(1);
    }
    Ok(Chosen { metric: metric.name, outputs: found.iter().map(|p| p.name.to_owned()).collect(), why })
}

/// The outputs that a metric can be measured on; if there are none, why.
fn fitting<'a, 'b>(metric: &str, places: &'a [Place<'b>]) -> Result<Vec<&'a Place<'b>>, String> {
    let family = FAMILIES.iter().find(|f| f.metrics().iter().any(|m| m.name == metric));
    let family = family.ok_or_else(|| format!("there is no metric `{metric}`"))?;
    let mut reasons: Vec<String> = Vec::new();
    let mut found = Vec::new();
    for place in places {
        match family.fits(place) {
            Ok(()) => found.push(place),
            Err(reason) if !reasons.contains(&reason) => reasons.push(reason),
            Err(_) => {}
        }
    }
    if places.is_empty() {
        reasons.push("no output of the model holds numbers".to_owned());
    }
    if found.is_empty() {
        return Err(format!("{metric} cannot be measured here: {}", reasons.join("; ")));
    }
    Ok(found)
}

/// Whether an output is called logits or the like, or is made as a classifier makes them.
fn holds_logits(graph: &Graph, output: &str) -> bool {
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
    let mut seen = 0;
    // Bounded: a chain of reshapes is short, and a malformed graph may hold a cycle.
    while let (Some(value), 0..8) = (next, seen) {
        seen += 1;
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

    fn place<'a>(name: &'a str, dims: &'a [usize]) -> Place<'a> {
        Place { name, dtype: DataType::Float, dims, labels: None, tokens: None }
    }

    fn classifier(last: &str) -> Graph {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "3"]);
        let w = build.constant("w", Tensor::from_f32s(&[3, 3], &[0.0; 9]));
        let h = build.node(Node::new(last), &[x, w], "h");
        let y = build.node(Node::new("Identity"), &[h], "y");
        build.output(y, Type::unshaped(DataType::Float)).graph
    }

    fn auto(graph: &Graph, places: &[Place<'_>], samples: usize, causal: bool) -> String {
        let chosen = choose("auto", graph, places, samples, &mut |_| Ok(causal)).unwrap();
        format!("{}: {}", chosen.metric, chosen.why.unwrap())
    }

    #[test]
    fn auto_goes_by_what_the_model_is() {
        let (matmul, mul) = (classifier("MatMul"), classifier("Mul"));
        let y = place("y", &[8, 3]);
        let labels = Tensor::int64s(&[0; 8]);
        assert_eq!(auto(&matmul, &[Place { labels: Some(&labels), ..y }], 8, false), "accuracy: labels are given");
        assert_eq!(auto(&matmul, &[y], 500, false), "top1: `y` has logits of classes and no labels are given");
        assert_eq!(
            auto(&matmul, &[y], 8, false),
            "kl: `y` has logits of classes, and 8 samples are too few to count winners"
        );
        assert_eq!(auto(&mul, &[y], 8, false), "rel-l2: no output is known to be logits or images");
        assert_eq!(
            auto(&mul, &[place("y", &[1, 3, 64, 64])], 8, false),
            "psnr: `y` of shape [1, 3, 64, 64] holds images"
        );
        let ids = Tokens { ids: "ids", vocabulary: Some(64), mask: None };
        let tokens = Place { tokens: Some(ids), ..place("y", &[1, 5, 64]) };
        assert_eq!(
            auto(&mul, &[tokens], 8, true),
            "perplexity: `y` has logits for every token of `ids` and none depends on later tokens"
        );
        assert_eq!(auto(&mul, &[tokens], 8, false), "rel-l2: no output is known to be logits or images");
        // Classes of tokens are no vocabulary.
        let classes = Place { dims: &[1, 5, 9], ..tokens };
        assert_eq!(
            auto(&matmul, &[classes], 8, true),
            "kl: `y` has logits of classes, and 8 samples are too few to count winners"
        );
        let refused = choose("perplexity", &matmul, &[classes], 8, &mut |_| Ok(true)).unwrap_err();
        assert_eq!(
            refused,
            "perplexity cannot be measured here: output `y` has 9 numbers for every token of `ids`, which are 64 different \
             ones"
        );
    }

    #[test]
    fn logits_count_and_features_do_not() {
        let graph = classifier("Mul");
        let places = [place("features", &[8, 3]), place("logits", &[8, 3])];
        let chosen = choose("top1", &graph, &places, 8, &mut |_| Ok(false)).unwrap();
        assert_eq!((chosen.outputs, chosen.why), (vec!["logits".to_owned()], None));
        let chosen = choose("rel-l2", &graph, &places, 8, &mut |_| Ok(false)).unwrap();
        assert_eq!(chosen.outputs.len(), 2);
    }

    #[test]
    fn what_cannot_be_measured_is_said() {
        let graph = classifier("Mul");
        let places = [place("y", &[8, 3])];
        let refused = |metric| choose(metric, &graph, &places, 8, &mut |_| Ok(false)).unwrap_err();
        assert_eq!(
            refused("accuracy"),
            "accuracy cannot be measured here: there are no labels (--labels NAME names them)"
        );
        assert_eq!(refused("psnr"), "psnr cannot be measured here: output `y` of shape [8, 3] is no batch of images");
        let nothing = choose("rel-l2", &graph, &[], 8, &mut |_| Ok(false)).unwrap_err();
        assert_eq!(nothing, "rel-l2 cannot be measured here: no output of the model holds numbers");
        assert!(refused("bleu").starts_with("there is no metric `bleu`; there are auto, max-abs, rel-l2"));
    }
}
