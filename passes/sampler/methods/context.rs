//! What a method may look at besides the plan.

use super::{calibration::Calibration, parts::Parts};
use crate::sampler::{Error, Request, Scheduler, Table};

/// What a method may look at besides the plan.
pub struct PlanContext<'a> {
    /// The scheduler.
    pub scheduler: &'a Scheduler,
    /// What was asked of it.
    pub request: &'a Request,
    /// The numbers of the steps that were asked for.
    pub table: &'a Table,
    /// The tensors at which the denoiser can be cut.
    pub parts: &'a Parts,
    /// What happens in the plain loop.
    pub calibration: &'a Calibration<'a>,
}

impl PlanContext<'_> {
    /// Tensors that a method needs, unless the denoiser has none.
    pub(super) fn cuts(&self, method: &str, what: &str, cuts: &[String]) -> Result<Vec<String>, Error> {
        if cuts.is_empty() {
            return Err(missing(method, what));
        }
        Ok(cuts.to_vec())
    }
}

/// The error of a denoiser without what a method works on.
pub(super) fn missing(method: &str, what: &str) -> Error {
    Error::Plan(format!("{method} needs {what}, and the denoiser has none"))
}
