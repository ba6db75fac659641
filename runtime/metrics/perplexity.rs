//! How well a causal language model predicts each next token of the text it is given.

use super::{
    Accumulator, Case, Family, METRIC, Metric, OutputInfo, OutputPair, Refusal, Score, Suggestion, Tokens,
    hold_distributions,
};
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
    of_logits: true,
    ..METRIC
}];

/// Why there are no tokens to predict.
#[derive(Debug, thiserror::Error)]
enum TokenError {
    #[error("no input holds token ids with axes for sequences and positions")]
    NoIds,
    #[error("output `{output}` has {width} numbers for every token of `{ids}`, which are {vocabulary} different ones")]
    Narrow { output: String, width: usize, ids: String, vocabulary: usize },
    #[error("output `{output}` of shape {dims:?} is no logits for the tokens of `{ids}`")]
    NoLogitsOf { output: String, dims: Vec<usize>, ids: String },
    #[error("a batch has no token ids")]
    Missing,
    #[error("output `{output}` of shape {dims:?} is no logits")]
    NoLogits { output: String, dims: Vec<usize> },
    #[error("output `{output}` of shape {dims:?} has other positions than the ids, {ids:?}")]
    Positions { output: String, dims: Vec<usize>, ids: Vec<usize> },
    #[error("the token ids are not whole numbers")]
    NotWhole,
    #[error("token {id} of sample {sample} is outside the vocabulary of {vocabulary}")]
    Outside { id: i64, sample: usize, vocabulary: usize },
}

impl Family for LanguageModel {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal> {
        let tokens = output.tokens.ok_or(TokenError::NoIds)?;
        let (name, ids) = (output.name.to_owned(), tokens.ids.to_owned());
        match (output.dims, tokens.vocabulary) {
            (&[.., width], Some(vocabulary)) if output.dims.len() == 3 && width < vocabulary => {
                Err(TokenError::Narrow { output: name, width, ids, vocabulary }.into())
            }
            (&[_, length, width], _) if output.dtype.is_float() && length > 1 && width > 1 => Ok(()),
            (dims, _) => Err(TokenError::NoLogitsOf { output: name, dims: dims.to_vec(), ids }.into()),
        }
    }

    fn precedence(&self) -> u8 {
        30
    }

    fn suggest(&self, case: &mut Case<'_>) -> Option<Suggestion> {
        let output = case.outputs.iter().find(|output| self.fits(output).is_ok())?;
        let (name, ids) = (output.name, output.tokens?.ids);
        let why = || format!("`{name}` has logits for every token of `{ids}` and none depends on later tokens");
        (case.is_causal)(output).then(|| ("perplexity", why()))
    }

    fn start(&self, output: &OutputInfo<'_>) -> Box<dyn Accumulator> {
        Box::new(Likelihood { table: output.tokens.and_then(|tokens| tokens.vocabulary), ..Likelihood::default() })
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
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        let ids = pair.ids.ok_or(TokenError::Missing)?;
        let (name, dims) = (|| pair.name.to_owned(), pair.reference.dims());
        let &[sequences, length, vocabulary] = dims else {
            return Err(TokenError::NoLogits { output: name(), dims: dims.to_vec() }.into());
        };
        if ids.dims() != [sequences, length] {
            let ids = ids.dims().to_vec();
            return Err(TokenError::Positions { output: name(), dims: dims.to_vec(), ids }.into());
        }
        let ids = ids.to_i64s().ok_or(TokenError::NotWhole)?;
        let kept = pair.kept.filter(|k| k.dims == [sequences, length]);
        let is_kept = |at: usize| kept.is_none_or(|k| k.flags[at]);
        // Padding at the position itself is skipped by `rows`; what follows it may be padding too.
        let predicts = |at: usize| at % length + 1 < length && is_kept(at) && is_kept(at + 1);
        for at in (0..ids.len()).filter(|at| at % length + 1 < length) {
            self.padding += u64::from(!predicts(at));
            let (sample, id) = (pair.first + at / length, ids[at + 1]);
            if predicts(at) && self.place(id, vocabulary).is_none() {
                return Err(TokenError::Outside { id, sample, vocabulary }.into());
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

    fn scores(&self) -> Vec<(&'static str, Score)> {
        if self.tokens == 0 {
            return Vec::new();
        }
        let (before, after) = (self.before / self.tokens as f64, self.after / self.tokens as f64);
        // From the difference of the logarithms, so that a tiny change does not drown in two large numbers.
        let drop = (after - before).exp_m1();
        let detail = format!("{} tokens predicted, {} of padding left out", self.tokens, self.padding);
        vec![("perplexity", Score::new(before.exp(), after.exp(), drop).with(detail))]
    }
}

fn log_probability(row: &[f64], index: usize, plain: bool) -> f64 {
    if plain { row[index].max(TINY).ln() } else { row[index] - log_sum_exp(row) }
}

/// The inputs that hold token ids and that mark padding, among those that a batch feeds.
///
/// Ids are whole numbers with axes for sequences and positions that look up rows of the largest table; the mask is of
/// the same shape and called one.
pub(crate) fn token_inputs<'a>(graph: &Graph, inputs: &'a Sample) -> Option<Tokens<'a>> {
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
    use crate::metrics::TokenMask;

    fn pair<'a>(reference: &'a Tensor, ids: &'a Tensor, kept: Option<&'a TokenMask>) -> OutputPair<'a> {
        let candidate = reference;
        OutputPair { name: "logits", reference, candidate, first: 0, samples: 1, labels: None, ids: Some(ids), kept }
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
        let score = &sums.scores()[0].1;
        assert!((score.before - expected).abs() < 1e-12 && score.drop == 0.0);
        assert_eq!(score.detail.as_deref(), Some("2 tokens predicted, 0 of padding left out"));
    }

    #[test]
    fn negative_ids_count_from_the_end_of_the_table() {
        let logits = Tensor::from_f32s(&[1, 3, 2], &[0.0, 1.0, 2.0, 2.0, 9.0, -9.0]);
        let score = |ids: [i64; 3], table: Option<usize>| {
            let mut sums = Likelihood { table, ..Likelihood::default() };
            sums.add(&pair(&logits, &Tensor::from_i64s(&[1, 3], &ids), None))
                .map(|()| sums.scores()[0].1.before)
                .map_err(|e| e.to_string())
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
        let kept = TokenMask { dims: [1, 3], flags: vec![true, true, false] };
        let mut sums = Likelihood::default();
        sums.add(&pair(&logits, &ids, Some(&kept))).unwrap();
        assert_eq!(sums.tokens, 1);
        assert_eq!(sums.padding, 1);
        assert!(
            Likelihood::default()
                .add(&pair(&logits, &ids, None))
                .unwrap_err()
                .to_string()
                .contains("token 7 of sample 0")
        );
    }
}
