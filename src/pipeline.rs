//! Running the passes to a fixed point, holding them to their claims.

use crate::similar::did_you_mean;
use anyhow::{Context as _, anyhow};
use lathe_ir::{Initializer, Model, ScopeId};
use lathe_passes::{Info, Kind, Outcome, Pass, PassContext, lossy::METHODS};
use std::{
    collections::BTreeSet,
    panic::{self, AssertUnwindSafe},
    time::{Duration, Instant},
};

/// Rounds over the whole list after which passes that keep undoing each other are stopped.
const ROUNDS: usize = 12;

/// Which passes run.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only these, if any are named.
    pub only: Option<Vec<String>>,
    /// Never these.
    pub skip: BTreeSet<String>,
}

impl Selection {
    /// The passes of `all` that are selected. Fails on a name that no pass has.
    pub fn of<'a>(&self, all: &[&'a dyn Pass]) -> Result<Vec<&'a dyn Pass>, UnknownPass> {
        let lossy = |name: &String| METHODS.iter().any(|m| m.info().name == name);
        let known = |name: &String| all.iter().any(|p| p.info().name == name) || lossy(name);
        if let Some(unknown) = self.only.iter().flatten().chain(&self.skip).find(|name| !known(name)) {
            let names = all.iter().map(|p| p.info().name).chain(METHODS.iter().map(|m| m.info().name));
            return Err(UnknownPass { name: unknown.clone(), meant: did_you_mean(unknown, names) });
        }
        Ok(all.iter().copied().filter(|p| self.admits(p.info().name)).collect())
    }

    /// Whether a pass or method is selected.
    pub fn admits(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|n| n == name)) && !self.skip.contains(name)
    }
}

/// A name that is selected and that no pass has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no pass `{name}`; `optimize passes` lists them{meant}")]
pub struct UnknownPass {
    name: String,
    /// The question whether another name was meant.
    meant: String,
}

/// What one pass did over the whole run.
#[derive(Debug, Clone)]
pub struct PassRecord {
    /// The pass.
    pub name: &'static str,
    /// Its claim about error.
    pub kind: Kind,
    /// Its edits and refusals.
    pub outcome: Outcome,
    /// Time spent in it.
    pub time: Duration,
    /// Change of the number of nodes, subgraphs included.
    pub nodes_delta: i64,
    /// Change of the bytes of all constants.
    pub weight_bytes_delta: i64,
    /// Change of the floating-point operations of one run, where they were counted.
    pub flops_delta: i64,
    /// The largest relative L2 error found right after it, where it was run.
    pub error: Option<f64>,
    /// Why it was left out, if it was.
    pub dropped: Option<String>,
}

impl PassRecord {
    /// Of a pass that has not run yet.
    pub(crate) fn new(info: &'static Info) -> PassRecord {
        PassRecord {
            name: info.name,
            kind: info.kind,
            outcome: Outcome::default(),
            time: Duration::ZERO,
            nodes_delta: 0,
            weight_bytes_delta: 0,
            flops_delta: 0,
            error: None,
            dropped: None,
        }
    }
}

/// Looks at a model after an application that changed it.
pub(crate) type Watch<'a> = dyn FnMut(&Model, &dyn Pass) -> Result<Option<f64>, Broken> + 'a;

/// How far a run goes and who watches it.
pub(crate) struct Run<'a> {
    /// The passes, in order.
    pub passes: &'a [&'a dyn Pass],
    /// Stop after this many applications that changed something.
    pub limit: usize,
    /// Called after every application that changed something; returns the measured error if it ran the model. A
    /// complaint stops the run.
    pub watch: &'a mut Watch<'a>,
    /// Counts the floating-point operations of one run of a model, for the report.
    pub count_flops: Option<&'a dyn Fn(&Model) -> u64>,
    /// Hears how many passes of a round are done; `false` ends the run where it is.
    pub tell: &'a dyn Fn(usize) -> bool,
}

/// A pass that broke its claim, or broke down.
#[derive(Debug)]
pub(crate) struct Broken {
    pub pass: &'static str,
    pub reason: String,
}

/// Everything that tells one state of a model from another.
fn stamp(model: &Model) -> (i64, usize, Vec<u64>) {
    let revisions = model.graphs().map(|(graph, _)| graph.revision()).collect();
    (model.ir_version, model.opsets.len(), revisions)
}

/// Nodes of the model and of its local functions, subgraphs included.
pub(crate) fn node_count(model: &Model) -> usize {
    model.graphs().map(|(graph, _)| graph.all_nodes().len()).sum()
}

/// Bytes of all initializers.
pub(crate) fn weight_bytes(model: &Model) -> u64 {
    let mut total = 0;
    for (graph, _) in model.graphs() {
        for scope in graph.scopes() {
            let defaults = graph.scope(scope).inputs().iter().copied().filter(|_| scope == ScopeId::MAIN);
            for value in defaults.chain(graph.initializers(scope)) {
                total += match graph.value(value).initializer() {
                    Some(Initializer::Dense(tensor)) => tensor.byte_len(),
                    Some(Initializer::Sparse(sparse)) => sparse.values.byte_len() + sparse.indices.byte_len(),
                    None => 0,
                } as u64;
            }
        }
    }
    total
}

/// The one pass that may take inputs from a model: those that a file lists for its constants.
const FREEZES: &str = "freeze-initializers";

/// The names of what a caller gives and takes.
fn interface(model: &Model) -> Vec<String> {
    let main = model.graph.main();
    main.inputs().iter().chain(main.outputs()).map(|&v| model.graph.value(v).name.clone()).collect()
}

/// Runs the passes in order, again and again until none changes anything. Returns one record per pass and how many
/// applications changed something; or the pass that broke.
pub(crate) fn run(model: &mut Model, cx: &PassContext, run: Run) -> Result<(Vec<PassRecord>, usize), Broken> {
    let mut records: Vec<PassRecord> = run.passes.iter().map(|p| PassRecord::new(p.info())).collect();
    let mut seen = vec![None; run.passes.len()];
    let mut applied = 0;
    let (mut nodes, mut bytes) = (node_count(model), weight_bytes(model));
    let mut flops = run.count_flops.map(|count| count(model));
    for _ in 0..ROUNDS {
        let before_round = applied;
        for (index, pass) in run.passes.iter().enumerate() {
            if !(run.tell)(index) || applied >= run.limit {
                return Ok((records, applied));
            }
            if seen[index].as_ref() == Some(&stamp(model)) {
                continue;
            }
            let record = &mut records[index];
            let start = Instant::now();
            let given = interface(model);
            let outcome = apply(*pass, model, cx)?;
            record.time += start.elapsed();
            let changed = !outcome.changes.is_empty();
            if changed && pass.info().name != FREEZES && interface(model) != given {
                return Err(Broken {
                    pass: pass.info().name,
                    reason: "it changes the inputs or outputs of the model".into(),
                });
            }
            // Refusals of the last look are the ones that stand; earlier ones may have been overcome since.
            record.outcome.refusals.clear();
            record.outcome.merge(outcome);
            seen[index] = Some(stamp(model));
            if !changed {
                continue;
            }
            applied += 1;
            let (nodes_now, bytes_now) = (node_count(model), weight_bytes(model));
            record.nodes_delta += nodes_now as i64 - nodes as i64;
            record.weight_bytes_delta += bytes_now as i64 - bytes as i64;
            (nodes, bytes) = (nodes_now, bytes_now);
            if let (Some(count), Some(before)) = (run.count_flops, flops) {
                let now = count(model);
                record.flops_delta += now as i64 - before as i64;
                flops = Some(now);
            }
            if let Some(error) = (run.watch)(model, *pass)? {
                record.error = Some(record.error.unwrap_or(0.0).max(error));
            }
        }
        if applied == before_round {
            break;
        }
    }
    Ok((records, applied))
}

/// Applies one pass; a panic in it is a broken pass, not the end of the program.
fn apply(pass: &dyn Pass, model: &mut Model, cx: &PassContext) -> Result<Outcome, Broken> {
    let name = pass.info().name;
    let broken = |reason: String| Broken { pass: name, reason };
    match panic::catch_unwind(AssertUnwindSafe(|| pass.apply(model, cx))) {
        Ok(Ok(outcome)) => Ok(outcome),
        Ok(Err(error)) => Err(broken(error.to_string())),
        Err(payload) => {
            let message = payload.downcast_ref::<String>().cloned();
            let message = message.or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(broken(format!("it broke down: {}", message.unwrap_or_default())))
        }
    }
}

/// Finds the application after which `holds` first fails, by running ever shorter beginnings of the run on copies of
/// `original`. Returns the pass that made it.
pub(crate) fn bisect(
    original: &Model,
    cx: &PassContext,
    passes: &[&dyn Pass],
    applied: usize,
    holds: &mut dyn FnMut(&Model) -> anyhow::Result<bool>,
) -> anyhow::Result<&'static str> {
    let (mut good, mut bad) = (0, applied);
    let mut culprit = None;
    while bad - good > 1 || culprit.is_none() {
        let middle = if bad - good > 1 { good + (bad - good) / 2 } else { bad };
        let mut model = original.clone();
        let mut last = None;
        let mut watch = |_: &Model, pass: &dyn Pass| {
            last = Some(pass.info().name);
            Ok(None)
        };
        let settings = Run { passes, limit: middle, watch: &mut watch, count_flops: None, tell: &|_| true };
        run(&mut model, cx, settings).map_err(|b| anyhow!("pass `{}`: {}", b.pass, b.reason))?;
        if middle < bad && holds(&model).context("while looking for the pass that broke the model")? {
            good = middle;
        } else {
            bad = middle;
            culprit = last;
        }
    }
    culprit.ok_or_else(|| anyhow!("the model differs although no pass changed it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;
    use lathe_passes::{Error, Info};

    /// Takes the last input away.
    struct TakesAnInput;

    impl Pass for TakesAnInput {
        fn info(&self) -> &'static Info {
            static INFO: Info = Info {
                name: "takes-an-input",
                summary: "",
                doc: "",
                options: &[],
                kind: Kind::Identical,
                lowers: &[],
                source: None,
            };
            &INFO
        }

        fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
            let mut outcome = Outcome::default();
            let last = model.graph.main().inputs().len() - 1;
            let value = model.graph.main().inputs()[last];
            model.graph.set_default(value, Some(Initializer::Dense(lathe_ir::Tensor::from_f32s(&[2], &[1.0, 2.0]))));
            model.graph.freeze_input(ScopeId::MAIN, last);
            outcome.change("take", "the graph");
            Ok(outcome)
        }
    }

    #[test]
    fn a_pass_that_changes_the_interface_is_broken() {
        let mut model = text::parse("g (float[2] x, float[2] w) => (float[2] y) { y = Add (x, w) }")
            .expect("the graph is well formed");
        let run = Run {
            passes: &[&TakesAnInput],
            limit: usize::MAX,
            watch: &mut |_, _| Ok(None),
            count_flops: None,
            tell: &|_| true,
        };
        let broken = super::run(&mut model, &PassContext::default(), run).expect_err("the pass is stopped");
        assert_eq!(broken.pass, "takes-an-input");
        assert_eq!(broken.reason, "it changes the inputs or outputs of the model");
    }
}
