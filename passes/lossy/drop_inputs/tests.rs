use super::super::spectrum::{product, tests::random};
use super::*;
use lathe_analysis::{Calibrate, EvaluateError, Gram, Moments, SymMatrix};
use lathe_ir::text;
use std::collections::BTreeMap;

const ROWS: usize = 2000;

/// What values were on a set, by their names: one row each.
struct Known {
    values: BTreeMap<&'static str, Mat<f64>>,
    counted: bool,
    /// Rows that it was counted on.
    rows: u64,
}

impl Known {
    fn of(&self, rows: &Rows) -> &Mat<f64> {
        &self.values[rows.value.as_str()]
    }
}

impl Calibrate for Known {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        let x = self.of(rows);
        let all = product(x.transpose(), x.as_ref());
        let k = x.ncols();
        let upper = (0..k).flat_map(|i| (i..k).map(move |j| (i, j))).map(|at| all[at] / ROWS as f64).collect();
        let mean = (0..k).map(|i| x.col(i).iter().sum::<f64>() / ROWS as f64).collect();
        Ok(Some(Gram { matrix: SymMatrix::from_upper(k, upper).unwrap(), mean, rows: ROWS as u64 }))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let x = self.of(rows);
        let square = (0..x.ncols()).map(|i| x.col(i).squared_norm_l2() / ROWS as f64).collect();
        Ok(Some(Moments { square, largest: None, rows: ROWS as u64 }))
    }

    fn held_gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        self.gram(rows)
    }

    fn held_moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        self.moments(rows)
    }

    fn magnitudes(&self, rows: &Rows) -> Result<Option<Magnitudes>, EvaluateError> {
        let x = self.of(rows);
        let (mut share_below, mut square_below) = (Vec::new(), Vec::new());
        for step in Magnitudes::steps() {
            for i in 0..x.ncols() {
                let below = || x.col(i).iter().filter(|v| v.abs() < step);
                share_below.push(below().count() as f64 / ROWS as f64);
                square_below.push(below().map(|v| v * v).sum::<f64>() / ROWS as f64);
            }
        }
        let square = self.moments(rows)?.unwrap().square;
        Ok(self.counted.then_some(Magnitudes { share_below, square_below, square, rows: self.rows }))
    }
}

fn list(numbers: impl IntoIterator<Item = f64>) -> String {
    numbers.into_iter().map(|x| format!("{:e}", x as f32)).collect::<Vec<_>>().join(", ")
}

/// A layer of `inputs` and `outputs` that reads `s`, whose last `quiet` features are small, and what a set shows of it.
struct Bench {
    model: Model,
    known: Known,
    weight: Mat<f64>,
}

impl Bench {
    /// `body` makes `h` of `s` and the weight `w`, which is stored as `sizes`, turned if `turned`.
    fn new(shapes: [&str; 2], sizes: &str, turned: bool, body: &str, inputs: usize, quiet: usize) -> Bench {
        let outputs = sizes.split(", ").map(|s| s.parse::<usize>().unwrap()).product::<usize>() / inputs;
        let weight = random(inputs, outputs, 2);
        let stored = if turned { weight.transpose().to_owned() } else { weight.clone() };
        let numbers = (0..stored.nrows()).flat_map(|i| (0..stored.ncols()).map(move |j| (i, j))).map(|at| stored[at]);
        let scale = |i: usize| if i < inputs - quiet { 1.0 } else { 1e-3 };
        let [x, scales] = shapes;
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 18]> g (float[{x}] x) => (float[] y) \
             <float[{scales}] scale = {{{}}}, float[{sizes}] w = {{{}}}, float[64] c = {{{}}}> \
             {{ s = Mul (x, scale) {body} y = Relu (h) }}",
            list((0..inputs).map(scale)),
            list(numbers),
            list(vec![0.25; 64])
        );
        let rows = random(ROWS, inputs, 3);
        let rows = Mat::from_fn(ROWS, inputs, |row, i| (rows[(row, i)] + 0.3) * scale(i));
        let product = product(rows.as_ref(), weight.as_ref());
        let values = BTreeMap::from([("s", rows), ("h", product)]);
        Bench {
            model: text::parse(&source).unwrap(),
            known: Known { values, counted: true, rows: ROWS as u64 },
            weight,
        }
    }

    fn plain(inputs: usize, outputs: usize, quiet: usize) -> Bench {
        let sizes = format!("{inputs}, {outputs}");
        Bench::new([&format!("3, {inputs}"), &inputs.to_string()], &sizes, false, "h = MatMul (s, w)", inputs, quiet)
    }

    fn propose(&self) -> Proposal {
        let cx = turned_on(&self.known);
        DropInputs.propose(&self.model, &cx).unwrap()
    }

    fn refused(&self) -> String {
        let proposal = self.propose();
        assert!(proposal.sites.is_empty(), "{:?}", proposal.sites);
        proposal.outcome.refusals.into_keys().next().unwrap()
    }
}

fn turned_on(known: &Known) -> MethodContext<'_> {
    let settings = [("drop-inputs.enabled".to_owned(), "true".to_owned())];
    MethodContext::default().with_calibration(known).with_settings(settings)
}

#[test]
fn it_is_off_unless_it_is_asked_for() {
    let bench = Bench::plain(64, 64, 16);
    let cx = MethodContext::default().with_calibration(&bench.known);
    assert!(DropInputs.magnitudes(&bench.model, &cx).unwrap().is_empty());
    let proposal = DropInputs.propose(&bench.model, &cx).unwrap();
    assert!(proposal.sites.is_empty());
    assert_eq!(
        proposal.outcome.refusals.into_keys().next().unwrap(),
        "it is off; --set drop-inputs.enabled=true turns it on"
    );
}

/// Leaves out 16 of 64 inputs and runs both models.
fn check(bench: &Bench) -> Model {
    let proposal = bench.propose();
    let [site] = proposal.sites.as_slice() else { panic!("{proposal:?}") };
    let names: Vec<&str> = site.candidates.iter().map(|c| c.label.as_str()).collect();
    assert_eq!(names, ["drop 16 of 64 inputs"]);
    assert!(
        site.candidates[0].cost.bytes < site.baseline.bytes && site.candidates[0].loss.per_tap().unwrap()[0] < 1e-3,
        "{site:?}"
    );
    let mut changed = bench.model.clone();
    let cx = turned_on(&bench.known);
    let outcome = DropInputs.apply(&mut changed, site, &site.candidates[0], &cx).unwrap();
    assert_eq!(outcome.changes.len(), 1, "{outcome:?}");
    changed.check().unwrap();
    lathe_testkit::equivalent(&bench.model, &changed, Some(5e-3), 1).unwrap();
    let bytes = |model: &Model| model.to_bytes().len() as f64;
    let saved = site.baseline.bytes as f64 - site.candidates[0].cost.bytes as f64;
    assert!((bytes(&bench.model) - bytes(&changed) - saved).abs() < 600.0);
    changed
}

#[test]
fn quiet_inputs_go_whatever_the_layer() {
    let changed = check(&Bench::plain(64, 64, 16));
    let operators: Vec<_> =
        changed.graph.nodes(ScopeId::MAIN).map(|id| changed.graph.node(id).op_type.clone()).collect();
    assert_eq!(operators.iter().filter(|op| *op == "Gather").count(), 1, "{operators:?}");
    check(&Bench::new(["3, 64", "64"], "64, 64", true, "h = Gemm <transB = 1> (s, w, c)", 64, 16));
    check(&Bench::new(["3, 64", "64"], "64, 64", true, "t = Transpose (w) h = MatMul (s, t)", 64, 16));
    check(&Bench::new(["1, 64, 5, 5", "64, 1, 1"], "64, 64, 1, 1", true, "h = Conv (s, w, c)", 64, 16));
    check(&Bench::new(["1, 64, 5, 5", "64, 1, 1"], "64, 64, 1, 1", true, "h = Conv (s, w)", 64, 16));
}

#[test]
fn the_error_is_the_one_told_and_the_bias_takes_the_mean() {
    let bench = Bench::plain(64, 64, 16);
    let found = weights(&bench.model.graph).0;
    let cx = turned_on(&bench.known);
    let statistics = factors::statistics(&bench.model.graph, &found[0], &cx).unwrap().unwrap();
    let order = order(&bench.model.graph, &found[0], &statistics, &cx).unwrap().unwrap();
    let picked = picked(&bench.model.graph, &found[0], &statistics, &order, 16).unwrap();
    assert_eq!(picked.kept, (0..48).collect::<Vec<_>>());
    let (x, whole) = (&bench.known.values["s"], &bench.known.values["h"]);
    let left = product(x.as_ref().subcols(0, 48), bench.weight.as_ref().subrows(0, 48));
    let off = Mat::from_fn(ROWS, 64, |row, i| whole[(row, i)] - left[(row, i)] - f64::from(picked.biases[0][i]));
    let error = off.norm_l2() / whole.norm_l2();
    assert!((error / picked.errors[0] - 1.0).abs() < 1e-3, "{error} found, {} told", picked.errors[0]);
}

#[test]
fn inputs_that_matter_stay() {
    assert_eq!(Bench::plain(64, 64, 0).refused(), FEW);
    // Too few to make up for the list of those that are left.
    assert_eq!(Bench::plain(128, 32, 8).refused(), "picking inputs would take more than they do");
    // Quiet on average, and loud in one of a hundred rows.
    let mut bench = Bench::plain(64, 64, 16);
    let rows = bench.known.values.get_mut("s").unwrap();
    (48..64).for_each(|i| (0..ROWS / 100).for_each(|row| rows[(row, i)] = 0.3));
    let cx = turned_on(&bench.known);
    assert_eq!(DropInputs.magnitudes(&bench.model, &cx).unwrap(), [Rows::last("s")]);
    assert_eq!(bench.refused(), FEW);
    let unwatched = Bench { known: Known { counted: false, ..Bench::plain(64, 64, 16).known }, ..bench };
    assert_eq!(unwatched.refused(), "it was not watched how large its inputs are");
    let few = Bench { known: Known { rows: 999, ..Bench::plain(64, 64, 16).known }, ..unwatched };
    assert_eq!(few.refused(), "fewer than 1,000 rows of its inputs were seen");
}

#[test]
fn only_layers_with_inputs_that_matter_little_are_counted() {
    for (quiet, wanted) in [(0, vec![]), (16, vec![Rows::last("s")])] {
        let bench = Bench::plain(64, 64, quiet);
        let cx = turned_on(&bench.known);
        assert_eq!(DropInputs.magnitudes(&bench.model, &cx).unwrap(), wanted);
    }
}
