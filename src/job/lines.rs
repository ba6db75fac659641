//! Models, passes and comparisons in the report's terms.

use super::cost;
use crate::{
    pipeline::{self, PassRecord},
    report::{OutputLine, PassLine, Refusal, Side, Verify},
};
use lathe_ir::Model;
use lathe_runtime::Claim;
use std::path::Path;

/// What the report says about one model.
pub(crate) fn side(path: &Path, model: &Model, file_bytes: u64) -> Side {
    let cost = cost(model);
    Side {
        path: path.display().to_string(),
        file_bytes,
        weight_bytes: pipeline::weight_bytes(model),
        nodes: model.graph.nodes(lathe_ir::ScopeId::MAIN).count() as u64,
        nodes_total: pipeline::node_count(model) as u64,
        parameters: cost.parameters,
        flops: cost.flops,
        peak_activation_bytes: cost.activation_peak_bytes,
        opset: model.opset(),
    }
}

pub(crate) fn pass_line(record: &PassRecord) -> PassLine {
    let refusals = record.outcome.refusals.iter().map(|(reason, (count, example))| Refusal {
        reason: reason.clone(),
        count: *count,
        example: example.clone(),
    });
    PassLine {
        name: record.name.to_owned(),
        kind: record.kind.name().to_owned(),
        changes: record.outcome.changes.len(),
        refusals: refusals.collect(),
        seconds: record.time.as_secs_f64(),
        nodes_delta: record.nodes_delta,
        weight_bytes_delta: record.weight_bytes_delta,
        flops_delta: record.flops_delta,
        error: record.error,
        dropped: record.dropped.clone(),
    }
}

/// The comparison in the report's terms.
pub(crate) fn verify(report: lathe_runtime::Report, claim: Claim, set: &str, note: Option<String>) -> Verify {
    let worst = report.comparison.worst();
    let rounding = report.comparison.outputs.iter().filter(|o| o.rounding && o.rel_l2 > worst);
    let rounding: Vec<String> = rounding.map(|o| format!("`{}`", o.name)).collect();
    let note = note.or_else(|| {
        let names = rounding.join(", ");
        (!rounding.is_empty()).then(|| format!("{names} is near zero everywhere and differs by float32 rounding only"))
    });
    let (metric, limit) = match claim {
        Claim::Identical => ("bits", 0.0),
        Claim::Equivalent { rtol } => {
            ("rel-l2", rtol.unwrap_or_else(|| lathe_runtime::default_rtol(lathe_ir::DataType::Float)))
        }
    };
    let outputs = report.comparison.outputs.iter().map(|o| OutputLine {
        name: o.name.clone(),
        max_abs: o.max_abs,
        rel_l2: o.rel_l2,
        cosine: o.cosine,
        top1: o.top1,
        kl: o.kl,
        snr: None,
        psnr: None,
        ssim: None,
    });
    Verify {
        set: set.to_owned(),
        samples: report.samples,
        metric: metric.to_owned(),
        why: None,
        before: 0.0,
        after: worst,
        drop: worst,
        limit,
        passed: report.comparison.failures.is_empty(),
        detail: None,
        runtime: report.engine.clone(),
        sizes: report.sizes.clone(),
        note,
        outputs: outputs.collect(),
    }
}
