//! Which sizes the open dimensions of a model's inputs take.

use super::{InputSpec, key, required_inputs, shape_for};
use crate::roles;
use lathe_ir::{Dim, Graph, Model, Shape, element_count};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Inputs of guessed sizes together hold no more elements than this: past it a guess is wrong, and making it up takes
/// longer than running the model.
const MOST_GUESSED: usize = 1 << 22;

/// Which values floats and whole numbers take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Style {
    /// Floats around zero, whole numbers of both signs.
    Usual,
    /// Floats between 0.1 and 1, whole numbers 0 and 1: for models that take logarithms or hide an index.
    Tame,
    /// As [`Style::Usual`], with the values at the edges of each type among them: zeros of both signs, infinities, NaN,
    /// denormals, the largest and the smallest.
    Special,
    /// As [`Style::Usual`], with the smallest and the largest of their type among whole numbers that nothing rounds.
    Ends,
}

/// A size for every symbolic dimension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    pub(super) named: BTreeMap<String, usize>,
    /// Sizes of dimensions that have no name: the first axis, and the others.
    pub(super) first: usize,
    pub(super) rest: usize,
    pub(super) style: Style,
    /// Whether the first row of every mask is masked throughout.
    pub(super) masked: bool,
}

impl Sizes {
    /// The same sizes with values of another style.
    pub fn with_style(&self, style: Style) -> Sizes {
        Sizes { style, ..self.clone() }
    }

    /// The same sizes, and the first row of every mask masked throughout.
    pub(crate) fn with_masked_row(&self) -> Sizes {
        Sizes { masked: true, ..self.clone() }
    }

    pub(crate) fn has_zero(&self) -> bool {
        self.named.values().any(|&size| size == 0)
    }

    /// The style of the values.
    pub fn style(&self) -> Style {
        self.style
    }

    /// For messages: `batch = 1, sequence = 8`; empty when the model leaves nothing open.
    pub fn describe(&self) -> String {
        let named = self.named.iter().map(|(name, size)| match name.strip_prefix('?') {
            Some(at) => format!("axis {} = {size}", at.replace('/', " of ")),
            None => format!("{name} = {size}"),
        });
        named.collect::<Vec<_>>().join(", ")
    }

    /// [`Sizes::describe`] with what is unusual about the values.
    pub(crate) fn label(&self) -> String {
        let values = match self.style {
            Style::Usual | Style::Tame => None,
            Style::Special => Some("values at the edges of their types"),
            Style::Ends => Some("whole numbers at the ends of their types"),
        };
        let row = self.masked.then_some("a row masked throughout");
        let sizes = self.describe();
        let sizes = Some(sizes.as_str()).filter(|sizes| !sizes.is_empty());
        [sizes, values, row].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    pub(super) fn of(&self, key: &str) -> Option<usize> {
        self.named.get(key).copied()
    }

    /// The longest sequence.
    pub(super) fn longest(&self) -> Option<usize> {
        self.named.iter().filter(|(name, _)| kind(name, 1) == Kind::Sequence).map(|(_, &size)| size).max()
    }
}

/// What a dimension stands for, guessed from its name and place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Batch,
    Sequence,
    Past,
    /// A past and a sequence together.
    Total,
    Image,
    Other,
}

fn kind(name: &str, axis: usize) -> Kind {
    let lower = name.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|w| lower.contains(w));
    if has(&["batch"]) || ["n", "b", "bs"].contains(&lower.as_str()) {
        Kind::Batch
    } else if has(&["past", "cache"]) {
        Kind::Past
    } else if has(&["height", "width"]) || ["h", "w"].contains(&lower.as_str()) {
        Kind::Image
    } else if has(&["seq", "len", "time", "token", "frame"]) {
        Kind::Sequence
    } else if axis == 0 {
        Kind::Batch
    } else {
        Kind::Other
    }
}

/// What an axis stands for by the name of its input, where the name of the dimension says nothing.
fn kind_by_input(input: &str, axis: usize) -> Kind {
    let lower = input.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|w| lower.contains(w));
    match axis {
        0 => Kind::Other,
        _ if has(&["past", "cache"]) => Kind::Past,
        1 if has(&["attention_mask"]) => Kind::Total,
        1 if lower.ends_with("ids") => Kind::Sequence,
        _ => Kind::Other,
    }
}

/// The open dimensions of a model's inputs.
struct Open {
    kinds: BTreeMap<String, Kind>,
    /// Those whose size the user states, or a constant that the input meets.
    fixed: BTreeMap<String, usize>,
    /// Whether no size is left to choose.
    closed: bool,
}

impl Open {
    fn of(model: &Model, spec: &InputSpec) -> Open {
        let graph = &model.graph;
        let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
        let (mut given, mut met) = (BTreeMap::new(), BTreeMap::new());
        for id in required_inputs(graph) {
            let value = graph.value(id);
            let Some(shape) = value.ty.as_ref().and_then(|t| t.shape()) else { continue };
            let stated = spec.shapes.iter().find(|(name, _)| *name == value.name).map(|(_, dims)| dims);
            let pinned = roles::pinned(graph, id, Some(shape.dims.len())).filter(|p| p.ndim == shape.dims.len());
            for (axis, dim) in shape.dims.iter().enumerate() {
                let Some(key) = key(dim, axis, shape.dims.len()) else { continue };
                let fixed = spec.sizes.iter().find(|(name, _)| *name == key).map(|(_, size)| size);
                if let Some(&size) = stated.and_then(|dims| dims.get(axis)).or(fixed) {
                    given.insert(key.clone(), size);
                }
                let pin = pinned.as_ref().and_then(|p| p.sizes.iter().find(|(at, _)| *at == axis));
                if let (Some(_), Some(&(_, size))) = (dim.name(), pin) {
                    met.insert(key.clone(), size);
                }
                let unknown = if is_image(shape) { Kind::Image } else { Kind::Other };
                let named = [kind(&key, axis), kind_by_input(&value.name, axis)];
                let kind = named.into_iter().find(|&kind| kind != Kind::Other).unwrap_or(unknown);
                let known = kinds.entry(key).or_insert(kind);
                if *known == Kind::Other || (*known == Kind::Total && kind == Kind::Sequence) {
                    *known = kind;
                }
            }
        }
        if !kinds.values().any(|&kind| kind == Kind::Past) {
            kinds.values_mut().filter(|kind| **kind == Kind::Total).for_each(|kind| *kind = Kind::Sequence);
        }
        let mut fixed: BTreeMap<String, usize> = met;
        fixed.extend(given);
        let closed = kinds.keys().all(|key| fixed.contains_key(key)) && !has_unranked(graph);
        Open { kinds, fixed, closed }
    }

    /// A size for each dimension by its kind; `first` and `rest` for those without a name.
    fn assign(&self, size: &dyn Fn(Kind) -> usize, first: usize, rest: usize, style: Style) -> Sizes {
        let named = self.kinds.iter().map(|(name, &kind)| (name.clone(), size(kind))).collect();
        self.settled(named, first, rest, style)
    }

    fn settled(&self, mut named: BTreeMap<String, usize>, first: usize, rest: usize, style: Style) -> Sizes {
        named.extend(self.fixed.clone());
        settle_sums(&mut named, &self.fixed);
        Sizes { named, first, rest, style, masked: false }
    }

    /// A past and a sequence together.
    fn total(&self, sizes: &Sizes) -> Option<usize> {
        let of =
            |wanted: Kind| self.kinds.iter().find(|(_, kind)| **kind == wanted).and_then(|(name, _)| sizes.of(name));
        of(Kind::Past)?.checked_add(of(Kind::Sequence)?)
    }

    /// The open dimensions that are taken for totals.
    fn totals(&self) -> impl Iterator<Item = &String> {
        self.free().filter(|name| self.kinds[*name] == Kind::Total)
    }

    /// Gives totals the size that they have if they are totals.
    fn add_up(&self, mut sizes: Sizes) -> Sizes {
        if let Some(total) = self.total(&sizes) {
            sizes.named.extend(self.totals().map(|name| (name.clone(), total)));
        }
        sizes
    }

    fn free(&self) -> impl Iterator<Item = &String> {
        self.kinds.keys().filter(|name| !self.fixed.contains_key(*name))
    }
}

/// Sizes to run a model with, in the order in which they should be tried.
///
/// The first two differ in every symbolic dimension, one of them with batch 1; the third is small, for models of much
/// work. The others give all open dimensions the same size, for models whose dimensions are related in ways their names do not say; inputs that would hold millions of
/// elements are left out of these.
pub fn sizes_to_try(model: &Model, spec: &InputSpec) -> Vec<Sizes> {
    let open = Open::of(model, spec);
    let usual = |which: usize| {
        move |kind: Kind| match kind {
            Kind::Batch => [1, 3, 2][which],
            Kind::Sequence => [8, 5, 3][which],
            Kind::Past => [4, 7, 2][which],
            Kind::Total => [12, 12, 5][which],
            Kind::Image => [64, 96, 32][which],
            Kind::Other => [4, 6, 3][which],
        }
    };
    let mut all = vec![open.add_up(open.assign(&usual(0), 1, 4, Style::Usual))];
    // A model that leaves no size open needs no further sizes, only other values.
    if !open.closed {
        all.push(open.add_up(open.assign(&usual(1), 3, 6, Style::Usual)));
        all.push(open.add_up(open.assign(&usual(2), 2, 3, Style::Usual)));
        let guesses = guesses(&open).into_iter();
        all.extend(guesses.filter(|sizes| elements(model, spec, sizes).is_some_and(|count| count <= MOST_GUESSED)));
    }
    all.push(open.add_up(open.assign(&usual(0), 1, 4, Style::Tame)));
    all.push(open.add_up(open.assign(&usual(1), 3, 6, Style::Tame)));
    let mut distinct: Vec<Sizes> = Vec::new();
    for mut sizes in all {
        if open.closed {
            (sizes.first, sizes.rest) = (1, 1);
        }
        if !distinct.contains(&sizes) {
            distinct.push(sizes);
        }
    }
    distinct
}

fn guesses(open: &Open) -> Vec<Sizes> {
    let mut all = Vec::new();
    for size in [1, 2, 8, 16, 32, 64, 128, 224, 256, 384, 512, 640, 1024] {
        let one_batch = move |kind: Kind| if kind == Kind::Batch { 1 } else { size };
        all.push(open.assign(&one_batch, 1, size, Style::Usual));
        if size <= 32 {
            all.push(open.assign(&|_| size, size, size, Style::Usual));
        }
    }
    // One long dimension and all others 1: audio beside a state, for instance.
    for long in open.free().take(6) {
        for size in [64, 256, 512] {
            let mut sizes = open.assign(&|_| 1, 1, 1, Style::Usual);
            sizes.named.insert(long.clone(), size);
            all.push(sizes);
        }
    }
    all
}

/// Sizes at the edge of what a model takes, made of the last sizes that it accepts: every open dimension 1, then those of one
/// kind 1, unless they are in other sizes that it accepts, or 0, and the others as they were. None where nothing is open.
pub(crate) fn edge_sizes(model: &Model, spec: &InputSpec, all_accepted: &[Sizes]) -> Vec<Sizes> {
    let open = Open::of(model, spec);
    let Some(accepted) = all_accepted.last() else { return Vec::new() };
    let known = |kind: Kind| {
        let single = |sizes: &Sizes| open.kinds.iter().all(|(name, of)| *of != kind || sizes.of(name) == Some(1));
        all_accepted.iter().any(single)
    };
    let adds_up = open.total(accepted).is_some_and(|total| open.totals().all(|name| accepted.of(name) == Some(total)));
    let like = |size: &dyn Fn(Kind, usize) -> usize| {
        let named = open.kinds.iter().map(|(name, &kind)| (name.clone(), size(kind, accepted.of(name).unwrap_or(1))));
        let sizes = open.settled(named.collect(), accepted.first, accepted.rest, accepted.style);
        if adds_up { open.add_up(sizes) } else { sizes }
    };
    let mut kinds: BTreeSet<Kind> = open.free().map(|name| open.kinds[name]).collect();
    if adds_up {
        kinds.remove(&Kind::Total);
    }
    let mut all = vec![like(&|_, _| 1)];
    for edge in [1, 0] {
        let kinds = kinds.iter().filter(|&&kind| edge == 0 || !known(kind));
        all.extend(kinds.map(|&kind| like(&|of, size| if of == kind { edge } else { size })));
    }
    let mut distinct: Vec<Sizes> = Vec::new();
    for sizes in all {
        if all_accepted.iter().all(|known| known.named != sizes.named) && !distinct.contains(&sizes) {
            distinct.push(sizes);
        }
    }
    distinct
}

fn has_unranked(graph: &Graph) -> bool {
    required_inputs(graph).any(|v| graph.value(v).ty.as_ref().is_none_or(|t| t.shape().is_none()))
}

/// The elements of all inputs together; `None` where they are too many to count or the user's shapes do not fit.
fn elements(model: &Model, spec: &InputSpec, sizes: &Sizes) -> Option<usize> {
    let graph = &model.graph;
    required_inputs(graph).try_fold(0usize, |sum, id| {
        let shape = graph.value(id).ty.as_ref().and_then(|t| t.shape());
        sum.checked_add(element_count(&shape_for(graph, id, shape, spec, sizes).ok()?)?)
    })
}

/// Gives dimensions that are named as sums (`past_sequence_length + sequence_length`), and totals beside a past, the
/// size that their names promise.
fn settle_sums(named: &mut BTreeMap<String, usize>, fixed: &BTreeMap<String, usize>) {
    let keys: Vec<String> = named.keys().filter(|k| !fixed.contains_key(*k)).cloned().collect();
    let past = |name: &str| name.to_ascii_lowercase().contains("past");
    let total = |name: &str| name.to_ascii_lowercase().contains("total");
    for key in keys {
        let terms: Vec<&str> = key.split('+').map(str::trim).collect();
        let sum = if terms.len() > 1 {
            terms.iter().map(|t| t.parse().ok().or_else(|| named.get(*t).copied())).sum::<Option<usize>>()
        } else if total(&key) {
            let sequence = named.iter().find(|(k, _)| kind(k, 1) == Kind::Sequence && !total(k) && !k.contains('+'));
            let before = named.iter().find(|(k, _)| past(k) && !k.contains('+'));
            before.zip(sequence).map(|(a, b)| a.1 + b.1)
        } else {
            None
        };
        if let Some(sum) = sum {
            named.insert(key, sum);
        }
    }
}

/// Whether a shape looks like images: four axes, one of them holding 1, 3 or 4 channels.
pub(super) fn is_image(shape: &Shape) -> bool {
    let channels = |axis: usize| matches!(shape.dims.get(axis).and_then(Dim::known), Some(1 | 3 | 4));
    shape.dims.len() == 4 && (channels(1) || channels(3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Build;
    use lathe_ir::{DataType, Node, Tensor, Type};

    fn described(sizes: &[Sizes]) -> Vec<String> {
        sizes.iter().map(Sizes::describe).collect()
    }

    fn identity(dims: &[&str]) -> Model {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, dims);
        let y = build.node(Node::new("Identity"), &[x], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    #[test]
    fn guesses_hold_few_elements() {
        let model = identity(&["a", "b", "c", "d"]);
        let spec = InputSpec::default();
        let all = sizes_to_try(&model, &spec);
        assert!(all.len() > 10);
        for sizes in &all {
            let count = elements(&model, &spec, sizes).unwrap();
            assert!(count <= MOST_GUESSED, "{}: {count}", sizes.describe());
        }
        // Two axes of an image may still be large.
        let image = identity(&["n", "3", "h", "w"]);
        assert!(described(&sizes_to_try(&image, &spec)).contains(&"h = 1024, n = 1, w = 1024".to_owned()));
    }

    #[test]
    fn a_named_size_follows_the_constant_it_meets() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["n", "channels", "h", "w"]);
        let w = build.constant("w", Tensor::from_f32s(&[2, 3, 1, 1], &[0.0; 6]));
        let y = build.node(Node::new("Conv"), &[x, w], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let all = sizes_to_try(&model, &InputSpec::default());
        assert!(all.iter().all(|sizes| sizes.of("channels") == Some(3)), "{:?}", described(&all));
        // What the user states comes first.
        let spec = InputSpec { shapes: vec![("x".to_owned(), vec![1, 4, 8, 8])], ..InputSpec::default() };
        assert_eq!(sizes_to_try(&model, &spec)[0].of("channels"), Some(4));
    }

    #[test]
    fn edges_are_ones_and_zeros_of_each_kind() {
        let spec = InputSpec::default();
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["batch", "seq_len"]);
        build.input("past", DataType::Float, &["batch", "past_len"]);
        build.input("mask", DataType::Float, &["batch", "past_len + seq_len"]);
        let y = build.node(Node::new("Identity"), &[x], "y");
        let cached = build.output(y, Type::unshaped(DataType::Float)).model();
        let accepted = &sizes_to_try(&cached, &spec)[..2];
        assert_eq!(
            described(&edge_sizes(&cached, &spec, accepted)),
            [
                "batch = 1, past_len = 1, past_len + seq_len = 2, seq_len = 1",
                "batch = 3, past_len = 7, past_len + seq_len = 8, seq_len = 1",
                "batch = 3, past_len = 1, past_len + seq_len = 6, seq_len = 5",
                "batch = 0, past_len = 7, past_len + seq_len = 12, seq_len = 5",
                "batch = 3, past_len = 7, past_len + seq_len = 7, seq_len = 0",
                "batch = 3, past_len = 0, past_len + seq_len = 5, seq_len = 5",
            ]
        );
        // What is stated is no size to choose.
        let model = identity(&["batch", "seq_len", "4"]);
        let stated = InputSpec { shapes: vec![("x".to_owned(), vec![1, 8, 4])], ..InputSpec::default() };
        assert!(edge_sizes(&model, &stated, &sizes_to_try(&model, &stated)).is_empty());
        let closed = identity(&["2", "3"]);
        assert!(edge_sizes(&closed, &spec, &sizes_to_try(&closed, &spec)).is_empty());
    }

    #[test]
    fn names_of_inputs_speak_for_dimensions_that_nobody_named() {
        let mut build = Build::new();
        let ids = build.input("input_ids", DataType::Int64, &["s21", "s50"]);
        build.input("attention_mask", DataType::Int64, &["s6", "s81"]);
        build.input("past_key_values.0.key", DataType::Float, &["s21", "4", "s57", "16"]);
        let y = build.node(Node::new("Identity"), &[ids], "y");
        let model = build.output(y, Type::unshaped(DataType::Int64)).model();
        let spec = InputSpec::default();
        let all = sizes_to_try(&model, &spec);
        assert_eq!(
            described(&all[..2]),
            ["s21 = 1, s50 = 8, s57 = 4, s6 = 1, s81 = 12", "s21 = 3, s50 = 5, s57 = 7, s6 = 3, s81 = 12"]
        );
        let edges = described(&edge_sizes(&model, &spec, &all[..2]));
        assert!(edges.contains(&"s21 = 3, s50 = 5, s57 = 0, s6 = 3, s81 = 5".to_owned()), "{edges:?}");
        let stated = InputSpec { shapes: vec![("input_ids".to_owned(), vec![2, 3])], ..InputSpec::default() };
        assert_eq!(sizes_to_try(&model, &stated)[0].describe(), "s21 = 2, s50 = 3, s57 = 4, s6 = 1, s81 = 7");
        // Without a past the mask is as long as the sequence.
        let mut build = Build::new();
        let mask = build.input("attention_mask", DataType::Int64, &["b", "s"]);
        build.input("input_ids", DataType::Int64, &["b", "t"]);
        let y = build.node(Node::new("Identity"), &[mask], "y");
        let model = build.output(y, Type::unshaped(DataType::Int64)).model();
        assert_eq!(sizes_to_try(&model, &spec)[1].describe(), "b = 3, s = 5, t = 5");
    }
}
