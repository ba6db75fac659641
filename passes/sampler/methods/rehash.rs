//! Deep tensors of a UNet are kept while they hardly change.
//!
//! Source: Zhan et al. 2024, Fast and memory-efficient video diffusion using streamlined inference, arXiv:2411.01171.

/// Which steps are computed: the first, the last, and every one at which the tensor has turned too far from the last
/// computed one.
///
/// `cosine(from, step)` is the cosine between what the tensor is at both steps on calibration runs. After `longest` steps
/// in a row one is computed in any case.
pub fn rehash(steps: usize, threshold: f64, longest: usize, cosine: &dyn Fn(usize, usize) -> f64) -> Vec<bool> {
    let mut last = 0;
    let decide = |step: usize| {
        let full = step == 0 || step + 1 == steps || step - last > longest || cosine(last, step) < threshold;
        if full {
            last = step;
        }
        full
    };
    (0..steps).map(decide).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_turns_is_computed() {
        let told = |threshold, longest| {
            let angle = |step: usize| if step < 4 { 0.5 * step as f64 } else { 2.0 + 0.01 * step as f64 };
            let found = rehash(10, threshold, longest, &|a, b| (angle(a) - angle(b)).cos());
            found.iter().map(|&c| if c { 'x' } else { '.' }).collect::<String>()
        };
        assert_eq!(told(0.95, 8), "xxxxx....x");
        assert_eq!(told(0.95, 2), "xxxxx..x.x");
        assert_eq!(told(-2.0, 8), "x........x");
        assert_eq!(told(2.0, 8), "xxxxxxxxxx");
    }
}
