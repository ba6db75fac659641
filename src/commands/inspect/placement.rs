//! `optimize inspect --ep`: which nodes an execution provider takes as a run of the model shows, why others are left as the
//! runtime says, and how many of them exact passes and fixed sizes remove, which is tried.

use crate::{Interface, Options, RunOptions, job, latency::Measurement};
use lathe_analysis::Facts;
use lathe_ir::{Model, ScopeId, ValueId};
use lathe_runtime::{BenchInputs, Placement, generate, required_inputs, sizes_to_try};
use serde::Serialize;
use std::{collections::BTreeMap, path::Path};

/// Nodes of one kind that a provider leaves for one reason.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct LeftGroup {
    /// Their operator.
    pub op: String,
    /// The types of what they read: `int64`.
    pub reads: String,
    /// How many there are.
    pub count: usize,
    /// One of them.
    pub example: String,
    /// The provider that runs them.
    pub provider: String,
    /// Why, where the runtime says so.
    pub why: Option<String>,
}

/// Where the nodes of one model run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Placed {
    /// Nodes that ran.
    pub nodes: usize,
    /// Nodes that the provider took.
    pub taken: usize,
    /// Groups of nodes that it ran without a node of another provider between them.
    pub partitions: usize,
    /// Nodes that the runtime added to copy values between memories.
    pub copies: usize,
    /// The others, the most numerous first.
    pub left: Vec<LeftGroup>,
}

/// Where the nodes of a model run, and those of what it can be made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Placements {
    /// The provider as the runtime calls it.
    pub provider: String,
    /// The model as it is.
    pub model: Placed,
    /// What exact passes make of it.
    pub optimized: Trial,
    /// The same with the sizes of its inputs fixed; `None` where none is open or nothing was left.
    pub fixed: Option<Fixed>,
}

/// What comes of trying something.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Trial {
    /// It runs like this.
    Placed(Placed),
    /// It cannot be made or run, and why.
    Failed(String),
}

/// A trial with fixed sizes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Fixed {
    /// As `--fix-dim` takes them.
    pub sizes: String,
    /// What comes of it.
    pub trial: Trial,
}

/// A model on disk and how it is run.
pub(super) struct Question<'a> {
    pub path: &'a Path,
    pub run: &'a RunOptions,
}

impl Question<'_> {
    /// Runs the model, and what it can be made, on the provider.
    pub(super) fn answer(&self, model: &Model) -> anyhow::Result<Placements> {
        let placement = self.placement(self.path)?;
        let before = placed(&placement, model);
        let optimized = self.trial(Interface::default());
        let left = matches!(&optimized, Trial::Placed(placed) if !placed.left.is_empty());
        let sizes = if left { self.sizes(model) } else { Vec::new() };
        let fixed = (!sizes.is_empty()).then(|| Fixed {
            sizes: sizes.iter().map(|(name, size)| format!("{name}={size}")).collect::<Vec<_>>().join(","),
            trial: self.trial(Interface { sizes, ..Interface::default() }),
        });
        Ok(Placements { provider: placement.provider, model: before, optimized, fixed })
    }

    fn placement(&self, path: &Path) -> anyhow::Result<Placement> {
        let inputs = BenchInputs::Random(self.run.inputs.clone());
        let measured = Measurement { run: self.run, models: &[path], inputs: &inputs, seconds: 0.0 };
        Ok(measured.profiles()?.into_iter().next().map(|profile| profile.placement).unwrap_or_default())
    }

    /// Where the nodes of the result of exact passes run.
    fn trial(&self, interface: Interface) -> Trial {
        let tried = || -> anyhow::Result<Placed> {
            let folder = tempfile::tempdir()?;
            let output = folder.path().join("model.onnx");
            let mut run = self.run.clone();
            run.progress = lathe_runtime::Listener::default();
            let options = Options { interface, ..Options::exact(self.path.to_owned(), output.clone(), run) };
            job::optimize(&options)?;
            let model = Model::read(&output)?.model;
            Ok(placed(&self.placement(&output)?, &model))
        };
        tried().map_or_else(|error| Trial::Failed(format!("{error:#}")), Trial::Placed)
    }

    /// The sizes that open dimensions of inputs have in the run, by what `--fix-dim` calls them.
    fn sizes(&self, model: &Model) -> Vec<(String, usize)> {
        let mut sizes: Vec<(String, usize)> = Vec::new();
        let first = sizes_to_try(model, &self.run.inputs).into_iter().next();
        let Some(Ok(inputs)) = first.map(|sizes| generate(model, &self.run.inputs, &sizes)) else { return sizes };
        for (value, (name, tensor)) in required_inputs(&model.graph).zip(&inputs) {
            let Some(shape) = model.graph.value(value).ty.as_ref().and_then(|ty| ty.shape().cloned()) else { continue };
            for (axis, dim) in shape.dims.iter().enumerate().filter(|(_, dim)| dim.known().is_none()) {
                let called = match dim.name() {
                    Some(symbol) if !symbol.is_empty() && symbol != "?" => symbol.to_owned(),
                    _ => format!("{name}[{axis}]"),
                };
                if !sizes.iter().any(|(known, _)| *known == called) {
                    sizes.push((called, tensor.dims()[axis]));
                }
            }
        }
        sizes
    }
}

/// Groups what was left by operator, types and reason.
fn placed(placement: &Placement, model: &Model) -> Placed {
    let (graph, facts) = (&model.graph, Facts::infer(model));
    let elem = |&value: &ValueId| facts.elem(value).map_or_else(|| "?".to_owned(), |elem| elem.to_string());
    let reads: BTreeMap<&str, String> = graph
        .nodes(ScopeId::MAIN)
        .map(|id| {
            let mut types: Vec<String> = graph.node(id).inputs().iter().flatten().map(elem).collect();
            types.sort();
            types.dedup();
            (graph.node(id).name.as_str(), types.join(", "))
        })
        .collect();
    let mut groups: Vec<LeftGroup> = Vec::new();
    for node in &placement.left {
        let types = reads.get(node.name.as_str()).cloned().unwrap_or_default();
        let same = |g: &&mut LeftGroup| {
            g.op == node.op && g.reads == types && g.why == node.why && g.provider == node.provider
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.count += 1,
            None => groups.push(LeftGroup {
                op: node.op.clone(),
                reads: types,
                count: 1,
                example: node.name.clone(),
                provider: node.provider.clone(),
                why: node.why.clone(),
            }),
        }
    }
    groups.sort_by(|a, b| (b.count, &a.op).cmp(&(a.count, &b.op)));
    Placed {
        nodes: placement.taken + placement.left.len(),
        taken: placement.taken,
        partitions: placement.partitions,
        copies: placement.copies,
        left: groups,
    }
}

impl Placed {
    fn left(&self) -> usize {
        self.nodes - self.taken
    }

    /// How many nodes are taken, without a subject.
    pub(super) fn describe(&self) -> String {
        if self.left.is_empty() {
            return format!("all {} nodes", self.nodes);
        }
        let count = |count: usize, one: &str, many: &str| format!("{count} {}", if count == 1 { one } else { many });
        format!(
            "{} of {} nodes in {}, with {} between memories; {} left",
            self.taken,
            self.nodes,
            count(self.partitions, "group", "groups"),
            count(self.copies, "copy", "copies"),
            self.left()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_runtime::LeftNode;

    #[test]
    fn nodes_that_are_left_for_one_reason_are_one_group() {
        let model = lathe_ir::text::parse(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 4] x) => (int64[2] y) { s = Shape <> (x) y = Add (s, s) }",
        )
        .unwrap();
        let left = |name: &str, op: &str, why: Option<&str>| LeftNode {
            name: name.to_owned(),
            op: op.to_owned(),
            provider: "CPUExecutionProvider".to_owned(),
            why: why.map(str::to_owned),
        };
        let placement = Placement {
            provider: "WebGpuExecutionProvider".to_owned(),
            taken: 3,
            partitions: 2,
            copies: 1,
            left: vec![
                left("a", "Shape", None),
                left("b", "Add", Some("no kernel")),
                left("c", "Add", Some("no kernel")),
                left("d", "Add", None),
            ],
            ..Placement::default()
        };
        let placed = placed(&placement, &model);
        assert_eq!(placed.describe(), "3 of 7 nodes in 2 groups, with 1 copy between memories; 4 left");
        let groups: Vec<_> = placed.left.iter().map(|g| (g.op.as_str(), g.count, g.example.as_str())).collect();
        assert_eq!(groups, [("Add", 2, "b"), ("Add", 1, "d"), ("Shape", 1, "a")]);
        let whole = Placed { taken: 7, left: Vec::new(), ..placed };
        assert_eq!(whole.describe(), "all 7 nodes");
    }
}
