//! How alike images are: psnr and ssim, over the range of values that the first batch of the original shows.

use super::{Accumulator, Family, Metric, Pair, Place, Score};
use crate::similarity::{layout, similarities};

pub(super) struct Images;

const METRICS: &[Metric] = &[
    Metric {
        name: "psnr",
        summary: "the peak signal-to-noise ratio of images in dB",
        drop: "root mean square error over peak: 0.01 is 40 dB",
    },
    Metric { name: "ssim", summary: "the mean structural similarity of images", drop: "1 − similarity" },
];

impl Family for Images {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, place: &Place<'_>) -> Result<(), String> {
        match (place.dtype.is_float() || place.dtype.is_integer()) && layout(place.dims).is_some() {
            true => Ok(()),
            false => Err(format!("output `{}` of shape {:?} is no batch of images", place.name, place.dims)),
        }
    }

    fn start(&self, _: &Place<'_>) -> Box<dyn Accumulator> {
        Box::new(Sums::default())
    }
}

#[derive(Default)]
struct Sums {
    peak: Option<f64>,
    elements: u64,
    squares: f64,
    planes: u64,
    similarity: f64,
}

/// The range of values that images are in: 1, 2 (from −1 to 1), 255, or what is seen.
fn peak(values: &[f64]) -> f64 {
    let finite = || values.iter().copied().filter(|x| x.is_finite());
    let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    match () {
        () if low >= 0.0 && high <= 1.001 => 1.0,
        () if low >= -1.001 && high <= 1.001 => 2.0,
        () if low >= 0.0 && high <= 255.5 => 255.0,
        () if high > low => high - low,
        () => 1.0,
    }
}

impl Accumulator for Sums {
    fn add(&mut self, pair: &Pair<'_>) -> Result<(), String> {
        let dims = pair.reference.dims();
        let layout = layout(dims).ok_or_else(|| format!("output `{}` of shape {dims:?} is no image", pair.name))?;
        let all = |t: &lathe_ir::Tensor| t.to_f64s().ok_or("the output holds no real numbers");
        let (a, b) = (all(pair.reference)?, all(pair.candidate)?);
        let peak = *self.peak.get_or_insert_with(|| peak(&a));
        for (&x, &y) in a.iter().zip(&b).filter(|(x, y)| x.is_finite() && y.is_finite()) {
            self.elements += 1;
            self.squares += (x - y) * (x - y);
        }
        let image = layout.elements();
        for (a, b) in a.chunks_exact(image).zip(b.chunks_exact(image)) {
            for similarity in similarities(a, b, layout, peak).filter(|s| s.is_finite()) {
                self.planes += 1;
                self.similarity += similarity;
            }
        }
        Ok(())
    }

    fn scores(&self) -> Vec<Score> {
        let Some(peak) = self.peak.filter(|_| self.elements > 0 && self.planes > 0) else { return Vec::new() };
        let noise = (self.squares / self.elements as f64).sqrt() / peak;
        let similarity = self.similarity / self.planes as f64;
        let detail = format!("values are taken to span {peak}");
        vec![
            Score::new("psnr", f64::INFINITY, -20.0 * noise.log10(), noise).with(detail.clone()),
            Score::new("ssim", 1.0, similarity, 1.0 - similarity).with(detail),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::scores, *};
    use lathe_ir::Tensor;

    /// A smooth picture and the same with a pattern on it. NumPy gives their similarity by the two-dimensional definition.
    fn pictures(channels_last: bool) -> (Tensor, Tensor) {
        let at = |i: usize, noise: f64| {
            let (y, x) = (i / 13, i % 13);
            let clean = 0.5 + 0.4 * ((y as f64) * 0.7).sin() * ((x as f64) * 0.5).cos();
            (clean + noise * if (x + y) % 2 == 0 { 1.0 } else { -1.0 }) as f32
        };
        let dims: &[usize] = if channels_last { &[1, 12, 13, 1] } else { &[1, 1, 12, 13] };
        let picture = |noise: f64| Tensor::from_f32s(dims, &(0..12 * 13).map(|i| at(i, noise)).collect::<Vec<_>>());
        (picture(0.0), picture(0.05))
    }

    #[test]
    fn agrees_with_the_definition() {
        for channels_last in [false, true] {
            let all = scores(&Images, &[pictures(channels_last)], None);
            assert!((all[0].after - 20.0 * 20f64.log10()).abs() < 1e-5, "{:?}", all[0]);
            assert!((all[1].after - SSIM).abs() < 1e-6, "{:?}", all[1]);
        }
    }

    const SSIM: f64 = 0.967_047_87;

    #[test]
    fn equal_images_are_alike() {
        let (a, _) = pictures(false);
        let all = scores(&Images, &[(a.clone(), a)], None);
        assert_eq!((all[0].after, all[0].drop), (f64::INFINITY, 0.0));
        assert!((all[1].after - 1.0).abs() < 1e-12);
    }
}
