//! The parts of a pipeline around its sampling loop: what they become in front of it and behind it.

use super::{
    SamplerOptions,
    denoiser::Denoiser,
    folder::Folder,
    source::Source,
    stages::{Ends, SAMPLES, Stages},
};
use crate::{Failure, report::Side, runner::Runner};
use anyhow::{Context as _, anyhow};
use lathe_ir::{Dim, Model};
use lathe_passes::sampler::{
    RoleOptions, Scheduler,
    pipelines::{Asked, Config, DECODER, Empty, Guided, Negative, Part, Pipeline, decoded, encoded},
};
use lathe_runtime::{Claim, InputSpec, Inputs, Verdict};
use serde_json::{Map, Value};

/// What stands for the text in the unconditional pass.
#[derive(Debug, Clone, PartialEq)]
pub enum NegativeText {
    /// Token ids that are inputs of the result.
    Input,
    /// Zeros where the text encoders would give something.
    Zeros,
    /// These token ids, by the names of inputs, as tokenizers write them.
    Ids(Map<String, Value>),
}

/// What is asked of a pipeline besides its loop.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PipelineOptions {
    /// Height and width of what it makes, in pixels.
    pub size: Option<[usize; 2]>,
    /// Frames of what it makes.
    pub frames: Option<usize>,
    /// What stands for the text in the unconditional pass; `None` is what pipelines of the class do.
    pub negative: Option<NegativeText>,
    /// Whether the result is the loop alone.
    pub only_loop: bool,
}

/// The parts of a pipeline around its loop.
pub(super) struct Around {
    pub pipeline: &'static Pipeline,
    parts: Vec<(String, Source, Config)>,
    denoiser_config: Config,
    /// What every encoder and decoder is asked for, but for noise that the solver adds.
    asked: Asked,
    negative: NegativeText,
    /// The shape of the noise on trials, where it is open.
    noise: Vec<Option<usize>>,
    inputs: InputSpec,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A pipeline as a job has it: what is asked of its loop, its denoiser, and what is around them.
pub(super) struct Prepared {
    pub options: SamplerOptions,
    pub denoiser: Denoiser,
    pub around: Option<Around>,
}

/// Reads a pipeline's folder.
pub(super) fn prepare(asked: &SamplerOptions) -> Result<Prepared, Failure> {
    if asked.actions.is_some() {
        let message = "--actions is about the denoiser of a policy, and this is the folder of a pipeline of images";
        return Err(Failure::Usage(message.to_owned()));
    }
    let folder = Folder::open(&asked.denoiser)?;
    let pipeline = folder.pipeline()?;
    let mut options = asked.clone();
    options.denoiser = folder.model(pipeline.denoiser)?;
    let roles: Vec<String> = pipeline.roles.iter().map(|&role| role.to_owned()).collect();
    options.roles = options.roles.or(RoleOptions::parse(&roles)?);
    let mut denoiser = Denoiser::read(&options.denoiser, &options.roles)?;
    let denoiser_config = Config::new(pipeline.denoiser, folder.config(pipeline.denoiser)?);
    let vae = Config::new(DECODER, folder.config(DECODER)?);
    if let Some(channels) = denoiser_config.count("in_channels").filter(|_| !pipeline.packed) {
        denoiser.state_channels(pipeline.channels, channels);
    }
    let (scheduler, _) = Scheduler::parse(&options.scheduler, options.solver)?;
    let size = Size::of(asked, pipeline, &denoiser, [&denoiser_config, &vae], scheduler.dynamic_shift.is_some())?;
    let patch = pipeline.patch.or(denoiser_config.count("patch_size")).unwrap_or(1).max(1);
    let frames = size.frames.unwrap_or(1);
    let tokens = size.usual[0] / patch * (size.usual[1] / patch) * frames;
    options.request.tokens = options.request.tokens.or(scheduler.dynamic_shift.as_ref().map(|_| tokens.max(1)));
    options.request.explicit_sigmas |= pipeline.explicit_sigmas && takes_sigmas(&options, &scheduler);
    let embedded = pipeline.guided == Guided::Embedded || denoiser.original.graph.find_value("timestep_cond").is_some();
    let guidance = if embedded { options.guidance.take().map(|guidance| guidance.scale) } else { None };
    options.guidance = options.guidance.filter(|guidance| !guidance.is_plain());
    let negative = negative(asked, pipeline, &folder, options.guidance.is_some())?;
    if asked.pipeline.only_loop {
        return Ok(Prepared { options, denoiser, around: None });
    }
    let mut parts = Vec::new();
    for &name in pipeline.encoders.iter().chain([&DECODER]) {
        let source = Source::read(&folder.model(name)?)?;
        parts.push((name.to_owned(), source, Config::new(name, folder.config(name)?)));
    }
    let opset = parts.iter().map(|(_, part, _)| part.opset()).max().unwrap_or(0).max(denoiser.opset());
    parts.iter().for_each(|(_, part, _)| part.raise(opset));
    denoiser.raise(opset);
    let inputs = std::mem::take(&mut options.run.inputs.shapes);
    let inputs = InputSpec { shapes: inputs, ..options.run.inputs.clone() };
    let asked = Asked {
        negative: if options.guidance.is_none() { Negative::None } else { Negative::Ids },
        guidance,
        size: size.fixed,
        frames: size.frames,
        noises: 0,
    };
    let mut warnings: Vec<String> = folder.left_out().into_iter().collect();
    for (name, part, _) in &parts {
        warnings.extend(part.warnings.iter().map(|warning| format!("`{name}`: {warning}")));
    }
    let noise = size.noise(pipeline, &denoiser, &vae);
    if !pipeline.packed {
        // Plans are made on latents of the size that trials have.
        let dims = noise.iter().map(|dim| dim.unwrap_or(SAMPLES)).collect();
        options.run.inputs.shapes.push((denoiser.roles.latent.clone(), dims));
    }
    let around = Around { pipeline, parts, denoiser_config, asked, negative, noise, inputs, warnings };
    Ok(Prepared { options, denoiser, around: Some(around) })
}

/// Whether the pipeline tells this scheduler noise levels: flows that do not make their own.
fn takes_sigmas(options: &SamplerOptions, scheduler: &Scheduler) -> bool {
    let own = options.scheduler.get("use_flow_sigmas").and_then(Value::as_bool).unwrap_or(false);
    scheduler.solver.name() == "flow-euler" && !own
}

fn negative(
    asked: &SamplerOptions,
    pipeline: &Pipeline,
    folder: &Folder,
    guided: bool,
) -> Result<NegativeText, Failure> {
    if let Some(negative) = &asked.pipeline.negative {
        if !guided {
            let message =
                "--negative is about the unconditional pass, which --guidance asks for where a pipeline has one";
            return Err(Failure::Usage(message.to_owned()));
        }
        return Ok(negative.clone());
    }
    let zeros = pipeline.empty == Empty::Zeros && folder.says("force_zeros_for_empty_prompt");
    Ok(if zeros { NegativeText::Zeros } else { NegativeText::Input })
}

/// The size of the latent.
struct Size {
    /// Height and width, where the result is for one size.
    fixed: Option<[usize; 2]>,
    /// Height and width that trials have.
    usual: [usize; 2],
    frames: Option<usize>,
}

impl Size {
    fn of(
        asked: &SamplerOptions,
        pipeline: &Pipeline,
        denoiser: &Denoiser,
        [config, vae]: [&Config; 2],
        shifted: bool,
    ) -> Result<Size, Failure> {
        let factor = vae.spatial_factor();
        let latent = denoiser.latent();
        let own = match latent.as_slice() {
            [.., h, w] if !pipeline.packed && latent.len() >= 4 => known(h).zip(known(w)).map(|(h, w)| [h, w]),
            _ => None,
        };
        let wanted = match asked.pipeline.size {
            None => None,
            Some([height, width]) => {
                let step = if pipeline.packed { factor * pipeline.patch.unwrap_or(1) } else { factor };
                if height % step != 0 || width % step != 0 || height == 0 || width == 0 {
                    let message = format!("--size is {height}x{width}, expected multiples of {step}");
                    return Err(Failure::Usage(message));
                }
                Some([height / factor, width / factor])
            }
        };
        if let Some(([h, w], [height, width])) = own.zip(wanted).filter(|(own, wanted)| own != wanted) {
            let name = pipeline.denoiser;
            let message = format!("`{name}` takes latents of {h}×{w}, and --size asks for {height}×{width}");
            return Err(Failure::Usage(message));
        }
        let side = || (pipeline.side > 0).then_some([pipeline.side; 2]);
        let usual = wanted.or(own).or(config.sample_size()).or_else(side).ok_or_else(|| {
            Failure::Usage(format!("`{}/config.json` says no size; --size HxW does", pipeline.denoiser))
        })?;
        let fixed = wanted.or(own).or((pipeline.packed || shifted).then_some(usual));
        let frames = match (asked.pipeline.frames, pipeline.frames) {
            (None, None) => None,
            (Some(_), None) => {
                let message = format!("--frames is about videos, and {} makes images", pipeline.classes[0]);
                return Err(Failure::Usage(message));
            }
            (asked, Some(axis)) => {
                let step = vae.temporal_factor();
                let own = latent.get(axis).and_then(known);
                let said = asked.or(config.count("sample_frames").filter(|_| own.is_none()));
                if let Some(frames) = said.filter(|frames| *frames == 0 || (frames - 1) % step != 0) {
                    return Err(Failure::Usage(format!(
                        "--frames is {frames}, expected one more than a multiple of {step}"
                    )));
                }
                let wanted = said.map(|frames| (frames - 1) / step + 1);
                if let Some((own, wanted)) = own.zip(wanted).filter(|(own, wanted)| own != wanted) {
                    let name = pipeline.denoiser;
                    let message = format!("`{name}` takes latents of {own} frames, and --frames asks for {wanted}");
                    return Err(Failure::Usage(message));
                }
                own.or(wanted)
            }
        };
        Ok(Size { fixed, usual, frames })
    }

    /// The sizes of the noise on trials, where the shape is as the denoiser's latent or its unpacked form.
    fn noise(&self, pipeline: &Pipeline, denoiser: &Denoiser, vae: &Config) -> Vec<Option<usize>> {
        let mut dims: Vec<Option<usize>> = match pipeline.packed {
            true => vec![None, vae.count("latent_channels"), None, None],
            false => denoiser.latent().iter().map(known).collect(),
        };
        if let (Some(axis), Some(frames)) = (pipeline.frames, self.frames)
            && let Some(dim) = dims.get_mut(axis)
        {
            *dim = Some(frames);
        }
        if let [.., h, w] = dims.as_mut_slice() {
            (*h, *w) = (Some(self.usual[0]), Some(self.usual[1]));
        }
        dims
    }
}

fn known(dim: &Dim) -> Option<usize> {
    dim.known().and_then(|d| usize::try_from(d).ok())
}

impl Around {
    /// The folder and its parts in the terms of the report.
    pub fn sides(&self, folder: &SamplerOptions, denoiser: &Side) -> (Side, Vec<Side>) {
        let mut sides: Vec<Side> = vec![denoiser.clone()];
        sides.extend(self.parts.iter().map(|(_, part, _)| part.side.clone()));
        let sum = |of: fn(&Side) -> u64| sides.iter().map(of).sum();
        let whole = Side {
            path: folder.denoiser.display().to_string(),
            file_bytes: sum(|s| s.file_bytes),
            weight_bytes: sum(|s| s.weight_bytes),
            nodes: sum(|s| s.nodes),
            nodes_total: sum(|s| s.nodes_total),
            parameters: sum(|s| s.parameters),
            flops: sum(|s| s.flops),
            peak_activation_bytes: sides.iter().map(|s| s.peak_activation_bytes).max().unwrap_or(0),
            opset: denoiser.opset,
        };
        (whole, sides)
    }

    /// Whether weights of some part are beside it.
    pub fn data(&self) -> bool {
        self.parts.iter().any(|(_, part, _)| part.data)
    }

    /// The models in front of the loop and behind it, with the parts simplified and as they are.
    pub fn stages(
        &self,
        options: &SamplerOptions,
        denoiser: &Denoiser,
        noises: usize,
        runner: &Runner,
    ) -> Result<(Stages, Vec<String>), Failure> {
        let mut warnings = Vec::new();
        let (mut plain, mut simplified) = (vec![self.denoiser(denoiser)], vec![self.denoiser(denoiser)]);
        for (name, source, config) in &self.parts {
            let part = |model: Model| Part { name: name.clone(), model, config: config.clone() };
            let upgraded = source.upgraded(runner)?;
            if options.verify
                && upgraded.opset() != source.original.opset()
                && let Some(reason) = differs(source, &upgraded, &self.inputs, runner)?
            {
                let message = format!("`{name}` cannot be upgraded to operator set {}: {reason}", upgraded.opset());
                return Err(Failure::Refused(message));
            }
            let model = source.simplified(runner, &options.run.progress)?.model.clone();
            let reason = if options.verify { differs(source, &model, &self.inputs, runner)? } else { None };
            match reason {
                None => simplified.push(part(model)),
                Some(reason) => {
                    warnings.push(format!("`{name}` was not simplified: with it simplified {reason}"));
                    simplified.push(part(upgraded.clone()));
                }
            }
            plain.push(part(upgraded));
        }
        let asked = self.asked(&plain, denoiser, noises, runner)?;
        let ends = |parts: &[Part]| self.ends(parts, denoiser, &asked);
        let stages = Stages {
            output: self.pipeline.output,
            packed: self.pipeline.packed,
            reference: ends(&plain)?,
            result: ends(&simplified)?,
            noise: self.noise.clone(),
            inputs: self.inputs.clone(),
        };
        Ok((stages, warnings))
    }

    fn denoiser(&self, denoiser: &Denoiser) -> Part {
        let name = self.pipeline.denoiser.to_owned();
        let mut model = denoiser.original.clone();
        // Its inputs are all that is asked of it here.
        model.opsets.iter_mut().filter(|(domain, _)| domain.is_empty()).for_each(|(_, v)| *v = denoiser.opset());
        Part { name, model, config: self.denoiser_config.clone() }
    }

    fn ends(&self, parts: &[Part], denoiser: &Denoiser, asked: &Asked) -> Result<Ends, Failure> {
        let encode = encoded(self.pipeline, parts, &denoiser.roles, asked)?;
        let gives = |name: &str| encode.graph.main().outputs().iter().any(|&v| encode.graph.value(v).name == name);
        if let Some(condition) = denoiser.roles.conditions.iter().find(|c| !gives(&c.name)) {
            let (name, missing) = (self.pipeline.denoiser, &condition.name);
            return Err(Failure::Error(anyhow!(
                "`{name}` takes `{missing}`, which pipelines of class `{}` do not give it here; --only loop compiles its loop \
                 with that as an input",
                self.pipeline.classes[0]
            )));
        }
        let mut sample = denoiser.latent();
        if let (Some([height, width]), false, [.., h, w]) = (asked.size, self.pipeline.packed, sample.as_mut_slice()) {
            (*h, *w) = (Dim::Known(height as i64), Dim::Known(width as i64));
        }
        let decode = decoded(self.pipeline, parts, sample, asked.size)?;
        Ok(Ends { encode: Some(encode), decode })
    }

    /// What is asked of encoders, once it is known how often noise is added.
    fn asked(&self, parts: &[Part], denoiser: &Denoiser, noises: usize, runner: &Runner) -> Result<Asked, Failure> {
        let asked = Asked { noises, ..self.asked.clone() };
        if asked.negative == Negative::None {
            return Ok(asked);
        }
        let negative = match &self.negative {
            NegativeText::Input => Negative::Ids,
            NegativeText::Zeros => Negative::Zeros,
            NegativeText::Ids(ids) => {
                // One text for every sample: what the encoders make of it is a constant.
                let alone = Asked { negative: Negative::None, noises: 0, ..self.asked.clone() };
                let encode = encoded(self.pipeline, parts, &denoiser.roles, &alone)?;
                Negative::Given(super::stages::of_text(&encode, ids, &self.noise, runner)?)
            }
        };
        Ok(Asked { negative, ..asked })
    }
}

/// Why a part does something else after it was rewritten; `None` where it does the same.
fn differs(source: &Source, model: &Model, inputs: &InputSpec, runner: &Runner) -> Result<Option<String>, Failure> {
    let folder = runner.child().scratch().context("cannot make a temporary folder")?;
    let path = folder.path().join("part.onnx");
    model.write_linked(&path).map_err(|e| anyhow!("a part cannot be put aside: {e}"))?;
    let spec = InputSpec { seed: inputs.seed, ..InputSpec::default() };
    let claim = Claim::Equivalent { rtol: None };
    let verdict = runner
        .compare(&source.path, &path, &Inputs::Random(spec), claim)
        .with_context(|| format!("`{}` cannot be run", source.path.display()))?;
    let reason = verdict.describe();
    match verdict {
        Verdict::Compared(report) if report.comparison.holds() => Ok(None),
        Verdict::ReferenceRefused { .. } => Err(Failure::Error(anyhow!("`{}`: {reason}", source.path.display()))),
        _ => Ok(Some(reason)),
    }
}
