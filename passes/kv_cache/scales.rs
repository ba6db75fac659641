//! What one step of a code stands for.

use super::{CacheNode, CacheType, Caches};
use lathe_ir::{Model, Node, ScopeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// Shares of the largest magnitude at which codes of 4 bits may end: what lies beyond is cut off, and the rest is finer.
pub const CLIPS: [f64; 6] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5];

/// A channel whose numbers stay below this share of the largest is given that: other samples may show more of it.
const LEAST_SHARE: f64 = 1e-3;

/// A model with the numbers of every cache as rows of `heads · size` channels, by the names of these values.
#[derive(Debug)]
pub struct Watched {
    /// The model.
    pub model: Model,
    /// For keys and values of every cache the values that are watched: the numbers, or one for each of [`CLIPS`].
    pub rows: Vec<[Vec<String>; 2]>,
}

impl Watched {
    /// The numbers themselves.
    pub fn numbers(model: &Model, caches: &Caches) -> Watched {
        Watched::of(model, caches, |_, _, _, rows| vec![rows])
    }

    /// What rounding to codes leaves of them, at every share at which codes may end.
    pub fn errors(model: &Model, caches: &Caches, wanted: CacheType, largest: &Scales) -> Watched {
        Watched::of(model, caches, |model, cache, part, rows| {
            let steps = largest.steps(cache, part);
            let mut clipped =
                |share: f64| error(model, rows, &steps.iter().map(|s| s * share).collect::<Vec<_>>(), wanted);
            CLIPS.iter().map(|&share| clipped(share)).collect()
        })
    }

    fn of(
        model: &Model,
        caches: &Caches,
        mut watch: impl FnMut(&mut Model, usize, usize, ValueId) -> Vec<ValueId>,
    ) -> Watched {
        let mut model = model.clone();
        let mut all = Vec::new();
        for (index, cache) in caches.nodes.iter().enumerate() {
            let mut both = [Vec::new(), Vec::new()];
            for (part, &value) in cache.present.iter().enumerate() {
                let rows = rows(&mut model, cache, value);
                let watched = watch(&mut model, index, part, rows);
                both[part] = watched.into_iter().map(|value| model.graph.value(value).name.clone()).collect();
            }
            all.push(both);
        }
        Watched { model, rows: all }
    }
}

/// `[batch, positions, heads · size]` of a cache.
fn rows(model: &mut Model, cache: &CacheNode, value: ValueId) -> ValueId {
    let graph = &mut model.graph;
    let turned =
        graph.append(ScopeId::MAIN, Node::new("Transpose").with("perm", vec![0i64, 2, 1, 3]), &[value], "cache");
    let to = Tensor::int64s(&[0, 0, (cache.heads * cache.size) as i64]);
    let to = graph.add_initializer(ScopeId::MAIN, "cache_rows", to);
    graph.append(ScopeId::MAIN, Node::new("Reshape"), &[turned, to], "cache")
}

/// What is left of rows that are rounded to codes with these steps.
fn error(model: &mut Model, rows: ValueId, steps: &[f64], wanted: CacheType) -> ValueId {
    let steps: Vec<f32> = steps.iter().map(|&step| step as f32).collect();
    let graph = &mut model.graph;
    let step = graph.add_initializer(ScopeId::MAIN, "step", Tensor::from_f32s(&[steps.len()], &steps));
    let codes = codes(model, rows, step, wanted);
    let graph = &mut model.graph;
    let back = graph.append(ScopeId::MAIN, Node::new("Mul"), &[codes, step], "rounded");
    graph.append(ScopeId::MAIN, Node::new("Sub"), &[rows, back], "rounded")
}

/// The codes of numbers, as floats.
pub(super) fn codes(model: &mut Model, numbers: ValueId, step: ValueId, wanted: CacheType) -> ValueId {
    let graph = &mut model.graph;
    let largest = wanted.largest() as f32;
    let most = graph.add_initializer(ScopeId::MAIN, "most", Tensor::from_f32s(&[], &[largest]));
    let least = graph.add_initializer(ScopeId::MAIN, "least", Tensor::from_f32s(&[], &[-largest - 1.0]));
    let scaled = graph.append(ScopeId::MAIN, Node::new("Div"), &[numbers, step], "codes");
    let whole = graph.append(ScopeId::MAIN, Node::new("Round"), &[scaled], "codes");
    graph.append(ScopeId::MAIN, Node::new("Clip"), &[whole, least, most], "codes")
}

/// The steps of codes, of every channel of every cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    wanted: CacheType,
    /// For keys and values of every cache one number for each channel, those of a head one after the other.
    steps: Vec<[Vec<f64>; 2]>,
}

impl Scales {
    /// Codes that reach the largest magnitudes of the channels, `[keys, values]` for each cache.
    pub fn reaching(caches: &Caches, wanted: CacheType, magnitudes: Vec<[Vec<f64>; 2]>) -> Scales {
        let steps = caches.nodes.iter().zip(magnitudes).map(|(cache, [keys, values])| {
            let shared = |part: usize, all: Vec<f64>| -> Vec<f64> {
                let all = together(&groups(cache, part, wanted), &all, f64::max);
                let whole = all.iter().copied().fold(0.0, f64::max);
                let least = if whole > 0.0 { whole * LEAST_SHARE } else { 1.0 };
                all.iter().map(|&most| most.max(least) / wanted.largest()).collect()
            };
            [shared(0, keys), shared(1, values)]
        });
        Scales { wanted, steps: steps.collect() }
    }

    /// With the share of [`CLIPS`] at which each group of channels loses least: `errors` are sums of squares by share and
    /// channel.
    pub fn clipped(&self, caches: &Caches, errors: &[[Vec<Vec<f64>>; 2]]) -> Scales {
        let mut found = self.clone();
        for ((cache, steps), errors) in caches.nodes.iter().zip(&mut found.steps).zip(errors) {
            for (part, errors) in errors.iter().enumerate() {
                let groups = groups(cache, part, self.wanted);
                let sums: Vec<Vec<f64>> = errors.iter().map(|one| together(&groups, one, |a, b| a + b)).collect();
                for (channel, step) in steps[part].iter_mut().enumerate() {
                    let lost = |at: &usize| sums[*at].get(channel).copied().unwrap_or(f64::INFINITY);
                    // Of equal ones the first, which cuts least off.
                    let best = (0..sums.len()).min_by(|a, b| lost(a).total_cmp(&lost(b)));
                    *step *= best.map_or(1.0, |at| CLIPS[at]);
                }
            }
        }
        found
    }

    /// The steps of the keys (0) or values (1) of a cache, of every channel.
    pub fn steps(&self, cache: usize, part: usize) -> &[f64] {
        &self.steps[cache][part]
    }

    /// The same as the operator reads it: `[1, heads, 1, size]`, or one number.
    pub(super) fn tensor(&self, index: usize, cache: &CacheNode, part: usize) -> Tensor {
        let steps: Vec<f32> = self.steps(index, part).iter().map(|&step| step as f32).collect();
        match self.wanted.by_channel {
            true => Tensor::from_f32s(&[1, cache.heads, 1, cache.size], &steps),
            false => Tensor::from_f32s(&[1], &steps[..1]),
        }
    }
}

/// Which channels share a step, by a number for each. A rotary embedding mixes channel `i` of keys with `i + size / 2`, at every
/// position otherwise, so that what one holds the other may.
fn groups(cache: &CacheNode, part: usize, wanted: CacheType) -> Vec<usize> {
    let channels = 0..cache.heads * cache.size;
    match (wanted.by_channel, part) {
        (false, _) => channels.map(|_| 0).collect(),
        (true, 0) if cache.size.is_multiple_of(2) => {
            let half = cache.size / 2;
            channels.map(|at| at / cache.size * half + at % half).collect()
        }
        (true, _) => channels.collect(),
    }
}

/// What numbers of channels come to in each one's group.
fn together(groups: &[usize], numbers: &[f64], join: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    let mut joined: BTreeMap<usize, f64> = BTreeMap::new();
    for (&group, &number) in groups.iter().zip(numbers) {
        joined.entry(group).and_modify(|so_far| *so_far = join(*so_far, number)).or_insert(number);
    }
    groups.iter().map(|group| joined.get(group).copied().unwrap_or_default()).collect()
}
