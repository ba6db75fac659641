//! Lossy methods: what could be stored or computed otherwise, what that costs and what it loses.
//!
//! A method proposes and carries out; it never chooses. All options of all methods compete in one allocation.

mod layers;

pub use layers::{Layer, layers};

use crate::{Context, Error, Info, Outcome};
use lathe_ir::{Model, NodeId};

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
    /// ‖X(W − Ŵ)‖ / ‖XW‖ over the calibration set: the relative L2 error of the site's output.
    pub error: f64,
}

/// A place where a method could act.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The node whose weight would change; sites at one node exclude each other.
    pub node: NodeId,
    /// As reports call it.
    pub name: String,
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
