//! How far each sample of a changed sampler is from the sample of the original for the same noise and conditions.
//!
//! Paired distances vary little between samples, so a few dozen pairs tell plans apart. They say nothing about samples
//! that differ and are as good: for that see [`frechet`](crate::frechet) and [`kernel`](crate::kernel).

use crate::{FeatureError, quantile, similarity};
use lathe_analysis::Random;
use lathe_ir::Tensor;

/// Distances of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Root of the mean square difference.
    pub rmse: f64,
    /// Norm of the difference over the norm of the original.
    pub rel_l2: f64,
    /// Cosine between both.
    pub cosine: f64,
    /// Peak signal-to-noise ratio in dB; infinite where nothing differs.
    pub psnr: f64,
    /// Structural similarity; `None` for what is no image of at least 11 by 11.
    pub ssim: Option<f64>,
}

/// The distances of all pairs of two batches, `[samples, …]`. Values of images span `range`: 2 for −1 to 1.
pub fn pairs(reference: &Tensor, candidate: &Tensor, range: f64) -> Result<Vec<Pair>, FeatureError> {
    let (a, b) = both(reference, candidate)?;
    let dims = reference.dims();
    let size: usize = dims[1..].iter().product::<usize>().max(1);
    let layout = similarity::layout(dims);
    let pair = |(a, b): (&[f64], &[f64])| {
        let sum = |of: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(&x, &y)| of(x, y)).sum::<f64>();
        let (aa, bb, ab) = (sum(&|x, _| x * x), sum(&|_, y| y * y), sum(&|x, y| x * y));
        let squares = sum(&|x, y| (x - y) * (x - y));
        let rmse = (squares / size as f64).sqrt();
        Pair {
            rmse,
            rel_l2: if squares == 0.0 { 0.0 } else { (squares / aa).sqrt() },
            cosine: if squares == 0.0 { 1.0 } else { ab / (aa * bb).sqrt() },
            psnr: 20.0 * (range / rmse).log10(),
            ssim: layout.map(|layout| similarity::similarity_of(a, b, layout, range)),
        }
    };
    Ok(a.chunks_exact(size).zip(b.chunks_exact(size)).map(pair).collect())
}

/// How different two images look to a network, pair by pair: its feature maps `[samples, channels, …]` of both, one pair
/// of tensors per layer.
///
/// At every position both vectors of channels are scaled to length one; the squared difference is averaged over
/// positions and added over layers. Pooled features `[samples, channels]` count as one position.
/// Source: Zhang et al. 2018, The unreasonable effectiveness of deep features, arXiv:1801.03924, without its weights.
pub fn feature_distances(layers: &[(&Tensor, &Tensor)]) -> Result<Vec<f64>, FeatureError> {
    let mut sums: Vec<f64> = Vec::new();
    for &(reference, candidate) in layers {
        let (a, b) = both(reference, candidate)?;
        let &[samples, channels, ref rest @ ..] = reference.dims() else {
            return Err(FeatureError::Shape(reference.dims().to_vec()));
        };
        let places: usize = rest.iter().product();
        if !sums.is_empty() && sums.len() != samples {
            return Err(FeatureError::Counts(sums.len(), samples));
        }
        sums.resize(samples, 0.0);
        for (sample, sum) in sums.iter_mut().enumerate() {
            let at = |of: &[f64], channel: usize, place: usize| of[(sample * channels + channel) * places + place];
            let length = |of: &[f64], place: usize| {
                let squares: f64 = (0..channels).map(|c| at(of, c, place).powi(2)).sum();
                squares.sqrt().max(f64::MIN_POSITIVE)
            };
            let difference = |place: usize| {
                let (la, lb) = (length(&a, place), length(&b, place));
                (0..channels).map(|c| (at(&a, c, place) / la - at(&b, c, place) / lb).powi(2)).sum::<f64>()
            };
            *sum += (0..places).map(difference).sum::<f64>() / places.max(1) as f64;
        }
    }
    Ok(sums)
}

/// The elements of two tensors of equal shape.
fn both(reference: &Tensor, candidate: &Tensor) -> Result<(Vec<f64>, Vec<f64>), FeatureError> {
    let shape = |t: &Tensor| FeatureError::Shape(t.dims().to_vec());
    if reference.dims().is_empty() || reference.dims() != candidate.dims() {
        return Err(shape(candidate));
    }
    let all = |t: &Tensor| t.to_f64s().ok_or_else(|| shape(t));
    Ok((all(reference)?, all(candidate)?))
}

/// Ends of the interval that holds 95 % of the means of `rounds` samples drawn from `values` with replacement.
pub fn bootstrap(values: &[f64], rounds: usize, seed: u64) -> [f64; 2] {
    let mut random = Random::named(seed, "bootstrap");
    let mean = |random: &mut Random| {
        (0..values.len()).map(|_| values[random.index(values.len())]).sum::<f64>() / values.len() as f64
    };
    let means: Vec<f64> = (0..rounds.max(1)).map(|_| mean(&mut random)).collect();
    [quantile(&means, 0.025), quantile(&means, 0.975)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_told_one_by_one() {
        let a = Tensor::from_f32s(&[2, 2], &[3.0, 4.0, 1.0, 0.0]);
        let b = Tensor::from_f32s(&[2, 2], &[3.0, 4.0, 0.0, 1.0]);
        let found = pairs(&a, &b, 2.0).unwrap();
        assert_eq!((found[0].rmse, found[0].cosine, found[0].psnr), (0.0, 1.0, f64::INFINITY));
        assert_eq!((found[1].rmse, found[1].cosine, found[1].ssim), (1.0, 0.0, None));
        assert!((found[1].rel_l2 - 2f64.sqrt()).abs() < 1e-12);
        // 20 log10 (2 / 1).
        assert!((found[1].psnr - 6.020_599_913).abs() < 1e-6);
        assert!(pairs(&a, &Tensor::from_f32s(&[4], &[0.0; 4]), 2.0).is_err());
    }

    #[test]
    fn images_have_a_similarity() {
        let picture = |shift: f32| -> Vec<f32> { (0..144).map(|i| (i as f32 * 0.3).sin() * 0.5 + shift).collect() };
        let a = Tensor::from_f32s(&[1, 1, 12, 12], &picture(0.0));
        assert!((pairs(&a, &a, 2.0).unwrap()[0].ssim.unwrap() - 1.0).abs() < 1e-12);
        let b = Tensor::from_f32s(&[1, 1, 12, 12], &picture(0.2));
        let similarity = pairs(&a, &b, 2.0).unwrap()[0].ssim.unwrap();
        assert!((0.0..0.99).contains(&similarity), "{similarity}");
    }

    #[test]
    fn features_count_by_direction() {
        // One position turns by a right angle, which is a squared distance of 2; the other only grows.
        let a = Tensor::from_f32s(&[1, 2, 2], &[1.0, 1.0, 0.0, 0.0]);
        let b = Tensor::from_f32s(&[1, 2, 2], &[0.0, 5.0, 1.0, 0.0]);
        assert_eq!(feature_distances(&[(&a, &b)]).unwrap(), [1.0]);
        let pooled = Tensor::from_f32s(&[1, 2], &[0.0, 2.0]);
        let other = Tensor::from_f32s(&[1, 2], &[3.0, 0.0]);
        assert_eq!(feature_distances(&[(&a, &b), (&pooled, &other)]).unwrap(), [3.0]);
    }

    #[test]
    fn the_interval_of_a_mean_holds_it() {
        let [low, high] = bootstrap(&[4.0, 1.0, 3.0, 2.0], 2000, 1);
        assert!((1.0..2.5).contains(&low) && high > 2.5 && high <= 4.0, "{low} {high}");
    }
}
