//! What `optimize inspect` prints for people.

use super::{
    DEAREST, Found,
    activations::{Activations, LIMITS, Skipped},
    anatomy::{Anatomy, node_name},
    ceilings,
    placement::{Placed, Placements, Trial},
};
use crate::report::{grouped, mib};
use comfy_table::{Cell, CellAlignment, Table, presets};
use lathe_analysis::NodeCost;
use std::fmt::Write as _;

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// A table whose first column and the columns after `numbers` more are text.
fn table(heads: &[&str], numbers: usize) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(cells(heads.iter().map(|head| (*head).to_owned()).collect(), numbers));
    table
}

fn cells(texts: Vec<String>, numbers: usize) -> Vec<Cell> {
    let cell = |(i, text): (usize, String)| if (1..=numbers).contains(&i) { right(text) } else { Cell::new(text) };
    texts.into_iter().enumerate().map(cell).collect()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn costs(anatomy: &Anatomy, cost: &NodeCost) -> [String; 4] {
    [
        grouped(cost.flops),
        percent(anatomy.share_of_flops(cost.flops)),
        mib(cost.weight_bytes),
        percent(anatomy.share_of_bytes(cost.weight_bytes as f64)),
    ]
}

/// The whole answer; with `list` every unit has a line.
pub(super) fn page(found: &Found, list: bool) -> String {
    let (side, anatomy, model) = (&found.side, &found.anatomy, found.anatomy.model);
    let mut out = format!(
        "{}\nformat {} · opset {} · {} {}\n\n",
        side.path, model.ir_version, side.opset, model.producer_name, model.producer_version
    );
    for (title, lines) in [("inputs", &found.inputs), ("outputs", &found.outputs)] {
        let _ = writeln!(out, "{title}");
        for (name, ty) in lines {
            let _ = writeln!(out, "  {name}  {ty}");
        }
    }
    let (nodes, all) = (grouped(side.nodes), grouped(side.nodes_total));
    let _ = writeln!(out, "\nnodes            {nodes} ({all} with subgraphs and functions)");
    let _ = writeln!(out, "parameters       {}", grouped(side.parameters));
    let _ = writeln!(out, "file             {} (constants {})", mib(side.file_bytes), mib(side.weight_bytes));
    let _ = writeln!(out, "FLOPs            {} (open batch sizes as 1, other open sizes as 128)", grouped(side.flops));
    let _ = writeln!(out, "peak activation  {}\n", mib(side.peak_activation_bytes));
    let mut operators = table(&["operator", "nodes", "FLOPs", "constants"], 3);
    for o in &anatomy.cost.operators {
        let row = vec![o.op_type.clone(), grouped(o.count as u64), grouped(o.flops), mib(o.weight_bytes)];
        operators.add_row(cells(row, 3));
    }
    let _ = writeln!(out, "{}", trimmed(&operators));
    if !anatomy.cost.uncounted.is_empty() {
        let names: Vec<String> = anatomy.cost.uncounted.iter().map(|(op, count)| format!("{op} ×{count}")).collect();
        let _ = writeln!(out, "\nFLOPs not known for: {}", names.join(", "));
    }
    layers(&mut out, anatomy);
    units(&mut out, anatomy, list);
    savings(&mut out, anatomy);
    found.activations.iter().for_each(|found| activations(&mut out, found));
    found.placement.iter().for_each(|found| placement(&mut out, found));
    for warning in &found.warnings {
        let _ = writeln!(out, "warning: {warning}");
    }
    out
}

fn placement(out: &mut String, found: &Placements) {
    let _ = writeln!(out, "\n{} takes {}", found.provider, found.model.describe());
    left(out, &found.model);
    let mut tried = |what: &str, trial: &Trial| {
        let _ = match trial {
            Trial::Placed(placed) => writeln!(out, "after {what} it takes {}", placed.describe()),
            Trial::Failed(why) => writeln!(out, "{what} could not be tried: {why}"),
        };
        if let Trial::Placed(placed) = trial {
            left(out, placed);
        }
    };
    tried("`optimize MODEL`", &found.optimized);
    if let Some(fixed) = &found.fixed {
        tried(&format!("`optimize MODEL --fix-dim {}`", fixed.sizes), &fixed.trial);
    }
}

/// The nodes that a provider left, by operator, types and reason.
fn left(out: &mut String, placed: &Placed) {
    if placed.left.is_empty() {
        return;
    }
    let mut rows = table(&["  left", "nodes", "reads", "runs on", "for example", "why"], 1);
    for group in &placed.left {
        let why = group.why.clone().unwrap_or_else(|| "the runtime does not say".to_owned());
        let provider = group.provider.trim_end_matches("ExecutionProvider").to_owned();
        let op = format!("  {}", group.op);
        rows.add_row(cells(
            vec![op, group.count.to_string(), group.reads.clone(), provider, group.example.clone(), why],
            1,
        ));
    }
    let _ = writeln!(out, "{}", trimmed(&rows));
}

fn trimmed(table: &Table) -> String {
    let lines: Vec<String> = table.to_string().lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

fn layers(out: &mut String, anatomy: &Anatomy) {
    let graph = anatomy.graph();
    let dearest = anatomy.dearest(DEAREST);
    if dearest.is_empty() {
        return;
    }
    let mut rows = table(&["dearest nodes", "FLOPs", "", "constants", "", "operator"], 4);
    for id in dearest {
        let mut row = vec![node_name(graph, id)];
        row.extend(costs(anatomy, &anatomy.cost.by_node[id.index()]));
        row.push(graph.node(id).op_type.clone());
        rows.add_row(cells(row, 4));
    }
    let _ = writeln!(out, "\n{}", trimmed(&rows));
}

fn units(out: &mut String, anatomy: &Anatomy, list: bool) {
    let (graph, units) = (anatomy.graph(), &anatomy.units);
    if units.is_empty() {
        let _ = writeln!(out, "\nresidual units: none found");
    } else {
        let mut kinds = table(&["residual units", "units", "FLOPs", "", "constants", ""], 5);
        for (kind, count, cost) in anatomy.by_kind() {
            let mut row = vec![kind.to_owned(), if count == 0 { String::new() } else { grouped(count as u64) }];
            row.extend(costs(anatomy, &cost));
            kinds.add_row(cells(row, 5));
        }
        let _ = writeln!(out, "\n{}", trimmed(&kinds));
        let chain = |(index, chain): (usize, &Vec<_>)| match units.period(index) {
            Some(period) if period > 1 => format!("{} in blocks of {period}", chain.len()),
            _ => chain.len().to_string(),
        };
        let chains: Vec<String> = units.chains().iter().enumerate().map(chain).collect();
        let projected = units.iter().filter(|(_, unit)| unit.barrier.is_some()).count();
        let projected = if projected > 0 { format!("; projected skips: {projected}") } else { String::new() };
        let _ = writeln!(out, "units in chains: {}{projected}", chains.join(", "));
    }
    let mut reasons: Vec<(String, usize)> = Vec::new();
    for rejected in units.rejected() {
        let reason = rejected.reason.to_string();
        match reasons.iter_mut().find(|(r, _)| *r == reason) {
            Some((_, count)) => *count += 1,
            None => reasons.push((reason, 1)),
        }
    }
    for (reason, count) in reasons {
        let _ = writeln!(out, "sums that end no unit, because {reason}: {count}");
    }
    if !list || units.is_empty() {
        return;
    }
    let heads = ["unit", "nodes", "parameters", "FLOPs", "", "kind", "chain", "stream", "remarks"];
    let mut rows = table(&heads, 4);
    for (id, unit) in units.iter() {
        let cost = &anatomy.of_unit[id.index()];
        let mut remarks: Vec<String> = unit.barrier.iter().map(ToString::to_string).collect();
        for (what, values) in [("side inputs", &unit.side_inputs), ("outputs", &unit.outputs)] {
            if !values.is_empty() {
                let names: Vec<&str> = values.iter().map(|&v| graph.value(v).name.as_str()).collect();
                remarks.push(format!("{what}: {}", names.join(", ")));
            }
        }
        let row = vec![
            format!("{}{}", "  ".repeat(unit.depth.min(8)), units.label(graph, id)),
            grouped(unit.nodes.len() as u64),
            grouped(cost.parameters),
            grouped(cost.flops),
            percent(anatomy.share_of_flops(cost.flops)),
            unit.kind.name().to_owned(),
            format!("{}.{}", unit.chain, unit.position),
            format!("{} → {}", graph.value(unit.stream_in).name, graph.value(unit.stream_out).name),
            remarks.join("; "),
        ];
        rows.add_row(cells(row, 4));
    }
    let _ = writeln!(out, "\n{}", trimmed(&rows));
}

fn activations(out: &mut String, found: &Activations) {
    let (set, samples) = (&found.set, grouped(found.samples as u64));
    let heading = format!("inputs that could be left out, on {samples} samples of {set}");
    if found.layers.is_empty() {
        let _ = writeln!(out, "\n{heading}: the model has no layer with a large constant weight");
        return;
    }
    let columns = |rule: &str| LIMITS.map(|limit| format!("{rule} {}", percent(limit)));
    let heads = [vec!["layer".to_owned(), "inputs".to_owned()], columns("WINA").to_vec(), columns("TEAL").to_vec()];
    let heads = [heads.concat(), vec!["quiet".to_owned()]].concat();
    let mut rows = table(&heads.iter().map(String::as_str).collect::<Vec<_>>(), heads.len() - 1);
    let cell = |skipped: &Skipped| format!("{} at {}", percent(skipped.share), percent(skipped.error));
    for layer in &found.layers {
        let mut row = vec![layer.layer.clone(), grouped(layer.inputs as u64)];
        row.extend(layer.wina.iter().chain(&layer.teal).map(cell));
        row.push(grouped(layer.quiet_inputs as u64));
        rows.add_row(cells(row, heads.len() - 1));
    }
    let totals = found.totals();
    let mut row = vec!["all, by multiplications".to_owned(), String::new()];
    row.extend(totals.iter().map(|t| percent(t.0)).chain(totals.iter().map(|t| percent(t.1))));
    rows.add_row(cells(row, heads.len() - 2));
    let _ = writeln!(out, "\n{heading}:\n{}", trimmed(&rows));
    let _ = writeln!(
        out,
        "share of the inputs below a threshold of |x| times the norm of its weights (WINA) or of |x| (TEAL) at the \
         measured error of the layer's product; quiet: below WINA's last one on at least 99.9 % of the rows. Which inputs are small \
         changes from row to row: a runtime without a kernel of its own for them saves no time"
    );
}

fn savings(out: &mut String, anatomy: &Anatomy) {
    let found = ceilings::ceilings(anatomy);
    if found.is_empty() {
        return;
    }
    let mut rows = table(&["could be saved at most", "constants", "FLOPs", "at", "supposing"], 2);
    for ceiling in found {
        let share = |share: Option<f64>| share.map_or_else(|| "–".to_owned(), percent);
        let (bytes, flops) = (share(ceiling.weight_bytes_share), share(ceiling.flops_share));
        rows.add_row(cells(
            vec![ceiling.method.to_owned(), bytes, flops, ceiling.sites, ceiling.supposing.to_owned()],
            2,
        ));
    }
    let _ = writeln!(out, "\n{}", trimmed(&rows));
}
