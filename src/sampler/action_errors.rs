//! How far chunks of actions are apart: in shares of the range that each number of an action has.

use super::spread::Spread;
use lathe_ir::Tensor;
use serde::Serialize;

/// How far actions are apart, over pairs of chunks: the root of the mean square of the numbers of a step, each over its range
/// in all chunks of A.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ActionErrors {
    /// Over all steps of a chunk.
    pub chunk: Spread,
    /// Of the step that is furthest off.
    pub worst: Spread,
}

/// Chunks of two policies, `[n, steps, numbers]`.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    steps: usize,
    numbers: usize,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Chunks {
    /// Adds chunks; what has another shape is none.
    pub fn push(&mut self, a: &Tensor, b: &Tensor) {
        let &[_, steps, numbers] = a.dims() else { return };
        let values = a.to_f64s().zip(b.to_f64s()).filter(|(a, b)| a.len() == b.len());
        if let Some((a, b)) = values {
            (self.steps, self.numbers) = (steps, numbers);
            self.a.extend(a);
            self.b.extend(b);
        }
    }

    /// Over the chunk and of the worst step, for every pair.
    pub fn errors(&self) -> Vec<[f64; 2]> {
        let (width, size) = (self.numbers, self.steps * self.numbers);
        if size == 0 {
            return Vec::new();
        }
        let range = |number: usize| {
            let values = self.a.iter().skip(number).step_by(width);
            let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
            // What never moves has no range: it is compared as it is.
            if high > low { high - low } else { 1.0 }
        };
        let ranges: Vec<f64> = (0..width).map(range).collect();
        let pairs = self.a.chunks(size).zip(self.b.chunks(size));
        pairs
            .map(|(a, b)| {
                let step = |(a, b): (&[f64], &[f64])| {
                    let squares = a.iter().zip(b).zip(&ranges).map(|((a, b), range)| ((a - b) / range).powi(2));
                    squares.sum::<f64>() / width as f64
                };
                let steps: Vec<f64> = a.chunks(width).zip(b.chunks(width)).map(step).collect();
                let mean = steps.iter().sum::<f64>() / steps.len() as f64;
                [mean.sqrt(), steps.iter().fold(0.0, |most: f64, &s| most.max(s)).sqrt()]
            })
            .collect()
    }

    /// The same over all pairs; `None` where there are no chunks.
    pub fn spread(&self, seed: u64) -> Option<ActionErrors> {
        let errors = self.errors();
        let of = |k: usize| Spread::of(&errors.iter().map(|e| e[k]).collect::<Vec<_>>(), seed);
        (!errors.is_empty()).then(|| ActionErrors { chunk: of(0), worst: of(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_by_their_range_and_the_worst_step_by_itself() {
        let mut chunks = Chunks::default();
        // Ranges 2 and 10 over both chunks of two steps; the third number never moves.
        let a = Tensor::from_f32s(&[2, 2, 3], &[0.0, 0.0, 5.0, 1.0, 10.0, 5.0, 2.0, 5.0, 5.0, 0.0, 0.0, 5.0]);
        let b = Tensor::from_f32s(&[2, 2, 3], &[1.0, 5.0, 5.5, 1.0, 10.0, 5.0, 2.0, 5.0, 5.0, 0.0, 0.0, 5.0]);
        chunks.push(&a, &b);
        let errors = chunks.errors();
        // Each number of the first step is half its range off.
        assert!((errors[0][0] - 0.125f64.sqrt()).abs() < 1e-12 && (errors[0][1] - 0.5).abs() < 1e-12, "{errors:?}");
        assert_eq!(errors[1], [0.0, 0.0]);
        let mut images = Chunks::default();
        images.push(&Tensor::from_f32s(&[1, 1, 1, 1], &[0.0]), &Tensor::from_f32s(&[1, 1, 1, 1], &[1.0]));
        assert!(images.spread(0).is_none());
    }
}
