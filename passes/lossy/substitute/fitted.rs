//! What was fitted on the calibration set to stand between values.

use crate::lossy::regions::drop_unused;
use lathe_ir::{Graph, ScopeId, ValueId};
use std::collections::BTreeMap;

/// Nodes and numbers to compute a value from others, which are known by name: it can be put into a copy of a part of the
/// model too.
#[derive(Debug)]
pub(super) struct Fitted {
    /// The values that are read, as the inputs of the fragment.
    pub inputs: Vec<String>,
    /// The value that is computed anew: the output of the fragment, a constant of it if it reads nothing.
    pub output: String,
    /// Nodes and numbers.
    pub fragment: Graph,
}

impl PartialEq for Fitted {
    /// Whether both are one: equal ones are never fitted twice.
    fn eq(&self, other: &Fitted) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Fitted {
    /// Puts the fragment in its place; what only the old value needed goes. An error says why it does not fit.
    pub fn splice(&self, graph: &mut Graph) -> Result<(), &'static str> {
        let inputs: Vec<Option<ValueId>> = self.inputs.iter().map(|name| graph.find_value(name)).collect();
        let old = graph.find_value(&self.output).filter(|_| inputs.iter().all(Option::is_some));
        let old = old.ok_or("a value that it stands between is gone")?;
        let fragment = self.fragment.fragment(ScopeId::MAIN);
        let pasted = graph.paste(&fragment, ScopeId::MAIN, &inputs, &BTreeMap::new(), &self.output);
        let new = pasted.outputs.first().copied().flatten().expect("a fragment has an output");
        graph.replace(old, new);
        drop_unused(graph, old);
        graph.sort().map_err(|_| "nodes need one another")
    }
}
