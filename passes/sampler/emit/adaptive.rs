//! The form that decides while it runs: Zhou et al. 2025, EasyCache, arXiv:2507.02860.
//!
//! In the coordinates of a flow, `u = x_f + D` with the last computed `D` takes the place of the network while the
//! change of `u` that is to be expected, summed over steps, stays below the threshold. The conditional pass decides.

use super::{Emitter, Iteration, State};
use crate::sampler::{Error, Pass, sums::Factor};
use lathe_ir::{DataType, ScopeId, Tensor, ValueId};

impl Emitter<'_> {
    /// The loop. Returns the sample and which steps ran the network.
    pub(super) fn adaptive(&mut self, state: State) -> Result<Vec<ValueId>, Error> {
        let rule = self.sampler.plan.adaptive.expect("the form was checked against the plan");
        let count = self.sampler.table.rows.len();
        let kept = self.sampler.table.history();
        let steps: Vec<usize> = (0..count).collect();
        let one = Factor::Number(1.0);
        let mut sums = self.sums(ScopeId::MAIN);
        let nothing = sums.scaled(state.x, Factor::Number(0.0), DataType::Float, "nothing")?;
        let zero = sums.number(0.0, "zero");
        let ones = sums.number(1.0, "one");
        let unit = sums.node("Add", &[nothing, ones], "unit");
        // The state, the flow's last state, state and flow at the last evaluation, what it added, rate, sum; estimates.
        let mut first = vec![state.x, nothing, nothing, unit, nothing, zero, zero];
        first.extend(std::iter::repeat_n(nothing, kept));
        let (scope, index, inputs) = self.body(&vec![DataType::Float; first.len()]);
        let numbers = self.numbers(&steps, Iteration { scope, index: Some(index) })?;
        let [x, previous, last_state, last_flow, added, rate, sum] = inputs[..7] else {
            unreachable!("the body has an input for every value it carries")
        };
        let mut sums = self.sums(scope);
        let flow_state = sums.scaled(x, numbers.flow_scale, DataType::Float, "flow_state")?;
        let moved = sums.node("Sub", &[flow_state, previous], "moved");
        let (moved, size) = (sums.mean_size(moved, "moved"), sums.mean_size(last_flow, "size"));
        let share = sums.node("Div", &[moved, size], "share");
        let change = sums.node("Mul", &[rate, share], "change");
        let expected = sums.node("Add", &[sum, change], "expected");
        let bounds = [rule.warmup, count.saturating_sub(rule.tail)].map(|n| n.min(count) as i64);
        let [from, until] = bounds.map(|n| sums.constant(Tensor::from_i64s(&[], &[n]), "bound"));
        let early = sums.node("Less", &[index, from], "early");
        let late = sums.node("GreaterOrEqual", &[index, until], "late");
        let threshold = sums.number(rule.threshold.min(f64::from(f32::MAX)), "threshold");
        let much = sums.node("GreaterOrEqual", &[expected, threshold], "much");
        let forced = sums.node("Or", &[early, late], "forced");
        let full = sums.node("Or", &[forced, much], "full");

        let computed = self.out.graph.add_scope("computed");
        let mut inside = State { x, history: Vec::new(), seen: Vec::new(), store: Default::default() };
        let found = self.predictions(0, &numbers, computed, &mut inside)?;
        let m = self.joined(0, &found, computed)?;
        let watched = found.get(&Pass::Cond).copied().unwrap_or(m);
        let mut sums = self.sums(computed);
        let [q, r] = numbers.flow;
        let flow = sums.sum(&[(x, q), (m, r)], DataType::Float, "flow")?;
        let watched = if watched == m { flow } else { sums.sum(&[(x, q), (watched, r)], DataType::Float, "watched")? };
        let new = sums.node("Sub", &[flow, flow_state], "added");
        let turned = sums.node("Sub", &[watched, last_flow], "turned");
        let gone = sums.node("Sub", &[flow_state, last_state], "gone");
        let (turned, gone) = (sums.mean_size(turned, "turned"), sums.mean_size(gone, "gone"));
        let least = sums.number(1e-12, "least");
        let gone = sums.node("Max", &[gone, least], "gone");
        let slope = sums.node("Div", &[turned, gone], "rate");
        let results = [flow, new, flow_state, watched, slope, zero];
        self.branch(computed, &results);

        let skipped = self.out.graph.add_scope("skipped");
        let again = self.sums(skipped).node("Add", &[flow_state, added], "flow");
        self.branch(skipped, &[again, added, last_state, last_flow, rate, expected]);

        let mut sums = self.sums(scope);
        let branches = [("then_branch", computed), ("else_branch", skipped)];
        let chosen = sums.control("If", &branches, vec![Some(full)], results.len());
        // m = (u − q·x) / r.
        let back = match r {
            Factor::Number(r) => Factor::Number(1.0 / r),
            Factor::Value(r) => Factor::Value(sums.node("Div", &[ones, r], "back")),
        };
        let own = sums.scaled(x, q, DataType::Float, "own")?;
        let rest = if q == Factor::Number(0.0) { chosen[0] } else { sums.node("Sub", &[chosen[0], own], "rest") };
        let m = sums.scaled(rest, back, DataType::Float, "prediction")?;
        let mut after = State { x, history: inputs[7..].to_vec(), seen: Vec::new(), store: Default::default() };
        self.advance(&numbers, scope, &mut after, m)?;
        let mut outputs = vec![after.x, flow_state];
        outputs.extend([2, 3, 1, 4, 5].map(|k| chosen[k]));
        outputs.extend(&after.history);
        outputs.push(full);
        let results = self.close(scope, count, &first, &outputs, 1);
        let sample = self.sums(ScopeId::MAIN).scaled(results[0], one, DataType::Float, "state")?;
        Ok(vec![sample, results[results.len() - 1]])
    }

    /// Gives a branch its outputs, each made inside it.
    fn branch(&mut self, scope: ScopeId, results: &[ValueId]) {
        for &value in results {
            let value = self.sums(scope).node("Identity", &[value], "result");
            self.out.graph.add_output(scope, value);
        }
    }
}
