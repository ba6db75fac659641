//! How well a causal language model predicts each next token of the text it is given.

use super::{Accumulator, Family, Metric, Pair, Place, Score, Tokens, hold_distributions};
use crate::{
    Sample,
    divergence::{TINY, log_sum_exp},
    roles,
};
use lathe_ir::{Graph, Tensor};

pub(super) struct LanguageModel;

const METRICS: &[Metric] = &[Metric {
    name: "perplexity",
    summary: "the exponential of the mean negative log-likelihood of each next token, padding left out",
    drop: "the relative increase: 0.02 is two percent more perplexity",
}];

impl Family for LanguageModel {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, place: &Place<'_>) -> Result<(), String> {
        let tokens = place.tokens.ok_or("no input holds token ids with axes for sequences and positions")?;
        let (name, ids) = (place.name, tokens.ids);
        match (place.dims, tokens.vocabulary) {
            (&[.., width], Some(vocabulary)) if place.dims.len() == 3 && width < vocabulary => Err(format!(
                "output `{name}` has {width} numbers for every token of `{ids}`, which are {vocabulary} different ones"
            )),
            (&[_, length, width], _) if place.dtype.is_float() && length > 1 && width > 1 => Ok(()),
            (dims, _) => Err(format!("output `{name}` of shape {dims:?} is no logits for the tokens of `{ids}`")),
        }
    }

    fn start(&self, place: &Place<'_>) -> Box<dyn Accumulator> {
        Box::new(Likelihood { table: place.tokens.and_then(|tokens| tokens.vocabulary), ..Likelihood::default() })
    }

    fn single(&self) -> bool {
        true
    }
}

/// Sums of negative log-likelihoods, in nats.
#[derive(Default)]
struct Likelihood {
    tokens: u64,
    padding: u64,
    before: f64,
    after: f64,
    /// Whether the model gives probabilities rather than logits, by the first batch.
    plain: Option<bool>,
    /// Rows of the table that ids pick of, which negative ones count from the end.
    table: Option<usize>,
}

impl Likelihood {
    /// Which of so many logits is that of a token.
    fn place(&self, id: i64, vocabulary: usize) -> Option<usize> {
        let from_end = if id < 0 { self.table.unwrap_or(vocabulary) as i64 } else { 0 };
        usize::try_from(id + from_end).ok().filter(|&place| place < vocabulary)
    }
}

impl Accumulator for Likelihood {
    fn add(&mut self, pair: &Pair<'_>) -> Result<(), String> {
        let ids = pair.ids.ok_or("a batch has no token ids")?;
        let dims = pair.reference.dims();
        let &[sequences, length, vocabulary] = dims else {
            return Err(format!("output `{}` of shape {dims:?} is no logits", pair.name));
        };
        if ids.dims() != [sequences, length] {
            let (name, found) = (pair.name, ids.dims());
            return Err(format!("output `{name}` of shape {dims:?} has other positions than the ids, {found:?}"));
        }
        let ids = ids.to_i64s().ok_or("the token ids are not whole numbers")?;
        let kept = pair.kept.filter(|k| k.dims == [sequences, length]);
        let is_kept = |at: usize| kept.is_none_or(|k| k.flags[at]);
        // Padding at the position itself is skipped by `rows`; what follows it may be padding too.
        let predicts = |at: usize| at % length + 1 < length && is_kept(at) && is_kept(at + 1);
        for at in (0..ids.len()).filter(|at| at % length + 1 < length) {
            self.padding += u64::from(!predicts(at));
            let (sequence, id) = (pair.first + at / length, ids[at + 1]);
            if predicts(at) && self.place(id, vocabulary).is_none() {
                return Err(format!("token {id} of sample {sequence} is outside the vocabulary of {vocabulary}"));
            }
        }
        let plain = *self.plain.get_or_insert_with(|| hold_distributions(pair));
        pair.rows(|start, a, b| {
            let at = start / vocabulary;
            if let Some(next) = self.place(ids[(at + 1).min(ids.len() - 1)], vocabulary).filter(|_| predicts(at)) {
                self.tokens += 1;
                self.before -= log_probability(a, next, plain);
                self.after -= log_probability(b, next, plain);
            }
        });
        Ok(())
    }

    fn scores(&self) -> Vec<Score> {
        if self.tokens == 0 {
            return Vec::new();
        }
        let (before, after) = (self.before / self.tokens as f64, self.after / self.tokens as f64);
        // From the difference of the logarithms, so that a tiny change does not drown in two large numbers.
        let drop = (after - before).exp_m1();
        let detail = format!("{} tokens predicted, {} of padding left out", self.tokens, self.padding);
        vec![Score::new("perplexity", before.exp(), after.exp(), drop).with(detail)]
    }
}

fn log_probability(row: &[f64], index: usize, plain: bool) -> f64 {
    if plain { row[index].max(TINY).ln() } else { row[index] - log_sum_exp(row) }
}

/// The inputs that hold token ids and that mark padding, among those that a batch feeds.
///
/// Ids are whole numbers with axes for sequences and positions that look up rows of the largest table; the mask is of
/// the same shape and called one.
pub(super) fn token_inputs<'a>(graph: &Graph, inputs: &'a Sample) -> Option<Tokens<'a>> {
    let is_mask = |name: &str| name.to_ascii_lowercase().contains("mask");
    let table = |name: &str| {
        let value = graph.main().inputs().iter().copied().find(|&v| graph.value(v).name == name)?;
        match roles::role_of(graph, value, &|_, _| None) {
            roles::Role::Index { bound } => Some(bound),
            _ => None,
        }
    };
    let tokens = |tensor: &Tensor| tensor.dims().len() == 2 && tensor.dtype().is_integer();
    let candidates = inputs.iter().filter(|(name, tensor)| tokens(tensor) && !is_mask(name));
    let ids = candidates.filter_map(|(name, tensor)| Some((table(name)?, name.as_str(), tensor)));
    let ids = ids.reduce(|best, next| if next.0 > best.0 { next } else { best });
    let (bound, ids, tensor) = ids?;
    let mask = inputs.iter().find(|(name, mask)| is_mask(name) && mask.dims() == tensor.dims());
    // A table that is computed has no size that is known.
    let vocabulary = Some(bound).filter(|&rows| rows > 1);
    Some(Tokens { ids, vocabulary, mask: mask.map(|(name, _)| name.as_str()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Kept;

    fn pair<'a>(reference: &'a Tensor, ids: &'a Tensor, kept: Option<&'a Kept>) -> Pair<'a> {
        let candidate = reference;
        Pair { name: "logits", reference, candidate, first: 0, samples: 1, labels: None, ids: Some(ids), kept }
    }

    #[test]
    fn predicts_the_next_token() {
        // Position 0 predicts token 1 with probability e/(1+e), position 1 token 0 with 1/2; position 2 predicts nothing.
        let logits = Tensor::from_f32s(&[1, 3, 2], &[0.0, 1.0, 2.0, 2.0, 9.0, -9.0]);
        let ids = Tensor::from_i64s(&[1, 3], &[0, 1, 0]);
        let mut sums = Likelihood::default();
        sums.add(&pair(&logits, &ids, None)).unwrap();
        let e = 1f64.exp();
        let expected = ((1.0 + e) / e * 2.0).sqrt();
        let score = &sums.scores()[0];
        assert!((score.before - expected).abs() < 1e-12 && score.drop == 0.0);
        assert_eq!(score.detail.as_deref(), Some("2 tokens predicted, 0 of padding left out"));
    }

    #[test]
    fn negative_ids_count_from_the_end_of_the_table() {
        let logits = Tensor::from_f32s(&[1, 3, 2], &[0.0, 1.0, 2.0, 2.0, 9.0, -9.0]);
        let score = |ids: [i64; 3], table: Option<usize>| {
            let mut sums = Likelihood { table, ..Likelihood::default() };
            sums.add(&pair(&logits, &Tensor::from_i64s(&[1, 3], &ids), None)).map(|()| sums.scores()[0].before)
        };
        assert_eq!(score([0, 1, 0], Some(2)), score([0, -1, -2], Some(2)));
        assert_eq!(score([0, 1, 0], None), score([0, -1, -2], None));
        assert!(score([0, -3, 0], Some(2)).unwrap_err().contains("token -3 of sample 0"));
        // A head may leave out the end of the table.
        assert!(score([0, -1, 0], Some(3)).is_err() && score([0, -2, 0], Some(3)).is_ok());
    }

    #[test]
    fn padding_neither_predicts_nor_is_predicted() {
        let logits = Tensor::from_f32s(&[1, 3, 2], &[0.0, 1.0, 2.0, f32::NAN, 9.0, -9.0]);
        let ids = Tensor::from_i64s(&[1, 3], &[0, 1, 7]);
        let kept = Kept { dims: [1, 3], flags: vec![true, true, false] };
        let mut sums = Likelihood::default();
        sums.add(&pair(&logits, &ids, Some(&kept))).unwrap();
        assert_eq!(sums.tokens, 1);
        assert_eq!(sums.padding, 1);
        assert!(Likelihood::default().add(&pair(&logits, &ids, None)).unwrap_err().contains("token 7 of sample 0"));
    }
}
