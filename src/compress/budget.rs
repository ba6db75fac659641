//! What a user allows to be spent and lost.

use lathe_passes::{Quantity, QuantityMap};
use std::time::Duration;

/// What may be spent, and what may be lost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Budget {
    /// Shares of the original to keep: of the file's bytes, of the parameters, of the floating-point operations and of the
    /// measured latency.
    pub shares: QuantityMap<f64>,
    /// The largest drop of the metric on the validation set.
    pub max_drop: Option<f64>,
    /// What becomes as little as the drop allows where no share is given.
    pub minimize: Quantity,
    /// The metric; `None` chooses one that fits the outputs.
    pub metric: Option<String>,
    /// Time in which to look for a budget that the allowed drop permits, where it does not permit the one that is given;
    /// none where it is zero.
    pub advice: Duration,
    /// Whether every method is asked, even where rounding alone keeps to the budgets and loses next to nothing.
    pub thorough: bool,
    /// Whether a result may be slower than the original where latency is not limited.
    pub allow_slower: bool,
}

/// Time that a refused budget is worth unless told.
pub(crate) const ADVICE: Duration = Duration::from_secs(60);

impl Budget {
    /// Whether anything may be lost.
    pub fn is_given(&self) -> bool {
        !self.shares.is_empty() || self.max_drop.is_some()
    }

    /// What is limited or becomes as little as the drop allows.
    pub(crate) fn limited(&self) -> Vec<Quantity> {
        match self.shares.is_empty() {
            true => vec![self.minimize],
            false => self.shares().into_iter().map(|(quantity, _)| quantity).collect(),
        }
    }

    /// The shares that are given, each with what it is of, in the order in which searches and sentences go through them.
    pub(crate) fn shares(&self) -> Vec<(Quantity, f64)> {
        let order = [Quantity::Size, Quantity::Parameters, Quantity::Flops, Quantity::Latency];
        order.into_iter().filter_map(|quantity| Some((quantity, self.shares.get(quantity)?))).collect()
    }
}
