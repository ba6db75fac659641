//! How alike images are: psnr and ssim, over the range of values that the first batch of the original shows.

use super::{Accumulator, Family, Metric, Pair, Place, Score};

pub(super) struct Images;

const METRICS: &[Metric] = &[
    Metric {
        name: "psnr",
        summary: "the peak signal-to-noise ratio of images in dB",
        drop: "root mean square error over peak: 0.01 is 40 dB",
    },
    Metric { name: "ssim", summary: "the mean structural similarity of images", drop: "1 − similarity" },
];

/// Side and deviation of the Gaussian window, from Wang et al. 2004, Image quality assessment.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;

/// How the axes of a batch of images are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    channels: usize,
    height: usize,
    width: usize,
    channels_last: bool,
}

/// One, three or four channels beside two axes that hold a window.
pub(crate) fn layout(dims: &[usize]) -> Option<Layout> {
    let &[_, a, b, c] = dims else { return None };
    let channels = |n: usize| matches!(n, 1 | 3 | 4);
    let found = match () {
        () if channels(a) => Layout { channels: a, height: b, width: c, channels_last: false },
        () if channels(c) => Layout { channels: c, height: a, width: b, channels_last: true },
        () => return None,
    };
    (found.height >= WINDOW && found.width >= WINDOW).then_some(found)
}

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
        let image = layout.height * layout.width * layout.channels;
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

/// The similarity of every channel of two images.
fn similarities<'a>(a: &'a [f64], b: &'a [f64], layout: Layout, peak: f64) -> impl Iterator<Item = f64> + 'a {
    let plane = layout.height * layout.width;
    (0..layout.channels).map(move |channel| {
        let pick = |all: &[f64]| -> Vec<f64> {
            match layout.channels_last {
                true => all.iter().skip(channel).step_by(layout.channels).copied().collect(),
                false => all[channel * plane..(channel + 1) * plane].to_vec(),
            }
        };
        similarity(&pick(a), &pick(b), layout.width, peak)
    })
}

/// The mean similarity over the channels of two images whose values span `peak`.
pub(crate) fn similarity_of(a: &[f64], b: &[f64], layout: Layout, peak: f64) -> f64 {
    similarities(a, b, layout, peak).sum::<f64>() / layout.channels as f64
}

/// The mean over all full windows of one plane of two images.
fn similarity(a: &[f64], b: &[f64], width: usize, peak: f64) -> f64 {
    let weights: Vec<f64> = (0..WINDOW)
        .map(|i| {
            let distance = i as f64 - (WINDOW / 2) as f64;
            (-distance * distance / (2.0 * SIGMA * SIGMA)).exp()
        })
        .collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let smooth = |of: &dyn Fn(f64, f64) -> f64| {
        let values: Vec<f64> = a.iter().zip(b).map(|(&x, &y)| of(x, y)).collect();
        blur(&values, width, &weights)
    };
    let (mean_a, mean_b) = (smooth(&|x, _| x), smooth(&|_, y| y));
    let (aa, bb, ab) = (smooth(&|x, _| x * x), smooth(&|_, y| y * y), smooth(&|x, y| x * y));
    let (c1, c2) = ((0.01 * peak).powi(2), (0.03 * peak).powi(2));
    let mut sum = 0.0;
    for i in 0..mean_a.len() {
        let (m, n) = (mean_a[i], mean_b[i]);
        let (var_a, var_b, covariance) = (aa[i] - m * m, bb[i] - n * n, ab[i] - m * n);
        sum += (2.0 * m * n + c1) * (2.0 * covariance + c2) / ((m * m + n * n + c1) * (var_a + var_b + c2));
    }
    sum / mean_a.len() as f64
}

/// Weighted sums over every full window of a plane, first along rows, then along columns.
fn blur(plane: &[f64], width: usize, weights: &[f64]) -> Vec<f64> {
    let inner = width + 1 - weights.len();
    let rows: Vec<f64> = plane
        .chunks_exact(width)
        .flat_map(|row| row.windows(weights.len()))
        .map(|window| window.iter().zip(weights).map(|(x, w)| x * w).sum())
        .collect();
    let height = plane.len() / width;
    let mut out = vec![0.0; (height + 1 - weights.len()) * inner];
    for (at, slot) in out.iter_mut().enumerate() {
        *slot = weights.iter().enumerate().map(|(i, w)| w * rows[at + i * inner]).sum();
    }
    out
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

    #[test]
    fn knows_images_by_their_shape() {
        assert!(layout(&[2, 3, 32, 32]).is_some_and(|l| !l.channels_last));
        assert!(layout(&[2, 32, 32, 3]).is_some_and(|l| l.channels_last));
        assert_eq!((layout(&[2, 64, 32, 32]), layout(&[2, 3, 7, 32]), layout(&[2, 10])), (None, None, None));
    }
}
