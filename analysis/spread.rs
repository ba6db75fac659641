//! How the numbers of a value are spread: a histogram on a logarithmic scale, and ranges that lose little.

/// Powers of two that bins reach over, from here on, and how many.
const LOWEST: i32 = -24;
const OCTAVES: usize = 40;

/// Bins of an octave: the top four bits of a mantissa tell them.
const PER_OCTAVE: usize = 16;

/// Bins of either sign.
const HALF: usize = OCTAVES * PER_OCTAVE;

/// Octaves below the largest magnitude in which the end of a range is looked for.
const SEARCHED: usize = 4;

/// Bins of equal width in which distributions are compared, and the levels that each is rounded to.
const LINEAR: usize = 2048;
const LEVELS: usize = 128;

/// Distance of the thresholds at which distributions are compared, in bins.
const STRIDE: usize = 8;

/// How many numbers of a value lie in which range, and their sums: what a run over any part of a set gives can be added to
/// what another gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// The least number.
    pub least: f64,
    /// The largest number.
    pub largest: f64,
    /// Per bin, in rising order of their numbers: how many there are, their sum, and the sum of their squares.
    bins: Vec<[f64; 3]>,
}

impl Spread {
    /// Bins.
    pub const BINS: usize = 2 * HALF;

    /// Of the extremes and of [`Spread::BINS`] counts, as many sums and as many sums of squares. `None` if these are not
    /// as many, or nothing was counted.
    pub fn new(least: f64, largest: f64, sums: &[f64]) -> Option<Spread> {
        if sums.len() != 3 * Spread::BINS || !least.is_finite() || !largest.is_finite() {
            return None;
        }
        let bins = (0..Spread::BINS).map(|at| [0, 1, 2].map(|part| sums[part * Spread::BINS + at])).collect();
        let spread = Spread { least, largest, bins };
        (spread.count() > 0.0).then_some(spread)
    }

    /// Adds numbers to [`Spread::BINS`] counts, sums and sums of squares. What is no number is passed over.
    pub fn add(sums: &mut [f64], numbers: impl Iterator<Item = f32>) {
        let (counts, rest) = sums.split_at_mut(Spread::BINS);
        let (totals, squares) = rest.split_at_mut(Spread::BINS);
        for x in numbers.filter(|x| !x.is_nan()) {
            let (at, wide) = (Spread::bin(x), f64::from(x));
            counts[at] += 1.0;
            totals[at] += wide;
            squares[at] += wide * wide;
        }
    }

    /// The bin of a number: its sign, exponent and the top bits of its mantissa. Zero and what is smaller than every bin
    /// lies in the lowest of its sign, what is larger in the highest.
    fn bin(x: f32) -> usize {
        let lowest = ((127 + LOWEST) as u32) << 4;
        let steps = (x.abs().to_bits() >> 19).saturating_sub(lowest) as usize;
        let steps = steps.min(HALF - 1);
        if x < 0.0 { HALF - 1 - steps } else { HALF + steps }
    }

    /// The magnitude at which a step of either sign begins.
    fn edge(step: usize) -> f64 {
        if step == 0 {
            return 0.0;
        }
        let (octave, part) = (step / PER_OCTAVE, step % PER_OCTAVE);
        2f64.powi(LOWEST + octave as i32) * (1.0 + part as f64 / PER_OCTAVE as f64)
    }

    /// The ends of a bin.
    fn ends(at: usize) -> (f64, f64) {
        if at >= HALF {
            return (Spread::edge(at - HALF), Spread::edge(at - HALF + 1));
        }
        (-Spread::edge(HALF - at), -Spread::edge(HALF - 1 - at))
    }

    /// Numbers.
    pub fn count(&self) -> f64 {
        self.bins.iter().map(|bin| bin[0]).sum()
    }

    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.bins.iter().map(|bin| bin[1]).sum::<f64>() / self.count()
    }

    /// The mean of their squares.
    pub fn square(&self) -> f64 {
        self.bins.iter().map(|bin| bin[2]).sum::<f64>() / self.count()
    }

    /// Of this value and another one.
    #[must_use]
    pub fn with(&self, other: &Spread) -> Spread {
        let both = self.bins.iter().zip(&other.bins);
        Spread {
            least: self.least.min(other.least),
            largest: self.largest.max(other.largest),
            bins: both.map(|(a, b)| [0, 1, 2].map(|part| a[part] + b[part])).collect(),
        }
    }

    /// All numbers, and zero.
    pub fn whole(&self) -> (f64, f64) {
        (self.least.min(0.0), self.largest.max(0.0))
    }

    /// The range that holds a share of the numbers, and zero: of what is left out, half lies on each side, or all of it on one
    /// where the other ends at zero.
    pub fn percentile(&self, share: f64) -> (f64, f64) {
        let (least, largest) = self.whole();
        let sides = if least == 0.0 || largest == 0.0 { 1.0 } else { 2.0 };
        let out = (1.0 - share).max(0.0) / sides * self.count();
        let cut = |place: &dyn Fn(usize) -> usize| {
            let mut left = out;
            (0..Spread::BINS).map(place).find(|&at| {
                left -= self.bins[at][0];
                left < 0.0
            })
        };
        let low = cut(&|at| at).map_or(least, |at| Spread::ends(at).0);
        let high = cut(&|at| Spread::BINS - 1 - at).map_or(largest, |at| Spread::ends(at).1);
        (low.clamp(least, 0.0), high.clamp(0.0, largest))
    }

    /// The mean square error of numbers that are cut to a range and rounded to steps of a part of it. Exact for what is cut
    /// where the ends of the range are ends of bins; numbers far below a step are rounded to zero.
    pub fn error(&self, (low, high): (f64, f64), steps: f64) -> f64 {
        let step = (high - low) / steps;
        let rounding = step * step / 12.0;
        let mut sum = 0.0;
        for (at, &[count, total, square]) in self.bins.iter().enumerate().filter(|(_, bin)| bin[0] > 0.0) {
            let (from, to) = Spread::ends(at);
            let beyond = |end: f64| (square - 2.0 * end * total + end * end * count).max(0.0);
            sum += match (to <= low, from >= high) {
                (true, false) => beyond(low),
                (false, true) => beyond(high),
                _ => (count * rounding).min(square),
            };
        }
        sum / self.count()
    }

    /// The range with zero in it that loses least by [`Spread::error`]. With `symmetric`, both ends are equally far from
    /// zero.
    pub fn least_error(&self, steps: f64, symmetric: bool) -> (f64, f64) {
        let mut range = self.whole();
        if symmetric {
            let most = range.1.max(-range.0);
            let ends = Spread::below(most).map(|end| (-end, end));
            return self.best(ends.chain([(-most, most)]), steps);
        }
        let (least, largest) = range;
        for _ in 0..2 {
            let low = range.0;
            range = self.best(Spread::below(largest).map(|end| (low, end)).chain([(low, largest)]), steps);
            let high = range.1;
            range = self.best(Spread::below(-least).map(|end| (-end, high)).chain([(least, high)]), steps);
        }
        range
    }

    fn best(&self, ranges: impl Iterator<Item = (f64, f64)>, steps: f64) -> (f64, f64) {
        let errors = ranges.map(|range| (self.error(range, steps), range));
        errors.min_by(|a, b| a.0.total_cmp(&b.0)).map_or_else(|| self.whole(), |(_, range)| range)
    }

    /// Magnitudes at which bins end, a few octaves below this one.
    fn below(most: f64) -> impl Iterator<Item = f64> {
        let top = if most > 0.0 { Spread::bin(most as f32) - HALF } else { 0 };
        (top.saturating_sub(SEARCHED * PER_OCTAVE).max(1)..=top).map(Spread::edge).filter(move |&end| end < most)
    }

    /// The range with zero in it whose rounded distribution is nearest to that of the magnitudes by the divergence of Kullback
    /// and Leibler: thresholds are tried on 2,048 bins of equal width.
    pub fn least_divergence(&self) -> (f64, f64) {
        let (least, largest) = self.whole();
        let most = largest.max(-least);
        if most <= 0.0 {
            return (0.0, 0.0);
        }
        let linear = self.linear(most);
        let divergences = (LEVELS..=LINEAR).step_by(STRIDE).map(|bins| (divergence(&linear, bins), bins));
        let bins = divergences.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(LINEAR, |(_, bins)| bins);
        let end = most * bins as f64 / LINEAR as f64;
        (least.max(-end), largest.min(end))
    }

    /// How many magnitudes lie in which of the bins of equal width; those of one bin of the logarithmic scale are spread
    /// evenly over it.
    fn linear(&self, most: f64) -> Vec<f64> {
        let width = most / LINEAR as f64;
        let mut linear = vec![0.0; LINEAR];
        for (at, bin) in self.bins.iter().enumerate().filter(|(_, bin)| bin[0] > 0.0) {
            let (a, b) = Spread::ends(at);
            let (from, to) = (a.abs().min(b.abs()), a.abs().max(b.abs()).min(most));
            let (first, last) = ((from / width) as usize, (to / width) as usize);
            let (first, last) = (first.min(LINEAR - 1), last.min(LINEAR - 1));
            for (own, count) in linear.iter_mut().enumerate().take(last + 1).skip(first) {
                let inside = (to.min((own + 1) as f64 * width) - from.max(own as f64 * width)).max(0.0);
                *count += if first == last { bin[0] } else { bin[0] * inside / (to - from) };
            }
        }
        linear
    }
}

/// How far the first bins with everything beyond them in the last are from what is left of them in a few levels.
fn divergence(linear: &[f64], bins: usize) -> f64 {
    let beyond: f64 = linear[bins..].iter().sum();
    let total: f64 = linear.iter().sum();
    let inside: f64 = linear[..bins].iter().sum();
    if inside <= 0.0 {
        return f64::INFINITY;
    }
    let mut sum = 0.0;
    for level in 0..LEVELS {
        let own = level * bins / LEVELS..(level + 1) * bins / LEVELS;
        let filled = linear[own.clone()].iter().filter(|&&count| count > 0.0).count();
        let spread = linear[own.clone()].iter().sum::<f64>() / filled.max(1) as f64;
        for at in own {
            let p = linear[at] + if at + 1 == bins { beyond } else { 0.0 };
            let q = if linear[at] > 0.0 { spread } else { 0.0 };
            // What the rounded distribution has nothing of still counts.
            let (p, q) = (p / total, (q / inside).max(1e-9));
            sum += if p > 0.0 { p * (p / q).ln() } else { 0.0 };
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    fn sums(numbers: &[f32]) -> Vec<f64> {
        let mut sums = vec![0.0; 3 * Spread::BINS];
        Spread::add(&mut sums, numbers.iter().copied());
        sums
    }

    fn spread(numbers: &[f32]) -> Spread {
        let ends = numbers.iter().filter(|x| !x.is_nan()).map(|&x| f64::from(x));
        let (least, largest) = (ends.clone().fold(f64::INFINITY, f64::min), ends.fold(f64::NEG_INFINITY, f64::max));
        Spread::new(least, largest, &sums(numbers)).unwrap()
    }

    fn normal(count: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..count).map(|_| random.normal() as f32).collect()
    }

    #[test]
    fn bins_are_sixteenths_of_octaves_in_rising_order() {
        for at in 0..Spread::BINS {
            let (from, to) = Spread::ends(at);
            assert!(from < to, "{at}");
            assert!(at + 1 == Spread::BINS || Spread::ends(at + 1).0 == to);
        }
        for x in [1.0f32, 1.06, 1.0625, 3.9, 2e-5, 6e4, -1.0, -1.0625, -7.3, 0.0] {
            let (from, to) = Spread::ends(Spread::bin(x));
            let (small, x) = (x.abs() <= 0.0, f64::from(x));
            let inside = if x < 0.0 { from < x && x <= to } else { from <= x && x < to };
            assert!(inside, "{x} is not from {from} to {to}");
            assert!(small || (to - from) / x.abs() <= 1.0 / 16.0);
        }
        // Too small, too large and endless numbers lie in the outermost bins.
        assert_eq!([1e-30f32, 1e30, f32::INFINITY].map(Spread::bin), [HALF, 2 * HALF - 1, 2 * HALF - 1]);
        assert_eq!([-1e-30f32, f32::NEG_INFINITY].map(Spread::bin), [HALF - 1, 0]);
    }

    #[test]
    fn halves_add_up_to_the_whole_bit_for_bit() {
        let numbers: Vec<f32> = normal(4000, 3).iter().map(|x| (x * 64.0).round() / 64.0).collect();
        let (one, other) = numbers.split_at(1700);
        assert_eq!(spread(one).with(&spread(other)), spread(&numbers));
        assert_eq!(spread(&[1.0, f32::NAN, 3.0]), spread(&[1.0, 3.0]));
        assert_eq!(Spread::new(f64::INFINITY, f64::NEG_INFINITY, &sums(&[])), None);
        assert_eq!(Spread::new(0.0, 1.0, &[1.0]), None);
    }

    #[test]
    fn a_percentile_is_right_within_a_bin() {
        let mut numbers = normal(20_000, 5);
        let found = spread(&numbers);
        numbers.sort_by(f32::total_cmp);
        let (low, high) = found.percentile(0.99);
        let (exact_low, exact_high) = (f64::from(numbers[100]), f64::from(numbers[numbers.len() - 101]));
        assert!((low / exact_low - 1.0).abs() <= 0.063 && (high / exact_high - 1.0).abs() <= 0.063);
        assert_eq!(found.percentile(1.0), found.whole());
        // On one side where the other ends at zero.
        let positive: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
        let mut sorted = positive.clone();
        sorted.sort_by(f32::total_cmp);
        let (low, high) = spread(&positive).percentile(0.99);
        assert_eq!(low, 0.0);
        assert!((high / f64::from(sorted[sorted.len() - 201]) - 1.0).abs() <= 0.063);
        assert_eq!(spread(&[0.0, 0.0]).percentile(0.9), (0.0, 0.0));
    }

    #[test]
    fn what_is_cut_off_is_counted_exactly_at_edges_of_bins() {
        let numbers = normal(10_000, 7);
        let found = spread(&numbers);
        for (low, high) in [(-1.5, 2.0), (-0.25, 0.5), (0.0, 1.0625)] {
            let step = (high - low) / 255.0;
            let lost = |&x: &f32| {
                let x = f64::from(x);
                if x < low {
                    (x - low).powi(2)
                } else if x > high {
                    (x - high).powi(2)
                } else {
                    step * step / 12.0
                }
            };
            let exact = numbers.iter().map(lost).sum::<f64>() / numbers.len() as f64;
            let told = found.error((low, high), 255.0);
            // Numbers below a step, which are few, are told by their bins.
            assert!((told / exact - 1.0).abs() <= 2e-3, "{low} {high}: {told} {exact}");
        }
        let cut = |x: &f32| (f64::from(*x).abs() - 0.5).max(0.0).powi(2);
        let exact = numbers.iter().map(cut).sum::<f64>() / numbers.len() as f64;
        assert!((found.error((-0.5, 0.5), 1e9) / exact - 1.0).abs() <= 1e-6);
    }

    /// The tail of a Gaussian that is cut at `c` standard deviations, on both sides, and the rounding inside.
    fn gaussian_error(c: f64, steps: f64) -> f64 {
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let width = 1e-4;
        let tail = (0..100_000).map(|i| c + (i as f64 + 0.5) * width).map(|x| (x - c).powi(2) * density(x) * width);
        2.0 * tail.sum::<f64>() + (2.0 * c / steps).powi(2) / 12.0
    }

    #[test]
    fn a_gaussian_is_cut_where_it_loses_least() {
        let found = spread(&normal(400_000, 11));
        for steps in [255.0, 15.0] {
            let candidates = (100..600).map(|i| f64::from(i) / 100.0);
            let least = candidates.min_by(|a, b| gaussian_error(*a, steps).total_cmp(&gaussian_error(*b, steps)));
            let best = least.unwrap();
            assert!((best - if steps > 100.0 { 3.92 } else { 2.55 }).abs() < 0.03, "{best}");
            let (low, high) = found.least_error(steps, true);
            assert!(low == -high && (high / best - 1.0).abs() < 0.08, "{steps}: {high}, not {best}");
            let (told, exact) = (found.error((low, high), steps), gaussian_error(high, steps));
            assert!((told / exact - 1.0).abs() < 0.1, "{told} {exact}");
        }
    }

    #[test]
    fn outliers_are_left_out_and_a_plain_range_stays() {
        let mut numbers = normal(100_000, 13);
        numbers.push(3000.0);
        let found = spread(&numbers);
        assert!(found.least_error(255.0, false).1 > 2000.0, "one outlier of that size is most of the energy");
        assert!(found.percentile(0.9999).1 < 6.0);
        let mut random = Random::new(17);
        let even: Vec<f32> = (0..50_000).map(|_| random.uniform() as f32).collect();
        let found = spread(&even);
        let (low, high) = found.least_error(255.0, false);
        assert!(low == 0.0 && high > 0.99, "{high}");
        let step = high / 255.0;
        assert!((found.error((low, high), 255.0) / (step * step / 12.0) - 1.0).abs() < 0.02);
        let (low, high) = found.least_divergence();
        assert!(low == 0.0 && high > 0.9, "{high}");
        assert_eq!(spread(&[0.0; 9]).least_divergence(), (0.0, 0.0));
        assert_eq!(spread(&[0.0; 9]).least_error(255.0, false), (0.0, 0.0));
    }

    #[test]
    fn a_long_tail_is_cut_by_divergence() {
        let numbers: Vec<f32> = normal(200_000, 19).iter().map(|x| x * x * x * x).collect();
        let found = spread(&numbers);
        let (low, high) = found.least_divergence();
        assert!(low == 0.0 && high < found.largest, "{high} of {}", found.largest);
    }
}
