//! Inline SVG: bars that stretch with the page. Numbers and names stand beside them as text.

use maud::{Markup, html};

/// A bar that fills `share` (0 to 1) of its track. `class` is its colour: `before`, `after` or `bad`.
pub(super) fn bar(share: f64, class: &str, label: &str) -> Markup {
    html! {
        svg.bar viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect.track x="0" y="0" width="100" height="8" opacity="0.5" {}
            rect class=(class) x="0" y="0" width=(width(share)) height="8" {}
        }
    }
}

/// What is visible: nothing for zero, at least a sliver for anything else.
fn width(share: f64) -> String {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 1.0 };
    let width = if share > 0.0 { (share * 100.0).max(0.6) } else { 0.0 };
    format!("{width:.2}")
}

/// Where an error lies between 1e-9 and 1 (`0` to `1`) on a logarithmic scale.
pub(super) fn decades(error: f64) -> f64 {
    if error > 0.0 { ((error.log10() + 9.0) / 9.0).clamp(0.0, 1.0) } else { 0.0 }
}

/// The middle half of runs as a box from `q1` to `q3`, and their median as a line in it, on a scale from 0 to `most`.
pub(super) fn quartiles(q1: f64, median: f64, q3: f64, most: f64, class: &str, label: &str) -> Markup {
    let at = |x: f64| if most > 0.0 { (x / most * 100.0).clamp(0.0, 100.0) } else { 0.0 };
    let (left, right, middle) = (at(q1), at(q3), at(median));
    html! {
        svg.bar viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=(label) {
            line x1="0" x2="100" y1="4" y2="4" opacity="0.4" {}
            rect class=(class) x=(format!("{left:.2}")) y="0" width=(format!("{:.2}", (right - left).max(0.6))) height="8" {}
            line.middle x1=(format!("{middle:.2}")) x2=(format!("{middle:.2}")) y1="0" y2="8" {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_stay_on_the_track() {
        assert_eq!([width(0.0), width(1e-9), width(0.5), width(7.0)], ["0.00", "0.60", "50.00", "100.00"]);
        assert_eq!([width(f64::NAN), width(f64::INFINITY), width(-1.0)], ["100.00", "100.00", "0.00"]);
    }

    #[test]
    fn errors_are_on_a_logarithmic_scale() {
        assert_eq!([decades(0.0), decades(1e-12), decades(1.0), decades(f64::INFINITY)], [0.0, 0.0, 1.0, 1.0]);
        assert!((decades(1e-3) - 6.0 / 9.0).abs() < 1e-12);
    }
}
