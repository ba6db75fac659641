//! Steps of several sizes: the network at each, and what happens to the state and to noise between two.

use super::{Emitter, Fragment, Variant};
use crate::{
    PassContext,
    exact::{DropDead, FoldConstants, SimplifyShapes},
    sampler::{
        Error, Sampler,
        network::Network,
        sizes::{Border, Resize},
        sums::Factor,
    },
};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Dim, ScopeId, Tensor, Type, ValueId};
use std::{collections::BTreeMap, mem::swap, rc::Rc};

/// Bytes by which what depends on the size alone may enlarge a sampler, for each size.
const MOST_FOLDED: u64 = 64 << 20;

/// The network at one size.
pub(super) struct Sized {
    net: Network,
    facts: Facts,
    known: BTreeMap<ValueId, ValueId>,
    variants: BTreeMap<String, Rc<(Variant, Fragment)>>,
}

impl Sampler<'_> {
    /// Fails unless height and width of the latent are open and no condition has them too, where steps have sizes.
    pub fn check_latent(&self) -> Result<(), Error> {
        if self.plan.sizes.is_some() { check_latent(self) } else { Ok(()) }
    }
}

fn check_latent(sampler: &Sampler) -> Result<(), Error> {
    let graph = &sampler.denoiser.graph;
    let dims = |name: &str| {
        let ty = graph.find_value(name).and_then(|v| graph.value(v).ty.as_ref());
        ty.and_then(Type::shape).map(|shape| shape.dims.clone()).unwrap_or_default()
    };
    let name = &sampler.roles.latent;
    let latent = dims(name);
    let shown = latent.iter().map(Dim::to_string).collect::<Vec<_>>().join(", ");
    let sides = match latent.as_slice() {
        [_, _, .., height, width] if latent.len() >= 4 => [height, width],
        _ => {
            let message = format!("steps of several sizes need a latent [n, c, h, w], and `{name}` is [{shown}]");
            return Err(Error::Plan(message));
        }
    };
    if sides.iter().any(|side| side.known().is_some()) {
        return Err(Error::Plan(format!(
            "steps of several sizes need a denoiser whose height and width are open, and `{name}` is [{shown}]"
        )));
    }
    let follows = |name: &&String| dims(name).iter().any(|d| d.name().is_some() && sides.contains(&d));
    match sampler.roles.conditions.iter().map(|c| &c.name).find(follows) {
        None => Ok(()),
        Some(condition) => Err(Error::Plan(format!(
            "the condition `{condition}` has the height or width of the latent, which steps of several sizes change"
        ))),
    }
}

impl Emitter<'_> {
    /// The latent's dimensions at a size.
    pub(super) fn dims(&self, size: Option<[usize; 2]>) -> Vec<Dim> {
        let mut dims = self.net.dims.clone();
        let sides = dims.len().saturating_sub(2);
        for (dim, size) in dims[sides..].iter_mut().zip(size.into_iter().flatten()) {
            *dim = Dim::Known(size as i64);
        }
        dims
    }

    /// Makes the network that of the size of a step.
    pub(super) fn enter(&mut self, step: usize) -> Result<(), Error> {
        let size = self.sampler.plan.sizes.as_ref().map(|sizes| sizes.steps[step]);
        if size == self.size {
            return Ok(());
        }
        let mut next = match self.others.remove(&size) {
            Some(known) => known,
            None => self.sized(size)?,
        };
        swap(&mut self.net, &mut next.net);
        swap(&mut self.facts, &mut next.facts);
        swap(&mut self.known, &mut next.known);
        swap(&mut self.variants, &mut next.variants);
        self.others.insert(self.size, next);
        self.size = size;
        Ok(())
    }

    /// The network with all that depends on its size alone computed.
    fn sized(&mut self, size: Option<[usize; 2]>) -> Result<Sized, Error> {
        let (base, known) = match self.others.get(&None) {
            Some(base) => (&base.net, &base.known),
            None => (&self.net, &self.known),
        };
        let (mut net, mut known) = (base.clone(), known.clone());
        net.dims = self.dims(size);
        let graph = &mut net.model.graph;
        graph.value_mut(net.latent).ty = Some(Type::tensor(net.dtype, net.dims.clone()));
        let cx = PassContext::default().with_evaluator(self.evaluator).with_max_growth(MOST_FOLDED);
        for pass in [&SimplifyShapes as &dyn crate::Pass, &FoldConstants, &DropDead] {
            pass.apply(&mut net.model, &cx).map_err(|e| Error::Network(e.to_string()))?;
        }
        // Of constants that are there already the copy stays unused, and goes at the end.
        let fragment = net.model.graph.fragment(ScopeId::MAIN);
        for (old, new) in self.out.graph.paste_constants(&fragment, ScopeId::MAIN, "") {
            known.entry(old).or_insert(new);
        }
        Ok(Sized { facts: Facts::infer(&net.model), net, known, variants: BTreeMap::new() })
    }

    /// The upper left of noise, where a step is smaller.
    pub(super) fn cropped(&mut self, noise: ValueId, size: Option<[usize; 2]>, scope: ScopeId) -> ValueId {
        let full = self.sampler.plan.sizes.as_ref().map(|sizes| sizes.full());
        let Some([height, width]) = size.filter(|_| size != full) else { return noise };
        let mut sums = self.sums(scope);
        let bounds = [[0, 0], [height as i64, width as i64], [-2, -1]].map(|n| sums.int64s(&n, "crop"));
        sums.node("Slice", &[noise, bounds[0], bounds[1], bounds[2]], "crop")
    }

    /// A state at the size of the next step.
    pub(super) fn resized(&mut self, x: ValueId, border: &Border, scope: ScopeId) -> ValueId {
        self.along_sides(x, &border.resize, scope, "resized")
    }

    /// Noise for a state that was resized.
    pub(super) fn lessened(&mut self, noise: ValueId, border: &Border, scope: ScopeId) -> Result<ValueId, Error> {
        let Some(without) = &border.without else { return Ok(noise) };
        let part = self.along_sides(noise, without, scope, "shared");
        let terms = [(noise, Factor::Number(1.0)), (part, Factor::Number(-1.0))];
        self.sums(scope).sum(&terms, DataType::Float, "rest")
    }

    /// One matrix for the height and one for the width.
    fn along_sides(&mut self, x: ValueId, [rows, columns]: &[Resize; 2], scope: ScopeId, name: &str) -> ValueId {
        let mut sums = self.sums(scope);
        let (from, to) = (columns.from, columns.to);
        let left: Vec<f32> = rows.weights.iter().map(|&w| w as f32).collect();
        let right: Vec<f32> = (0..from * to).map(|i| columns.weights[i % to * from + i / to] as f32).collect();
        let (left, right) = (Tensor::from_f32s(&[rows.to, rows.from], &left), Tensor::from_f32s(&[from, to], &right));
        let (left, right) = (sums.constant(left, "rows"), sums.constant(right, "columns"));
        let x = sums.node("MatMul", &[x, right], name);
        sums.node("MatMul", &[left, x], name)
    }
}
