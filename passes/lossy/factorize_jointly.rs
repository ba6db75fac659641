//! Layers that read the same value as one thin layer that they share and one of their own each.

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, OVERHEAD, Proposal, Site, Weight, batches,
    factorize::{self, Rank},
    factors::{self, Judge, LayerStatistics},
    spectrum::{Spectrum, product, tails_of_products},
    weights, within_memory,
};
use crate::{Error, Info, Kind, Outcome, Saving};
use faer::Mat;
use lathe_analysis::Gram;
use lathe_ir::{Graph, Model, Node, ScopeId, Tensor, ValueId};
use std::collections::BTreeMap;

/// Replaces layers with one input by factors that share the first.
pub struct FactorizeJointly;

static INFO: Info = Info {
    name: "factorize-jointly",
    summary: "replace layers that read the same value by a thin layer they share and one each",
    doc: "Offers float32 `MatMul` and `Gemm` layers that read the same value, as queries, keys and values of an attention \
          or the gate and the values of an MLP do, as `x·U` computed once and `·Vᵢ` each, of rank r: r(k + Σnᵢ) numbers \
          and multiply-adds per row instead of k·Σnᵢ. The factors lose least of the outputs on the calibration set, \
          each relative to its own size. Declines what `factorize` declines, convolutions and weights that several \
          layers share.",
    options: &[],
    kind: Kind::Lossy,
    lowers: &[Saving::Parameters, Saving::Flops],
    source: Some("Wang et al. 2024, SVD-LLM, arXiv:2403.07378, on the concatenated weights"),
};

/// Layers that read one value, in the order of their first use, with what was seen of them.
struct Team<'a> {
    members: Vec<Member<'a>>,
    /// Second moments of what they read, and those that fits are judged by.
    gram: Gram,
    judge: Gram,
}

struct Member<'a> {
    weight: &'a Weight,
    /// Mean square norm of a row of its output, and the one that its errors are relative to.
    output: f64,
    judged: f64,
}

/// Matrices by what they read, where two or more read the same.
fn candidates<'a>(graph: &Graph, found: &'a [Weight]) -> Vec<Vec<&'a Weight>> {
    let mut by_input: BTreeMap<ValueId, Vec<&Weight>> = BTreeMap::new();
    for weight in found {
        let [tap] = weight.taps.as_slice() else { continue };
        if weight.dims.len() == 2 && tap.rows.is_some() {
            let data = graph.node(tap.node).input(0).expect("a tap multiplies data");
            by_input.entry(data).or_default().push(weight);
        }
    }
    by_input.into_values().filter(|c| c.len() > 1).collect()
}

/// Those of the candidates that can be factored, if they are several.
fn team<'a>(
    graph: &Graph,
    candidates: &[&'a Weight],
    cx: &MethodContext,
    outcome: &mut Outcome,
) -> Result<Option<Team<'a>>, Error> {
    let (mut members, mut grams) = (Vec::new(), None);
    for &weight in candidates {
        let mut join = |statistics: LayerStatistics| {
            let Judge { gram, output } = statistics.judges()?.swap_remove(0);
            members.push(Member { weight, output: statistics.outputs[0], judged: output });
            grams.get_or_insert_with(|| (statistics.grams[0].clone(), gram.clone()));
            Ok(())
        };
        if let Err(reason) = factors::statistics(graph, weight, cx)?.and_then(&mut join) {
            outcome.refuse(reason, format!("`{}`", graph.value(weight.value).name));
        }
    }
    Ok(grams.filter(|_| members.len() > 1).map(|(gram, judge)| Team { members, gram, judge }))
}

impl Team<'_> {
    /// Inputs, and outputs of all members.
    fn sides(&self) -> (usize, usize) {
        let outputs = self.members.iter().map(|m| m.weight.sides().1).sum();
        (self.members[0].weight.sides().0, outputs)
    }

    /// The directions of all outputs side by side, each member's divided by its root mean square norm.
    fn spectrum(&self, graph: &Graph) -> Result<Spectrum, &'static str> {
        let (k, n) = self.sides();
        let mut all = Mat::zeros(k, n);
        let mut from = 0;
        for member in &self.members {
            let own = factors::matrix(graph, member.weight)?;
            let scale = 1.0 / member.output.sqrt();
            for column in 0..own.ncols() {
                all.col_mut(from + column).iter_mut().zip(own.col(column).iter()).for_each(|(to, w)| *to = w * scale);
            }
            from += own.ncols();
        }
        let gram = Mat::from_fn(k, k, |row, column| self.gram.matrix.get(row, column));
        Spectrum::of(all.as_ref(), gram.as_ref()).ok_or("its decomposition does not converge")
    }

    /// Squared relative error of every member at every rank.
    fn tails(&self, found: &Spectrum) -> Vec<Vec<f64>> {
        let k = found.left.nrows();
        let gram = Mat::from_fn(k, k, |row, column| self.judge.matrix.get(row, column));
        let moments = product(found.left.transpose(), product(gram.as_ref(), found.left.as_ref()).as_ref());
        let mut from = 0;
        let mut all = Vec::new();
        for member in &self.members {
            let n = member.weight.sides().1;
            let own = found.right.as_ref().subrows(from, n);
            let mut products = product(own.transpose(), own);
            for column in 0..products.ncols() {
                products.col_mut(column).iter_mut().zip(moments.col(column).iter()).for_each(|(x, y)| *x *= y);
            }
            let scale = member.output / member.judged;
            all.push(tails_of_products(products.as_ref()).into_iter().map(|tail| tail * scale).collect());
            from += n;
        }
        all
    }

    fn site(&self, graph: &Graph) -> Result<Site, &'static str> {
        let found = self.spectrum(graph)?;
        let (k, n) = self.sides();
        let tails = self.tails(&found);
        let cost = |rank: usize| {
            let numbers = (rank * (k + n)) as u64;
            let extra = OVERHEAD * (1 + self.members.len() as u64);
            Cost { bytes: 4 * numbers + extra, parameters: numbers, flops_per_row: 2 * numbers }
        };
        let candidate = |rank: usize| Candidate {
            label: format!("joint rank {rank}"),
            cost: cost(rank),
            loss: Loss::PerTap(tails.iter().map(|own| own[rank].max(0.0).sqrt()).collect()),
            edit: Edit::new(Rank(rank)),
        };
        let ranks = factorize::ranks(k, n).into_iter().filter(|&r| r < found.len());
        let single: Vec<Site> = self.members.iter().map(|m| m.weight.site(graph, Vec::new())).collect();
        let elements = (k * n) as u64;
        let mut footprint: Vec<ValueId> = single.iter().filter_map(|s| s.weight).collect();
        footprint.sort_unstable();
        let mut nodes: Vec<_> = single.iter().flat_map(|s| s.nodes.iter().copied()).collect();
        nodes.sort_unstable();
        Ok(Site {
            footprint,
            nodes,
            taps: single.iter().flat_map(|s| s.taps.iter().copied()).collect(),
            baseline: Cost { bytes: 4 * elements, parameters: elements, flops_per_row: 2 * elements },
            ..self.members[0].weight.site(graph, ranks.map(candidate).collect())
        })
    }

    /// Replaces every member by a product with what they share and one with its own factor.
    fn emit(&self, graph: &mut Graph, found: &Spectrum, rank: usize) {
        let mut left = found.left.subcols(0, rank).to_owned();
        let mut right = found.right.subcols(0, rank).to_owned();
        let mut from = 0;
        for member in &self.members {
            let n = member.weight.sides().1;
            let mut own = right.subrows_mut(from, n);
            own *= faer::Scale(member.output.sqrt());
            from += n;
        }
        factors::balance(&mut left, &mut right);
        let first = self.members[0].weight;
        let name = graph.value(first.value).name.clone();
        let data = graph.node(first.taps[0].node).input(0).expect("a tap multiplies data");
        let fresh = graph.fresh_name(&format!("{name}_shared"));
        let numbers = factors::numbers(left.as_ref());
        let shared = graph.add_initializer(ScopeId::MAIN, &fresh, Tensor::from_f32s(&[left.nrows(), rank], &numbers));
        let inner = graph.append(ScopeId::MAIN, Node::new("MatMul"), &[data, shared], &format!("{name}_inner"));
        let mut from = 0;
        for member in &self.members {
            let n = member.weight.sides().1;
            let own = right.as_ref().subrows(from, n);
            factors::second(graph, member.weight, &[inner], own);
            from += n;
        }
    }
}

impl Method for FactorizeJointly {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<Rank>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let graph = &model.graph;
        let (found, refused) = weights(graph);
        let place = |value: ValueId| format!("`{}`", graph.value(value).name);
        refused.iter().for_each(|&(value, reason)| proposal.outcome.refuse(reason, place(value)));
        // Members read the same, and its second moments are kept once.
        let bytes = |members: &Vec<&Weight>| members.first().map_or(0, |weight| factors::statistics_bytes(weight));
        for batch in batches(&candidates(graph, &found), cx, bytes) {
            let mut teams = Vec::new();
            for candidates in batch {
                teams.extend(team(graph, candidates, cx, &mut proposal.outcome)?);
            }
            let bytes = |team: &Team| factors::working_bytes(team.sides());
            for (team, site) in teams.iter().zip(within_memory(&teams, cx, bytes, |team| team.site(graph))) {
                match site {
                    Ok(site) => proposal.sites.push(site),
                    Err(reason) => proposal.outcome.refuse(reason, place(team.members[0].weight.value)),
                }
            }
        }
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let &Rank(rank) = candidate.edit.of();
        let place = format!("`{}`", site.name);
        let mut outcome = Outcome::default();
        let (found, _) = weights(&model.graph);
        let candidates = candidates(&model.graph, &found);
        let own = candidates.iter().find(|c| c.iter().any(|weight| Some(weight.value) == site.weight));
        let team = own.map(|c| team(&model.graph, c, cx, &mut Outcome::default())).transpose()?.flatten();
        let Some(team) = team else {
            outcome.refuse("the constants are no longer used as they were", place);
            return Ok(outcome);
        };
        match team.spectrum(&model.graph) {
            Ok(directions) => {
                team.emit(&mut model.graph, &directions, rank);
                outcome.change(candidate.label.clone(), place);
            }
            Err(reason) => outcome.refuse(reason, place),
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::tests::{gram, random};
    use super::*;
    use lathe_analysis::SymMatrix;
    use lathe_ir::text;

    const K: usize = 48;

    /// Three layers that read `x`, one of them by a `Gemm` with its weight turned and a bias, and what 200 rows show.
    fn planted() -> (Model, Mat<f64>) {
        let list = |count: usize, seed: u64| {
            let numbers = factors::numbers(random(1, count, seed).as_ref());
            numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
        };
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, {K}] x) => (float[3, 96] q, float[3, 96] k, float[3, 96] v) \
             <float[{K}, 96] wq = {{{}}}, float[{K}, 96] wk = {{{}}}, float[96, {K}] wv = {{{}}}, float[96] c = {{{}}}> {{ \
             a = MatMul (x, wq) q = Relu (a) b = MatMul (x, wk) k = Relu (b) d = Gemm <transB = 1> (x, wv, c) v = Relu (d) }}",
            list(96 * K, 1),
            list(96 * K, 2),
            list(96 * K, 3),
            list(96, 4)
        );
        (text::parse(&source).unwrap(), random(200, K, 5))
    }

    fn whole<'a>(model: &Model, found: &'a [Weight], rows: &Mat<f64>) -> Team<'a> {
        let graph = &model.graph;
        let members: Vec<Member> = candidates(graph, found)[0]
            .iter()
            .map(|weight| {
                let output = product(rows.as_ref(), factors::matrix(graph, weight).unwrap().as_ref());
                let output = output.squared_norm_l2() / rows.nrows() as f64;
                Member { weight, output, judged: output }
            })
            .collect();
        let full = gram(rows);
        let upper = (0..K).flat_map(|i| (i..K).map(move |j| (i, j))).map(|at| full[at]).collect();
        let gram = Gram { matrix: SymMatrix::from_upper(K, upper).unwrap(), mean: vec![0.0; K], rows: 200 };
        Team { members, judge: gram.clone(), gram }
    }

    #[test]
    fn factors_of_full_rank_change_nothing() {
        let (model, rows) = planted();
        let mut changed = model.clone();
        let found = weights(&model.graph).0;
        let team = whole(&model, &found, &rows);
        assert_eq!(team.members.len(), 3);
        team.emit(&mut changed.graph, &team.spectrum(&model.graph).unwrap(), K);
        changed.check().unwrap();
        lathe_testkit::equivalent(&model, &changed, Some(1e-4), 1).unwrap();
        let shared = changed.graph.find_value("wq_inner").unwrap();
        assert_eq!(changed.graph.value(shared).uses().len(), 3, "one thin layer serves all");
    }

    #[test]
    fn every_member_loses_what_is_told() {
        let (model, rows) = planted();
        let found = weights(&model.graph).0;
        let team = whole(&model, &found, &rows);
        let directions = team.spectrum(&model.graph).unwrap();
        let site = team.site(&model.graph).unwrap();
        let (rank, mut from) = (site.candidates[2].edit.of::<Rank>().0, 0);
        for (member, stated) in team.members.iter().zip(site.candidates[2].loss.per_tap().unwrap()) {
            let weight = factors::matrix(&model.graph, member.weight).unwrap();
            let right = directions.right.subcols(0, rank).subrows(from, 96) * faer::Scale(member.output.sqrt());
            let low = product(directions.left.as_ref().subcols(0, rank), right.transpose());
            let off = product(rows.as_ref(), (&weight - low).as_ref());
            let error = (off.squared_norm_l2() / 200.0 / member.output).sqrt();
            assert!((error - stated).abs() < 1e-6 * error && error > 0.01, "{error} {stated}");
            from += 96;
        }
    }

    #[test]
    fn layers_that_read_different_values_are_no_team() {
        let source = "<ir_version: 10, opset_import: [\"\" : 18]> g (float[3, 64] x) => (float[3, 64] y) \
             <float[64, 64] w = {W}, float[64, 64] u = {W}> { a = MatMul (x, w) b = Relu (a) y = MatMul (b, u) }";
        let model = text::parse(&source.replace("{W}", &format!("{{{}}}", vec!["0.5"; 4096].join(", ")))).unwrap();
        let found = weights(&model.graph).0;
        assert_eq!((found.len(), candidates(&model.graph, &found).len()), (2, 0));
    }
}
