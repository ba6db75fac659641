//! How alike images are: psnr and ssim, over the range of values that the first batch of the original shows.

use super::{Accumulator, Case, Column, Family, METRIC, Metric, OutputInfo, OutputPair, Refusal, Score, Suggestion};
use crate::similarity::{layout, similarities};
use lathe_ir::Tensor;

pub(super) struct Images;

const METRICS: &[Metric] = &[
    Metric {
        name: "psnr",
        summary: "the peak signal-to-noise ratio of images in dB",
        drop: "root mean square error over peak: 0.01 is 40 dB",
        column: Some(Column { heading: "PSNR", order: 4, unit: "dB" }),
        ..METRIC
    },
    Metric {
        name: "ssim",
        summary: "the mean structural similarity of images",
        drop: "1 − similarity",
        column: Some(Column { heading: "SSIM", order: 4, unit: "" }),
        ..METRIC
    },
];

/// An output that is no picture.
#[derive(Debug, thiserror::Error)]
enum ImageError {
    #[error("output `{output}` of shape {dims:?} is no batch of images")]
    NoBatch { output: String, dims: Vec<usize> },
    #[error("output `{output}` of shape {dims:?} is no image")]
    NoImage { output: String, dims: Vec<usize> },
    #[error("the output holds no real numbers")]
    NotReal,
}

impl Family for Images {
    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn fits(&self, output: &OutputInfo<'_>) -> Result<(), Refusal> {
        match (output.dtype.is_float() || output.dtype.is_integer()) && layout(output.dims).is_some() {
            true => Ok(()),
            false => {
                let (output, dims) = (output.name.to_owned(), output.dims.to_vec());
                Err(ImageError::NoBatch { output, dims }.into())
            }
        }
    }

    fn precedence(&self) -> u8 {
        10
    }

    fn suggest(&self, case: &mut Case<'_>) -> Option<Suggestion> {
        let images = case.outputs.iter().find(|o| o.dtype.is_float() && layout(o.dims).is_some())?;
        Some(("psnr", format!("`{}` of shape {:?} holds images", images.name, images.dims)))
    }

    fn start(&self, _: &OutputInfo<'_>) -> Box<dyn Accumulator> {
        Box::new(ImageSums::default())
    }
}

#[derive(Default)]
struct ImageSums {
    peak: Option<f64>,
    elements: u64,
    squares: f64,
    planes: u64,
    similarity: f64,
}

/// The range of values that images are in: 1, 2 (from −1 to 1), 255, or that of these values.
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

impl Accumulator for ImageSums {
    fn add(&mut self, pair: &OutputPair<'_>) -> Result<(), Refusal> {
        let dims = pair.reference.dims();
        let unfit = || ImageError::NoImage { output: pair.name.to_owned(), dims: dims.to_vec() };
        let layout = layout(dims).ok_or_else(unfit)?;
        let all = |t: &Tensor| t.to_f64s().ok_or(ImageError::NotReal);
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

    fn scores(&self) -> Vec<(&'static str, Score)> {
        let Some(peak) = self.peak.filter(|_| self.elements > 0 && self.planes > 0) else { return Vec::new() };
        let noise = (self.squares / self.elements as f64).sqrt() / peak;
        let similarity = self.similarity / self.planes as f64;
        let detail = format!("values are taken to span {peak}");
        vec![
            ("psnr", Score::new(f64::INFINITY, -20.0 * noise.log10(), noise).with(detail.clone())),
            ("ssim", Score::new(1.0, similarity, 1.0 - similarity).with(detail)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::scores, *};

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
            assert!((all["psnr"].after - 20.0 * 20f64.log10()).abs() < 1e-5, "{:?}", all["psnr"]);
            assert!((all["ssim"].after - SSIM).abs() < 1e-6, "{:?}", all["ssim"]);
        }
    }

    const SSIM: f64 = 0.967_047_87;

    #[test]
    fn equal_images_are_alike() {
        let (a, _) = pictures(false);
        let all = scores(&Images, &[(a.clone(), a)], None);
        assert_eq!((all["psnr"].after, all["psnr"].drop), (f64::INFINITY, 0.0));
        assert!((all["ssim"].after - 1.0).abs() < 1e-12);
    }
}
