//! Two samplers from the same noise: how far apart the samples of each seed are, and how far apart both sets are.

use super::{
    action_errors::{ActionErrors, Chunks},
    evaluator::Evaluator,
    features::Extractor,
    picture::spread as between_signs,
    seeded_inputs::SeededInputs,
    spread::Spread,
};
use crate::{Failure, RunOptions, runner::Runner, validate::significant};
use anyhow::{Context as _, anyhow};
use lathe_ir::{Model, Tensor};
use lathe_runtime::{
    FeatureError, Features, InputSpec, LoadOptions, Pair, Progress, feature_distances, frechet, kernel, pairs, sliced,
};
use serde::Serialize;
use std::{
    fmt::Write as _,
    ops::Range,
    path::{Path, PathBuf},
};

/// Samples that run together, where that is free.
const BATCH: usize = 16;
/// Bytes of noise that are sent at once.
const MOST_SENT: usize = 64 << 20;
/// Lines that sets are projected on, subsets of a kernel distance.
const LINES: usize = 256;
const SUBSETS: usize = 20;
/// The drop that is the mean over pairs of how far the worst step of a chunk of actions is off.
pub(crate) const ACTION_METRIC: &str = "action-l2";
/// What samplers give, and which of it are pixels from 0 to 1.
const OUTPUTS: [&str; 4] = ["sample", "actions", "image", "video"];
const PIXELS: [&str; 2] = ["image", "video"];
/// Seeds that distances of sets need at least.
pub(crate) const LEAST_SEEDS: usize = 4;

/// What to compare.
#[derive(Debug, Clone)]
pub(crate) struct SamplerComparison {
    /// The reference.
    pub a: PathBuf,
    /// The candidate.
    pub b: PathBuf,
    /// How many samples are drawn from each.
    pub seeds: usize,
    /// A network that sees features in samples; its first output counts as one row per image.
    pub features: Option<PathBuf>,
    /// What is bounded: `rel-l2`, `psnr` or `ssim`.
    pub metric: String,
    /// The largest drop of the metric that passes.
    pub max_drop: Option<f64>,
    /// How the samplers are run; the seed is that of everything.
    pub run: RunOptions,
}

/// Distances by what a network sees. Distances of sets are of one half of the seeds to the other, so that noise is never
/// shared; `_itself` is that distance within A.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FeatureDistances {
    /// How many features an image has.
    pub width: usize,
    /// The distance of pairs over all outputs of the network, channels scaled to length one.
    pub paired: Spread,
    /// The Fréchet distance.
    pub fid: f64,
    /// Within A.
    pub fid_itself: f64,
    /// The kernel distance.
    pub kid: f64,
    /// Its deviation between subsets.
    pub kid_deviation: f64,
    /// Within A.
    pub kid_itself: f64,
    /// The sliced Wasserstein distance.
    pub sliced: f64,
    /// Within A.
    pub sliced_itself: f64,
}

/// What a comparison of two samplers came to.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Compared {
    /// How many pairs.
    pub samples: usize,
    /// The seed.
    pub seed: u64,
    /// What is bounded.
    pub metric: String,
    /// The loss, positive where B differs; `null` where it is no number.
    pub drop: f64,
    /// The bound; `null` where none was set.
    pub limit: f64,
    /// Whether all samples are finite and the bound holds.
    pub passed: bool,
    /// The peak signal-to-noise ratio in dB, for values from −1 to 1.
    pub psnr: Spread,
    /// The structural similarity; `null` for what is no image of at least 11 by 11.
    pub ssim: Option<Spread>,
    /// The norm of the difference over that of A's sample.
    pub rel_l2: Spread,
    /// The cosine between both.
    pub cosine: Spread,
    /// Of chunks of actions, by the range that each number has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actions: Option<ActionErrors>,
    /// By features, where a network was given.
    pub features: Option<FeatureDistances>,
    /// Who ran the samplers.
    pub runtime: String,
    /// What is odd.
    pub notes: Vec<String>,
}

/// A sampler on disk.
pub(super) struct SamplerFile<'a> {
    path: PathBuf,
    model: Model,
    /// The output that samples are.
    output: &'static str,
    runner: &'a Runner,
    load: LoadOptions,
}

impl<'a> SamplerFile<'a> {
    /// Reads a sampler; another model is a usage error.
    pub fn open(path: &Path, runner: &'a Runner, load: &LoadOptions) -> Result<SamplerFile<'a>, Failure> {
        let model = Model::read(path).with_context(|| format!("cannot use `{}`", path.display()))?.model;
        let graph = &model.graph;
        let name = |v: &lathe_ir::ValueId| graph.value(*v).name.as_str();
        let takes = graph.main().inputs().iter().any(|v| name(v) == "noise");
        let gives = |output: &&&str| graph.main().outputs().iter().any(|v| name(v) == **output);
        let Some(&output) = OUTPUTS.iter().find(gives).filter(|_| takes) else {
            let message = format!(
                "`{}` is no sampler, which takes `noise` and gives `sample`, `actions`, `image` or `video`; --seeds compares what `optimize sampler` wrote",
                path.display()
            );
            return Err(Failure::Usage(message));
        };
        Ok(SamplerFile {
            path: path.to_owned(),
            model,
            output,
            runner,
            load: LoadOptions { optimize: true, ..load.clone() },
        })
    }

    /// Inputs as this sampler takes them.
    pub fn seeded(&self, inputs: &InputSpec) -> Result<SeededInputs<'_>, Failure> {
        SeededInputs::new(&self.model, "noise", inputs)
    }

    /// The samples of several ranges, one tensor for each.
    pub fn samples(&self, inputs: &SeededInputs, ranges: &[Range<usize>]) -> Result<Vec<Tensor>, Failure> {
        let all: Result<Vec<_>, _> = ranges.iter().map(|r| inputs.of_sampler(&self.model, r.clone())).collect();
        let outputs = self.runner.child().run_file(&self.path, &all?, &self.load)?;
        let sample = |outputs: Vec<(String, Tensor)>| {
            let found = outputs.into_iter().find(|(name, _)| name == self.output).map(|(_, tensor)| tensor);
            let found = found.ok_or_else(|| anyhow!("`{}` gives no `{}`", self.path.display(), self.output))?;
            Ok(if PIXELS.contains(&self.output) { between_signs(&found)? } else { found })
        };
        outputs.into_iter().map(sample).collect()
    }
}

/// Ranges of samples that run together, in groups that are sent together.
pub(super) fn batches(inputs: &SeededInputs, samples: Range<usize>, noises: usize) -> Vec<Vec<Range<usize>>> {
    let batch = inputs.batch(BATCH.min(samples.len().max(1)));
    let together = (MOST_SENT / (batch * inputs.bytes() * (1 + noises)).max(1)).max(1);
    let runs: Vec<Range<usize>> = samples.step_by(batch).map(|start| start..start + batch).collect();
    runs.chunks(together).map(<[_]>::to_vec).collect()
}

/// Draws from two samplers with the same seeds and compares. A candidate that does not run is refused.
pub(crate) fn compare_samplers(pair: &SamplerComparison) -> Result<Compared, Failure> {
    let (load, seed) = (&pair.run.load, pair.run.inputs.seed);
    let runner = Runner::new(&pair.run)?;
    let (a, b) = (SamplerFile::open(&pair.a, &runner, load)?, SamplerFile::open(&pair.b, &runner, load)?);
    let inputs = a.seeded(&pair.run.inputs)?;
    let evaluator = Evaluator::fast(&runner, load);
    let extractor = pair.features.as_ref().map(|path| Extractor::read(path, &evaluator)).transpose()?;
    let mut notes = Vec::new();
    let noises = [&a, &b].map(|sampler| super::seeded_inputs::step_noises(&sampler.model).unwrap_or(0));
    if noises[0] != noises[1] {
        notes.push(format!("A adds noise in {} steps and B in {}, of which the first are equal", noises[0], noises[1]));
    }
    let mut all: Vec<Pair> = Vec::new();
    let mut features = [Features::new(), Features::new()];
    let mut feature_pairs: Vec<f64> = Vec::new();
    let mut chunks = Chunks::default();
    for group in batches(&inputs, 0..pair.seeds, noises[0].max(noises[1])) {
        let ours = a.samples(&inputs, &group).map_err(|e| Failure::Error(anyhow!("`{}`: {e}", pair.a.display())))?;
        let theirs =
            b.samples(&inputs, &group).map_err(|e| Failure::Refused(format!("`{}`: {e}", pair.b.display())))?;
        for ((x, y), range) in ours.iter().zip(&theirs).zip(&group) {
            let left = pair.seeds - range.start;
            let (x, y) = (first(x, left)?, first(y, left)?);
            if let Some(at) = not_finite(&x) {
                return Err(Failure::Error(anyhow!("sample {} of A is not finite", range.start + at)));
            }
            if x.dims() != y.dims() {
                return Err(Failure::Refused(format!("A draws {:?} and B {:?}", x.dims(), y.dims())));
            }
            if let Some(at) = not_finite(&y) {
                return Err(Failure::Refused(format!("sample {} of B is not finite", range.start + at)));
            }
            all.extend(pairs(&x, &y, 2.0)?);
            chunks.push(&x, &y);
            if let Some(extractor) = &extractor {
                let (x, y) = (extractor.see(&x)?, extractor.see(&y)?);
                features[0].push(&x[0])?;
                features[1].push(&y[0])?;
                let layers: Vec<_> = x.iter().zip(&y).filter(|(x, _)| x.dims().len() > 1).collect();
                feature_pairs.extend(feature_distances(&layers)?);
            }
        }
        pair.run.progress.hear(&Progress::new(all.len(), pair.seeds, "pairs"));
    }
    let spread = |of: &dyn Fn(&Pair) -> f64| Spread::of(&all.iter().map(of).collect::<Vec<_>>(), seed);
    let ssim: Option<Vec<f64>> = all.iter().map(|p| p.ssim).collect();
    let actions = chunks.spread(seed);
    let drop = match pair.metric.as_str() {
        // As in the catalogue of metrics: over the peak, which is 2 from −1 to 1.
        "psnr" => (all.iter().map(|p| p.rmse * p.rmse).sum::<f64>() / all.len() as f64).sqrt() / 2.0,
        ACTION_METRIC => {
            let worst = chunks.errors().iter().map(|[_, worst]| worst).sum::<f64>() / all.len() as f64;
            if actions.is_none() {
                let message = "samples are no chunks of actions, which have three axes: samples, steps and numbers";
                return Err(Failure::Usage(message.to_owned()));
            }
            worst
        }
        "ssim" => {
            let ssim = ssim.as_ref().ok_or_else(|| {
                Failure::Error(anyhow!("ssim cannot be measured here: samples are no images of at least 11 by 11"))
            })?;
            1.0 - ssim.iter().sum::<f64>() / ssim.len() as f64
        }
        _ => all.iter().map(|p| p.rel_l2).sum::<f64>() / all.len() as f64,
    };
    let limit = pair.max_drop.unwrap_or(f64::INFINITY);
    let features = match extractor {
        Some(_) => Some(distances(&features, Spread::of(&feature_pairs, seed), seed)?),
        None => None,
    };
    Ok(Compared {
        samples: all.len(),
        seed,
        metric: pair.metric.clone(),
        drop,
        limit,
        passed: drop <= limit,
        psnr: spread(&|p| p.psnr),
        ssim: ssim.map(|values| Spread::of(&values, seed)),
        rel_l2: spread(&|p| p.rel_l2),
        cosine: spread(&|p| p.cosine),
        actions,
        features,
        runtime: lathe_analysis::Evaluate::name(&evaluator),
        notes,
    })
}

/// The first samples of a batch.
fn first(samples: &Tensor, count: usize) -> Result<Tensor, Failure> {
    let mut dims = samples.dims().to_vec();
    match dims.first_mut() {
        Some(all) if *all > count => *all = count,
        _ => return Ok(samples.clone()),
    }
    let mut values = samples.to_f64s().unwrap_or_default();
    values.truncate(dims.iter().product());
    let cut = Tensor::from_f64s(samples.dtype(), &dims, &values);
    cut.ok_or_else(|| Failure::Error(anyhow!("samples are no real numbers")))
}

/// The first sample of a batch that has something infinite in it.
fn not_finite(samples: &Tensor) -> Option<usize> {
    let size: usize = samples.dims().iter().skip(1).product::<usize>().max(1);
    samples.to_f64s().unwrap_or_default().iter().position(|v| !v.is_finite()).map(|at| at / size)
}

fn distances(features: &[Features; 2], paired: Spread, seed: u64) -> Result<FeatureDistances, FeatureError> {
    let count = features[0].len() / 2;
    if count * 2 < LEAST_SEEDS {
        return Err(FeatureError::Few { found: features[0].len(), expected: LEAST_SEEDS });
    }
    let halves = |of: &Features| [0..count, count..2 * count].map(|half| of.select(&half.collect::<Vec<_>>()));
    let ([a, c], [b, d]) = (halves(&features[0]), halves(&features[1]));
    let mean = |of: &dyn Fn(&Features, &Features) -> Result<f64, FeatureError>| -> Result<f64, FeatureError> {
        Ok((of(&a, &d)? + of(&c, &b)?) / 2.0)
    };
    let kid = |x: &Features, y: &Features| kernel(x, y, SUBSETS, count.div_ceil(2), seed);
    Ok(FeatureDistances {
        width: a.width(),
        paired,
        fid: mean(&frechet)?,
        fid_itself: frechet(&a, &c)?,
        kid: mean(&|x, y| Ok(kid(x, y)?.mean))?,
        kid_deviation: kid(&a, &d)?.deviation,
        kid_itself: kid(&a, &c)?.mean,
        sliced: mean(&|x, y| sliced(x, y, LINES, seed))?,
        sliced_itself: sliced(&a, &c, LINES, seed)?,
    })
}

impl Compared {
    /// One sentence: what was measured, and the bound.
    pub fn sentence(&self) -> String {
        let limit = match self.limit.is_finite() {
            true => format!(" where {} is allowed", significant(self.limit)),
            false => String::new(),
        };
        format!("{} pairs of samples: a drop of {} by {}{limit}", self.samples, significant(self.drop), self.metric)
    }

    /// What a person reads.
    pub fn text(&self) -> String {
        let mut out = format!("{} on {}, seed {}\n", self.sentence(), self.runtime, self.seed);
        let n = significant;
        let mut line = |name: &str, s: &Spread, unit: &str| {
            let _ = writeln!(
                out,
                "  {name:9} median {}{unit}, 10 % {}, 90 % {}; mean {} ({} to {})",
                n(s.median),
                n(s.p10),
                n(s.p90),
                n(s.mean),
                n(s.interval[0]),
                n(s.interval[1])
            );
        };
        line("PSNR", &self.psnr, " dB");
        if let Some(ssim) = &self.ssim {
            line("SSIM", ssim, "");
        }
        line("rel L2", &self.rel_l2, "");
        line("cosine", &self.cosine, "");
        if let Some(actions) = &self.actions {
            line("actions", &actions.chunk, " of their range");
            line("the worst step", &actions.worst, " of its range");
        }
        if let Some(f) = &self.features {
            line("features", &f.paired, "");
            let sets = [
                ("FID", f.fid, f.fid_itself),
                ("KID", f.kid, f.kid_itself),
                ("sliced Wasserstein", f.sliced, f.sliced_itself),
            ];
            for (name, between, within) in sets {
                let _ = writeln!(out, "  {name} {} between A and B, {} within A", n(between), n(within));
            }
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_compared_in_halves_of_other_noise() {
        let features = |count: usize, width: usize, shift: f64| {
            let value = |i: usize| ((i * 7919) as f64 * 0.37).sin() + shift;
            let mut features = Features::new();
            let numbers: Vec<f64> = (0..count * width).map(value).collect();
            features.push(&Tensor::from_f64s(lathe_ir::DataType::Double, &[count, width], &numbers).unwrap()).unwrap();
            features
        };
        // Fewer images than features and more, which take different ways to the same distance.
        for width in [3, 40] {
            let itself = [features(20, width, 0.0), features(20, width, 0.0)];
            let none = distances(&itself, Spread::of(&[0.0], 1), 1).unwrap();
            assert!((none.fid - none.fid_itself).abs() < 1e-9 * none.fid.max(1.0), "{none:?}");
            assert_eq!((none.sliced, none.width), (none.sliced_itself, width));
            let moved = [features(20, width, 0.0), features(20, width, 2.0)];
            let moved = distances(&moved, Spread::of(&[0.0], 1), 1).unwrap();
            assert!(moved.fid > none.fid + 4.0 * width as f64 - 0.5, "{moved:?}");
            assert!(moved.kid > none.kid && moved.sliced > none.sliced + 1.0, "{moved:?}");
        }
        let few = [features(3, 2, 0.0), features(3, 2, 0.0)];
        assert_eq!(distances(&few, Spread::of(&[0.0], 1), 1).unwrap_err(), FeatureError::Few { found: 3, expected: 4 });
    }
}
