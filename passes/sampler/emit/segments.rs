//! The periodic form: runs of steps that do the same, relative to themselves, become one `Loop` each.

use super::{Emitter, Iteration, Lane, State, What};
use crate::sampler::{Error, Mode, Pass, Ref, Substitution, plan::Kind, sums::Factor};
use lathe_ir::{DataType, ScopeId, Tensor, Type, ValueId};

/// The longest pattern of steps that is looked for.
const LONGEST_PERIOD: usize = 8;

/// A run of steps: `count` times the first `period` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub start: usize,
    pub period: usize,
    pub count: usize,
}

impl Segment {
    fn end(self) -> usize {
        self.start + self.period * self.count
    }
}

/// Something that one iteration hands to the next: what a step of the pattern stored, some iterations ago.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Carried {
    what: What,
    lane: Lane,
    /// The step in the pattern.
    at: usize,
    /// How many iterations ago.
    back: usize,
}

/// What a substitution takes the place of, in which passes, and the terms it is replaced of.
type Replaced = (String, Option<Pass>, Vec<Term>);

/// A tensor, how many steps back, in which pass, and the bits of its weight.
type Term = (Option<String>, usize, Option<Pass>, u64);

/// What must be equal for steps to share a body.
#[derive(PartialEq)]
struct Signature {
    mode: Mode,
    replaced: Vec<Replaced>,
    /// Whether there is fresh noise, and whether that of the row before is used.
    noise: [bool; 2],
    /// How many rows ago the state lies that the row starts from.
    anchor: Option<usize>,
    /// Whether what the network gives reaches anything.
    evaluates: bool,
    stored: Vec<What>,
}

impl Emitter<'_> {
    /// All steps, those that repeat in loops.
    pub(super) fn looped(&mut self, mut state: State) -> Result<State, Error> {
        let mut step = 0;
        while step < self.sampler.table.rows.len() {
            match self.segment(step) {
                Some(segment) => {
                    self.repeat(segment, &mut state)?;
                    step = segment.end();
                }
                None => {
                    self.unrolled(step, &mut state)?;
                    step += 1;
                }
            }
        }
        Ok(state)
    }

    fn signature(&self, step: usize) -> Signature {
        let (plan, row) = (self.sampler.plan, &self.sampler.table.rows[step]);
        let replaced = |one: &Substitution| {
            let relative = |(r, weight): &(Ref, f64)| (r.of.clone(), step - r.step, r.pass, weight.to_bits());
            let name = match &one.kind {
                Kind::Delta { input, .. } => format!("{} - {input}", one.cut),
                _ => one.cut.clone(),
            };
            let terms = one.terms(step).unwrap_or_else(|| one.refs().into_iter().map(|r| (r, 1.0)).collect());
            (name, one.pass, terms.iter().map(relative).collect())
        };
        Signature {
            mode: plan.cfg[step],
            replaced: plan.at(step).iter().map(replaced).collect(),
            noise: [row.noise, row.noise_before].map(|factor| factor != 0.0),
            anchor: row.anchor.map(|anchor| anchor.back),
            evaluates: row.evaluates(),
            stored: self.stored.get(&step).into_iter().flatten().cloned().collect(),
        }
    }

    /// The run of at least two equal patterns from `start` that covers most steps; the shorter pattern of equals.
    fn segment(&self, start: usize) -> Option<Segment> {
        let total = self.sampler.table.rows.len();
        let signatures: Vec<Signature> = (start..total).map(|step| self.signature(step)).collect();
        let mut best: Option<Segment> = None;
        for period in 1..=LONGEST_PERIOD.min(signatures.len() / 2) {
            let same = (period..signatures.len()).take_while(|&k| signatures[k] == signatures[k - period]).count();
            let most = 1 + same / period;
            let fits = (2..=most)
                .rev()
                .map(|count| Segment { start, period, count })
                .find(|s| self.holds_anchors(*s) && self.carried(*s).is_some());
            if let Some(found) = fits
                && best.is_none_or(|best| found.end() > best.end())
            {
                best = Some(found);
            }
        }
        best
    }

    /// Whether the states that rows start from lie in their own iteration, or, of rows after the loop, after it too.
    fn holds_anchors(&self, segment: Segment) -> bool {
        let rows = self.sampler.table.rows.iter().enumerate().skip(segment.start);
        rows.filter_map(|(at, row)| Some((at, row.anchor?.back))).all(|(at, back)| {
            let first = if at < segment.end() { at - (at - segment.start) % segment.period } else { segment.end() };
            at >= first + back
        })
    }

    /// What iterations hand on; `None` where a step refers to what was not kept or is not there before the first.
    fn carried(&self, segment: Segment) -> Option<Vec<Carried>> {
        let Segment { start, period, count } = segment;
        let plan = self.sampler.plan;
        let mut chains: Vec<(What, usize, usize)> = Vec::new();
        let mut need = |what: What, at: usize, back: usize| match chains.iter_mut().find(|c| (&c.0, c.1) == (&what, at))
        {
            Some(chain) => chain.2 = chain.2.max(back),
            None => chains.push((what, at, back)),
        };
        for step in start..start + period {
            for one in plan.at(step) {
                for r in one.refs().iter().filter(|r| r.step < start) {
                    let back = (start - r.step).div_ceil(period);
                    need(What::of(one, r), r.step + back * period - start, back);
                }
            }
        }
        for (&step, substitutions) in plan.steps.range(segment.end()..) {
            for one in substitutions {
                for r in one.refs().iter().filter(|r| (start..segment.end()).contains(&r.step) && r.step != step) {
                    need(What::of(one, r), (r.step - start) % period, count - (r.step - start) / period);
                }
            }
        }
        let mut all = Vec::new();
        for (what, at, most) in chains {
            for back in 1..=most {
                // The first iteration finds what a step before the loop stored.
                let before = (start + at).checked_sub(back * period)?;
                if before >= start || !self.stored.get(&before).is_some_and(|s| s.contains(&what)) {
                    return None;
                }
                let lanes = self.lanes(start + at);
                all.extend(lanes.into_iter().map(|lane| Carried { what: what.clone(), lane, at, back }));
            }
        }
        Some(all)
    }

    /// One loop.
    fn repeat(&mut self, segment: Segment, state: &mut State) -> Result<(), Error> {
        let Segment { start, period, count } = segment;
        let kept = self.sampler.table.history();
        while state.history.len() < kept {
            // There is nothing before the first step; its weight is zero.
            let nothing = self.sums(ScopeId::MAIN).scaled(state.x, Factor::Number(0.0), DataType::Float, "nothing")?;
            state.history.push(nothing);
        }
        let carried = self.carried(segment).expect("a segment was chosen because it can be looped");
        let mut first = vec![state.x];
        first.extend(&state.history);
        let mut types = vec![DataType::Float; first.len()];
        for one in &carried {
            let before = start + one.at - one.back * period;
            first.push(self.fetch(&one.what, before, one.lane, ScopeId::MAIN, state)?);
            types.push(self.facts.elem(self.tensor(one.what.names()[0])?).unwrap_or(self.net.dtype));
        }
        let (scope, index, inputs) = self.body(&types);
        let (history, seen) = (inputs[1..=kept].to_vec(), Vec::new());
        let mut inside = State { x: inputs[0], history, seen, store: Default::default() };
        for (one, &value) in carried.iter().zip(&inputs[1 + kept..]) {
            inside.store.insert((one.what.clone(), start + one.at - one.back * period, one.lane), value);
        }
        for at in 0..period {
            let steps: Vec<usize> = (0..count).map(|k| start + k * period + at).collect();
            let numbers = self.numbers(&steps, Iteration { scope, index: Some(index) })?;
            self.step(start + at, &numbers, scope, &mut inside)?;
        }
        let mut outputs = vec![inside.x];
        outputs.extend(&inside.history);
        for one in &carried {
            let step = start + one.at - (one.back - 1) * period;
            outputs.push(self.fetch(&one.what, step, one.lane, scope, &mut inside)?);
        }
        let results = self.close(scope, count, &first, &outputs, 0);
        state.x = results[0];
        state.history = results[1..=kept].to_vec();
        state.seen.clear();
        for (one, &value) in carried.iter().zip(&results[1 + kept..]) {
            let step = start + (count - one.back) * period + one.at;
            state.store.insert((one.what.clone(), step, one.lane), value);
        }
        Ok(())
    }

    /// Opens the body of a loop that carries values of these types. Returns its scope, its counter, and the values inside.
    pub(super) fn body(&mut self, carried: &[DataType]) -> (ScopeId, ValueId, Vec<ValueId>) {
        let graph = &mut self.out.graph;
        let scope = graph.add_scope("steps");
        let mut input = |name: &str, ty: Type| {
            let name = graph.fresh_name(name);
            let value = graph.add_value(name, Some(ty));
            graph.add_input(scope, value);
            value
        };
        let index = input("iteration", Type::tensor(DataType::Int64, Vec::new()));
        input("going", Type::tensor(DataType::Bool, Vec::new()));
        let inside = carried.iter().map(|&elem| input("carried", Type::unshaped(elem))).collect();
        (scope, index, inside)
    }

    /// Closes the body of a loop, whose last `scans` outputs are collected over iterations, and makes its node.
    pub(super) fn close(
        &mut self,
        scope: ScopeId,
        count: usize,
        first: &[ValueId],
        outputs: &[ValueId],
        scans: usize,
    ) -> Vec<ValueId> {
        let going = self.out.graph.scope(scope).inputs()[1];
        let mut sums = self.sums(scope);
        // An output of a body is replaced inside it, and once.
        let going = sums.node("Identity", &[going], "goes_on");
        let outputs: Vec<ValueId> = outputs.iter().map(|&v| sums.node("Identity", &[v], "next")).collect();
        for value in std::iter::once(going).chain(outputs.iter().copied()) {
            self.out.graph.add_output(scope, value);
        }
        let mut sums = self.sums(ScopeId::MAIN);
        let trips = sums.constant(Tensor::from_i64s(&[], &[count as i64]), "trips");
        let inputs = [Some(trips), None].into_iter().chain(first.iter().map(|&v| Some(v))).collect();
        debug_assert_eq!(outputs.len(), first.len() + scans, "a loop returns what it carries and what it collects");
        sums.control("Loop", &[("body", scope)], inputs, outputs.len())
    }
}
