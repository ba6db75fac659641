//! Stores equal constants once.

use crate::{Error, Info, Kind, Outcome, Pass, PassContext, Saving};
use lathe_ir::{DataType, Graph, Model, ScopeId, Tensor, ValueId};
use std::collections::{BTreeMap, HashMap};

/// See [`INFO`].
pub struct ShareInitializers;

static INFO: Info = Info {
    name: "share-initializers",
    summary: "stores constants of equal type, shape and bytes once",
    doc: "Of several constants with the same element type, shape and bytes only the first stays, and everything that \
          used another uses it. A constant of a subgraph gives way to an equal one of a graph around it. Floats are \
          compared by their bits, so 0 and −0 stay apart. A constant that is itself an output of the model stays.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Parameters],
    source: None,
};

impl Pass for ShareInitializers {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, _: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        for (graph, _) in model.graphs_mut() {
            share(graph, &mut outcome);
        }
        Ok(outcome)
    }
}

/// Bytes looked at on either end of a large tensor before all of it is read.
const SAMPLE: usize = 1024;

type Key = (DataType, Vec<usize>, Vec<u8>);

fn key(tensor: &Tensor) -> Key {
    let bytes = tensor.bytes();
    let sample = match tensor.string_data() {
        Some(strings) => strings.iter().flat_map(|s| [s.as_ref(), &[0]].concat()).take(SAMPLE).collect(),
        None if bytes.len() <= 2 * SAMPLE => bytes.to_vec(),
        None => {
            let sample = [&bytes[..SAMPLE], &bytes[bytes.len() - SAMPLE..]].concat();
            // Touching a page brings its neighbours along.
            tensor.release();
            sample
        }
    };
    (tensor.dtype(), tensor.dims().to_vec(), sample)
}

fn share(graph: &mut Graph, outcome: &mut Outcome) {
    let mut kept: BTreeMap<ScopeId, HashMap<Key, Vec<ValueId>>> = BTreeMap::new();
    for scope in graph.scopes() {
        let mut visible = vec![scope];
        while let Some(outer) = graph.parent(visible[visible.len() - 1]) {
            visible.push(outer);
        }
        let all: Vec<ValueId> = graph.initializers(scope).collect();
        for value in all {
            let Some(tensor) = graph.constant(value) else { continue };
            let key = key(tensor);
            let same = |other: &&ValueId| graph.constant(**other).is_some_and(|o| o.same_bits(tensor));
            let candidates = visible.iter().filter_map(|s| kept.get(s)?.get(&key)).flatten();
            let found = if graph.is_output(value) { None } else { candidates.into_iter().find(same).copied() };
            match found {
                Some(first) => {
                    let names = format!("`{}` is `{}`", graph.value(value).name, graph.value(first).name);
                    graph.replace_uses(value, first);
                    graph.remove_initializer(value);
                    outcome.change("share-constant", names);
                }
                None => kept.entry(scope).or_default().entry(key).or_default().push(value),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_untouched};
    use insta::assert_snapshot;

    #[test]
    fn shares_equal_constants() {
        let graph = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            s = Add (x, a)
            y = Mul (s, b)
        }";
        assert_snapshot!(check(&ShareInitializers, graph), @r#"
        g (float[2] x) => (float[2] y) <
            float[2] a = {1, 2}
        > {
            s = Add (x, a)
            y = Mul (s, a)  # float[2]
        }
        "#);
    }

    #[test]
    fn shares_across_subgraphs() {
        let graph = "g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            s = Add (x, a)
            y = If (c) <
                then_branch = t () => (float[2] p) <float[2] b = {1, 2}> { p = Mul (s, b) },
                else_branch = e () => (float[2] r) { r = Identity (s) }
            >
        }";
        assert_snapshot!(check(&ShareInitializers, graph), @r#"
        g (bool c, float[2] x) => (float[2] y) <
            float[2] a = {1, 2}
        > {
            s = Add (x, a)
            y = If (c) <then_branch = t () => (float[2] p) {
                p = Mul (s, a)  # float[2]
            }, else_branch = e () => (float[2] r) {
                r = Identity (s)  # float[2]
            }>  # float[2]
        }
        "#);
    }

    #[test]
    fn keeps_what_differs_in_sign_of_zero_shape_or_type() {
        let graph = "g (float[2] x) => (float[2] y) <float[1] a = {0}, float[1] b = {-0.0}, float c = {0}> {
            s = Add (x, a)
            t = Add (s, b)
            y = Add (t, c)
        }";
        check_untouched(&ShareInitializers, graph);
    }
}
