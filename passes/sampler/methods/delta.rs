//! What a range of blocks adds is kept from an earlier step, early in the back of the network, late in its front.
//!
//! Source: Chen et al. 2024, Δ-DiT, arXiv:2406.01125.

use super::{Method, Options, Parts, PlanContext, Stages, context::missing, substitute};
use crate::{
    Opt,
    sampler::{Error, Kind, StepPlan, Substitution},
};

pub(super) const METHOD: Method = Method {
    name: "delta",
    summary: "keeps what a range of blocks added",
    doc: "Some of the repeated blocks are left out at most steps: what they add to their stream is what they added at an \
          earlier step. In early steps these are the last blocks, in late steps the first.",
    options: &[
        Opt {
            name: "blocks",
            unit: "a number",
            default: "",
            doc: "how many blocks; as many as `speed` needs unless given",
        },
        Opt { name: "speed", unit: "a number", default: "1.6", doc: "how many times as fast the network becomes" },
        Opt { name: "every", unit: "a number", default: "2", doc: "one of so many steps is computed whole" },
        Opt {
            name: "switch",
            unit: "a number",
            default: "",
            doc: "the step from which on the first blocks are left out; three fifths of all unless given",
        },
    ],
    stages: Stages::One,
    source: "Chen et al. 2024, Δ-DiT, arXiv:2406.01125",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let steps = plan.grid.len();
    let (every, speed) = (options.get("every")?, options.get("speed")?);
    let fitted = Delta::for_speed(speed, cx.parts.blocks(), every, steps);
    let blocks = options.optional("blocks")?.or(fitted.map(|d| d.blocks));
    let blocks = blocks.ok_or_else(|| missing(METHOD.name, "more repeated blocks for that speed"))?;
    let switch = options.optional("switch")?.unwrap_or(steps * 3 / 5);
    delta(plan, cx.parts, &Delta { blocks, switch, every })
}

/// Which blocks are left out at which steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// How many blocks.
    pub blocks: usize,
    /// From this step on the first blocks are left out, before it the last ones.
    pub switch: usize,
    /// One of so many steps is computed whole.
    pub every: usize,
}

impl Delta {
    /// As many blocks as make the network `speed` times as fast, of `blocks`, with the switch after three fifths of the
    /// steps. `None` if even leaving all out is not enough.
    pub fn for_speed(speed: f64, blocks: usize, every: usize, steps: usize) -> Option<Delta> {
        let share = (1.0 - 1.0 / speed) * every as f64 / (every as f64 - 1.0);
        let wanted = (blocks as f64 * share).ceil();
        let fits = every >= 2 && wanted >= 1.0 && wanted <= blocks as f64;
        fits.then(|| Delta { blocks: wanted as usize, switch: steps * 3 / 5, every })
    }
}

/// Writes the entries. Every stream of a border gets its own difference.
pub fn delta(plan: &mut StepPlan, parts: &Parts, options: &Delta) -> Result<(), Error> {
    let (count, steps) = (parts.blocks(), plan.grid.len());
    if options.blocks == 0 || options.blocks > count || options.every < 2 {
        let message = format!(
            "{} of {count} repeated blocks cannot be left out at all but every {}th step",
            options.blocks, options.every
        );
        return Err(Error::Plan(message));
    }
    for step in 0..steps {
        let late = step >= options.switch;
        let start = if late { options.switch } else { 0 };
        let since = (step - start) % options.every;
        if since == 0 {
            continue;
        }
        let (from, to) = if late { (0, options.blocks) } else { (count - options.blocks, count) };
        for (input, cut) in parts.borders[from].iter().zip(&parts.borders[to]) {
            let kind = Kind::Delta { input: input.clone(), from: step - since };
            substitute(plan, step, Substitution::new(cut.clone(), kind))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{guided, parts};
    use super::*;

    #[test]
    fn the_back_is_left_out_early_and_the_front_late() {
        let mut plan = guided(7);
        delta(&mut plan, &parts(10), &Delta { blocks: 3, switch: 4, every: 2 }).unwrap();
        plan.check().unwrap();
        let shown: Vec<_> = plan.steps.iter().map(|(step, all)| (*step, all[0].cut.as_str(), &all[0].kind)).collect();
        let kind = |input: &str, from| Kind::Delta { input: input.to_owned(), from };
        let expected = [(1, "h10", &kind("h7", 0)), (3, "h10", &kind("h7", 2)), (5, "h3", &kind("h0", 4))];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_speed_gives_a_number_of_blocks() {
        let found = Delta::for_speed(1.6, 28, 2, 20).unwrap();
        assert_eq!(found, Delta { blocks: 21, switch: 12, every: 2 });
        assert_eq!(Delta::for_speed(3.0, 28, 2, 20), None);
        assert!(delta(&mut guided(4), &parts(3), &Delta { blocks: 4, switch: 2, every: 2 }).is_err());
    }
}
