//! Quantized key-value caches: scales from the calibration set, the rewrite, and the run beside the original with caches that are
//! quantized on the way in and dequantized on the way out.

use super::{Job, Outcome, Prepared as Start, lines};
use crate::{
    Failure, PassRecord,
    pipeline::{node_count, weight_bytes},
    report::{CachePort, CacheReport, KeptNode, Verify},
};
use anyhow::{Context as _, anyhow};
use lathe_analysis::Rows;
use lathe_ir::Model;
use lathe_passes::kv_cache::{self, CLIPS, CacheType, Caches, Quantized, Scales, Watched, quantize, with_float_caches};
use lathe_runtime::{Claim, CollectOptions, Inputs, Provider, Request, SetSpec, Statistics, Verdict};
use std::time::Instant;

/// What `--kv-cache` asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheOptions {
    /// The numbers in which caches are kept.
    pub cache: CacheType,
    /// The relative L2 error that an output may have; `None` for that of the type.
    pub rtol: Option<f64>,
}

impl CacheOptions {
    fn tolerance(&self) -> f64 {
        self.rtol.unwrap_or_else(|| self.cache.tolerance())
    }
}

/// Outputs that a note names at most.
const MOST_NAMED: usize = 2;

/// Whether this can be done at all with these options.
pub(super) fn check(asked: CacheOptions, provider: &str, calibration: Option<&SetSpec>) -> Result<(), Failure> {
    if calibration.is_none() {
        let message =
            "--kv-cache takes the scales of caches from a calibration set, and none is given; --calib names one";
        return Err(Failure::Usage(message.to_owned()));
    }
    if Provider::asked(provider).is_some_and(|provider| provider.quantized_caches) {
        return Ok(());
    }
    let able: Vec<&str> = crate::PROVIDERS.iter().filter(|p| p.quantized_caches).map(|p| p.name).collect();
    Err(Failure::Usage(format!(
        "the execution provider {} has no kernel that reads an {} cache; --ep {} has",
        lathe_runtime::provider_name(provider),
        asked.cache.name(),
        able.join(" or ")
    )))
}

impl Job<'_> {
    /// The result with caches in other numbers. `calibration` is what scales are taken of, `dropped` what was left out before.
    pub(super) fn quantize_caches(
        &self,
        start: &Start<'_>,
        exact: Outcome,
        asked: CacheOptions,
        calibration: &SetSpec,
        dropped: &[PassRecord],
    ) -> Result<(Outcome, CacheReport), Failure> {
        let begin = Instant::now();
        let caches = Caches::find(&exact.model, asked.cache).map_err(|why| not_found(&why, dropped))?;
        let scales = self.scales(&exact.model, &caches, asked.cache, calibration)?;
        let quantized = quantize(&exact.model, &caches, asked.cache, &scales);
        quantized.model.check().context("the quantized caches are wrong; this is a fault of this program")?;
        let mut report = report_of(&quantized, &caches, asked);
        let mut record = PassRecord::new(&kv_cache::INFO);
        for cache in &caches.nodes {
            record.outcome.change(asked.cache.name(), quantized.model.graph.describe(cache.node));
        }
        caches.kept.iter().for_each(|kept| record.outcome.refuse(kept.reason.clone(), kept.node.clone()));
        record.nodes_delta = node_count(&quantized.model) as i64 - node_count(&exact.model) as i64;
        record.weight_bytes_delta = weight_bytes(&quantized.model) as i64 - weight_bytes(&exact.model) as i64;
        let mut verify = None;
        if self.options.verify {
            let found = self.beside_original(&quantized, asked)?;
            report.compared = Some(COMPARED.to_owned());
            record.error = found.worst.is_some().then_some(found.after);
            verify = Some(found);
        }
        let staged = quantized.model.stage(&start.target, &start.write)?;
        record.time = begin.elapsed();
        let records = exact.records.into_iter().chain([record]).collect();
        Ok((Outcome { model: quantized.model, staged, verify, records, ..exact }, report))
    }

    /// What one step of a code stands for in every cache.
    fn scales(&self, model: &Model, caches: &Caches, wanted: CacheType, set: &SetSpec) -> Result<Scales, Failure> {
        let scratch = tempfile::tempdir().context("there is no place for statistics")?;
        let kept = self.runner.store().map(|store| store.join("statistics"));
        let folder = kept.unwrap_or_else(|| scratch.path().to_owned());
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot use `{}`", folder.display()))?;
        let run = &self.options.run;
        let collect = CollectOptions {
            memory: run.memory.unwrap_or_else(lathe_runtime::quarter_of_memory),
            cache_limit: self.runner.statistics_limit(),
            ..CollectOptions::new(run.load.clone(), folder)
        };
        let seen = |watched: &Watched| -> Result<Statistics, Failure> {
            let names = watched.rows.iter().flatten().flatten();
            let requests: Vec<Request> = names.map(|name| Request::Columns(Rows::last(name))).collect();
            Ok(self.runner.collect(&watched.model, set, &requests, &collect)?)
        };
        let watched = Watched::numbers(model, caches);
        let statistics = seen(&watched)?;
        let field = |statistics: &Statistics, name: &str, field: &str| -> Result<Vec<f64>, Failure> {
            let request = Request::Columns(Rows::last(name));
            if statistics.counts(&request)?.rows == 0 {
                let why = anyhow!("the calibration set shows no position of a cache, so its scales are not known");
                return Err(Failure::Error(why));
            }
            Ok(statistics.field(&request, field)?.data)
        };
        let mut magnitudes = Vec::new();
        for [keys, values] in &watched.rows {
            let of = |names: &[String]| field(&statistics, &names[0], "max_abs");
            magnitudes.push([of(keys)?, of(values)?]);
        }
        let scales = Scales::reaching(caches, wanted, magnitudes);
        if wanted.bits > 4 {
            return Ok(scales);
        }
        // Codes are few, so that it pays to cut off what is rare.
        let watched = Watched::errors(model, caches, wanted, &scales);
        let statistics = seen(&watched)?;
        let mut errors = Vec::new();
        for both in &watched.rows {
            let mut found = [Vec::new(), Vec::new()];
            for (names, found) in both.iter().zip(&mut found) {
                debug_assert_eq!(names.len(), CLIPS.len());
                for name in names {
                    found.push(field(&statistics, name, "square_sum")?);
                }
            }
            errors.push(found);
        }
        Ok(scales.clipped(caches, &errors))
    }

    /// Runs the result, with float caches around it, beside the original.
    fn beside_original(&self, quantized: &Quantized, asked: CacheOptions) -> Result<Verify, Failure> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let path = folder.path().join("float_caches.onnx");
        with_float_caches(quantized).write_linked(&path)?;
        // Caches differ by what rounding is; what counts is what the model says.
        let claim = Claim::Within { rtol: f64::MAX };
        let name = asked.cache.name();
        // A loss is measured on all samples, of which exact passes see a few.
        let inputs = self.set.as_ref().map_or_else(|| self.inputs(), |(spec, _)| Inputs::Set(spec.clone()));
        let verdict = self.runner.compare(self.reference, &path, &inputs, claim)?;
        let reason = verdict.describe();
        let report = match verdict {
            Verdict::Compared(report) if report.comparison.holds() => report,
            Verdict::ReferenceRefused { .. } => return Err(Failure::Error(anyhow!("{reason}"))),
            _ => return Err(Failure::Refused(format!("the model with {name} caches is not run: {reason}"))),
        };
        let mut found = lines::verify(report, claim, self.set_name());
        hold(&mut found, quantized, asked)?;
        found.runtime = format!("{}, caches quantized on the way in and {COMPARED}", found.runtime);
        let returned: Vec<String> = quantized.outputs().map(|port| format!("`{}`", port.name)).collect();
        let named = match returned.len() {
            0..=MOST_NAMED => returned.join(" and "),
            count => format!("{} and {} other caches", returned[0], count - 1),
        };
        let kept = found.outputs.iter().filter(|output| output.limit.is_some()).filter_map(|output| {
            let (same, divergence) = (output.scores.get("top1")?, output.scores.get("kl")?);
            let percent = same * 100.0;
            Some(format!(
                "`{}` keeps its largest entry in {percent:.1} % of rows, divergence {divergence:.1e} nats",
                output.name
            ))
        });
        let note = format!("{named} were compared as the numbers that their codes stand for");
        let notes: Vec<String> = found.note.take().into_iter().chain(kept).chain([note]).collect();
        found.note = Some(notes.join("; "));
        Ok(found)
    }
}

/// Holds the float outputs of a comparison to the tolerance; where the model returns nothing but caches, those.
fn hold(found: &mut Verify, quantized: &Quantized, asked: CacheOptions) -> Result<(), Failure> {
    let is_cache = |name: &str| quantized.outputs().any(|port| port.name == name);
    let counts = found.outputs.iter().any(|o| !is_cache(&o.name) && o.uncompared.is_none() && o.limit.is_some());
    let limit = asked.tolerance();
    let mut worst: Option<(f64, String)> = None;
    for output in &mut found.outputs {
        let held = output.limit.is_some() && output.uncompared.is_none() && counts != is_cache(&output.name);
        output.limit = held.then_some(limit);
        let error = output.scores.rel_l2();
        if held && worst.as_ref().is_none_or(|(most, _)| error > *most) {
            worst = Some((error, output.name.clone()));
        }
    }
    let (error, name) = worst.map_or((0.0, None), |(error, name)| (error, Some(name)));
    if error > limit || error.is_nan() {
        return Err(Failure::Refused(format!(
            "with {} caches the relative L2 error of `{}` is {error:.1e}, the limit {limit:.1e}; --rtol allows more",
            asked.cache.name(),
            name.unwrap_or_default()
        )));
    }
    (found.after, found.drop, found.limit, found.worst) = (error, error, limit, name);
    Ok(())
}

/// That no cache was found, and why where the pass that writes the operator was left out: samples that it does not run on.
fn not_found(why: &str, dropped: &[PassRecord]) -> Failure {
    let fusion =
        dropped.iter().find(|record| record.name == "fuse-attention").and_then(|record| record.dropped.as_ref());
    let fusion = fusion.map(|reason| {
        format!(" (`fuse-attention` was left out, {reason}; GroupQueryAttention takes several new positions behind a cache of one \
                 sequence only: --batch 1)")
    });
    Failure::Error(anyhow!("{why}{}", fusion.unwrap_or_default()))
}

const COMPARED: &str = "dequantized on the way out";

fn report_of(quantized: &Quantized, caches: &Caches, asked: CacheOptions) -> CacheReport {
    let ports = quantized.ports.iter().map(|port| CachePort {
        name: port.name.clone(),
        before: port.before.clone(),
        after: port.after.clone(),
    });
    let numbers: usize = caches.nodes.iter().map(|cache| 2 * cache.heads * cache.size).sum();
    CacheReport {
        dtype: asked.cache.name().to_owned(),
        scales: if asked.cache.by_channel { "per channel" } else { "per tensor" }.to_owned(),
        nodes: caches.nodes.len(),
        kept: caches.kept.iter().map(|k| KeptNode { node: k.node.clone(), reason: k.reason.clone() }).collect(),
        ports: ports.collect(),
        bytes_before: numbers as u64 * 4,
        bytes_after: (numbers * usize::from(asked.cache.bits) / 8) as u64,
        compared: None,
        limit: asked.tolerance(),
    }
}
