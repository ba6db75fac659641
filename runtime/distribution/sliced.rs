//! The sliced Wasserstein distance: earth is moved along random lines, where sorting says how.
//!
//! Source: Rabin et al. 2011, Wasserstein barycenter and its application to texture mixing.

use super::{FeatureError, Features};
use lathe_analysis::Random;

/// The mean over `directions` random unit vectors of the squared Wasserstein-2 distance between both projections.
///
/// Needs equally many images of each. Its size means little by itself: compare with the distance of two halves of one set.
pub fn sliced(a: &Features, b: &Features, directions: usize, seed: u64) -> Result<f64, FeatureError> {
    a.check(b, 1)?;
    if a.len() != b.len() {
        return Err(FeatureError::Counts(a.len(), b.len()));
    }
    let mut random = Random::named(seed, "sliced distance");
    let directions = directions.max(1);
    let mut sum = 0.0;
    for _ in 0..directions {
        let line: Vec<f64> = (0..a.width()).map(|_| random.normal()).collect();
        let length = line.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        let (left, right) = (projected(a, &line), projected(b, &line));
        let squares: f64 = left.iter().zip(&right).map(|(x, y)| (x - y) * (x - y)).sum();
        sum += squares / (length * length * a.len() as f64);
    }
    Ok(sum / directions as f64)
}

/// The projections of all images, ascending.
fn projected(features: &Features, line: &[f64]) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(line).map(|(a, b)| a * b).sum();
    let mut values: Vec<f64> = (0..features.len()).map(|image| dot(features.row(image))).collect();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::super::testing::{from, moved, waves};
    use super::*;

    #[test]
    fn one_dimension_is_exact() {
        let (a, b) = (from(&[3, 1], vec![3.0, 0.0, 1.0]), from(&[3, 1], vec![2.0, 5.0, 0.0]));
        // Sorted: 0 1 3 and 0 2 5.
        assert!((sliced(&a, &b, 4, 0).unwrap() - 5.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_shift_is_seen_by_its_share_of_a_random_direction() {
        let a = waves(100, 6, 0.0);
        assert_eq!(sliced(&a, &a, 8, 1).unwrap(), 0.0);
        // The mean of (v·θ)² over unit vectors is ‖v‖² / d, here 0.25; 4,096 directions leave about two percent.
        let found = sliced(&a, &moved(&a, 1.0, 0.5), 4096, 1).unwrap();
        assert!((found - 0.25).abs() < 0.02, "{found}");
        assert_eq!(found, sliced(&a, &moved(&a, 1.0, 0.5), 4096, 1).unwrap());
    }

    #[test]
    fn sets_of_different_sizes_are_refused() {
        assert_eq!(sliced(&waves(3, 2, 0.0), &waves(4, 2, 0.0), 1, 0), Err(FeatureError::Counts(3, 4)));
    }
}
