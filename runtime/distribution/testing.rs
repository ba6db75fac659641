//! Features that tests and a few lines of NumPy make alike.

use super::Features;
use lathe_ir::Tensor;

/// `sin(1.3 i + 0.7 j + phase) + 0.3 cos(0.11 i² + j) + 0.2 sin(0.37 (i + 1) (j + 1)²)` at row `i` and column `j`.
pub(super) fn waves(count: usize, width: usize, phase: f64) -> Features {
    let at = |i: f64, j: f64| {
        let fast = (0.37 * (i + 1.0) * (j + 1.0) * (j + 1.0)).sin();
        (1.3 * i + 0.7 * j + phase).sin() + 0.3 * (0.11 * i * i + j).cos() + 0.2 * fast
    };
    let values = (0..count).flat_map(|i| (0..width).map(move |j| at(i as f64, j as f64)));
    from(&[count, width], values.collect())
}

pub(super) fn from(dims: &[usize], values: Vec<f64>) -> Features {
    let mut features = Features::new();
    features.push(&Tensor::from_f64s(lathe_ir::DataType::Double, dims, &values).unwrap()).unwrap();
    features
}

/// Every feature times `scale` plus `shift`.
pub(super) fn moved(of: &Features, scale: f64, shift: f64) -> Features {
    let values = of.values.iter().map(|v| v * scale + shift).collect();
    Features { width: of.width, values }
}
