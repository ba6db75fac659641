//! What makes sampling faster, one method a file: each writes entries of a [`StepPlan`] and knows nothing of graphs.
//!
//! A method takes the names of the tensors it may cut ([`Parts`]) and, where it decides by what happens in the plain loop,
//! a [`Calibration`]. Whether a plan is worth it is measured elsewhere.

mod arms;
mod bottleneck;
mod calibration;
mod context;
mod deep;
mod delta;
mod dual;
mod easy;
mod forecast;
mod forecasting;
mod gate;
mod linear_guidance;
mod options;
mod parts;
mod rehash;
mod sada;
mod stack;

pub use bottleneck::{Bottleneck, bottleneck};
pub use calibration::{Calibration, PlainLoop, StepRecord};
pub use context::PlanContext;
pub use easy::easy;
pub use forecasting::{Forecast, every, forecast};
pub use gate::{agreement_of_passes, gate, guide_until};
pub use options::{OptionError, Options};
pub use parts::Parts;

use super::{Error, StepPlan, Substitution};
use crate::Opt;

/// A method as a user meets it, and what it does to a plan.
#[derive(Debug)]
pub struct Method {
    /// Its name in plans; the file is of this name.
    pub name: &'static str,
    /// One line without a full stop.
    pub summary: &'static str,
    /// One paragraph: what it writes, what it needs.
    pub doc: &'static str,
    /// What can be set: `gate:at=30`.
    pub options: &'static [Opt],
    /// Whether it works on steps of several sizes.
    pub stages: Stages,
    /// The papers.
    pub source: &'static str,
    /// Writes its entries.
    apply: fn(&mut StepPlan, &Options, &PlanContext) -> Result<(), Error>,
}

/// Whether a method can follow one that makes steps of several sizes: runs of the plain loop are of one size, and so is
/// what a method keeps of earlier steps whatever their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stages {
    /// It stays inside stages, or makes them.
    Any,
    /// It does where this option is given, and looks at runs of one size without.
    AnyWith(&'static str),
    /// It works on steps of one size.
    One,
}

/// Every method. The command line, its help and the documentation list them in this order.
pub const METHODS: &[&Method] = &[
    &bottleneck::METHOD,
    &gate::METHOD,
    &linear_guidance::METHOD,
    &delta::METHOD,
    &arms::METHOD,
    &stack::METHOD,
    &forecast::METHOD,
    &deep::METHOD,
    &rehash::METHOD,
    &dual::METHOD,
    &easy::METHOD,
    &sada::METHOD,
];

/// Methods by name with their options, one after the other: `gate:at=30+forecast:every=2`.
#[derive(Debug)]
pub struct Methods {
    calls: Vec<(&'static Method, Options)>,
}

impl Methods {
    /// Reads names and options.
    pub fn parse(text: &str) -> Result<Methods, OptionError> {
        let call = |text: &str| {
            let (name, options) = text.split_once(':').unwrap_or((text, ""));
            let method = METHODS.iter().copied().find(|method| method.name == name).ok_or_else(|| {
                let known = METHODS.iter().map(|method| method.name).collect();
                OptionError::UnknownMethod { name: name.to_owned(), known }
            })?;
            Ok((method, Options::parse(method.name, method.options, options)?))
        };
        Ok(Methods { calls: text.split('+').map(call).collect::<Result<_, _>>()? })
    }

    /// Lets every method write its entries into a plan.
    pub fn apply(&self, plan: &mut StepPlan, cx: &PlanContext) -> Result<(), Error> {
        for (method, options) in &self.calls {
            let without = match method.stages {
                Stages::Any => None,
                Stages::AnyWith(option) if options.optional::<String>(option)?.is_some() => None,
                Stages::AnyWith(option) => Some(format!(" without its option {option}")),
                Stages::One => Some(String::new()),
            };
            if let Some(without) = without.filter(|_| plan.sizes.is_some()) {
                let name = method.name;
                let message = format!("{name}{without} looks at steps of one size, and bottleneck makes several");
                return Err(Error::Plan(message));
            }
            (method.apply)(plan, options, cx)?;
        }
        plan.check()
    }
}

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
mod tests {
    use super::*;

    #[test]
    fn every_file_with_a_method_is_listed_and_named_after_it() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sampler/methods");
        let mut files = Vec::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if std::fs::read_to_string(&path).unwrap().contains("const METHOD: Method") {
                files.push(path.file_stem().unwrap().to_str().unwrap().replace('_', "-"));
            }
        }
        files.retain(|file| file != "mod");
        files.sort();
        let mut names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        names.sort_unstable();
        assert_eq!(files, names);
        for method in METHODS {
            assert!(method.doc.ends_with('.') && !method.summary.ends_with('.'), "{}", method.name);
            assert!(method.source.contains("arXiv:"), "{}", method.name);
        }
    }

    #[test]
    fn names_and_options_are_read_and_refused() {
        let refused = |text: &str| Methods::parse(text).unwrap_err().to_string();
        assert!(refused("magic").contains("expected one of bottleneck, gate"));
        assert!(refused("gate+delta:rate=3").contains("`rate=3` is no option of delta"));
        assert_eq!(Methods::parse("gate:at=3+stack").unwrap().calls.len(), 2);
    }
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
