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

/// A bar to `median` on a scale from 0 to `most`, and a whisker from `q1` to `q3` around its end.
pub(super) fn quartiles(q1: f64, median: f64, q3: f64, most: f64, class: &str, label: &str) -> Markup {
    let at = |x: f64| format!("{:.2}", if most > 0.0 { (x / most * 100.0).clamp(0.0, 100.0) } else { 0.0 });
    html! {
        svg.bar viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect.track x="0" y="0" width="100" height="8" opacity="0.5" {}
            rect class=(class) x="0" y="0" width=(at(median)) height="8" {}
            line x1=(at(q1)) x2=(at(q3)) y1="4" y2="4" {}
            @for end in [q1, q3] { line x1=(at(end)) x2=(at(end)) y1="-2" y2="10" {} }
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
