//! Results that are not slower than the original, where latency is not limited: among plans that lose as little the
//! fastest, and a slower one only where no other keeps to the budgets.

use super::{
    Request,
    bench::{Bench, Exact, Fitted},
    calibrate::Calibrated,
    fit_budget::{Goal, Timed},
    in_order,
    price::price,
    propose::{Proposed, propose},
    setup::Setup,
};
use crate::Failure;
use lathe_passes::Quantity;
use lathe_runtime::Timings;
use std::rc::Rc;

/// How many times as long as the original a result takes at least to be called slower, and by how many milliseconds.
const SLOWER: f64 = 1.1;
const SLOWER_MS: f64 = 0.2;

/// Shares of the latency that are looked at, from the fastest on.
const SHARES: [f64; 7] = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// What a budget run has come to.
pub(super) struct Settled<'r, 'a> {
    pub setup: &'r Setup<'a>,
    pub calibrated: &'r Rc<Calibrated<'a>>,
    pub goal: &'r Goal,
    pub request: &'r Request<'r>,
    /// What methods that only round have proposed for what is limited.
    pub rounded: Proposed,
}

impl Settled<'_, '_> {
    /// The result, or one in its place that is faster than it if it is slower than the original.
    pub fn not_slower(
        &self,
        bench: &Bench<'_>,
        exact: &Exact<'_>,
        fitted: Fitted,
        warnings: &mut Vec<String>,
    ) -> Result<Fitted, Failure> {
        let is_limited = self.goal.shares.iter().any(|&(quantity, _)| quantity == Quantity::Latency);
        // What is not run is not timed either, and half precision is for another device unless time is limited on this one.
        let elsewhere = bench.finish.is_some();
        if elsewhere || is_limited || self.request.budget.allow_slower || !bench.verify || !self.goal.may_stop_early() {
            return Ok(fitted);
        }
        let bench = &bench.at_one_sample(exact.model);
        let timings = bench.time(fitted.staged.path())?;
        let Some(slower) = slower(&timings) else { return Ok(fitted) };
        let _span = bench.run.progress.span("look for a faster plan");
        let original = timings.quartiles(0)[0];
        let Some(mut faster) = self.faster(bench, exact, &fitted)? else {
            warnings.push(format!(
                "the result takes {slower:.2} times as long as the original, and no faster plan was found that keeps to \
                 the budget; --allow-slower leaves the search out"
            ));
            return Ok(Fitted { latency: Some(bench.latency(fitted.staged.path(), &timings)?), ..fitted });
        };
        let after = faster.latency.as_ref().and_then(|latency| latency.ratio).unwrap_or(f64::NAN);
        warnings.push(format!(
            "the plan of the least loss takes {slower:.2} times as long as the original ({original:.2} ms), and one that \
             takes {after:.2} times as long is written, which is predicted to lose {:.2e} instead of {:.2e}; \
             --allow-slower takes the other",
            faster.plan.objective, fitted.plan.objective
        ));
        faster.plan.alternatives = fitted.plan.alternatives;
        // Nobody asked for a share of the latency.
        faster.plan.budget.remove(Quantity::Latency.key());
        Ok(faster)
    }

    /// The fastest plan that loses about as little as `fitted`, or else the least lossy one that is not slower than the
    /// original; `None` where there is none.
    fn faster(&self, bench: &Bench<'_>, exact: &Exact<'_>, fitted: &Fitted) -> Result<Option<Fitted>, Failure> {
        let mut shares = self.goal.shares.clone();
        shares.push((Quantity::Latency, 1.0));
        let quantities = shares.iter().map(|&(quantity, _)| quantity).collect();
        let cx = self.setup.cx.clone().with_quantities(quantities);
        let setup = Setup { cx, inputs: bench.inputs.clone(), ..self.setup.clone() };
        let (mut methods, _) = in_order(&setup);
        methods.retain(|method| !self.rounded.records.contains_key(method.info().name));
        let mut notes = Vec::new();
        let proposed = propose(&setup, exact.model, self.calibrated, &methods, self.rounded.clone())?;
        let candidates = price(&setup, exact.model, self.calibrated, proposed, &mut notes)?;
        let mut timed = Timed::new(bench, exact, candidates, &shares, self.request)?;
        let found = timed.fastest(&SHARES, fitted.plan.objective)?;
        let passes = |fitted: &Fitted| fitted.verify.as_ref().is_none_or(|verify| verify.passed);
        Ok(found.filter(|found| passes(found) || !passes(fitted)))
    }
}

/// How many times as long as the original a result takes, if it is slower beyond chance.
fn slower(timings: &Timings) -> Option<f64> {
    let [original, result] = [0, 1].map(|model| timings.quartiles(model)[0]);
    let is_slower = timings.verdict() == Some("slower") && result - original > SLOWER_MS;
    timings.ratio().filter(|&ratio| is_slower && ratio > SLOWER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_runtime::Series;

    fn timings(before: f64, after: f64) -> Timings {
        let series = |ms: f64| Series { sittings: vec![vec![ms; 5]; 3], ..Series::default() };
        let ratios = vec![vec![after / before; 5]; 3];
        Timings { models: vec![series(before), series(after)], ratios, ..Timings::default() }
    }

    #[test]
    fn slower_is_by_more_than_a_tenth_and_two_tenths_of_a_millisecond() {
        assert_eq!(slower(&timings(10.0, 24.0)), Some(2.4));
        assert_eq!(slower(&timings(10.0, 10.9)), None);
        assert_eq!(slower(&timings(10.0, 6.0)), None);
        // Three times as long, and nothing that anybody waits for.
        assert_eq!(slower(&timings(0.05, 0.15)), None);
    }
}
