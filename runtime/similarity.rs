//! The structural similarity of images.
//!
//! Source: Wang et al. 2004, Image quality assessment.

/// Side and deviation of the Gaussian window.
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

impl Layout {
    /// Elements of one image.
    pub(crate) fn elements(&self) -> usize {
        self.height * self.width * self.channels
    }
}

/// One, three or four channels beside two axes that hold a window.
pub(crate) fn layout(dims: &[usize]) -> Option<Layout> {
    let &[_, a, b, c] = dims else { return None };
    let channels = |n: usize| matches!(n, 1 | 3 | 4);
    let layout = match () {
        () if channels(a) => Layout { channels: a, height: b, width: c, channels_last: false },
        () if channels(c) => Layout { channels: c, height: a, width: b, channels_last: true },
        () => return None,
    };
    (layout.height >= WINDOW && layout.width >= WINDOW).then_some(layout)
}

/// The similarity of every channel of two images.
pub(crate) fn similarities<'a>(
    a: &'a [f64],
    b: &'a [f64],
    layout: Layout,
    peak: f64,
) -> impl Iterator<Item = f64> + 'a {
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
    use super::layout;

    #[test]
    fn knows_images_by_their_shape() {
        assert!(layout(&[2, 3, 32, 32]).is_some_and(|l| !l.channels_last));
        assert!(layout(&[2, 32, 32, 3]).is_some_and(|l| l.channels_last));
        assert_eq!((layout(&[2, 64, 32, 32]), layout(&[2, 3, 7, 32]), layout(&[2, 10])), (None, None, None));
    }
}
