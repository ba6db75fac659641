//! The values of one input, row by row.

use super::Style;
use crate::roles::Role;
use bytes::Bytes;
use lathe_analysis::Random;
use lathe_ir::DataType;

/// How the values of one input are chosen.
pub(super) struct Recipe {
    pub role: Role,
    pub style: Style,
    pub image: bool,
    pub mask: bool,
    /// Whether the first row of a mask is masked throughout.
    pub masked: bool,
    /// Where the ends of the type are among whole numbers: in which of four turns.
    pub ends: Option<usize>,
    pub row: usize,
    pub longest: Option<usize>,
    pub float: bool,
}

impl Recipe {
    /// Appends the values of one row along the last axis.
    pub fn fill_row(&self, name: &str, dtype: DataType, random: &mut Random, out: &mut Vec<f64>) {
        let has = |words: &[&str]| words.iter().any(|w| name.contains(w));
        if self.mask {
            // Padding on the right, and all of a row only where that is asked for, in the first.
            let kept = self.row - random.index(self.row.div_ceil(2));
            let kept = if self.masked && out.is_empty() { 0 } else { kept };
            out.extend((0..self.row).map(|i| f64::from(u8::from(i < kept))));
            return;
        }
        if dtype == DataType::Bool {
            out.extend((0..self.row).map(|_| random.below(2) as f64));
            return;
        }
        if has(&["position"]) && dtype.is_integer() {
            let bound = if let Role::Index { bound } = self.role { bound.max(1) } else { usize::MAX };
            out.extend((0..self.row).map(|i| (i % bound) as f64));
            return;
        }
        if dtype.is_integer() && (has(&["length", "lens"]) || name.ends_with("_len")) {
            let most = self.longest.unwrap_or(3).max(1) as i64;
            out.extend((0..self.row).map(|_| random.between(1, most) as f64));
            return;
        }
        for _ in 0..self.row {
            let turn = self.ends.map(|first| (first + out.len()) % 4);
            out.push(match turn {
                Some(0) => ends(dtype).0,
                Some(1) => ends(dtype).1,
                _ if self.float => self.float_value(dtype, random),
                _ => self.whole(name, dtype, random),
            });
        }
    }

    fn whole(&self, name: &str, dtype: DataType, random: &mut Random) -> f64 {
        let signed = matches!(dtype, DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64);
        match self.role {
            Role::Index { bound } => {
                let most = if self.style == Style::Tame { bound.min(2) } else { bound };
                let most = if name.contains("token_type") || name.contains("segment") { most.min(2) } else { most };
                random.index(most) as f64
            }
            Role::Size => random.between(1, if self.style == Style::Tame { 1 } else { 3 }) as f64,
            Role::Divisor => random.between(1, 9) as f64,
            Role::Plain if self.style == Style::Tame => random.below(2) as f64,
            Role::Plain if self.style == Style::Special && random.one_in(4) => {
                let (least, most) = ends(dtype);
                [least, most, 0.0, if signed { -1.0 } else { 1.0 }][random.index(4)]
            }
            Role::Plain if matches!(dtype, DataType::Uint8) && self.image => random.below(256) as f64,
            Role::Plain => random.between(if signed { -9 } else { 0 }, 9) as f64,
        }
    }

    fn float_value(&self, dtype: DataType, random: &mut Random) -> f64 {
        match self.role {
            Role::Index { bound } => random.index(bound) as f64,
            Role::Size | Role::Divisor => random.between(1, 3) as f64,
            Role::Plain => match self.style {
                Style::Special if random.one_in(2) => {
                    let all = special(dtype);
                    all[random.index(all.len())]
                }
                Style::Tame => 0.1 + 0.9 * random.uniform(),
                _ if self.image => random.uniform(),
                _ => random.normal(),
            },
        }
    }
}

/// Floats that rewrites lose: both zeros, infinities, NaN, the smallest and the largest numbers of the type.
fn special(dtype: DataType) -> [f64; 16] {
    let (denormal, normal, largest): (f64, f64, f64) = match dtype {
        DataType::Double => (f64::from_bits(1), f64::MIN_POSITIVE, f64::MAX),
        DataType::Float16 => {
            (half::f16::MIN_POSITIVE_SUBNORMAL.into(), half::f16::MIN_POSITIVE.into(), half::f16::MAX.into())
        }
        DataType::Bfloat16 => {
            (half::bf16::MIN_POSITIVE_SUBNORMAL.into(), half::bf16::MIN_POSITIVE.into(), half::bf16::MAX.into())
        }
        _ => (f32::from_bits(1).into(), f32::MIN_POSITIVE.into(), f32::MAX.into()),
    };
    [
        // Thrice, because so many rewrites lose it.
        -0.0,
        -0.0,
        -0.0,
        0.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        denormal,
        -3.0 * denormal,
        normal,
        -normal / 2.0,
        largest,
        -largest,
        largest / 2.0,
        1.0,
        -1.0,
    ]
}

/// The smallest and the largest whole number of a type. What lies beyond its range becomes its end: 2⁶³ is what float64 has
/// for the largest int64.
fn ends(dtype: DataType) -> (f64, f64) {
    let bits = dtype.bits() as i32;
    match dtype {
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 | DataType::Uint64 => (0.0, 2f64.powi(bits) - 1.0),
        _ => (-(2f64.powi(bits - 1)), 2f64.powi(bits - 1) - 1.0),
    }
}

/// A string.
pub(super) fn word(random: &mut Random) -> Bytes {
    const WORDS: &[&str] = &["a", "lathe", "Turning", "12", "", "two words", "naïve", "3.5"];
    Bytes::from_static(WORDS[random.index(WORDS.len())].as_bytes())
}
