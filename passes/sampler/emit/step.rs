//! One step: the network with what a plan leaves of it, guidance, and the update of the state.

use super::{Emitter, Iteration, Lane, Numbers, State, Store, What};
use crate::sampler::{
    Clip, Error, Mode, Pass, Ref, Scale, Substitution,
    network::{self, How, TimeFeed},
    plan::Kind,
    sums::Factor,
};
use lathe_ir::{DataType, Node, ScopeId, Tensor, ValueId};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

impl Emitter<'_> {
    /// One step in the main graph.
    pub(super) fn unrolled(&mut self, step: usize, state: &mut State) -> Result<(), Error> {
        let at = Iteration { scope: ScopeId::MAIN, index: None };
        self.enter(step)?;
        let numbers = self.numbers(&[step], at)?;
        self.step(step, &numbers, at.scope, state)
    }

    /// One step in any scope.
    pub(super) fn step(
        &mut self,
        step: usize,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<(), Error> {
        let predictions = self.predictions(step, numbers, scope, state)?;
        let m = self.joined(step, &predictions, scope)?;
        self.advance(numbers, scope, state, m)
    }

    /// What the network predicts in each pass of a step, in float32.
    pub(super) fn predictions(
        &mut self,
        step: usize,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<BTreeMap<Pass, ValueId>, Error> {
        let dtype = self.net.dtype;
        let mut sums = self.sums(scope);
        let latent = sums.scaled(state.x, numbers.input_scale, DataType::Float, "latent")?;
        let mut latent = sums.cast(latent, DataType::Float, dtype, "latent");
        let mut found = BTreeMap::new();
        for lane in self.lanes(step) {
            if lane == Lane::Both {
                latent = self.sums(scope).joined(latent, latent, "latents");
            }
            let m = self.evaluate(step, lane, latent, numbers, scope, state)?;
            let mut sums = self.sums(scope);
            match lane {
                Lane::One(pass) => _ = found.insert(pass, m),
                Lane::Both => {
                    let [uncond, cond] = sums.halves(m, "prediction");
                    found.extend([(Pass::Cond, cond), (Pass::Uncond, uncond)]);
                }
            }
        }
        Ok(found)
    }

    /// One evaluation of the network, or of what a plan leaves of it.
    pub(super) fn evaluate(
        &mut self,
        step: usize,
        lane: Lane,
        latent: ValueId,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<ValueId, Error> {
        let mut cuts = Vec::new();
        let mut given = Vec::new();
        let mut whole = None;
        let inside = |one: &&Substitution| match lane {
            Lane::One(pass) => one.is_in(pass),
            Lane::Both => true,
        };
        for one in self.sampler.plan.at(step).iter().filter(inside) {
            let cut = self.cut(&one.cut)?;
            let (how, tensor) = self.given(one, step, lane, scope, state)?;
            if cut == self.net.output && how.is_given() {
                whole = Some(tensor);
            }
            cuts.push((cut, how));
            given.push(tensor);
        }
        let wanted = self.stored.get(&step).cloned().unwrap_or_default();
        let names: BTreeSet<String> = wanted.iter().flat_map(What::names).map(str::to_owned).collect();
        let names: Vec<String> = names.into_iter().collect();
        let kept = names.iter().map(|name| self.tensor(name)).collect::<Result<Vec<_>, _>>()?;
        let outputs = if whole.is_some() && kept.is_empty() {
            Vec::new()
        } else {
            self.paste(step, lane, latent, numbers, scope, (&cuts, &given, &kept))?
        };
        let predicted = usize::from(whole.is_none());
        let tensors: BTreeMap<&str, ValueId> =
            names.iter().map(String::as_str).zip(outputs.iter().skip(predicted).copied()).collect();
        for what in wanted {
            let value = match &what {
                What::Cut(cut) => tensors[cut.as_str()],
                What::Added(cut, input) => {
                    self.sums(scope).node("Sub", &[tensors[cut.as_str()], tensors[input.as_str()]], "added")
                }
            };
            state.store.insert((what, step, lane), value);
        }
        let m = whole.or(outputs.first().copied()).expect("a variant predicts unless its prediction is given");
        let (dtype, channels) = (self.net.dtype, self.net.channels);
        let mut sums = self.sums(scope);
        let m = sums.cast(m, dtype, DataType::Float, "prediction");
        let Some(channels) = channels else { return Ok(m) };
        let bounds = [0, channels, 1].map(|n| sums.int64s(&[n], "mean"));
        Ok(sums.node("Slice", &[m, bounds[0], bounds[1], bounds[2]], "mean"))
    }

    /// The value of a tensor that plans refer to.
    pub(super) fn tensor(&self, name: &str) -> Result<ValueId, Error> {
        if name == self.sampler.roles.latent {
            return Ok(self.net.latent);
        }
        // A stream that has not met the latent yet is computed in front of all steps.
        let hoisted = self.net.hoisted_names.iter().zip(&self.net.hoisted).find(|(known, _)| *known == name);
        hoisted.map_or_else(|| self.cut(name), |(_, &value)| Ok(value))
    }

    /// The value that a plan cuts.
    pub(super) fn cut(&self, name: &str) -> Result<ValueId, Error> {
        if name == self.sampler.roles.output { Ok(self.net.output) } else { network::cut_value(&self.net.model, name) }
    }

    /// Puts a variant of the network into a scope.
    pub(super) fn paste(
        &mut self,
        step: usize,
        lane: Lane,
        latent: ValueId,
        numbers: &Numbers,
        scope: ScopeId,
        (cuts, given, kept): (&[(ValueId, How)], &[ValueId], &[ValueId]),
    ) -> Result<Vec<ValueId>, Error> {
        let key = format!("{cuts:?} {kept:?}");
        let variant = match self.variants.get(&key) {
            Some(known) => Rc::clone(known),
            None => {
                let variant = network::variant(&self.net.model, self.net.output, cuts, kept)?;
                let fragment = variant.model.graph.fragment(ScopeId::MAIN);
                let emitted = Rc::new((variant, fragment));
                self.variants.insert(key, Rc::clone(&emitted));
                emitted
            }
        };
        let (variant, fragment) = &*variant;
        let mut arguments: BTreeMap<ValueId, ValueId> = BTreeMap::from([(self.net.latent, latent)]);
        let hoisted = self.hoisted(lane)?;
        arguments.extend(self.net.hoisted.iter().copied().zip(hoisted));
        arguments.extend(variant.given.iter().copied().zip(given.iter().copied()));
        let mut ahead = numbers.ahead.clone();
        if self.net.feed == TimeFeed::Batch {
            let graph = &mut self.out.graph;
            let size = graph.append(scope, Node::new("Shape").with("start", 0).with("end", 1), &[latent], "batch");
            ahead = ahead.iter().map(|&t| graph.append(scope, Node::new("Expand"), &[t, size], "times")).collect();
        }
        arguments.extend(self.net.ahead.iter().copied().zip(ahead));
        let arguments: Vec<_> = fragment.inputs().iter().map(|v| arguments.get(v).copied()).collect();
        let prefix = match lane {
            Lane::One(Pass::Uncond) => format!("step{step}.uncond."),
            _ => format!("step{step}."),
        };
        let pasted = self.out.graph.paste(fragment, scope, &arguments, &self.known, &prefix);
        Ok(pasted.outputs.into_iter().flatten().collect())
    }

    /// The tensor that a substitution brings into the network, and what it does there.
    pub(super) fn given(
        &mut self,
        one: &Substitution,
        step: usize,
        lane: Lane,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<(How, ValueId), Error> {
        let dtype = self.facts.elem(self.cut(&one.cut)?).unwrap_or(self.net.dtype);
        let Some(terms) = one.terms(step) else {
            let Kind::Delta { input, from } = &one.kind else { unreachable!("only a delta has no terms") };
            let tensor = self.fetch(&What::of(one, &Ref::from(*from)), *from, lane, scope, state)?;
            return Ok((How::shifted(self.tensor(input)?), tensor));
        };
        let own = |r: &Ref| r.step == step && r.pass.is_none_or(|pass| lane == Lane::One(pass));
        let (mut inside, mut others) = (How::default(), Vec::new());
        for (r, weight) in &terms {
            if own(r) {
                inside.add(self.tensor(r.of.as_ref().unwrap_or(&one.cut))?, *weight);
            } else {
                let from = r.pass.map_or(lane, Lane::One);
                others.push((self.fetch(&What::of(one, r), r.step, from, scope, state)?, Factor::Number(*weight)));
            }
        }
        let mut sums = self.sums(scope);
        let tensor = if others.is_empty() {
            let zero = Tensor::from_f64s(dtype, &[], &[0.0]);
            let zero = zero.ok_or_else(|| Error::Plan(format!("`{}` of {dtype} cannot be weighted", one.cut)))?;
            sums.constant(zero, "nothing")
        } else {
            sums.sum(&others, dtype, "forecast")?
        };
        Ok((inside, tensor))
    }

    /// What a step stored, in a lane; halves of batches are taken and joined as needed.
    pub(super) fn fetch(
        &mut self,
        what: &What,
        step: usize,
        lane: Lane,
        scope: ScopeId,
        state: &mut State,
    ) -> Result<ValueId, Error> {
        let find = |store: &Store, lane: Lane| store.get(&(what.clone(), step, lane)).copied();
        if let Some(found) = find(&state.store, lane) {
            return Ok(found);
        }
        let missing = || Error::Plan(format!("step {step} left no `{}` for another pass", what.names()[0]));
        let [cond, uncond] = [Pass::Cond, Pass::Uncond].map(Lane::One);
        if lane == Lane::Both {
            let (a, b) = find(&state.store, uncond).zip(find(&state.store, cond)).ok_or_else(missing)?;
            let both = self.sums(scope).joined(a, b, "both");
            state.store.insert((what.clone(), step, lane), both);
            return Ok(both);
        }
        let both = find(&state.store, Lane::Both).ok_or_else(missing)?;
        let halves = self.sums(scope).halves(both, "half");
        for (lane, value) in [uncond, cond].into_iter().zip(halves) {
            state.store.insert((what.clone(), step, lane), value);
        }
        find(&state.store, lane).ok_or_else(missing)
    }

    /// The prediction of a step: of its only pass, or guided.
    pub(super) fn joined(
        &mut self,
        step: usize,
        found: &BTreeMap<Pass, ValueId>,
        scope: ScopeId,
    ) -> Result<ValueId, Error> {
        let (mode, guidance) = (self.sampler.plan.cfg[step], self.sampler.guidance);
        if !mode.is_guided() {
            return Ok(found[&mode.passes()[0]]);
        }
        let scale = match (mode, guidance.scale, self.scale) {
            (Mode::Scaled(scale), ..) | (_, Scale::Constant(scale), _) => Factor::Number(scale),
            (_, Scale::Input, input) => Factor::Value(input.expect("a guided step has its input")),
        };
        let ndim = self.net.dims.len();
        self.sums(scope).guided(found[&Pass::Cond], found[&Pass::Uncond], scale, guidance.rescale, ndim)
    }

    /// The next state from a prediction.
    pub(super) fn advance(
        &mut self,
        numbers: &Numbers,
        scope: ScopeId,
        state: &mut State,
        m: ValueId,
    ) -> Result<(), Error> {
        let (clip, dims) = (self.sampler.table.clip, self.net.dims.clone());
        let (kept, anchored) = (self.sampler.table.history(), self.sampler.table.anchored());
        let mut sums = self.sums(scope);
        let mut terms = vec![(state.x, numbers.state), (m, numbers.output)];
        if let Some((back, factor)) = numbers.anchor {
            let anchor = state.seen.get(back - 1).copied();
            terms.push((anchor.ok_or_else(|| early("starts from a state"))?, factor));
        }
        if numbers.keeps {
            let [x, output, estimate] = numbers.kept;
            let q = if clip == Clip::None {
                sums.sum(&[(state.x, x), (m, output)], DataType::Float, "clean")?
            } else {
                let [u, w] = numbers.estimate;
                let y = sums.sum(&[(state.x, u), (m, w)], DataType::Float, "clean")?;
                let y = sums.clipped(y, clip, &dims)?;
                sums.sum(&[(state.x, x), (m, output), (y, estimate)], DataType::Float, "kept")?
            };
            terms.push((q, numbers.history.first().copied().unwrap_or(Factor::Number(0.0))));
            state.history.insert(0, q);
        } else if kept > 0 {
            // Nobody asks for what this row keeps, but what earlier ones kept moves one place on.
            state.history.insert(0, state.x);
        }
        for (back, &weight) in numbers.history.iter().enumerate().skip(1) {
            match state.history.get(back) {
                Some(&q) => terms.push((q, weight)),
                None if weight == Factor::Number(0.0) => {}
                None => return Err(early("uses what was kept")),
            }
        }
        state.history.truncate(kept);
        state.seen.insert(0, state.x);
        state.seen.truncate(anchored);
        if let Some(border) = &numbers.border {
            let x = sums.sum(&terms, DataType::Float, "state")?;
            terms = vec![(self.resized(x, border, scope), Factor::Number(1.0))];
            state.history.clear();
        }
        terms.extend(&numbers.noise);
        state.x = self.sums(scope).sum(&terms, DataType::Float, "state")?;
        Ok(())
    }
}

/// The error of a row that needs what lies before the first.
fn early(what: &str) -> Error {
    Error::Plan(format!("a step {what} from before the first"))
}
