//! What a lossy method is, and what it may know.

use super::{Candidate, Cost, EditCodec, Site};
use crate::{Error, Info, Outcome, PassContext, Quantity, Settings, Target};
use lathe_analysis::{Calibrate, Keep, KeyBuilder, Rows};
use lathe_ir::{Model, ValueId};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, str::FromStr};

/// The oldest operator set in which models are compressed.
pub const OLDEST_OPSET: i64 = 13;

/// Where a runtime wants `QuantizeLinear` and `DequantizeLinear` to stand, and with which parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Recipe {
    /// As ONNX Runtime fuses them for its CPU provider: around every operator of a region, 8 bits without sign.
    #[default]
    Cpu,
    /// As TensorRT reads them: before layers and what skips one, 8 bits with sign and zero in the middle, biases in float.
    TensorRt,
    /// As OpenVINO reads them: before layers, 8 bits without sign, biases in float.
    OpenVino,
    /// As the HTP of Qualcomm's AI Engine reads them: around every operator, matrices with one scale.
    Qnn,
    /// Nowhere: the provider has no such kernels.
    None,
}

/// What a method may know besides the model. It is made once in a run; calibration and incumbents join it as they become
/// known.
#[derive(Clone, Default)]
pub struct MethodContext<'a> {
    /// Which operators may be used.
    pub target: Target,
    /// What is limited: what saves none of it need not be proposed.
    pub quantities: Vec<Quantity>,
    /// Whether the execution provider computes in half precision.
    pub half_precision: bool,
    /// How the runtime of the execution provider wants to be told what is rounded to whole numbers.
    pub recipe: Recipe,
    /// What was seen on the calibration set.
    pub calibration: Option<&'a dyn Calibrate>,
    /// Rows of all products with every weight in one run.
    pub rows: BTreeMap<ValueId, u64>,
    /// What other methods have proposed for the same constants: what these beat need not be proposed.
    pub incumbents: BTreeMap<ValueId, Vec<Candidate>>,
    /// Bytes that work on layers may take; `None` for 4 GiB.
    pub memory: Option<u64>,
    /// Where results are kept between runs.
    pub kept: Option<&'a dyn Keep>,
    /// Threads that a method may keep busy; 0 for as many as there are cores.
    pub threads: usize,
    /// Whether what is carried out is only timed, so that numbers need not be fitted.
    pub only_timed: bool,
    settings: Settings,
}

impl<'a> MethodContext<'a> {
    /// A context without calibration.
    pub fn new(target: Target, quantities: Vec<Quantity>, settings: impl Into<Settings>) -> MethodContext<'a> {
        MethodContext { target, quantities, settings: settings.into(), ..MethodContext::default() }
    }

    /// With quantities that are limited.
    #[must_use]
    pub fn with_quantities(self, quantities: Vec<Quantity>) -> Self {
        MethodContext { quantities, ..self }
    }

    /// With values of options.
    #[must_use]
    pub fn with_settings(self, settings: impl Into<Settings>) -> Self {
        MethodContext { settings: settings.into(), ..self }
    }

    /// With an execution provider that computes in half precision, or not.
    #[must_use]
    pub fn with_half_precision(self, half_precision: bool) -> Self {
        MethodContext { half_precision, ..self }
    }

    /// With a way to say what is rounded to whole numbers.
    #[must_use]
    pub fn with_recipe(self, recipe: Recipe) -> Self {
        MethodContext { recipe, ..self }
    }

    /// With bytes that work on layers may take.
    #[must_use]
    pub fn with_memory(self, memory: u64) -> Self {
        MethodContext { memory: Some(memory), ..self }
    }

    /// With a place where results are kept between runs.
    #[must_use]
    pub fn with_kept(self, kept: Option<&'a dyn Keep>) -> Self {
        MethodContext { kept, ..self }
    }

    /// With so many threads; 0 for as many as there are cores.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        MethodContext { threads, ..self }
    }

    /// With what was seen on a calibration set.
    #[must_use]
    pub fn with_calibration<'b>(&self, calibration: &'b dyn Calibrate) -> MethodContext<'b>
    where
        'a: 'b,
    {
        MethodContext {
            kept: self.kept,
            threads: self.threads,
            only_timed: self.only_timed,
            calibration: Some(calibration),
            target: self.target,
            quantities: self.quantities.clone(),
            half_precision: self.half_precision,
            recipe: self.recipe,
            rows: self.rows.clone(),
            incumbents: self.incumbents.clone(),
            memory: self.memory,
            settings: self.settings.clone(),
        }
    }

    /// With the rows of all products with every weight.
    #[must_use]
    pub fn with_rows(self, rows: BTreeMap<ValueId, u64>) -> Self {
        MethodContext { rows, ..self }
    }

    /// The value of an option: as set, else its default.
    pub fn setting<T: FromStr>(&self, method: &Info, option: &str) -> Result<T, Error> {
        self.settings.value(method, option)
    }

    /// A key of everything that a proposal depends on but the method; `None` where nothing is kept.
    pub(super) fn key(&self) -> Option<KeyBuilder> {
        self.kept?;
        let seen = self.calibration?.identity()?;
        let asked = format!("{:?}", (self.target, &self.quantities, self.half_precision, self.recipe, &self.settings));
        let known = format!("{:?}", (&self.rows, &self.incumbents));
        Some(KeyBuilder::new().bytes(&seen).text(&asked).text(&known))
    }

    /// The context of an exact pass that a method applies.
    pub(super) fn pass_context(&self) -> PassContext<'static> {
        PassContext::default().with_target(self.target).with_settings(self.settings.clone())
    }
}

/// What a method needs before it can propose, and what its candidates need before they can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Statistics of what layers read and give, which take time to collect.
    pub statistics: bool,
    /// The largest magnitudes of what layers read, which second moments do not tell.
    pub ranges: bool,
    /// Errors are so large that the loss does not follow from those of the layer: every candidate is carried out alone
    /// and its loss measured, where that takes no longer than other searches do.
    pub trials: bool,
    /// A candidate that is timed is worth nothing unless it is faster than what is there.
    pub speedup: bool,
}

impl Default for Needs {
    /// Statistics, and nothing else.
    fn default() -> Needs {
        Needs { statistics: true, ranges: false, trials: false, speedup: false }
    }
}

/// What a method could do with a model.
#[derive(Debug, Clone, Default)]
pub struct Proposal {
    /// Its sites.
    pub sites: Vec<Site>,
    /// Where it could not act, and why; it has made no changes.
    pub outcome: Outcome,
    /// Why it cannot do what settings ask of it.
    pub unmet: Option<String>,
}

impl Proposal {
    /// Nothing is proposed anywhere, for a reason.
    pub(super) fn refused(reason: &str, place: &str) -> Proposal {
        let mut proposal = Proposal::default();
        proposal.outcome.refuse(reason, place);
        proposal
    }
}

/// What a candidate leaves of the sites nested in its own.
pub struct NestedEffect {
    /// The model with the candidate carried out, and nothing else.
    pub model: Model,
    /// The share of its rows that the layer of every weight still has.
    pub rows: BTreeMap<ValueId, f64>,
}

/// What a nested site takes where a candidate of the site around it is carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedCost {
    /// The share of its rows that operations are counted by.
    pub rows: f64,
    /// What it takes as it is.
    pub baseline: Cost,
    /// What every candidate takes; `None` for one that cannot be carried out there.
    pub candidates: Vec<Option<Cost>>,
}

/// A lossy method: one idea, one file.
pub trait Method: Sync {
    /// The method as a user meets it.
    fn info(&self) -> &'static Info;

    /// What it needs to propose and to be chosen.
    fn needs(&self, _cx: &MethodContext) -> Needs {
        Needs::default()
    }

    /// Values whose second moments it wants besides those of what large weights are multiplied with; they are collected before
    /// it proposes.
    fn grams(&self, _model: &Model, _cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Values whose magnitudes it wants, as far as second moments tell; they are collected before it proposes.
    fn magnitudes(&self, _model: &Model, _cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Values of which it wants to know how their numbers are spread; that is collected before it proposes.
    fn spreads(&self, _model: &Model, _cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Values whose errors count beside those of the outputs of layers with weights.
    fn extra_taps(&self, _model: &Model, _cx: &MethodContext) -> Result<Vec<Rows>, Error> {
        Ok(Vec::new())
    }

    /// Whether it may lower any of what is limited.
    fn serves(&self, _quantities: &[Quantity]) -> bool {
        true
    }

    /// Whether all it does is to store and multiply numbers in fewer bits. What that loses follows from each layer, and it
    /// proposes in little time: such methods are asked first, and others only where these do not do.
    fn rounds_only(&self) -> bool {
        false
    }

    /// Which plain alternative a candidate is a part of, which does the same with every layer: what tools without an
    /// allocator write.
    fn plain(&self, _candidate: &Candidate) -> Option<&'static str> {
        None
    }

    /// The oldest operator set with everything it writes. Older models are upgraded to it where a budget is given that the
    /// method may serve.
    fn operator_set(&self) -> i64 {
        OLDEST_OPSET
    }

    /// Whether settings ask for it where no budget is given.
    fn is_requested(&self, _cx: &MethodContext) -> Result<bool, Error> {
        Ok(false)
    }

    /// How its edits are written, so that proposals are kept between runs; `None` where they are not.
    fn edit_codec(&self) -> Option<EditCodec> {
        None
    }

    /// Every site this method could act on, and what it could do there. Reads the calibration of `cx`.
    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error>;

    /// What a candidate leaves of the sites nested in its own, which are then still there; `None` where nothing of them is
    /// left as it was.
    fn effect_on_nested(
        &self,
        _model: &Model,
        _site: &Site,
        _candidate: &Candidate,
        _cx: &MethodContext,
    ) -> Result<Option<NestedEffect>, Error> {
        Ok(None)
    }

    /// What a nested site takes under the effect of a candidate around it, which is carried out first; `None` where it is
    /// no longer a site then.
    ///
    /// What concerns products of weights alone goes on with the rows that all of these have left.
    fn cost_under(&self, site: &Site, effect: &NestedEffect, _cx: &MethodContext) -> Result<Option<NestedCost>, Error> {
        let Some(&rows) = site.weight.and_then(|weight| effect.rows.get(&weight)) else { return Ok(None) };
        let alike = site.footprint.iter().all(|value| effect.rows.get(value) == Some(&rows));
        let candidates = site.candidates.iter().map(|candidate| Some(candidate.cost)).collect();
        Ok(alike.then_some(NestedCost { rows, baseline: site.baseline, candidates }))
    }

    /// Carries out a candidate of a site that [`Method::propose`] named, for a model whose other sites may have changed.
    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error>;
}
