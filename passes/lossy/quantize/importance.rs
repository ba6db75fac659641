//! How much a change of a stored number moves what reads it.

use super::super::{MethodContext, Tap, Weight, integers::Layout};
use crate::Error;
use lathe_analysis::Calibrate;

/// How much a change of a stored number moves a tap's output: mean squares of what it is multiplied with.
pub(super) struct Importance {
    /// Of every input, `[k]`.
    pub inputs: Vec<f64>,
    /// Mean square norm of a row of the output.
    pub output: f64,
}

/// `None` if the tap was not seen on the calibration set.
fn importance(tap: &Tap, weight: &Weight, calibration: Option<&dyn Calibrate>) -> Result<Option<Importance>, Error> {
    let Some(calibration) = calibration else { return Ok(None) };
    let Some(output) = calibration.moments(&tap.output_rows)? else { return Ok(None) };
    let output: f64 = output.square.iter().sum();
    let inputs = match &tap.rows {
        Some(rows) => match calibration.moments(rows)? {
            Some(moments) => moments.square,
            None => return Ok(None),
        },
        // Rows are picked: each is as likely as any other.
        None => vec![1.0 / weight.dims[0] as f64; weight.dims[1]],
    };
    let fits = inputs.len() == weight.inputs() && output.is_finite() && inputs.iter().all(|x| x.is_finite());
    Ok((fits && output > 0.0).then_some(Importance { inputs, output }))
}

/// What was seen of every tap, or why the weight is passed over.
pub(super) fn importances(weight: &Weight, cx: &MethodContext) -> Result<Result<Vec<Importance>, &'static str>, Error> {
    let axis = Layout::of(weight).axis;
    if weight.taps.iter().any(|tap| tap.inputs_axis != axis) {
        return Ok(Err("its uses sum over different axes"));
    }
    let mut found = Vec::new();
    for tap in &weight.taps {
        match importance(tap, weight, cx.calibration)? {
            Some(importance) => found.push(importance),
            None => return Ok(Err("nothing was seen of it on the calibration set")),
        }
    }
    Ok(Ok(found))
}

/// One importance for all taps: each counts by its share of its own output.
pub(super) fn joint(importances: &[Importance], layout: Layout) -> Vec<f64> {
    let mut joint = vec![0.0; layout.length];
    for tap in importances {
        for (sum, x) in joint.iter_mut().zip(&tap.inputs) {
            *sum += x / tap.output;
        }
    }
    // Inputs that were never active still keep their weights near what they were.
    let floor = joint.iter().copied().fold(0.0, f64::max) * 1e-6;
    joint.iter_mut().for_each(|x| *x += floor);
    joint
}
