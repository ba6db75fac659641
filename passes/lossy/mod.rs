//! Lossy methods: what could be stored or computed otherwise, what that costs and what it loses.
//!
//! A method proposes and carries out; it never chooses. All options of all methods compete in one allocation.

mod allocate;
mod layers;
mod quantize;

pub use allocate::{AllocateError, Allocation, Item, allocate};
pub use layers::{Tap, Weight, weights};
pub use quantize::Quantize;

use crate::{Context, Error, Info, Outcome};
use lathe_ir::{Model, ValueId};

/// What something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spent {
    /// Bytes in the file: padding, scales, zero points, masks and positions included.
    pub bytes: u64,
    /// Stored numbers.
    pub parameters: u64,
    /// Floating-point operations per row of the layer's input.
    pub flops_per_row: u64,
}

/// One way to carry out the work of a site.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// As reports call it: `int4 block 32`.
    pub name: String,
    /// What it takes.
    pub spent: Spent,
    /// The relative L2 error of every tap of the site over the calibration set: ‖X(W − Ŵ)‖ / ‖Y‖.
    pub errors: Vec<f64>,
}

/// A place where a method could act.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The constant that would change; sites of one constant exclude each other.
    pub weight: ValueId,
    /// As reports call it: the name of the constant.
    pub name: String,
    /// The values whose error is told: the outputs of the nodes that use the constant.
    pub taps: Vec<ValueId>,
    /// What it takes as it is.
    pub kept: Spent,
    /// What could be done instead.
    pub choices: Vec<Choice>,
}

/// What a method could do with a model.
#[derive(Debug, Clone, Default)]
pub struct Proposal {
    /// Its places.
    pub sites: Vec<Site>,
    /// Where it could not act, and why; it has made no changes.
    pub outcome: Outcome,
}

/// A lossy method: one idea, one file.
pub trait Method: Sync {
    /// The method as a user meets it.
    fn info(&self) -> &'static Info;

    /// Every place this method could act on, and what it could do there. Reads the calibration of `cx`.
    fn propose(&self, model: &Model, cx: &Context) -> Result<Proposal, Error>;

    /// Carries out one choice of a site that [`Method::propose`] named, for a model whose other sites may have changed.
    fn rewrite(&self, model: &mut Model, site: &Site, choice: usize, cx: &Context) -> Result<Outcome, Error>;
}

/// Every lossy method.
pub const METHODS: &[&dyn Method] = &[&Quantize];
