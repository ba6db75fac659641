//! How far the outputs of variants of a model are from the model's own.
//!
//! A variant has inputs more than the model, *gates*: one loaded session serves every assignment of numbers to them. The
//! model runs once per batch, the variant once per batch and assignment, and only distances are kept.

mod distance;
mod run;

pub(crate) use run::serve;

use crate::{
    Child, Distance, Gates, LoadOptions, SetSpec, StatisticsError,
    wire::{NonFinite, TrialJob},
};
use lathe_analysis::{Facts, Keep as _, KeyBuilder, may_leave};
use lathe_ir::{DataType, Graph, Model, ScopeId, Type, TypeKind, ValueId};
use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// What distances are kept as.
const KIND: &str = "trials";

/// A model and a variant of it with gates, and how both are run and compared.
#[derive(Debug, Clone, Copy)]
pub struct Trials<'a> {
    /// The model.
    pub reference: &'a Model,
    /// The variant.
    pub variant: &'a Model,
    /// What both are run on.
    pub set: &'a SetSpec,
    /// How outputs are compared.
    pub distance: Distance,
    /// How both are loaded.
    pub load: &'a LoadOptions,
}

impl Trials<'_> {
    /// The mean distance of the outputs of the variant from those of the reference over the samples, once for every
    /// assignment of its gates; infinite where an output has no number where the model's has one.
    ///
    /// Outputs that are caches or attention maps by their names count only where there are no others, and so do outputs of
    /// whole numbers and strings.
    pub fn run(&self, child: &Child, gates: &[Gates]) -> Result<Vec<f64>, StatisticsError> {
        let Some(keep) = child.kept() else { return self.run_all(child, gates) };
        let options = self.options();
        let variant = child.content().of_model(self.variant).map_err(failed)?;
        let run = child.run_hash(self.reference, self.set, &options, &(variant.as_bytes(), self.distance))?;
        let key = |gates: &Gates| KeyBuilder::new().bytes(run.as_bytes()).value(gates).finish();
        let known = |gates: &Gates| Some(f64::from_le_bytes(keep.get(KIND, &key(gates))?.try_into().ok()?));
        let mut found: Vec<Option<f64>> = gates.iter().map(known).collect();
        let open: Vec<Gates> = gates.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(g, _)| g.clone()).collect();
        let mut computed = self.run_all(child, &open)?.into_iter();
        for (gates, found) in gates.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
            *found = computed.next();
            found.iter().for_each(|distance| keep.put(KIND, &key(gates), &distance.to_le_bytes()));
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// What [`Trials::run`] gives without gates for several variants, as many at a time as there are workers.
    pub fn run_each(all: &[Trials<'_>], child: &Child) -> Result<Vec<f64>, StatisticsError> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(trials) = all.get(at) else { return done };
                let distance = trials.run(child, &[Gates::new()]).map(|found| found.first().copied());
                done.push((at, distance));
            }
        };
        let mut done = match child.workers().min(all.len()) {
            0 | 1 => work(),
            threads => thread::scope(|scope| {
                let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
                workers.into_iter().flat_map(|worker| worker.join().expect("a worker only asks")).collect()
            }),
        };
        done.sort_by_key(|(at, _)| *at);
        done.into_iter().map(|(_, distance)| Ok(distance?.unwrap_or(f64::INFINITY))).collect()
    }

    /// How both models are loaded: as they will run where they are used. Packing weights saves less time than it takes.
    fn options(&self) -> LoadOptions {
        LoadOptions { lean: true, optimize: true, ..self.load.clone() }
    }

    fn run_all(&self, child: &Child, gates: &[Gates]) -> Result<Vec<f64>, StatisticsError> {
        if gates.is_empty() {
            return Ok(Vec::new());
        }
        let scratch = child.scratch().map_err(failed)?;
        let file = |name: &str, model: &Model| -> Result<PathBuf, StatisticsError> {
            let folder = scratch.path().join(name);
            std::fs::create_dir(&folder).map_err(failed)?;
            let path = folder.join("model.onnx");
            model.write_linked(&path)?;
            Ok(path)
        };
        let job = TrialJob {
            reference: file("reference", self.reference)?,
            variant: file("variant", self.variant)?,
            set: self.set.clone(),
            gates: gates.to_vec(),
            distance: self.distance,
            non_finite: NonFinite::Infinite,
            options: self.options(),
        };
        Ok(child.trials(&job)?)
    }
}

fn failed(source: io::Error) -> StatisticsError {
    StatisticsError::Io { path: std::env::temp_dir(), source }
}

/// `` `a`, `b` ``.
pub(crate) fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Names of the outputs that count: those that depend on inputs and are no by-products, where there are any.
fn counted(model: &Model) -> Vec<String> {
    let graph = &model.graph;
    let moved = downstream(graph, graph.main().inputs());
    let mut outputs: Vec<ValueId> = graph.main().outputs().to_vec();
    let mut only = |counts: &dyn Fn(ValueId) -> bool| {
        if outputs.iter().any(|&v| counts(v)) {
            outputs.retain(|&v| counts(v));
        }
    };
    only(&|v| moved.contains(&v));
    only(&|v| !may_leave(&graph.value(v).name));
    outputs.into_iter().map(|v| graph.value(v).name.clone()).collect()
}

/// Everything in the main graph that is computed of these values, and themselves.
pub(crate) fn downstream(graph: &Graph, values: &[ValueId]) -> BTreeSet<ValueId> {
    let mut moved: BTreeSet<ValueId> = values.iter().copied().collect();
    for id in graph.sorted(ScopeId::MAIN).unwrap_or_default() {
        let node = graph.node(id);
        let captured = node.subgraphs().into_iter().flat_map(|scope| graph.captures(scope));
        if node.inputs().iter().flatten().copied().chain(captured).any(|v| moved.contains(&v)) {
            moved.extend(node.outputs().iter().flatten());
        }
    }
    moved
}

/// Whether an output that counts may hold real numbers, which answer to small errors as whole numbers and strings do not.
pub(crate) fn holds_numbers(model: &Model) -> bool {
    let facts = Facts::infer(model);
    let names = counted(model);
    let graph = &model.graph;
    graph.main().outputs().iter().filter(|&&v| names.contains(&graph.value(v).name)).any(|&v| {
        let elem = facts.elem(v).or_else(|| elem_in(graph.value(v).ty.as_ref()?));
        elem.is_none_or(DataType::is_float)
    })
}

/// The type of the elements of a tensor, or of those that something holds.
fn elem_in(ty: &Type) -> Option<DataType> {
    match &ty.kind {
        TypeKind::Sequence(inner) | TypeKind::Optional(inner) => elem_in(inner),
        TypeKind::Map { value, .. } => elem_in(value),
        _ => ty.elem(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_and_by_products_count_only_alone() {
        let outputs = |ports: &str, body: &str| {
            let head = format!("<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 3] x) => ({ports})");
            let model = lathe_ir::text::parse(&format!("{head} <float[1] c = {{1}}> {{ {body} }}")).unwrap();
            (counted(&model), holds_numbers(&model))
        };
        let whole = outputs("int64[n] y, float[1] k", "y = ArgMax <axis = 1, keepdims = 0> (x) k = Identity (c)");
        assert_eq!(whole, (vec!["y".to_owned()], false));
        let cache = outputs("float[n, 3] y, float[n, 3] present_0_key", "y = Neg (x) present_0_key = Abs (x)");
        assert_eq!(cache, (vec!["y".to_owned()], true));
        assert_eq!(outputs("float[1] k", "k = Identity (c)").0, ["k"]);
    }
}
