//! The sampler step by step, as a program around the denoiser would run it: what a compiled one is compared with.

use super::{
    Adaptive, Clip, Error, Guidance, Mode, Pass, Ref, Row, Sampler, Scale, Substitution, Uncond,
    emit::{What, stored},
    network::{self, How},
    plan::Kind,
    sizes::Resize,
};
use lathe_analysis::Evaluate;
use lathe_ir::{DataType, Model, Tensor, Type, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// What a run gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The sample.
    pub sample: Tensor,
    /// Which steps ran the network.
    pub computed: Vec<bool>,
}

/// Runs a sampler on named inputs, those that its compiled form takes. `original` is the denoiser as it was given.
///
/// Everything between evaluations is computed in float64. Where the plan cuts nothing the original itself is run, once
/// for each pass of each step; `tell` hears how many steps are done.
pub fn sample(
    sampler: &Sampler,
    original: &Model,
    inputs: &[(String, Tensor)],
    evaluator: &dyn Evaluate,
    tell: &dyn Fn(usize),
) -> Result<Sampled, Error> {
    let plain = sampler.plan.steps.is_empty();
    let base = if plain { original } else { sampler.denoiser };
    Run::new(sampler, base, inputs, evaluator)?.all(tell)
}

/// A tensor in float64.
#[derive(Debug, Clone)]
struct Array {
    dims: Vec<usize>,
    values: Vec<f64>,
}

impl Array {
    fn of(tensor: &Tensor) -> Result<Array, Error> {
        let values = tensor.to_f64s().ok_or_else(|| Error::Network(format!("{} is no number", tensor.dtype())))?;
        Ok(Array { dims: tensor.dims().to_vec(), values })
    }

    fn tensor(&self, dtype: DataType) -> Result<Tensor, Error> {
        let tensor = Tensor::from_f64s(dtype, &self.dims, &self.values);
        tensor.ok_or_else(|| Error::Network(format!("no numbers can be rounded to {dtype}")))
    }

    fn scaled(&self, factor: f64) -> Array {
        Array { dims: self.dims.clone(), values: self.values.iter().map(|v| v * factor).collect() }
    }

    fn sum(terms: &[(&Array, f64)]) -> Result<Array, Error> {
        let (first, factor) = terms[0];
        let mut sum = first.scaled(factor);
        for (array, factor) in &terms[1..] {
            if array.dims != sum.dims {
                let message = format!("tensors of shapes {:?} and {:?} are added", sum.dims, array.dims);
                return Err(Error::Network(message));
            }
            // A factor of zero leaves out what may not be finite.
            for (a, b) in sum.values.iter_mut().zip(&array.values).filter(|_| *factor != 0.0) {
                *a += factor * b;
            }
        }
        Ok(sum)
    }

    /// The first `count` entries of the second axis.
    fn channels(&self, count: usize) -> Array {
        let inner: usize = self.dims[2..].iter().product();
        let whole = self.dims[1] * inner;
        let values = self.values.chunks(whole.max(1)).flat_map(|sample| sample[..count * inner].to_vec()).collect();
        let mut dims = self.dims.clone();
        dims[1] = count;
        Array { dims, values }
    }

    /// The upper left of the last two axes.
    fn cropped(&self, [height, width]: [usize; 2]) -> Array {
        let mut dims = self.dims.clone();
        let [.., old_height, old_width] = dims.as_mut_slice() else { return self.clone() };
        let whole = [std::mem::replace(old_height, height), std::mem::replace(old_width, width)];
        let rows = self.values.chunks(whole[0] * whole[1]).flat_map(|plane| plane.chunks(whole[1]).take(height));
        Array { values: rows.flat_map(|row| &row[..width]).copied().collect(), dims }
    }

    /// The last two axes resized.
    fn resized(&self, [rows, columns]: &[Resize; 2]) -> Array {
        let mut dims = self.dims.clone();
        if let [.., height, width] = dims.as_mut_slice() {
            (*height, *width) = (rows.to, columns.to);
        }
        let at = |plane: &[f64], y: usize, x: usize| -> f64 {
            let across = |j: usize| -> f64 {
                let row = plane[j * columns.from..].iter();
                row.zip(&columns.weights[x * columns.from..][..columns.from]).map(|(v, w)| v * w).sum()
            };
            (0..rows.from)
                .map(|j| (rows.weights[y * rows.from + j], j))
                .filter(|(w, _)| *w != 0.0)
                .map(|(w, j)| w * across(j))
                .sum()
        };
        let planes = self.values.chunks(rows.from * columns.from);
        let values =
            planes.flat_map(|plane| (0..rows.to * columns.to).map(move |i| at(plane, i / columns.to, i % columns.to)));
        Array { values: values.collect(), dims }
    }

    fn samples(&self) -> impl Iterator<Item = &[f64]> {
        let size: usize = self.dims.iter().skip(1).product();
        self.values.chunks(size.max(1))
    }

    fn mean_size(&self) -> f64 {
        self.values.iter().map(|v| v.abs()).sum::<f64>() / self.values.len().max(1) as f64
    }
}

struct Run<'a> {
    sampler: &'a Sampler<'a>,
    base: &'a Model,
    inputs: &'a [(String, Tensor)],
    evaluator: &'a dyn Evaluate,
    stored: BTreeMap<usize, BTreeSet<What>>,
    store: BTreeMap<(What, usize, Pass), Array>,
    /// The element type of latent and prediction.
    dtype: DataType,
    /// Channels of the latent.
    channels: Option<usize>,
}

impl<'a> Run<'a> {
    fn new(
        sampler: &'a Sampler<'a>,
        base: &'a Model,
        inputs: &'a [(String, Tensor)],
        evaluator: &'a dyn Evaluate,
    ) -> Result<Run<'a>, Error> {
        let latent = base.graph.find_value(&sampler.roles.latent).and_then(|v| base.graph.value(v).ty.as_ref());
        let dtype = latent.and_then(Type::elem).unwrap_or(DataType::Float);
        let stored = stored(sampler.plan);
        Ok(Run { sampler, base, inputs, evaluator, stored, store: BTreeMap::new(), dtype, channels: None })
    }

    fn input(&self, name: &str) -> Result<&'a Tensor, Error> {
        let found = self.inputs.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor);
        found.ok_or_else(|| Error::Roles(format!("no value is given for `{name}`")))
    }

    fn all(mut self, tell: &dyn Fn(usize)) -> Result<Sampled, Error> {
        let table = self.sampler.table;
        let sizes = self.sampler.plan.sizes.as_ref();
        let mut x = Array::of(self.input("noise")?)?.scaled(table.initial_scale);
        if let Some(sizes) = sizes {
            x = x.cropped(sizes.steps[0]);
        }
        self.channels = x.dims.get(1).copied();
        let mut history: Vec<Array> = Vec::new();
        let mut seen: Vec<Array> = Vec::new();
        let mut last_noise: Option<Array> = None;
        let mut computed = Vec::new();
        let mut rule = self.sampler.plan.adaptive.map(|rule| Rule::new(rule, table.rows.len(), &x));
        let mut noises = 0;
        for (step, row) in table.rows.iter().enumerate() {
            let m = match &mut rule {
                None => {
                    let found = self.predict(step, row, &x)?;
                    self.joined(step, &found)?
                }
                Some(rule) => {
                    let run = rule.wants(step, row, &x);
                    let found = if run { Some(self.predict(step, row, &x)?) } else { None };
                    computed.push(run);
                    let joined = found.as_ref().map(|found| self.joined(step, found)).transpose()?;
                    let watched = found.as_ref().and_then(|found| found.get(&Pass::Cond)).or(joined.as_ref());
                    rule.next(row, &x, joined.as_ref().zip(watched))?
                }
            };
            let [u, w] = row.estimate;
            let y = clipped(Array::sum(&[(&x, u), (&m, w)])?, table.clip);
            let [of_state, of_output, of_estimate] = row.kept;
            history.insert(0, Array::sum(&[(&x, of_state), (&m, of_output), (&y, of_estimate)])?);
            let mut terms = vec![(&x, row.state), (&m, row.output)];
            terms.extend(history.iter().zip(row.history.iter().copied()));
            if let Some(anchor) = row.anchor {
                let missing = || Error::Plan("a step starts from a state from before the first".to_owned());
                terms.push((seen.get(anchor.back - 1).ok_or_else(missing)?, anchor.factor));
            }
            let fresh = if row.noise == 0.0 { None } else { Some(self.fresh(noises)?) };
            noises += usize::from(fresh.is_some());
            let next = sizes.map(|sizes| sizes.steps[(step + 1).min(table.rows.len() - 1)]);
            let mut fresh = fresh.map(|fresh| next.map_or(fresh.clone(), |next| fresh.cropped(next)));
            let border = sizes.and_then(|sizes| sizes.border(step));
            let kept;
            if let Some(border) = &border {
                kept = Array::sum(&terms)?.resized(&border.resize);
                terms = vec![(&kept, 1.0)];
                if let Some((noise, without)) = fresh.as_mut().zip(border.without.as_ref()) {
                    *noise = Array::sum(&[(noise, 1.0), (&noise.resized(without), -1.0)])?;
                }
            }
            if let Some(fresh) = &fresh {
                terms.push((fresh, row.noise));
            }
            if let Some(last) = last_noise.as_ref().filter(|_| row.noise_before != 0.0) {
                terms.push((last, row.noise_before));
            }
            let next = Array::sum(&terms)?;
            seen.insert(0, std::mem::replace(&mut x, next));
            seen.truncate(table.anchored());
            last_noise = fresh;
            history.truncate(if border.is_some() { 0 } else { table.history() });
            tell(step + 1);
        }
        if rule.is_none() {
            computed = vec![true; table.rows.len()];
        }
        Ok(Sampled { sample: x.tensor(DataType::Float)?, computed })
    }

    fn fresh(&self, index: usize) -> Result<Array, Error> {
        let all = Array::of(self.input("step_noise")?)?;
        let size: usize = all.dims[1..].iter().product();
        let values = all.values.get(index * size..(index + 1) * size);
        let values = values.ok_or_else(|| Error::Roles("`step_noise` has too few entries".to_owned()))?;
        Ok(Array { dims: all.dims[1..].to_vec(), values: values.to_vec() })
    }

    /// The predictions of every pass of a step.
    fn predict(&mut self, step: usize, row: &Row, x: &Array) -> Result<BTreeMap<Pass, Array>, Error> {
        let mut found = BTreeMap::new();
        for &pass in self.sampler.plan.cfg[step].passes() {
            found.insert(pass, self.evaluate(step, pass, row, x)?);
        }
        Ok(found)
    }

    fn evaluate(&mut self, step: usize, pass: Pass, row: &Row, x: &Array) -> Result<Array, Error> {
        let roles = self.sampler.roles;
        let mut inputs = vec![(roles.latent.clone(), x.scaled(row.input_scale).tensor(self.dtype)?)];
        inputs.push((roles.time.clone(), self.time(roles.time_of(row), x.dims[0])?));
        for condition in &roles.conditions {
            let cond = self.input(&condition.name)?;
            let value = match (pass, condition.uncond) {
                (Pass::Cond, _) | (_, Uncond::Same) => cond.clone(),
                (_, Uncond::Input) => self.input(&format!("{}_uncond", condition.name))?.clone(),
                (_, Uncond::Constant(number)) => {
                    let filled = Tensor::from_f64s(cond.dtype(), cond.dims(), &vec![number; cond.len()]);
                    filled.ok_or_else(|| Error::Roles(format!("`{}` holds no numbers", condition.name)))?
                }
            };
            inputs.push((condition.name.clone(), value));
        }
        let plan = self.sampler.plan;
        let wanted = self.stored.get(&step).cloned().unwrap_or_default();
        let cuts: Vec<&Substitution> = plan.at(step).iter().filter(|one| one.is_in(pass)).collect();
        let m = if cuts.is_empty() && wanted.is_empty() {
            let outputs = self.evaluator.run(self.base, &inputs)?;
            let found = outputs.into_iter().find(|(name, _)| *name == roles.output).map(|(_, tensor)| tensor);
            Array::of(&found.ok_or_else(|| Error::Network(format!("the denoiser gave no `{}`", roles.output)))?)?
        } else {
            self.cut(step, pass, &cuts, wanted, inputs)?
        };
        Ok(match (self.channels, m.dims.get(1)) {
            (Some(own), Some(&all)) if all == 2 * own && m.dims.len() == 4 => m.channels(own),
            _ => m,
        })
    }

    fn time(&self, time: f64, batch: usize) -> Result<Tensor, Error> {
        let graph = &self.base.graph;
        let value = graph.find_value(&self.sampler.roles.time);
        let ty = value.and_then(|v| graph.value(v).ty.as_ref());
        let elem = ty.and_then(Type::elem).unwrap_or(DataType::Float);
        let dims: Vec<usize> = ty
            .and_then(Type::shape)
            .map(|s| s.dims.iter().map(|d| d.known().map_or(batch, |d| d.max(0) as usize)).collect())
            .unwrap_or_default();
        let time = if elem.is_integer() { time.round_ties_even() } else { time };
        Array { values: vec![time; dims.iter().product()], dims }.tensor(elem)
    }

    /// Runs what a plan leaves of the denoiser.
    fn cut(
        &mut self,
        step: usize,
        pass: Pass,
        cuts: &[&Substitution],
        wanted: BTreeSet<What>,
        mut inputs: Vec<(String, Tensor)>,
    ) -> Result<Array, Error> {
        let output = self.value(&self.sampler.roles.output)?;
        let mut hows = Vec::new();
        let mut given = Vec::new();
        let mut whole = None;
        for one in cuts {
            let value = self.value(&one.cut)?;
            let (how, tensor) = self.given(one, step, pass)?;
            if value == output && how.is_given() {
                whole = Some(tensor.clone());
            }
            hows.push((value, how));
            given.push(tensor);
        }
        let names: BTreeSet<&str> = wanted.iter().flat_map(What::names).collect();
        let kept = names.iter().map(|name| self.tensor(name)).collect::<Result<Vec<_>, _>>()?;
        let mut variant = network::variant(self.base, output, &hows, &kept)?;
        for (&value, array) in variant.given.iter().zip(&given) {
            let value = variant.model.graph.value(value);
            let elem = value.ty.as_ref().and_then(Type::elem).unwrap_or(DataType::Float);
            inputs.push((value.name.clone(), array.tensor(elem)?));
        }
        network::drop_inputs(&mut variant.model);
        let graph = &variant.model.graph;
        let read = |name: &String| graph.main().inputs().iter().any(|&v| graph.value(v).name == *name);
        inputs.retain(|(name, _)| read(name));
        let nothing = graph.main().outputs().is_empty();
        let outputs = if nothing { Vec::new() } else { self.evaluator.run(&variant.model, &inputs)? };
        let mut outputs = outputs.into_iter().map(|(_, tensor)| Array::of(&tensor));
        let predicted = if variant.predicts { outputs.next().transpose()? } else { None };
        let tensors: BTreeMap<&str, Array> =
            names.iter().copied().zip(outputs.collect::<Result<Vec<_>, _>>()?).collect();
        for what in &wanted {
            let value = match what {
                What::Cut(cut) => tensors[cut.as_str()].clone(),
                What::Added(cut, input) => {
                    Array::sum(&[(&tensors[cut.as_str()], 1.0), (&tensors[input.as_str()], -1.0)])?
                }
            };
            self.store.insert((what.clone(), step, pass), value);
        }
        whole.or(predicted).ok_or_else(|| Error::Network("the denoiser gave no prediction".to_owned()))
    }

    fn value(&self, name: &str) -> Result<ValueId, Error> {
        network::cut_value(self.base, name)
    }

    /// The value of a tensor that plans refer to.
    fn tensor(&self, name: &str) -> Result<ValueId, Error> {
        match self.base.graph.find_value(name) {
            Some(latent) if name == self.sampler.roles.latent => Ok(latent),
            _ => self.value(name),
        }
    }

    fn given(&self, one: &Substitution, step: usize, pass: Pass) -> Result<(How, Array), Error> {
        let find = |r: &Ref, pass: Pass| {
            let found = self.store.get(&(What::of(one, r), r.step, pass));
            found.ok_or_else(|| Error::Plan(format!("step {} left no `{}`", r.step, one.cut)))
        };
        let Some(terms) = one.terms(step) else {
            let Kind::Delta { input, from } = &one.kind else { unreachable!("only a delta has no terms") };
            return Ok((How::shifted(self.value(input)?), find(&Ref::from(*from), pass)?.clone()));
        };
        let (mut inside, mut others) = (How::default(), Vec::new());
        for (r, weight) in &terms {
            if r.step == step && r.pass.is_none_or(|p| p == pass) {
                inside.add(self.tensor(r.of.as_ref().unwrap_or(&one.cut))?, *weight);
            } else {
                others.push((find(r, r.pass.unwrap_or(pass))?, *weight));
            }
        }
        let nothing = Array { dims: Vec::new(), values: vec![0.0] };
        let sum = if others.is_empty() { nothing } else { Array::sum(&others)? };
        Ok((inside, sum))
    }

    /// The prediction of a step: of its only pass, or guided.
    fn joined(&self, step: usize, found: &BTreeMap<Pass, Array>) -> Result<Array, Error> {
        let mode = self.sampler.plan.cfg[step];
        let Guidance { scale, rescale, .. } = self.sampler.guidance;
        if !mode.is_guided() {
            return Ok(found[&mode.passes()[0]].clone());
        }
        let scale = match (mode, scale) {
            (Mode::Scaled(scale), _) | (_, Scale::Constant(scale)) => scale,
            (_, Scale::Input) => self.input("guidance")?.scalar_f64().unwrap_or(1.0),
        };
        let (cond, uncond) = (&found[&Pass::Cond], &found[&Pass::Uncond]);
        let mut guided = Array::sum(&[(uncond, 1.0 - scale), (cond, scale)])?;
        if rescale != 0.0 {
            let factors: Vec<f64> = cond
                .samples()
                .zip(guided.samples())
                .map(|(wanted, found)| rescale * deviation(wanted) / deviation(found) + 1.0 - rescale)
                .collect();
            let size = guided.values.len() / factors.len().max(1);
            for (sample, factor) in guided.values.chunks_mut(size.max(1)).zip(factors) {
                sample.iter_mut().for_each(|v| *v *= factor);
            }
        }
        Ok(guided)
    }
}

fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

fn clipped(mut y: Array, clip: Clip) -> Array {
    match clip {
        Clip::None => {}
        Clip::Clamp(range) => y.values.iter_mut().for_each(|v| *v = v.clamp(-range, range)),
        Clip::Threshold { ratio, max } => {
            let size: usize = y.dims.iter().skip(1).product();
            for sample in y.values.chunks_mut(size.max(1)) {
                let mut sizes: Vec<f64> = sample.iter().map(|v| v.abs()).collect();
                sizes.sort_by(f64::total_cmp);
                let position = ratio * (sizes.len() - 1) as f64;
                let low = position.floor() as usize;
                let above = sizes[(low + 1).min(sizes.len() - 1)];
                let bound = (sizes[low] + (position - low as f64) * (above - sizes[low])).clamp(1.0, max);
                sample.iter_mut().for_each(|v| *v = v.clamp(-bound, bound) / bound);
            }
        }
    }
    y
}

/// The rule of the adaptive form, as its source states it.
struct Rule {
    rule: Adaptive,
    steps: usize,
    previous: Array,
    state: Array,
    flow: Array,
    added: Array,
    rate: f64,
    sum: f64,
    /// The sum if this step is skipped.
    expected: f64,
}

impl Rule {
    fn new(rule: Adaptive, steps: usize, x: &Array) -> Rule {
        let nothing = x.scaled(0.0);
        let flow = Array { dims: x.dims.clone(), values: vec![1.0; x.values.len()] };
        let (previous, state) = (nothing.clone(), nothing.clone());
        Rule { rule, steps, previous, state, flow, added: nothing, rate: 0.0, sum: 0.0, expected: 0.0 }
    }

    /// Whether a step is to be computed.
    fn wants(&mut self, step: usize, row: &Row, x: &Array) -> bool {
        let state = x.scaled(row.flow.scale);
        let moved: f64 = state.values.iter().zip(&self.previous.values).map(|(a, b)| (a - b).abs()).sum::<f64>()
            / state.values.len().max(1) as f64;
        self.expected = self.sum + self.rate * moved / self.flow.mean_size();
        let forced = step < self.rule.warmup || step + self.rule.tail >= self.steps;
        forced || self.expected >= self.rule.threshold
    }

    /// The prediction of a step, computed or not.
    fn next(&mut self, row: &Row, x: &Array, computed: Option<(&Array, &Array)>) -> Result<Array, Error> {
        let state = x.scaled(row.flow.scale);
        let [q, r] = row.flow.flow;
        let m = match computed {
            Some((m, watched)) => {
                let flow = Array::sum(&[(x, q), (m, r)])?;
                let watched = Array::sum(&[(x, q), (watched, r)])?;
                let turned = Array::sum(&[(&watched, 1.0), (&self.flow, -1.0)])?.mean_size();
                let gone = Array::sum(&[(&state, 1.0), (&self.state, -1.0)])?.mean_size();
                self.rate = turned / gone.max(1e-12);
                self.added = Array::sum(&[(&flow, 1.0), (&state, -1.0)])?;
                (self.state, self.flow, self.sum) = (state.clone(), watched, 0.0);
                m.clone()
            }
            None => {
                self.sum = self.expected;
                Array::sum(&[(&state, 1.0 / r), (&self.added, 1.0 / r), (x, -q / r)])?
            }
        };
        self.previous = state;
        Ok(m)
    }
}
