//! Methods by name: `gate:at=30+forecast:every=2,order=1`.

use super::plan_runner::{Seen, Trial};
use crate::Failure;
use anyhow::anyhow;
use lathe_ir::Tensor;
use lathe_passes::sampler::{
    Adaptive, StepPlan, Table, Up,
    methods::{
        Bottleneck, Delta, Dual, Forecast, Inner, LinearGuidance, Parts, Sada, bottleneck, delta, dual, easy, every,
        follow, forecast, gate, guide_until, is_stable, linear_guidance, rehash, sada, vote,
    },
};
use std::{collections::BTreeMap, str::FromStr};

/// Batches that calibrations look at.
const BATCHES: u64 = 2;
/// Where runs agree less than this on what is computed, each had better decide for itself.
const AGREEMENT: f64 = 0.8;

/// Every method with its options and their defaults.
const METHODS: &[(&str, &[(&str, &str)])] = &[
    ("bottleneck", &[("sizes", "1/0.5/1"), ("ends", ""), ("up", "linear")]),
    ("gate", &[("at", ""), ("threshold", "0.99"), ("share", "0.9")]),
    ("linear-guidance", &[("every", "2"), ("residual", "0.05")]),
    ("delta", &[("blocks", ""), ("speed", "1.6"), ("every", "2"), ("switch", "")]),
    ("arms", &[("every", "3"), ("first", "1"), ("order", "0"), ("points", "")]),
    ("stack", &[("every", "3"), ("first", "3"), ("order", "1"), ("points", "")]),
    ("forecast", &[("every", "3"), ("first", "3"), ("order", "1"), ("points", "")]),
    ("deep", &[("skip", "0"), ("every", "3"), ("first", "1")]),
    ("rehash", &[("skip", "0"), ("threshold", "0.95"), ("longest", "4")]),
    ("dual", &[("most", "0.3"), ("first", "false")]),
    ("easy", &[("threshold", "0.05"), ("warmup", "5"), ("tail", "1"), ("share", "0.3")]),
    ("sada", &[("stride", "4"), ("nodes", "4"), ("agreement", "0.7"), ("longest", "4")]),
];

/// What may follow on steps of several sizes: the others look at runs of one size, or at earlier steps whatever their size.
const STAGED: [&str; 5] = ["gate", "arms", "stack", "forecast", "deep"];

/// One method with the options that were given.
struct Call {
    name: &'static str,
    given: BTreeMap<&'static str, String>,
    defaults: &'static [(&'static str, &'static str)],
}

impl Call {
    fn parse(text: &str) -> Result<Call, Failure> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let (name, defaults) = METHODS.iter().find(|(n, _)| *n == name).ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|(n, _)| *n).collect();
            Failure::Usage(format!("no method is called `{name}`, expected one of {}", names.join(", ")))
        })?;
        let mut given = BTreeMap::new();
        for part in rest.split(',').filter(|p| !p.is_empty()) {
            let found = part
                .split_once('=')
                .and_then(|(key, value)| Some((defaults.iter().find(|(k, _)| *k == key)?.0, value.to_owned())));
            let keys: Vec<&str> = defaults.iter().map(|(k, _)| *k).collect();
            let wrong =
                || Failure::Usage(format!("`{part}` is no option of {name}, expected one of {}", keys.join(", ")));
            let (key, value) = found.ok_or_else(wrong)?;
            given.insert(key, value);
        }
        Ok(Call { name, given, defaults })
    }

    /// An option; `None` where it is neither given nor has a default.
    fn option<T: FromStr>(&self, key: &str) -> Result<Option<T>, Failure> {
        let default = self.defaults.iter().find(|(k, _)| *k == key).map_or("", |(_, default)| *default);
        let text = self.given.get(key).map_or(default, String::as_str);
        if text.is_empty() {
            return Ok(None);
        }
        let wrong = |_| Failure::Usage(format!("option {key} of {} is `{text}`, expected a number", self.name));
        text.parse().map(Some).map_err(wrong)
    }

    /// An option of several numbers; `None` where it is neither given nor has a default.
    fn several<T: FromStr>(&self, key: &str) -> Result<Option<Vec<T>>, Failure> {
        let Some(text) = self.option::<String>(key)? else { return Ok(None) };
        let wrong = |_| Failure::Usage(format!("option {key} of {} is `{text}`, expected numbers as 1/2/3", self.name));
        text.split('/').map(|part| part.parse().map_err(wrong)).collect::<Result<_, _>>().map(Some)
    }

    /// An option that has a default.
    fn get<T: FromStr>(&self, key: &str) -> Result<T, Failure> {
        let missing = || Failure::Usage(format!("{} needs its option {key}", self.name));
        self.option(key)?.ok_or_else(missing)
    }

    fn forecast(&self) -> Result<Forecast, Failure> {
        Ok(match (self.option("points")?, self.get("order")?) {
            (Some(points), _) => Forecast::Lagrange(points),
            (None, 0) => Forecast::Reuse,
            (None, order) => Forecast::Taylor(order),
        })
    }
}

/// The plan of some methods, one after the other, on the steps that were asked for; and a sentence where it should rather
/// be decided at run time.
pub(super) fn run(trial: &Trial, text: &str) -> Result<(StepPlan, Option<String>), Failure> {
    let calls: Vec<Call> = text.split('+').map(Call::parse).collect::<Result<_, _>>()?;
    let table = trial.asked()?;
    let mut plan = trial.plain(&table);
    let parts = Parts::find(trial.denoiser, trial.roles)?;
    let mut seen = Calibration { trial, table: &table, runs: Vec::new() };
    for call in &calls {
        apply(call, &mut plan, &parts, &mut seen)?;
    }
    plan.check()?;
    plan.evidence.insert("methods".to_owned(), text.into());
    let agreement = plan.evidence.get("agreement").and_then(serde_json::Value::as_f64);
    let sentence = agreement.filter(|&agreement| agreement < AGREEMENT).map(|agreement| {
        let agreement = 100.0 * agreement;
        format!("easy: runs agree on {agreement:.0} % of what is computed; --form adaptive lets each decide")
    });
    Ok((plan, sentence))
}

fn apply(call: &Call, plan: &mut StepPlan, parts: &Parts, seen: &mut Calibration) -> Result<(), Failure> {
    let steps = plan.grid.len();
    let output = vec![parts.output.clone()];
    let none = |what: &str| Failure::Usage(format!("{} needs {what}, and the denoiser has none", call.name));
    let uncalibrated = call.name == "gate" && call.option::<usize>("at")?.is_none();
    if plan.sizes.is_some() && call.name != "bottleneck" && (uncalibrated || !STAGED.contains(&call.name)) {
        let without = if uncalibrated { " without its option at" } else { "" };
        let message = format!("{}{without} looks at steps of one size, and bottleneck makes several", call.name);
        return Err(Failure::Usage(message));
    }
    match call.name {
        "bottleneck" => {
            let up: String = call.get("up")?;
            let up = Up::from_name(&up).ok_or_else(|| {
                let message = format!("option up of bottleneck is `{up}`, expected nearest, linear, cubic or matched");
                Failure::Usage(message)
            })?;
            let shares: Vec<f64> = call.several("sizes")?.unwrap_or_default();
            let sizes = sizes(seen.trial, &shares)?;
            let usual = if shares.len() == 3 { Bottleneck::usual_ends(steps) } else { None };
            let ends = call.several("ends")?.or(usual).ok_or_else(|| {
                let stages = shares.len();
                Failure::Usage(format!(
                    "bottleneck needs its option ends for {stages} stages of {steps} steps: 4/16/21"
                ))
            })?;
            let trial = seen.trial;
            bottleneck(plan, trial.scheduler, &trial.request, seen.table, &Bottleneck { sizes, ends, up })?;
        }
        "gate" => {
            let at = match call.option("at")? {
                Some(at) => at,
                None => gate(&seen.cosines()?, call.get("threshold")?, call.get("share")?),
            };
            guide_until(plan, at)?;
        }
        "linear-guidance" => {
            let options = LinearGuidance { every: call.get("every")?, most_residual: call.get("residual")? };
            let inner = seen.inner(steps)?;
            linear_guidance(plan, &parts.output, &inner, &options)?;
        }
        "delta" => {
            let (every, speed) = (call.get("every")?, call.get("speed")?);
            let fitted = Delta::for_speed(speed, parts.blocks(), every, steps);
            let blocks = call.option("blocks")?.or(fitted.map(|d| d.blocks));
            let blocks = blocks.ok_or_else(|| none("more repeated blocks for that speed"))?;
            let switch = call.option("switch")?.unwrap_or(steps * 3 / 5);
            delta(plan, parts, &Delta { blocks, switch, every })?;
        }
        "arms" | "stack" | "forecast" => {
            let cuts = match call.name {
                "arms" => parts.arms.clone(),
                "stack" => parts.borders.last().cloned().unwrap_or_default(),
                _ => output,
            };
            if cuts.is_empty() {
                return Err(none("repeated blocks"));
            }
            forecast(plan, &cuts, &every(call.get("every")?, call.get("first")?, steps), call.forecast()?)?;
        }
        "deep" | "rehash" => {
            let cut = parts.deep.get(call.get::<usize>("skip")?).cloned().ok_or_else(|| none("such a skip"))?;
            let computed = match call.name {
                "deep" => every(call.get("every")?, call.get("first")?, steps),
                _ => {
                    let values = seen.values(&cut)?;
                    let cosine = |from: usize, step: usize| cosine(&values[from], &values[step]);
                    rehash(steps, call.get("threshold")?, call.get("longest")?, &cosine)
                }
            };
            forecast(plan, &[cut], &computed, Forecast::Reuse)?;
        }
        "easy" => {
            let rule =
                Adaptive { threshold: call.get("threshold")?, warmup: call.get("warmup")?, tail: call.get("tail")? };
            let runs: Vec<Vec<bool>> = seen.samples()?.iter().map(|s| follow(&rule, &s.states, &s.flows)).collect();
            let (computed, agreement) = vote(&runs, call.get("share")?);
            easy(plan, seen.table, &seen.trial.roles.latent, &parts.output, &computed)?;
            plan.evidence.insert("agreement".to_owned(), agreement.into());
        }
        "dual" => dual(plan, &parts.output, &Dual { most: call.get("most")?, first: call.get("first")? })?,
        _ => {
            let options = Sada {
                stride: call.get("stride")?,
                nodes: call.get("nodes")?,
                agreement: call.get("agreement")?,
                longest: call.get("longest")?,
                ..Sada::stretched(steps)
            };
            sada(plan, &parts.output, &seen.stable(steps)?, &options)?;
        }
    }
    Ok(())
}

/// Height and width of stages by their shares of those that samples have.
fn sizes(trial: &Trial, shares: &[f64]) -> Result<Vec<[usize; 2]>, Failure> {
    let full = trial.sides()?;
    let side = |share: f64, whole: usize| {
        let side = share * whole as f64;
        let fits = side >= 1.0 && share <= 1.0 && side.fract() == 0.0;
        fits.then_some(side as usize).ok_or_else(|| {
            Failure::Usage(format!(
                "option sizes of bottleneck has {share} of {whole}, expected a whole number up to {whole}"
            ))
        })
    };
    if shares.last() != Some(&1.0) {
        return Err(Failure::Usage(
            "option sizes of bottleneck ends with 1, the size of the sample: 1/0.5/1".to_owned(),
        ));
    }
    shares.iter().map(|&share| Ok([side(share, full[0])?, side(share, full[1])?])).collect()
}

/// One sample's latents and predictions at every step, in the coordinates of a flow.
#[derive(Default)]
struct Path {
    states: Vec<Vec<f64>>,
    flows: Vec<Vec<f64>>,
}

/// What the plain loop does, run when it is first asked for.
pub(super) struct Calibration<'a> {
    pub trial: &'a Trial<'a>,
    pub table: &'a Table,
    pub runs: Vec<Vec<Seen>>,
}

impl Calibration<'_> {
    fn runs(&mut self) -> Result<&[Vec<Seen>], Failure> {
        for batch in self.runs.len() as u64..BATCHES {
            // Batches apart from those that plans are compared on.
            self.runs.push(self.trial.watch(self.trial.denoiser, self.table, (1 << 24) + batch)?.1);
        }
        Ok(&self.runs)
    }

    /// An output of every pass of a step, in float64, sample after sample.
    fn outputs(&self, step: &Seen) -> Result<Vec<Vec<f64>>, Failure> {
        let name = &self.trial.roles.output;
        let of = |outputs: &Vec<(String, Tensor)>| {
            let found = outputs.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.to_f64s());
            found.ok_or_else(|| Failure::Error(anyhow!("the denoiser gave no numbers as `{name}`")))
        };
        step.outputs.iter().map(of).collect()
    }

    /// For every sample and step the cosine between the noise that both passes see.
    pub fn cosines(&mut self) -> Result<Vec<Vec<f64>>, Failure> {
        self.runs()?;
        let mut all = Vec::new();
        for run in &self.runs {
            let samples = run.first().map_or(0, |step| step.latent.dims()[0]);
            let mut of: Vec<Vec<f64>> = vec![Vec::new(); samples];
            for (step, row) in run.iter().zip(&self.table.rows) {
                let outputs = self.outputs(step)?;
                let [cond, uncond] = outputs.as_slice() else {
                    return Err(Failure::Usage(
                        "there is no guidance to end; --guidance says how strong it is".to_owned(),
                    ));
                };
                let state = step.latent.to_f64s().unwrap_or_default();
                // The noise is the flow plus the clean sample.
                let [on_state, on_output] = [0, 1].map(|i| row.flow.flow[i] + row.estimate[i]);
                let noise = |m: &[f64]| -> Vec<f64> {
                    let pairs = m.iter().zip(&state);
                    pairs.map(|(m, x)| on_state * x / row.input_scale + on_output * m).collect()
                };
                let (cond, uncond) = (noise(cond), noise(uncond));
                let size = (cond.len() / samples.max(1)).max(1);
                for (sample, (a, b)) in cond.chunks(size).zip(uncond.chunks(size)).enumerate().take(samples) {
                    of[sample].push(cosine(a, b));
                }
            }
            all.extend(of);
        }
        Ok(all)
    }

    fn inner(&mut self, steps: usize) -> Result<Inner, Failure> {
        self.runs()?;
        let mut inner = Inner::new(steps);
        for run in &self.runs {
            let pairs = |step: &Seen| -> Result<[Vec<f64>; 2], Failure> {
                <[Vec<f64>; 2]>::try_from(self.outputs(step)?)
                    .map_err(|_| Failure::Usage("linear-guidance needs --guidance".to_owned()))
            };
            inner.add(&run.iter().map(pairs).collect::<Result<Vec<_>, _>>()?)?;
        }
        Ok(inner)
    }

    /// What every sample went through, in the conditional pass.
    fn samples(&mut self) -> Result<Vec<Path>, Failure> {
        self.runs()?;
        let mut all = Vec::new();
        for run in &self.runs {
            let samples = run.first().map_or(0, |step| step.latent.dims()[0]);
            let mut paths: Vec<Path> = (0..samples).map(|_| Path::default()).collect();
            for (step, row) in run.iter().zip(&self.table.rows) {
                let state: Vec<f64> =
                    step.latent.to_f64s().unwrap_or_default().iter().map(|x| x / row.input_scale).collect();
                let output = self.outputs(step)?.swap_remove(0);
                if output.len() != state.len() {
                    let message = "the denoiser predicts another shape than that of its latent (a variance too?), which \
                                   this method knows nothing of";
                    return Err(Failure::Usage(message.to_owned()));
                }
                let [a, b] = row.flow.flow;
                let size = (state.len() / samples.max(1)).max(1);
                for ((path, x), m) in paths.iter_mut().zip(state.chunks(size)).zip(output.chunks(size)) {
                    path.flows.push(x.iter().zip(m).map(|(x, m)| a * x + b * m).collect());
                    path.states.push(x.iter().map(|x| x * row.flow.scale).collect());
                }
            }
            all.extend(paths);
        }
        Ok(all)
    }

    /// At every step the share of samples for which the step can be left out by the criterion of stability.
    fn stable(&mut self, steps: usize) -> Result<Vec<f64>, Failure> {
        let samples = self.samples()?;
        // The time of the flow: its noise over signal and noise together.
        let times: Vec<f64> = self.table.rows.iter().map(|row| -row.estimate[1] / row.flow.flow[1]).collect();
        let mut votes = vec![0.0; steps];
        for Path { states, flows } in &samples {
            for step in 2..steps.saturating_sub(1) {
                let gradients = [&flows[step][..], &flows[step - 1], &flows[step - 2]];
                let width = times[step] - times[step + 1];
                if is_stable(&states[step + 1], &states[step], gradients, width) {
                    votes[step + 1] += 1.0;
                }
            }
        }
        Ok(votes.into_iter().map(|v| v / samples.len().max(1) as f64).collect())
    }

    /// What a tensor inside the denoiser is at every step of one batch, in the conditional pass.
    fn values(&self, cut: &str) -> Result<Vec<Vec<f64>>, Failure> {
        let mut watched = self.trial.denoiser.clone();
        let value = watched.graph.find_value(cut).ok_or_else(|| anyhow!("the denoiser has no value `{cut}`"))?;
        watched.graph.value_mut(value).ty = lathe_analysis::Facts::infer(self.trial.denoiser).ty(value);
        watched.graph.add_output(lathe_ir::ScopeId::MAIN, value);
        let (_, seen) = self.trial.watch(&watched, self.table, 1 << 24)?;
        let of = |step: &Seen| {
            let found = step.outputs[0].iter().find(|(n, _)| n == cut).and_then(|(_, t)| t.to_f64s());
            found.ok_or_else(|| Failure::Error(anyhow!("the denoiser gave no numbers as `{cut}`")))
        };
        seen.iter().map(of).collect()
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_method() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/samplers.md");
        let text = std::fs::read_to_string(path).unwrap();
        let rows: Vec<(&str, &str)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .filter_map(|line| Some((line.split_once('`')?.0, line.split('`').nth(2)?)))
            .collect();
        let options = |options: &[(&str, &str)]| {
            options.iter().map(|(key, default)| format!("{key}={default}")).collect::<Vec<_>>().join(",")
        };
        let expected: Vec<(&str, String)> = METHODS.iter().map(|(name, o)| (*name, options(o))).collect();
        assert_eq!(rows, expected.iter().map(|(name, options)| (*name, options.as_str())).collect::<Vec<_>>());
    }

    #[test]
    fn options_are_read_and_refused() {
        let call = Call::parse("delta:blocks=3,every=4").unwrap();
        assert_eq!((call.get::<usize>("blocks").unwrap(), call.get::<usize>("every").unwrap()), (3, 4));
        assert_eq!(call.option::<usize>("switch").unwrap(), None);
        assert_eq!(Call::parse("stack:points=4").unwrap().forecast().unwrap(), Forecast::Lagrange(4));
        assert_eq!(Call::parse("arms").unwrap().forecast().unwrap(), Forecast::Reuse);
        let refused = |text: &str| match Call::parse(text) {
            Ok(call) => call.get::<usize>("every").unwrap_err().to_string(),
            Err(failure) => failure.to_string(),
        };
        assert!(refused("magic").contains("expected one of bottleneck, gate"));
        assert!(refused("delta:rate=3").contains("`rate=3` is no option of delta"));
        assert!(refused("arms:every=x").contains("expected a number"));
    }
}
