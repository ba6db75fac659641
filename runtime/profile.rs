//! The profile that ONNX Runtime writes: where a run spends its time, and which provider took which node.

use crate::quantile;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Where the time of a run goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The runs that were measured; the first one, which also prepares, is left out if there are others.
    pub runs: usize,
    /// The median of a whole run, in milliseconds.
    pub run_ms: f64,
    /// Every node that ran, in the order of its first run.
    pub nodes: Vec<NodeTime>,
    /// Which provider took what.
    pub placement: Placement,
}

/// The time of one node of the graph that the runtime made of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeTime {
    /// Its name: the model's, unless the runtime fused it.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// The provider that ran it.
    pub provider: String,
    /// How often it ran in one run.
    pub calls: f64,
    /// The median of its time in one run, in milliseconds.
    pub ms: f64,
}

/// Which provider took which nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The provider that was asked for, as the runtime calls it.
    pub provider: String,
    /// How many nodes it took.
    pub taken: usize,
    /// Groups of nodes that it ran without a node of another provider between them.
    #[serde(default)]
    pub partitions: usize,
    /// The nodes that others run: "`/Shape` (Shape) on CPUExecutionProvider".
    pub elsewhere: Vec<String>,
    /// The same nodes with what the runtime says about them.
    #[serde(default)]
    pub left: Vec<LeftNode>,
    /// Nodes that the runtime added to copy values between memories.
    pub copies: usize,
}

/// A node that the provider left to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftNode {
    /// Its name.
    pub name: String,
    /// Its operator.
    pub op: String,
    /// The provider that runs it.
    pub provider: String,
    /// Why, where the runtime says so.
    pub why: Option<String>,
}

impl Placement {
    /// A sentence about nodes that the provider left, or `None` where it took them all.
    pub fn note(&self) -> Option<String> {
        /// Names beyond these are only counted.
        const SHOWN: usize = 8;
        if self.elsewhere.is_empty() {
            return None;
        }
        let total = self.taken + self.elsewhere.len();
        let more = self.elsewhere.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let shown = self.elsewhere[..self.elsewhere.len().min(SHOWN)].join(", ");
        let copies = if self.copies > 0 { format!("; {} copies between memories", self.copies) } else { String::new() };
        let others = self.elsewhere.len();
        Some(format!("{} left {others} of {total} nodes to others: {shown}{more}{copies}", self.provider))
    }
}

/// A profile that is none.
#[derive(Debug, thiserror::Error)]
#[error("the profile of the runtime cannot be read: {0}")]
pub struct ProfileError(#[from] serde_json::Error);

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Arguments,
}

#[derive(Default, Deserialize)]
struct Arguments {
    #[serde(default)]
    op_name: String,
    #[serde(default)]
    provider: String,
    #[serde(default)]
    node_index: String,
}

/// Operators whose time is that of the nodes in their bodies, which have events of their own.
const CONTAINERS: [&str; 3] = ["If", "Loop", "Scan"];

impl Profile {
    /// Reads the JSON that a session wrote. `provider` is the name of the provider that was asked for, and `reasons` say why
    /// it left nodes, by their names.
    pub fn parse(json: &[u8], provider: &str, reasons: &BTreeMap<String, String>) -> Result<Profile, ProfileError> {
        let events: Vec<Event> = serde_json::from_slice(json)?;
        let mut runs: Vec<&Event> = events.iter().filter(|e| e.cat == "Session" && e.name == "model_run").collect();
        runs.sort_by(|a, b| a.ts.total_cmp(&b.ts));
        let measured = &runs[usize::from(runs.len() > 1)..];
        let durations: Vec<f64> = measured.iter().map(|e| e.dur / 1000.0).collect();
        let run_ms = if durations.is_empty() { 0.0 } else { quantile(&durations, 0.5) };
        // Events are stamped with their start, and runs follow each other.
        let run_of = |event: &Event| measured.partition_point(|run| run.ts <= event.ts).checked_sub(1);
        let count = measured.len().max(1);
        let kernels = || {
            let kernel = |e: &&Event| e.cat == "Node" && e.name.ends_with("_kernel_time");
            events.iter().filter(kernel).map(|e| (e, e.name.trim_end_matches("_kernel_time")))
        };
        let mut order: Vec<NodeTime> = Vec::new();
        let mut times: Vec<Vec<f64>> = Vec::new();
        let mut places: BTreeMap<(&str, &str, &str), usize> = BTreeMap::new();
        for (event, name) in kernels() {
            let key = (name, event.args.node_index.as_str(), event.args.provider.as_str());
            let place = *places.entry(key).or_insert_with(|| {
                let (op, provider) = (event.args.op_name.clone(), event.args.provider.clone());
                order.push(NodeTime { name: name.to_owned(), op, provider, calls: 0.0, ms: 0.0 });
                times.push(vec![0.0; count]);
                order.len() - 1
            });
            if let Some(run) = run_of(event) {
                order[place].calls += 1.0 / count as f64;
                let contains = CONTAINERS.contains(&event.args.op_name.as_str());
                times[place][run] += if contains { 0.0 } else { event.dur / 1000.0 };
            }
        }
        for (node, times) in order.iter_mut().zip(&times) {
            node.ms = quantile(times, 0.5);
            // Summed from shares, so that a whole number is one.
            node.calls = (node.calls * 1000.0).round() / 1000.0;
        }
        let mut placement = Placement { provider: provider.to_owned(), ..Placement::default() };
        let (mut named, mut taken_before) = (BTreeSet::new(), false);
        for node in &order {
            let first = named.insert((&node.name, &node.op, &node.provider));
            if node.op.starts_with("Memcpy") {
                placement.copies += 1;
                continue;
            }
            let takes = node.provider == provider;
            placement.partitions += usize::from(takes && !taken_before);
            taken_before = takes;
            if takes {
                placement.taken += 1;
            } else if first {
                let name = if node.name.is_empty() { "unnamed" } else { &node.name };
                placement.elsewhere.push(format!("`{name}` ({}) on {}", node.op, node.provider));
                placement.left.push(LeftNode {
                    name: node.name.clone(),
                    op: node.op.clone(),
                    provider: node.provider.clone(),
                    why: reasons.get(&node.name).cloned(),
                });
            }
        }
        Ok(Profile { runs: measured.len(), run_ms, nodes: order, placement })
    }

    /// Calls and milliseconds of each operator in one run, the longest first.
    pub fn by_operator(&self) -> Vec<(String, f64, f64)> {
        let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        for node in &self.nodes {
            let sum = sums.entry(&node.op).or_default();
            sum.0 += node.calls;
            sum.1 += node.ms;
        }
        let mut sums: Vec<_> = sums.into_iter().map(|(op, (calls, ms))| (op.to_owned(), calls, ms)).collect();
        sums.sort_by(|a, b| b.2.total_cmp(&a.2));
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs of a graph that a GPU shares with the CPU.
    const SHARED: &str = r#"[
        {"cat":"Session","name":"session_initialization","ts":1,"dur":50},
        {"cat":"Session","name":"model_run","ts":100,"dur":900},
        {"cat":"Node","name":"conv_kernel_time","ts":110,"dur":800,
         "args":{"op_name":"Conv","provider":"CUDAExecutionProvider","node_index":"0"}},
        {"cat":"Session","name":"model_run","ts":2000,"dur":60},
        {"cat":"Node","name":"conv_kernel_time","ts":2010,"dur":30,
         "args":{"op_name":"Conv","provider":"CUDAExecutionProvider","node_index":"0"}},
        {"cat":"Node","name":"Memcpy_token_0_kernel_time","ts":2041,"dur":4,
         "args":{"op_name":"MemcpyToHost","provider":"CUDAExecutionProvider","node_index":"2"}},
        {"cat":"Node","name":"pick_kernel_time","ts":2045,"dur":6,
         "args":{"op_name":"Unique","provider":"CPUExecutionProvider","node_index":"1"}},
        {"cat":"Node","name":"branch_kernel_time","ts":2046,"dur":9,
         "args":{"op_name":"If","provider":"CUDAExecutionProvider","node_index":"3"}}]"#;

    fn reasons() -> BTreeMap<String, String> {
        BTreeMap::from([("pick".to_owned(), "no kernel".to_owned())])
    }

    #[test]
    fn the_first_run_is_not_counted() {
        let profile = Profile::parse(SHARED.as_bytes(), "CUDAExecutionProvider", &reasons()).unwrap();
        assert_eq!((profile.runs, profile.run_ms), (1, 0.06));
        let ops: Vec<_> = profile.by_operator().into_iter().map(|(op, _, ms)| (op, ms)).collect();
        let expected = [("Conv", 0.03), ("Unique", 0.006), ("MemcpyToHost", 0.004), ("If", 0.0)];
        assert_eq!(ops, expected.map(|(op, ms)| (op.to_owned(), ms)));
    }

    #[test]
    fn nodes_left_to_the_cpu_are_named() {
        let profile = Profile::parse(SHARED.as_bytes(), "CUDAExecutionProvider", &reasons()).unwrap();
        assert_eq!(
            profile.placement.note().unwrap(),
            "CUDAExecutionProvider left 1 of 3 nodes to others: `pick` (Unique) on CPUExecutionProvider; \
             1 copies between memories"
        );
        let left = &profile.placement.left[0];
        assert_eq!((left.name.as_str(), left.why.as_deref()), ("pick", Some("no kernel")));
        assert_eq!(profile.placement.partitions, 2);
        let all = Profile::parse(SHARED.as_bytes(), "TensorrtExecutionProvider", &BTreeMap::new()).unwrap();
        assert_eq!(all.placement.taken, 0);
    }

    #[test]
    fn what_is_no_profile_is_an_error() {
        assert!(Profile::parse(b"[{", "x", &BTreeMap::new()).is_err());
        assert_eq!(Profile::parse(b"[]", "x", &BTreeMap::new()).unwrap().runs, 0);
    }
}
