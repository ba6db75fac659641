//! Which passes of a step run together, and what the network knows of the conditions in each.

use super::{Emitter, Lane};
use crate::sampler::{Error, Pass, Substitution, Uncond};
use lathe_ir::{Dim, ScopeId, Tensor, Type, ValueId};
use std::collections::BTreeMap;

impl Emitter<'_> {
    /// Whether the passes of a step run as one batch.
    pub(super) fn is_batched(&self, step: usize) -> bool {
        let alike = |one: &Substitution| one.pass.is_none() && one.refs().iter().all(|r| r.pass.is_none());
        self.sampler.guidance.batched
            && self.can_batch()
            && self.sampler.plan.cfg[step].is_guided()
            && self.sampler.plan.at(step).iter().all(alike)
    }

    /// Whether latent and conditions have a first axis that may grow.
    pub(super) fn can_batch(&self) -> bool {
        let open = |dims: &[Dim]| dims.first().is_some_and(|d| d.known().is_none());
        let condition = |name: &str| {
            let ty = self.condition(name).ok().and_then(|v| self.sampler.denoiser.graph.value(v).ty.as_ref());
            ty.and_then(Type::shape).is_some_and(|shape| open(&shape.dims))
        };
        open(&self.net.dims) && self.sampler.roles.conditions.iter().all(|c| condition(&c.name))
    }

    /// The lanes that a step stores in.
    pub(super) fn lanes(&self, step: usize) -> Vec<Lane> {
        if self.is_batched(step) {
            return vec![Lane::Both];
        }
        self.sampler.plan.cfg[step].passes().iter().map(|&pass| Lane::One(pass)).collect()
    }

    /// What the network knows of the conditions in a lane, computed once in front of all steps.
    pub(super) fn hoisted(&mut self, lane: Lane) -> Result<Vec<ValueId>, Error> {
        if let Some(known) = self.hoisted.get(&lane) {
            return Ok(known.clone());
        }
        let mut given = BTreeMap::new();
        for condition in &self.sampler.roles.conditions {
            let old = self.condition(&condition.name)?;
            let cond = self.known[&old];
            let mut uncond = cond;
            if lane != Lane::One(Pass::Cond) {
                uncond = match condition.uncond {
                    Uncond::Same => cond,
                    Uncond::Input => self.unconditional[&old],
                    Uncond::Constant(number) => self.filled(cond, number)?,
                };
            }
            let value = match lane {
                Lane::One(Pass::Cond) => cond,
                Lane::One(Pass::Uncond) => uncond,
                Lane::Both => self.sums(ScopeId::MAIN).joined(uncond, cond, "conditions"),
            };
            given.insert(old, value);
        }
        let fragment = self.net.condition_part.graph.fragment(ScopeId::MAIN);
        let arguments: Vec<_> = fragment.inputs().iter().map(|v| given.get(v).copied()).collect();
        // Names of nodes are unique in a model.
        let prefix = match lane {
            Lane::One(Pass::Cond) => "once.",
            Lane::One(Pass::Uncond) => "once.uncond.",
            Lane::Both => "once.both.",
        };
        let pasted = self.out.graph.paste(&fragment, ScopeId::MAIN, &arguments, &self.known, prefix);
        let mut computed = pasted.outputs.into_iter().flatten();
        let value = |v: &ValueId| given.get(v).copied().or_else(|| computed.next());
        let values: Option<Vec<ValueId>> = self.net.hoisted.iter().map(value).collect();
        let values = values.ok_or_else(|| Error::Network("the part that sees conditions lost an output".to_owned()))?;
        self.hoisted.insert(lane, values.clone());
        Ok(values)
    }

    /// A number in the shape of a value.
    pub(super) fn filled(&mut self, like: ValueId, number: f64) -> Result<ValueId, Error> {
        let elem = self.out.graph.value(like).ty.as_ref().and_then(Type::elem);
        let tensor = elem.and_then(|elem| Tensor::from_f64s(elem, &[], &[number]));
        let tensor = tensor.ok_or_else(|| {
            Error::Roles(format!("`{}` cannot be filled with {number}", self.out.graph.value(like).name))
        })?;
        let mut sums = self.sums(ScopeId::MAIN);
        let number = sums.constant(tensor, "unconditional");
        let shape = sums.node("Shape", &[like], "condition.shape");
        Ok(sums.node("Expand", &[number, shape], "unconditional"))
    }
}
