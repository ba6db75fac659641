//! The quantiles of the beta distribution with both parameters 0.6, by which noise levels may be spread.

/// Both parameters.
const SHAPE: f64 = 0.6;

/// The beta function of them, `Γ(0.6)² / Γ(1.2)`.
const BETA: f64 = 2.415_344_208_002_471_4;

/// The number below which a share of the distribution lies, to the last bits.
pub(super) fn quantile(share: f64) -> f64 {
    if share <= 0.0 || share >= 1.0 {
        return share.clamp(0.0, 1.0);
    }
    let (mut low, mut high) = (0.0, 1.0);
    // Half of the distribution lies below a half.
    while low < high {
        let middle = 0.5 * (low + high);
        if middle == low || middle == high {
            break;
        }
        if cumulative(middle) < share { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// The share of the distribution below `x`: its regularized incomplete beta function.
fn cumulative(x: f64) -> f64 {
    // The continued fraction converges fast on the lower half, and the distribution is symmetric.
    if x > 0.5 { 1.0 - lower(1.0 - x) } else { lower(x) }
}

fn lower(x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let front = (SHAPE * (x.ln() + (-x).ln_1p())).exp() / (SHAPE * BETA);
    front / fraction(x)
}

/// The continued fraction `1 + d₁/(1 + d₂/(1 + …))` of the incomplete beta function, from a term so late that it does not
/// matter.
fn fraction(x: f64) -> f64 {
    const TERMS: usize = 120;
    let term = |index: usize| {
        let m = (index / 2) as f64;
        let (a, b) = (SHAPE, SHAPE);
        match index % 2 {
            0 => m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m)),
            _ => -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0)),
        }
    };
    (1..=TERMS).rev().fold(1.0, |rest, index| 1.0 + term(index) / rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_published_ones() {
        for (share, expected) in [(0.25, 0.175_680_378_7), (0.5, 0.5), (0.75, 0.824_319_621_3), (0.0, 0.0), (1.0, 1.0)]
        {
            assert!((quantile(share) - expected).abs() < 1e-9, "{share}: {}", quantile(share));
        }
        assert!((cumulative(0.1) + cumulative(0.9) - 1.0).abs() < 1e-14);
    }
}
