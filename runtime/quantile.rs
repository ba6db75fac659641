//! The quantile of measured values.

/// The value below which this share of `values` lies, between neighbours linearly; not a number if there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        // The difference of two infinities is no number.
        (Some(&a), Some(&b)) if a != b => a + (b - a) * (at - low as f64),
        (Some(&a), _) => a,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_interpolated() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!([0.0, 0.5, 1.0].map(|share| quantile(&values, share)), [1.0, 2.5, 4.0]);
        assert_eq!(quantile(&[1.0], 0.25), 1.0);
        assert_eq!(quantile(&[f64::INFINITY; 3], 0.4), f64::INFINITY);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
