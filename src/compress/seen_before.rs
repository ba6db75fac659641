//! What was seen of layers that read or give another value once an edit before them was carried out.

use lathe_analysis::{Calibrate, Cross, EvaluateError, Gram, Magnitudes, Moments, Rows, Spread};
use lathe_ir::{Model, NodeId};
use lathe_passes::lossy::{Tap, weights};
use std::collections::BTreeMap;

/// Statistics of a model as those of a variant of it: what was not seen of a value that a layer reads or gives is what
/// was seen of the value that stood in its place.
///
/// An edit that leaves out a block joins what is around it under other names. What its layers read then is near what
/// they read before, or the block would not have been left out.
pub(super) struct SeenBefore<'a> {
    seen: &'a dyn Calibrate,
    layers: Layers,
    places: BTreeMap<Rows, Rows>,
}

/// What every layer reads and gives.
type Layers = BTreeMap<NodeId, Vec<(Option<Rows>, Rows)>>;

fn layers(model: &Model) -> Layers {
    let mut found = Layers::new();
    for Tap { node, rows, output_rows, .. } in weights(&model.graph).0.into_iter().flat_map(|weight| weight.taps) {
        found.entry(node).or_default().push((rows, output_rows));
    }
    found
}

impl<'a> SeenBefore<'a> {
    /// What was seen of `model`.
    pub fn new(seen: &'a dyn Calibrate, model: &Model) -> SeenBefore<'a> {
        SeenBefore { seen, layers: layers(model), places: BTreeMap::new() }
    }

    /// Follows an edit of the model to what it left.
    pub fn follow(&mut self, variant: &Model) {
        self.places.clear();
        for (node, after) in layers(variant) {
            let before = self.layers.get(&node).into_iter().flatten();
            for ((read, given), (reads, gives)) in before.zip(after) {
                let read = reads.zip(read.clone());
                for (now, before) in read.into_iter().chain([(gives, given.clone())]) {
                    if now != before {
                        self.places.entry(now).or_insert(before);
                    }
                }
            }
        }
    }

    /// What `ask` finds of a value, or else of the one that stood in its place.
    fn of<T>(
        &self,
        rows: &Rows,
        ask: impl Fn(&Rows) -> Result<Option<T>, EvaluateError>,
    ) -> Result<Option<T>, EvaluateError> {
        match ask(rows)? {
            Some(found) => Ok(Some(found)),
            None => self.places.get(rows).map_or(Ok(None), ask),
        }
    }
}

impl Calibrate for SeenBefore<'_> {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        self.of(rows, |rows| self.seen.gram(rows))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        self.of(rows, |rows| self.seen.moments(rows))
    }

    fn held_gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        self.of(rows, |rows| self.seen.held_gram(rows))
    }

    fn held_moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        self.of(rows, |rows| self.seen.held_moments(rows))
    }

    fn magnitudes(&self, rows: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        self.of(rows, |rows| self.seen.magnitudes(rows))
    }

    fn spread(&self, rows: &Rows) -> Result<Option<Spread>, EvaluateError> {
        self.of(rows, |rows| self.seen.spread(rows))
    }

    fn identity(&self) -> Option<[u8; 32]> {
        self.seen.identity()
    }

    fn holds_out(&self) -> bool {
        self.seen.holds_out()
    }

    fn cosines(&self, pairs: &[(Rows, Rows)]) -> Result<Vec<f64>, EvaluateError> {
        self.seen.cosines(pairs)
    }

    fn cross(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        self.seen.cross(model, pairs)
    }

    fn held_out(&self, model: &Model, pairs: &[(Rows, Rows)]) -> Result<Vec<Cross>, EvaluateError> {
        self.seen.held_out(model, pairs)
    }

    fn trial_flops(&self) -> f64 {
        self.seen.trial_flops()
    }

    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        self.seen.trials(variant, gates)
    }

    fn trials_of(&self, variants: &[Model]) -> Result<Vec<f64>, EvaluateError> {
        self.seen.trials_of(variants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    /// Knows mean squares of some values.
    struct Seen(&'static [&'static str]);

    impl Calibrate for Seen {
        fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
            Ok(None)
        }

        fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
            let at = self.0.iter().position(|name| *name == rows.value);
            Ok(at.map(|at| Moments { square: vec![at as f64], largest: None, rows: 1 }))
        }
    }

    fn model(reads: &str) -> Model {
        let ones = ["1"; 64 * 64].join(",");
        let source = format!(
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2, 64] x) => (float[2, 64] y)
             <float[64, 64] V = {{{ones}}}, float[64, 64] W = {{{ones}}}>
             {{ h = MatMul (x, V) s = Add (x, h) n = Neg (s) y = MatMul ({reads}, W) }}"
        );
        text::parse(&source).unwrap()
    }

    #[test]
    fn a_layer_whose_input_has_another_name_is_seen_under_the_one_it_had() {
        let (before, after) = (model("n"), model("s"));
        let seen = Seen(&["x", "h", "n", "y"]);
        let mut seen = SeenBefore::new(&seen, &before);
        let square = |seen: &SeenBefore, name: &str| seen.moments(&Rows::last(name)).unwrap().map(|m| m.square);
        assert_eq!(square(&seen, "s"), None);
        seen.follow(&after);
        assert_eq!(square(&seen, "s"), Some(vec![2.0]));
        assert_eq!(square(&seen, "h"), Some(vec![1.0]));
        assert_eq!(square(&seen, "z"), None);
        // What was seen of the value itself comes first.
        let known = Seen(&["x", "h", "s", "n", "y"]);
        let mut seen = SeenBefore::new(&known, &before);
        seen.follow(&after);
        assert_eq!(square(&seen, "s"), Some(vec![2.0]));
        assert_eq!(square(&seen, "n"), Some(vec![3.0]));
    }
}
