//! What makes sampling faster, one method a file: each writes entries of a [`StepPlan`] and knows nothing of graphs.
//!
//! A method takes the names of the tensors it may cut ([`Parts`]) and, where it decides by what was seen on calibration
//! runs, the numbers of those runs. Whether a plan is worth it is measured elsewhere.

mod bottleneck;
mod delta;
mod dual;
mod easy;
mod forecast;
mod gate;
mod linear_guidance;
mod parts;
mod rehash;
mod sada;

pub use bottleneck::{Bottleneck, bottleneck};
pub use delta::{Delta, delta};
pub use dual::{Dual, dual};
pub use easy::{easy, follow, vote};
pub use forecast::{Forecast, every, forecast};
pub use gate::{gate, guide_until};
pub use linear_guidance::{Inner, LinearGuidance, linear_guidance};
pub use parts::Parts;
pub use rehash::rehash;
pub use sada::{Sada, is_stable, sada};

use super::{Error, StepPlan, Substitution};

/// Adds a substitution; an earlier one of the same cut at the step is an error.
fn substitute(plan: &mut StepPlan, step: usize, one: Substitution) -> Result<(), Error> {
    let entries = plan.steps.entry(step).or_default();
    let twice = |e: &Substitution| e.cut == one.cut && (e.pass.is_none() || one.pass.is_none() || e.pass == one.pass);
    if entries.iter().any(twice) {
        return Err(Error::Plan(format!("`{}` is substituted by two methods at step {step}", one.cut)));
    }
    entries.push(one);
    Ok(())
}

#[cfg(test)]
mod testing {
    use super::super::{Mode, StepPlan};
    use super::Parts;

    /// A guided plan of this many steps.
    pub fn guided(steps: usize) -> StepPlan {
        let grid = (0..steps).rev().map(|i| (i * 10) as f64).collect();
        StepPlan::plain("ddim", grid, Mode::Guided)
    }

    /// The parts of a model of one stream with this many blocks.
    pub fn parts(blocks: usize) -> Parts {
        let name = |what: &str, i: usize| format!("{what}{i}");
        Parts {
            output: "eps".to_owned(),
            borders: (0..=blocks).map(|i| vec![name("h", i)]).collect(),
            arms: (0..blocks).flat_map(|i| [name("attn", i), name("mlp", i)]).collect(),
            deep: Vec::new(),
        }
    }
}
