//! What the tests of samplers share.

use super::{Request, Schedule, Scheduler, Table};
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The schedule of Stable Diffusion.
pub(crate) static SD: LazyLock<Value> =
    LazyLock::new(|| json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}));

/// The same with some settings.
pub(crate) fn sd(more: Value) -> Value {
    let mut all = SD.clone();
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

/// The scheduler of a class with some settings.
pub(crate) fn scheduler(class: &str, settings: Value) -> Scheduler {
    let mut json = json!({ "_class_name": class });
    json.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    Scheduler::parse(&json, None).unwrap().0
}

/// Its training schedule.
pub(crate) fn schedule(class: &str, settings: Value) -> Schedule {
    Schedule::new(&scheduler(class, settings))
}

/// Its table for this many steps.
pub(crate) fn table(class: &str, settings: Value, steps: usize) -> Table {
    Table::new(&scheduler(class, settings), &Request::steps(steps)).unwrap()
}

/// Checks numbers against golden values of six digits.
pub(crate) fn assert_six(found: &[f64], golden: &[f64]) {
    assert_eq!(found.len(), golden.len());
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= (5e-6 * b.abs()).max(6e-7);
    assert!(found.iter().zip(golden).all(near), "{found:?} is not {golden:?}");
}

/// Checks rows against golden values, which have seven digits after the point: to 1e-6 relative, or half of the last digit.
pub(crate) fn assert_rows<A: AsRef<[f64]>, B: AsRef<[f64]>>(found: &[A], golden: &[B]) {
    assert_eq!(found.len(), golden.len());
    for (found, golden) in found.iter().zip(golden) {
        let (found, golden) = (found.as_ref(), golden.as_ref());
        assert_eq!(found.len(), golden.len());
        for (a, b) in found.iter().zip(golden) {
            assert!((a - b).abs() <= (1e-6 * b.abs()).max(6e-8), "{found:?} is not {golden:?}");
        }
    }
}
