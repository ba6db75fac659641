//! Which numbers codes stand for: ranges of activations, and scales of weights and biases.

use crate::lossy::Recipe;
use lathe_analysis::Spread;
use lathe_ir::{DataType, Tensor};
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Bits of what layers read and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) enum Width {
    #[default]
    Eight,
    Sixteen,
}

impl FromStr for Width {
    type Err = ();

    fn from_str(text: &str) -> Result<Width, ()> {
        match text {
            "8" => Ok(Width::Eight),
            "16" => Ok(Width::Sixteen),
            _ => Err(()),
        }
    }
}

impl Width {
    /// Steps between the least and the largest code.
    pub fn steps(self) -> f64 {
        match self {
            Width::Eight => f64::from(u8::MAX),
            Width::Sixteen => f64::from(u16::MAX),
        }
    }
}

/// The share of numbers that a range of percentiles holds.
const SHARE: f64 = 0.9999;

/// How far above the least step a bias of 32 bits stays, so that no rounding takes it beyond.
const MARGIN: f64 = 1.0001;

/// How ranges are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ranges {
    /// The whole ranges or those of least error, whichever loses less in the model.
    Auto,
    MinMax,
    Percentile,
    Mse,
    Entropy,
}

impl FromStr for Ranges {
    type Err = ();

    fn from_str(text: &str) -> Result<Ranges, ()> {
        Ok(match text {
            "auto" => Ranges::Auto,
            "minmax" => Ranges::MinMax,
            "percentile" => Ranges::Percentile,
            "mse" => Ranges::Mse,
            "entropy" => Ranges::Entropy,
            _ => return Err(()),
        })
    }
}

impl Ranges {
    /// What is tried to find the best.
    pub fn tried(self) -> Vec<Ranges> {
        if self == Ranges::Auto { vec![Ranges::MinMax, Ranges::Mse] } else { vec![self] }
    }

    /// The range of a value with codes of so many bits.
    pub fn of(self, spread: &Spread, width: Width) -> (f64, f64) {
        match self {
            Ranges::MinMax => spread.whole(),
            Ranges::Percentile => spread.percentile(SHARE),
            Ranges::Auto | Ranges::Mse => spread.least_error(width.steps(), false),
            Ranges::Entropy => spread.least_divergence(),
        }
    }
}

/// The processors that a result has to be right on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cpus {
    /// All: some add products of bytes in pairs of 16 bits.
    Any,
    /// Those that add them in 32 bits.
    Vnni,
}

impl FromStr for Cpus {
    type Err = ();

    fn from_str(text: &str) -> Result<Cpus, ()> {
        match text {
            "any" => Ok(Cpus::Any),
            "vnni" => Ok(Cpus::Vnni),
            _ => Err(()),
        }
    }
}

impl Cpus {
    /// The largest code of a weight: two products with a byte each must fit 16 bits, if that is how they are added.
    pub fn largest_code(self) -> u8 {
        match self {
            Cpus::Any => 64,
            Cpus::Vnni => 127,
        }
    }
}

/// What the codes of a value stand for: `scale · (code − zero)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Params {
    pub scale: f32,
    pub zero: u16,
    /// Whether codes have a sign; zero is then in the middle.
    pub signed: bool,
    pub width: Width,
}

/// The least range that Qualcomm's HTP takes.
const LEAST_RANGE: f64 = 1e-4;

impl Params {
    /// Of a range, extended so that it holds zero, which then has a code of its own. A range without extent, or one so small
    /// that steps have no normal number, is that from zero to one: what reads zeros alone still adds a bias in these steps.
    pub fn of((low, high): (f64, f64), width: Width) -> Params {
        let (low, high, steps) = (low.min(0.0), high.max(0.0), width.steps());
        let scale = ((high - low) / steps) as f32;
        if !scale.is_normal() {
            return Params { scale: (1.0 / steps) as f32, zero: 0, signed: false, width };
        }
        let zero = (-low / f64::from(scale)).round_ties_even().clamp(0.0, steps) as u16;
        Params { scale, zero, signed: false, width }
    }

    /// Of a range, as a recipe wants it.
    pub fn by(recipe: Recipe, width: Width, (low, high): (f64, f64)) -> Params {
        match recipe {
            Recipe::TensorRt => {
                let scale = (high.max(-low) / f64::from(i8::MAX)) as f32;
                let scale = if scale.is_normal() { scale } else { 1.0 / 127.0 };
                Params { scale, zero: 0, signed: true, width: Width::Eight }
            }
            Recipe::Qnn if high.max(0.0) - low.min(0.0) < LEAST_RANGE => Params::of((0.0, LEAST_RANGE), width),
            _ => Params::of((low, high), width),
        }
    }

    /// What Qualcomm's HTP wants of an operator's output in 16 bits, whatever was seen.
    pub fn fixed(op: &str) -> Option<Params> {
        let (bits, zero) = match op {
            "Sigmoid" => (16, 0),
            "Tanh" => (15, 1 << 15),
            _ => return None,
        };
        Some(Params { scale: 0.5f32.powi(bits), zero, signed: false, width: Width::Sixteen })
    }

    /// With the scale rounded down until no code stands for more than `most`, so that the cut at it does nothing.
    #[must_use]
    pub fn at_most(mut self, most: f32) -> Params {
        let codes = self.width.steps() as f32 - f32::from(self.zero);
        let top = most / codes;
        if !self.signed && codes > 0.0 && self.scale * codes > most && top.is_normal() {
            self.scale = top;
            while self.scale * codes > most {
                self.scale = self.scale.next_down();
            }
        }
        self
    }

    /// The range of numbers that codes stand for.
    pub fn range(self) -> (f64, f64) {
        let number = |code: f64| f64::from(self.scale) * (code - f64::from(self.zero));
        let ends = if self.signed { (-127.0, 127.0) } else { (0.0, self.width.steps()) };
        (number(ends.0), number(ends.1))
    }

    /// The mean square error of numbers that are so spread.
    pub fn error(self, spread: &Spread) -> f64 {
        // Codes with a sign have a step less.
        spread.error(self.range(), if self.signed { 254.0 } else { self.width.steps() })
    }

    /// The code of a number without sign.
    fn code(self, x: f32) -> u16 {
        (f64::from(x / self.scale).round_ties_even() + f64::from(self.zero)).clamp(0.0, self.width.steps()) as u16
    }

    /// The element type of codes.
    pub fn dtype(self) -> DataType {
        match (self.width, self.signed) {
            (Width::Eight, true) => DataType::Int8,
            (Width::Eight, false) => DataType::Uint8,
            (Width::Sixteen, _) => DataType::Uint16,
        }
    }

    /// The codes of numbers without sign, of a shape.
    pub fn codes(self, dims: &[usize], numbers: &[f32]) -> Tensor {
        self.stored(dims, numbers.iter().map(|&x| self.code(x)))
    }

    /// The zero point.
    pub fn zero_point(self) -> Tensor {
        self.stored(&[], std::iter::once(self.zero))
    }

    fn stored(self, dims: &[usize], codes: impl Iterator<Item = u16>) -> Tensor {
        let bytes: Vec<u8> = match self.width {
            Width::Eight => codes.map(|code| code as u8).collect(),
            Width::Sixteen => codes.flat_map(u16::to_le_bytes).collect(),
        };
        Tensor::new(self.dtype(), dims.to_vec(), bytes).expect("there is a code for every number")
    }
}

/// A weight in codes with one scale per output.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Codes {
    pub codes: Vec<i8>,
    pub scales: Vec<f32>,
}

impl Codes {
    /// Of numbers, each of which belongs to the output that `output` tells, with codes up to `largest`. No scale is below the
    /// least that is given for its output. `None` where a number is not finite.
    pub fn of(numbers: &[f32], output: impl Fn(usize) -> usize, largest: u8, least: &[f32]) -> Option<Codes> {
        if numbers.iter().any(|w| !w.is_finite()) {
            return None;
        }
        let mut scales = vec![0.0f32; least.len()];
        for (at, w) in numbers.iter().enumerate() {
            let scale = &mut scales[output(at)];
            *scale = scale.max(w.abs());
        }
        for (scale, &least) in scales.iter_mut().zip(least) {
            *scale = (*scale / f32::from(largest)).max(least);
            if !scale.is_normal() {
                *scale = 1.0;
            }
        }
        let most = f32::from(largest);
        let code = |(at, w): (usize, &f32)| (w / scales[output(at)]).round_ties_even().clamp(-most, most) as i8;
        Some(Codes { codes: numbers.iter().enumerate().map(code).collect(), scales })
    }

    /// The number that a code stands for.
    pub fn restored(&self, at: usize, output: usize) -> f32 {
        f32::from(self.codes[at]) * self.scales[output]
    }
}

/// The least scale of the weight of an output with which its bias, in steps of both scales, fits 32 bits.
pub(super) fn least_scale(bias: f32, input: f32) -> f32 {
    let step = MARGIN * 2.0 * f64::from(bias.abs()) / (f64::from(u32::MAX) - 1.0);
    // Steps of the sums have to be normal numbers too.
    let least = (step / f64::from(input)).max(f64::from(f32::MIN_POSITIVE) * 2.0 / f64::from(input).min(1.0));
    if bias == 0.0 { 0.0 } else { least as f32 }
}

/// A bias in steps of the scales of input and weight, and these steps.
pub(super) fn bias_codes(bias: &[f32], input: f32, weights: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let steps: Vec<f32> = weights.iter().map(|weight| input * weight).collect();
    let code = |(b, step): (&f32, &f32)| (f64::from(*b) / f64::from(*step)).round_ties_even() as i32;
    (bias.iter().zip(&steps).map(code).collect(), steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eight(range: (f64, f64)) -> Params {
        Params::of(range, Width::Eight)
    }

    fn restored(params: Params, x: f32) -> f32 {
        params.scale * (f32::from(params.code(x)) - f32::from(params.zero))
    }

    #[test]
    fn codes_hold_zero_and_the_range_is_rounded_in_even_steps() {
        let params = eight((-1.0, 3.0));
        assert_eq!(params, Params { scale: 4.0 / 255.0, zero: 64, signed: false, width: Width::Eight });
        assert_eq!(restored(params, 0.0), 0.0);
        let mut square = 0.0;
        let count = 100_000;
        for i in 0..count {
            let x = -0.99 + 3.9 * (i as f32 + 0.5) / count as f32;
            square += f64::from(restored(params, x) - x).powi(2) / f64::from(count);
        }
        let expected = f64::from(params.scale).powi(2) / 12.0;
        assert!((square / expected - 1.0).abs() < 0.02, "{square} {expected}");
        // What lies on one side of zero has all codes there.
        assert_eq!(eight((2.0, 5.1)), Params { scale: 5.1 / 255.0, zero: 0, signed: false, width: Width::Eight });
        assert_eq!(eight((-5.1, -2.0)), Params { scale: 5.1 / 255.0, zero: 255, signed: false, width: Width::Eight });
        for nothing in [(0.0, 0.0), (0.0, 1e-40), (-1e-44, 1e-44)] {
            assert_eq!(eight(nothing), eight((0.0, 1.0)));
        }
    }

    #[test]
    fn recipes_have_ranges_of_their_own() {
        let params = Params::by(Recipe::TensorRt, Width::Eight, (-1.0, 2.54));
        assert_eq!(params, Params { scale: 0.02, zero: 0, signed: true, width: Width::Eight });
        assert_eq!(Params::by(Recipe::TensorRt, Width::Eight, (0.0, 0.0)).scale, 1.0 / 127.0);
        assert!((params.range().0 + 2.54).abs() < 1e-6);
        assert_eq!(Params::by(Recipe::Qnn, Width::Eight, (0.0, 1e-6)), eight((0.0, 1e-4)));
        assert_eq!(Params::by(Recipe::OpenVino, Width::Eight, (-1.0, 3.0)), eight((-1.0, 3.0)));
    }

    #[test]
    fn codes_of_sixteen_bits_are_finer_and_some_are_fixed() {
        let params = Params::of((-1.0, 3.0), Width::Sixteen);
        assert_eq!((params.zero, params.dtype()), (16384, DataType::Uint16));
        assert!((params.scale - 4.0 / 65535.0).abs() < 1e-9);
        assert!((restored(params, 1.2345) - 1.2345).abs() <= params.scale / 2.0 * 1.001);
        assert_eq!(params.zero_point().bytes(), 16384u16.to_le_bytes());
        assert_eq!(params.codes(&[2], &[-1.0, 3.0]).bytes(), [0, 0, 255, 255]);
        let (sigmoid, tanh) = (Params::fixed("Sigmoid").unwrap(), Params::fixed("Tanh").unwrap());
        assert_eq!((sigmoid.scale, sigmoid.zero), (1.0 / 65536.0, 0));
        assert_eq!((tanh.scale, tanh.zero), (1.0 / 32768.0, 32768));
        assert_eq!(Params::fixed("Relu"), None);
    }

    #[test]
    fn no_code_stands_for_more_than_a_clip_lets_through() {
        for most in [6.0f32, 1.0, 0.3, 20.0, 6.1] {
            let params = eight((0.0, f64::from(most))).at_most(most);
            assert!(params.scale * 255.0 <= most && params.scale * 255.0 > most * 0.999_999);
        }
        assert!(eight((0.0, 6.1)).scale * 255.0 > 6.0);
        assert_eq!(eight((0.0, 5.0)).at_most(6.0), eight((0.0, 5.0)));
    }

    #[test]
    fn a_dead_channel_keeps_its_bias() {
        let input = 0.02f32;
        let (weight, bias) = ([1e-12f32, 0.5, 0.0, 0.0, 0.25], [3.0f32, -1.0, 7.5, 0.0, 0.0]);
        let least: Vec<f32> = bias.iter().map(|&b| least_scale(b, input)).collect();
        let codes = Codes::of(&weight, |at| at, 64, &least).unwrap();
        let (found, steps) = bias_codes(&bias, input, &codes.scales);
        for (at, &b) in bias.iter().enumerate() {
            let restored = found[at] as f32 * steps[at];
            assert!((restored - b).abs() <= 1e-3 * b.abs().max(1e-3), "{at}: {restored}, not {b}");
            assert!(steps[at].is_normal() && codes.scales[at].is_normal());
        }
        assert_eq!((codes.codes[1], codes.codes[4], codes.scales[3]), (64, 64, 1.0));
        // Without the guard it saturates.
        let (saturated, steps) = bias_codes(&[3.0], input, &[1e-12 / 64.0]);
        assert!(saturated[0] == i32::MAX && (saturated[0] as f32 * steps[0]) < 1e-3);
    }

    #[test]
    fn weights_that_are_not_finite_have_no_codes() {
        assert!(Codes::of(&[1.0, f32::NAN], |_| 0, 64, &[0.0]).is_none());
        let codes = Codes::of(&[0.0, 0.0], |at| at, 127, &[0.0, 0.0]).unwrap();
        assert_eq!((codes.codes, codes.scales), (vec![0, 0], vec![1.0, 1.0]));
    }
}
