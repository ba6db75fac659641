//! What a comparison comes to: errors by output, what accounts for them, and why a claim does not hold.

use serde::{Deserialize, Serialize};

/// How far one output of the candidate is from the reference's, over all samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputError {
    /// The output.
    pub name: String,
    /// The largest difference of two elements; infinite where one is a number and the other is not.
    #[serde(with = "crate::json_float")]
    pub max_abs: f64,
    /// `‖candidate − reference‖ / ‖reference‖`, of the worst sample.
    #[serde(with = "crate::json_float")]
    pub rel_l2: f64,
    /// The cosine of the angle between the two, of the worst sample.
    #[serde(with = "crate::json_float")]
    pub cosine: f64,
    /// The share of rows along the last axis whose largest element is at the same place.
    pub top1: Option<f64>,
    /// The mean over rows of the Kullback-Leibler divergence from reference to candidate, in nats, of the rows
    /// themselves where they are distributions and of their softmax otherwise.
    pub kl: Option<f64>,
    /// How many rows `top1` and `kl` are means over.
    pub rows: u64,
    /// The bound on `rel_l2` that the output was held to; `None` where everything has to be the same.
    pub limit: Option<f64>,
    /// What accounts for an error beyond the bound.
    pub excuse: Option<Excuse>,
    /// Why only type and shape were compared, and not the values.
    pub uncompared: Option<String>,
}

/// What was measured on the reference and accounts for an error beyond the bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Excuse {
    /// The output is as small as the rounding errors of what it is computed from. `error` is the root mean square of
    /// the difference, `noise` that of what changes in the reference when every operand of its arithmetic moves by at
    /// most one unit in the last place; `error` is at most [`Excuse::NOISES`] times `noise`.
    Rounding {
        /// The root mean square of the difference.
        error: f64,
        /// The root mean square of the change that moved operands make.
        noise: f64,
    },
    /// Half precision is rounded in other places: relative to the reference computed in float32, `candidate` is the L2
    /// error of the candidate and `reference` that of the reference; `candidate` is at most [`Excuse::HALVES`] times
    /// `reference`.
    HalfPrecision {
        /// The candidate's relative L2 error.
        candidate: f64,
        /// The reference's relative L2 error.
        reference: f64,
    },
}

impl Excuse {
    /// How many times the noise a difference may be: two summation orders of the same terms differ by a few times what
    /// one rounding of every term changes.
    pub const NOISES: f64 = 8.0;

    /// How many times as far from float32 as the reference a candidate in half precision may be.
    pub const HALVES: f64 = 2.0;

    /// One sentence without a subject.
    pub fn describe(&self) -> String {
        match self {
            Excuse::Rounding { error, noise } => format!(
                "differs by {error:.1e} (root mean square), and rounding inside the original moves it by {noise:.1e} \
                 (at most {} times that is allowed)",
                Excuse::NOISES
            ),
            Excuse::HalfPrecision { candidate, reference } => format!(
                "is {candidate:.1e} (relative L2) from the original computed in float32, and the original in half \
                 precision is {reference:.1e} from it (at most {} times that is allowed)",
                Excuse::HALVES
            ),
        }
    }

    /// Used up of what is allowed: 1 is all of it.
    fn share(&self) -> f64 {
        match *self {
            Excuse::Rounding { error, noise } => error / (Excuse::NOISES * noise),
            Excuse::HalfPrecision { candidate, reference } => candidate / (Excuse::HALVES * reference),
        }
    }
}

/// Why a claim does not hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum Fault {
    /// There are more or fewer outputs.
    #[error("expected {expected} outputs, found {found}")]
    Count {
        /// The reference's.
        expected: usize,
        /// The candidate's.
        found: usize,
    },
    /// An output has another name.
    #[error("expected the output `{expected}`, found `{found}`")]
    Name {
        /// The reference's.
        expected: String,
        /// The candidate's.
        found: String,
    },
    /// An output has another type or shape, or elements that have to be the same are not.
    #[error("output `{output}`: {message}")]
    Differs {
        /// The output.
        output: String,
        /// What differs.
        message: String,
    },
    /// The numbers of an output are further apart than the bound.
    #[error("output `{output}`: the relative L2 error is {error:.3e}, the limit {limit:.1e}")]
    TooFar {
        /// The output.
        output: String,
        /// The relative L2 error.
        #[serde(with = "crate::json_float")]
        error: f64,
        /// The bound.
        limit: f64,
    },
}

/// What a comparison came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// One entry per output, in the model's order.
    pub outputs: Vec<OutputError>,
    /// Why the claim does not hold; empty if it holds.
    pub faults: Vec<Fault>,
}

impl Comparison {
    /// Whether the claim holds.
    pub fn holds(&self) -> bool {
        self.faults.is_empty()
    }

    /// Joins the result of further samples to this one.
    pub fn merge(&mut self, other: Comparison) {
        for error in other.outputs {
            match self.outputs.iter_mut().find(|e| e.name == error.name) {
                Some(known) => known.merge(&error),
                None => self.outputs.push(error),
            }
        }
        for fault in other.faults {
            self.add(fault);
        }
    }

    /// Keeps a fault. Of an output that is too far from the reference on several samples it keeps the largest error.
    fn add(&mut self, fault: Fault) {
        if let Fault::TooFar { output: name, error: found, .. } = &fault
            && let Some(Fault::TooFar { error, .. }) =
                self.faults.iter_mut().find(|f| matches!(f, Fault::TooFar { output, .. } if output == name))
        {
            *error = error.max(*found);
        } else if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }

    /// The output whose relative L2 error is largest beside its bound; `None` where no values were compared.
    pub fn worst(&self) -> Option<&OutputError> {
        let share = |output: &OutputError| match (output.rel_l2, output.limit) {
            (error, Some(limit)) if limit > 0.0 => error / limit,
            (error, _) => error,
        };
        let compared = self.outputs.iter().filter(|o| o.uncompared.is_none());
        compared.reduce(|worst, next| if share(next) > share(worst) { next } else { worst })
    }

    /// The outputs that are beyond their bound and nothing else.
    pub(crate) fn too_far(&self) -> Vec<String> {
        let name = |fault: &Fault| match fault {
            Fault::TooFar { output, .. } => Some(output.clone()),
            _ => None,
        };
        self.faults.iter().filter_map(name).collect()
    }

    /// The outputs that differ in any way.
    pub(crate) fn faulty(&self) -> impl Iterator<Item = &str> {
        self.faults.iter().filter_map(|fault| match fault {
            Fault::Differs { output, .. } | Fault::TooFar { output, .. } => Some(output.as_str()),
            Fault::Count { .. } | Fault::Name { .. } => None,
        })
    }

    /// Lets an output beyond its bound pass, and keeps the reason.
    pub(crate) fn excuse(&mut self, name: &str, excuse: Excuse) {
        self.faults.retain(|fault| !matches!(fault, Fault::TooFar { output, .. } if output == name));
        for output in self.outputs.iter_mut().filter(|o| o.name == name) {
            output.excuse = Some(excuse);
        }
    }

    /// The faults in one line.
    pub fn describe_faults(&self) -> String {
        self.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }
}

impl OutputError {
    /// No error, of no element.
    pub(super) fn none(name: &str) -> OutputError {
        OutputError {
            name: name.to_owned(),
            max_abs: 0.0,
            rel_l2: 0.0,
            cosine: 1.0,
            top1: None,
            kl: None,
            rows: 0,
            limit: None,
            excuse: None,
            uncompared: None,
        }
    }

    /// As far apart as can be: nothing numeric can be said.
    pub(super) fn fail(&mut self) {
        (self.max_abs, self.rel_l2, self.cosine) = (f64::INFINITY, f64::INFINITY, 0.0);
    }

    pub(super) fn merge(&mut self, other: &OutputError) {
        let mean = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => {
                let (n, m) = (self.rows as f64, other.rows as f64);
                Some(if n + m > 0.0 { (a * n + b * m) / (n + m) } else { a })
            }
            (a, b) => a.or(b),
        };
        let (top1, kl) = (mean(self.top1, other.top1), mean(self.kl, other.kl));
        self.max_abs = self.max_abs.max(other.max_abs);
        self.rel_l2 = self.rel_l2.max(other.rel_l2);
        self.cosine = self.cosine.min(other.cosine);
        self.top1 = top1;
        self.kl = kl;
        self.rows += other.rows;
        self.limit = self.limit.or(other.limit);
        let excuses = self.excuse.into_iter().chain(other.excuse);
        self.excuse = excuses.reduce(|a, b| if b.share() > a.share() { b } else { a });
        if self.uncompared.is_none() {
            self.uncompared.clone_from(&other.uncompared);
        }
    }
}
