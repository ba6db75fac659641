//! Whether a candidate keeps to a loss it is allowed, on a set: what `verify` asks, and every lossy pass.

use crate::{
    Failure,
    report::{OutputLine, OutputScores, Verify},
    runner::Runner,
};
use anyhow::anyhow;
use lathe_runtime::{Measured, Scores, SetSpec, Verdict, metrics};
use std::path::Path;

/// What a candidate is held to.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    /// What both models are run on.
    pub set: SetSpec,
    /// What the report calls it: `calibration` or `validation`.
    pub set_name: &'static str,
    /// One of [`lathe_runtime::metrics`] or `auto`.
    pub metric: String,
    /// The largest drop of the metric that is allowed; `None` only measures.
    pub max_drop: Option<f64>,
}

/// Runs both files on the set and holds the drop of the metric against the bound.
///
/// A bound that is exceeded is a result that has not passed; a model that does not run is a failure.
pub(crate) fn validate(runner: &Runner, reference: &Path, candidate: &Path, bound: &Bound) -> Result<Verify, Failure> {
    match runner.measure(reference, candidate, &bound.set, &bound.metric)? {
        Ok(measured) => Ok(verify(measured, bound)),
        Err(verdict @ Verdict::ReferenceRefused { .. }) => Err(Failure::Error(anyhow!("{}", verdict.describe()))),
        Err(verdict) => Err(Failure::Refused(verdict.describe())),
    }
}

/// The measurement in the report's terms.
fn verify(measured: Measured, bound: &Bound) -> Verify {
    let limit = bound.max_drop.unwrap_or(f64::INFINITY);
    // A drop that is no number does not pass.
    let passed = measured.failures.is_empty() && measured.drop <= limit;
    let notes: Vec<String> = measured.failures.into_iter().chain(measured.notes).collect();
    Verify {
        set: bound.set_name.to_owned(),
        samples: measured.samples,
        metric: measured.metric,
        why: measured.why,
        before: measured.before,
        after: measured.after,
        drop: measured.drop,
        limit,
        worst: None,
        passed,
        detail: measured.detail,
        runtime: measured.engine,
        sizes: Vec::new(),
        left_out: Vec::new(),
        note: (!notes.is_empty()).then(|| notes.join("; ")),
        outputs: measured.outputs.iter().map(line).collect(),
    }
}

fn line(output: &Scores) -> OutputLine {
    let scores = metrics().filter_map(|metric| Some((metric.name, output.scores.get(metric.name)?.after)));
    OutputLine {
        name: output.name.clone(),
        scores: OutputScores::new(scores),
        limit: None,
        excuse: None,
        uncompared: None,
    }
}

/// One sentence: `accuracy 0.918 before, 0.9177 after: a drop of 0.0003 where 0.01 is allowed`.
pub(crate) fn describe(verify: &Verify) -> String {
    let (metric, before, after) = (&verify.metric, significant(verify.before), significant(verify.after));
    let limit = match verify.limit.is_finite() {
        true => format!(" where {} is allowed", significant(verify.limit)),
        false => String::new(),
    };
    let samples = format!("on {} {} samples", verify.samples, verify.set);
    // What cannot be measured at all has a reason.
    let reason = verify.note.as_ref().filter(|_| !verify.after.is_finite());
    let reason = reason.map_or(String::new(), |note| format!("; {note}"));
    format!("{metric} {before} before, {after} after {samples}: a drop of {}{limit}{reason}", significant(verify.drop))
}

/// Six significant digits without trailing zeros; powers of ten only for the very small.
pub(crate) fn significant(x: f64) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if !x.is_finite() || x.abs() < 1e-4 || x.abs() >= 1e15 {
        return format!("{x:.2e}");
    }
    let decimals = (5 - x.abs().log10().floor() as i64).clamp(0, 12) as usize;
    let text = format!("{x:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(drop: f64, failures: &[&str]) -> Measured {
        Measured {
            metric: "accuracy".to_owned(),
            why: Some("labels are given".to_owned()),
            samples: 10_000,
            before: 0.9178,
            after: 0.9178 - drop,
            drop,
            detail: None,
            outputs: vec![Scores { name: "logits".to_owned(), scores: Default::default() }],
            failures: failures.iter().map(|&f| f.to_owned()).collect(),
            notes: Vec::new(),
            engine: "an engine".to_owned(),
        }
    }

    fn bound(max_drop: Option<f64>) -> Bound {
        Bound { set: SetSpec::default(), set_name: "validation", metric: "auto".to_owned(), max_drop }
    }

    #[test]
    fn a_bound_is_kept_or_not() {
        assert!(verify(measured(0.01, &[]), &bound(Some(0.01))).passed);
        assert!(verify(measured(0.5, &[]), &bound(None)).passed);
        assert!(!verify(measured(0.0101, &[]), &bound(Some(0.01))).passed);
        assert!(!verify(measured(f64::NAN, &[]), &bound(None)).passed);
        let broken = verify(measured(0.0, &["output `y` has NaN"]), &bound(Some(0.01)));
        assert_eq!((broken.passed, broken.note.as_deref()), (false, Some("output `y` has NaN")));
    }

    #[test]
    fn says_what_was_measured() {
        let found = verify(measured(0.0003, &[]), &bound(Some(0.01)));
        let expected =
            "accuracy 0.9178 before, 0.9175 after on 10000 validation samples: a drop of 0.0003 where 0.01 is allowed";
        assert_eq!(describe(&found), expected);
        assert_eq!(
            [27.951_234_5, 1e-7, 123_456_789.0, -0.5].map(significant),
            ["27.9512", "1.00e-7", "123456789", "-0.5"]
        );
    }

    #[test]
    fn infinity_survives_json() {
        let found = verify(Measured { before: f64::INFINITY, ..measured(0.0, &[]) }, &bound(None));
        let text = serde_json::to_string(&found).unwrap();
        assert!(text.contains(r#""before":null"#) && text.contains(r#""limit":null"#));
        let again: Verify = serde_json::from_str(&text).unwrap();
        assert_eq!((again.before, again.limit), (f64::INFINITY, f64::INFINITY));
    }
}
