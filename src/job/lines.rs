//! Models, passes and comparisons in the report's terms.

use super::cost;
use crate::{
    pipeline::{self, PassRecord},
    report::{OutputLine, OutputScores, PassLine, Refusal, Side, Verify},
};
use lathe_ir::{DataType, Model};
use lathe_runtime::{Claim, Comparison, default_rtol};
use std::{collections::BTreeMap, path::Path};

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
pub(crate) fn verify(report: lathe_runtime::Report, claim: Claim, set: &str) -> Verify {
    let worst = report.comparison.worst();
    let (metric, usual) = match claim {
        Claim::Identical => ("bits", 0.0),
        Claim::Within { rtol } => ("rel-l2", rtol),
        Claim::Equivalent { rtol } => ("rel-l2", rtol.unwrap_or_else(|| default_rtol(DataType::Float))),
    };
    let after = worst.map_or(0.0, |output| output.rel_l2);
    let outputs = report.comparison.outputs.iter().map(|o| OutputLine {
        name: o.name.clone(),
        scores: {
            let always = [("max-abs", o.max_abs), ("rel-l2", o.rel_l2), ("cosine", o.cosine)];
            let rows = [o.top1.map(|x| ("top1", x)), o.kl.map(|x| ("kl", x))];
            OutputScores::new(always.into_iter().chain(rows.into_iter().flatten()))
        },
        limit: o.limit,
        excuse: o.excuse,
        uncompared: o.uncompared.clone(),
    });
    Verify {
        set: set.to_owned(),
        samples: report.samples,
        metric: metric.to_owned(),
        why: None,
        before: 0.0,
        after,
        drop: after,
        limit: worst.and_then(|output| output.limit).unwrap_or(usual),
        worst: worst.map(|output| output.name.clone()),
        passed: report.comparison.holds(),
        detail: None,
        runtime: report.engine.clone(),
        sizes: report.sizes.clone(),
        left_out: report.left_out.clone(),
        note: note(&report.comparison),
        outputs: outputs.collect(),
    }
}

/// What has to be said of single outputs: those whose values were not compared, and those beyond their bound.
fn note(comparison: &Comparison) -> Option<String> {
    let mut notes: Vec<String> = Vec::new();
    // Several outputs often share one reason.
    let mut uncompared: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for output in &comparison.outputs {
        if let Some(reason) = &output.uncompared {
            uncompared.entry(reason).or_default().push(format!("`{}`", output.name));
        }
        if let Some(excuse) = &output.excuse {
            notes.push(format!("`{}` {}", output.name, excuse.describe()));
        }
    }
    for (reason, names) in uncompared {
        notes.push(format!("of {} only type and shape were compared: {reason}", names.join(", ")));
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}
