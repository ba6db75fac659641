//! The denoiser of a job: read once, simplified once, whoever asks for it.

use super::source::Source;
use crate::Failure;
use lathe_ir::{DataType, Dim, Model, Type};
use lathe_passes::sampler::{RoleOptions, Roles, StepPlan, Table};
use std::{ops::Deref, path::Path};

/// The denoiser of a job.
pub(super) struct Denoiser {
    source: Source,
    pub roles: Roles,
}

impl Deref for Denoiser {
    type Target = Source;

    fn deref(&self) -> &Source {
        &self.source
    }
}

impl Denoiser {
    /// Reads a denoiser and finds out what its inputs are.
    pub fn read(path: &Path, options: &RoleOptions) -> Result<Denoiser, Failure> {
        let source = Source::read(path)?;
        let roles = Roles::infer(&source.original, options)?;
        Ok(Denoiser { source, roles })
    }

    /// Says how many channels the latent has along an axis, where the file leaves that open.
    pub fn state_channels(&mut self, axis: usize, channels: usize) {
        let graph = &mut self.source.original.graph;
        let value = graph.find_value(&self.roles.latent);
        let Some(ty) = value.and_then(|v| graph.value_mut(v).ty.as_mut()) else { return };
        if let (Some(elem), Some(mut dims)) = (ty.elem(), ty.shape().map(|shape| shape.dims.clone()))
            && let Some(dim) = dims.get_mut(axis).filter(|dim| dim.known().is_none())
        {
            *dim = Dim::Known(channels as i64);
            *ty = Type::tensor(elem, dims);
        }
    }

    /// The sizes of the latent, as far as the file states them.
    pub fn latent(&self) -> Vec<Dim> {
        let graph = &self.original.graph;
        let value = graph.find_value(&self.roles.latent);
        let shape = value.and_then(|v| graph.value(v).ty.as_ref()).and_then(Type::shape);
        shape.map(|shape| shape.dims.clone()).unwrap_or_default()
    }

    /// A sentence where the network takes whole times only and steps have others.
    pub fn rounded_times(&self, table: &Table) -> Option<String> {
        let graph = &self.original.graph;
        let elem = graph.find_value(&self.roles.time).and_then(|v| graph.value(v).ty.as_ref()?.elem());
        let rounded = table.rows.iter().filter(|row| self.roles.time_of(row).fract() != 0.0).count();
        (rounded > 0 && elem.is_some_and(DataType::is_integer)).then(|| {
            let (name, all) = (&self.roles.time, table.rows.len());
            format!("`{name}` takes whole numbers, and {rounded} of {all} times have fractions, which are rounded")
        })
    }

    /// The denoiser as inputs are made up for it: its latent has the size that the plan says.
    pub fn sized(&self, plan: &StepPlan, shapes: &[(String, Vec<usize>)]) -> Result<Model, Failure> {
        let mut sized = self.original.clone();
        let Some(sizes) = &plan.sizes else { return Ok(sized) };
        let (name, [height, width]) = (&self.roles.latent, sizes.full());
        let value = sized.graph.find_value(name);
        let Some(ty) = value.and_then(|v| sized.graph.value_mut(v).ty.as_mut()) else { return Ok(sized) };
        let given = shapes.iter().find(|(n, _)| n == name).map(|(_, dims)| dims.as_slice());
        if given.is_some_and(|dims| !dims.ends_with(&[height, width])) {
            let message =
                format!("the plan makes samples of {height}×{width}, and --input-shape gives `{name}` another size");
            return Err(Failure::Usage(message));
        }
        if let (Some(elem), Some(mut dims)) = (ty.elem(), ty.shape().map(|shape| shape.dims.clone()))
            && let [.., h, w] = dims.as_mut_slice()
        {
            (*h, *w) = (Dim::Known(height as i64), Dim::Known(width as i64));
            *ty = Type::tensor(elem, dims);
        }
        Ok(sized)
    }
}
