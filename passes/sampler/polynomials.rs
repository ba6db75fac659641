//! Polynomials through what earlier rows kept, and their integrals: the weights of linear multistep methods.

/// The polynomial that is 1 at node `index` and 0 at the others, by its coefficients, the constant first.
fn lagrange(nodes: &[f64], index: usize) -> Vec<f64> {
    let mut coefficients = vec![1.0];
    for (other, node) in nodes.iter().enumerate().filter(|(other, _)| *other != index) {
        let gap = nodes[index] - nodes[other];
        let mut next = vec![0.0; coefficients.len() + 1];
        for (power, c) in coefficients.iter().enumerate() {
            next[power] -= c * node / gap;
            next[power + 1] += c / gap;
        }
        coefficients = next;
    }
    coefficients
}

/// What each node's value is worth in the integral whose moments (those of `1, u, u², …`) these are.
pub(super) fn weights(nodes: &[f64], moments: &[f64]) -> Vec<f64> {
    let weight = |index| lagrange(nodes, index).iter().zip(moments).map(|(c, moment)| c * moment).sum();
    (0..nodes.len()).map(weight).collect()
}

/// `∫ uⁿ du` from 0 to `end`, for the first `count` n.
pub(super) fn moments(end: f64, count: usize) -> Vec<f64> {
    (1..=count).map(|power| end.powi(power as i32) / power as f64).collect()
}

/// `∫ uⁿ·exp(rate·u) du` from `−length` to 0, for the first `count` n. The rate is not zero.
pub(super) fn exponential_moments(rate: f64, length: f64, count: usize) -> Vec<f64> {
    let decayed = (-rate * length).exp();
    let mut moments: Vec<f64> = Vec::with_capacity(count);
    for power in 0..count {
        let upper = if power == 0 { 1.0 } else { 0.0 };
        let boundary = upper - (-length).powi(power as i32) * decayed;
        let before = power.checked_sub(1).map_or(0.0, |last| moments[last]);
        moments.push((boundary - power as f64 * before) / rate);
    }
    moments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} {b}");
    }

    #[test]
    fn integrals_are_exact_on_polynomials() {
        let nodes = [0.0, 1.5, 4.0];
        let found: f64 = weights(&nodes, &moments(-2.0, 3)).iter().zip(nodes).map(|(w, u)| w * u * u).sum();
        near(found, -8.0 / 3.0);
        // ∫ u²·e^{2u} from −1 to 0 is 1/4 − 5/4·e^{−2}.
        let found: f64 =
            weights(&nodes, &exponential_moments(2.0, 1.0, 3)).iter().zip(nodes).map(|(w, u)| w * u * u).sum();
        near(found, 0.25 - 1.25 * (-2f64).exp());
        assert!(exponential_moments(1.0, 0.0, 4).iter().all(|m| *m == 0.0));
    }
}
