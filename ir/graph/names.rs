//! Names of values: labels that are unambiguous where a model is written.

use super::{Graph, ScopeId, ValueId};
use std::collections::BTreeSet;

impl Graph {
    /// A name like `base` that no value has.
    pub fn fresh_name(&mut self, base: &str) -> String {
        if !base.is_empty() && !self.names.contains_key(base) {
            return base.to_owned();
        }
        let next = self.fresh.entry(base.to_owned()).or_insert(0);
        loop {
            *next += 1;
            let name = format!("{base}_{next}");
            if !self.names.contains_key(&name) {
                return name;
            }
        }
    }

    pub(super) fn count_name(&mut self, name: &str) {
        match self.names.get_mut(name) {
            Some(count) => *count += 1,
            None => _ = self.names.insert(name.to_owned(), 1),
        }
    }

    pub(super) fn uncount_name(&mut self, name: &str) {
        if let Some(count) = self.names.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                self.names.remove(name);
            }
        }
    }

    /// Gives a value exactly this name.
    pub fn rename(&mut self, value: ValueId, name: impl Into<String>) {
        self.touch();
        let name = name.into();
        let old = std::mem::take(&mut self.values[value.index()].name);
        self.uncount_name(&old);
        self.count_name(&name);
        self.values[value.index()].name = name;
    }

    /// Renames values so that no name is defined twice where both could be seen. Names of the main graph's inputs and
    /// outputs never change. Returns how many were renamed.
    pub fn make_names_unique(&mut self) -> usize {
        let mut renamed = 0;
        let mut taken: Vec<BTreeSet<String>> = vec![BTreeSet::new(); self.scopes.len()];
        for scope in self.scopes() {
            let mut visible = Vec::new();
            let mut at = self.parent(scope);
            while let Some(outer) = at {
                visible.push(outer.index());
                at = self.parent(outer);
            }
            let here = self.scope(scope);
            let fixed: Vec<ValueId> = if scope == ScopeId::MAIN {
                here.inputs.iter().chain(&here.outputs).copied().collect()
            } else {
                here.inputs.clone()
            };
            let made = self.nodes(scope).flat_map(|id| self.node(id).outputs.iter().flatten().copied());
            let all: Vec<ValueId> = fixed.into_iter().chain(self.initializers(scope)).chain(made).collect();
            let mut done = BTreeSet::new();
            for value in all {
                if !done.insert(value) {
                    continue;
                }
                let name = self.value(value).name.clone();
                let clash = name.is_empty()
                    || taken[scope.index()].contains(&name)
                    || visible.iter().any(|&outer| taken[outer].contains(&name));
                let name = if clash {
                    renamed += 1;
                    let fresh = self.fresh_name(if name.is_empty() { "value" } else { &name });
                    self.rename(value, fresh.clone());
                    fresh
                } else {
                    name
                };
                taken[scope.index()].insert(name);
            }
        }
        renamed
    }
}
