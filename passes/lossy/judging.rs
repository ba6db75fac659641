//! What every method that fits to a calibration set says of its error is the error on samples that the fit has not seen.

use super::{METHODS, Method, MethodContext, Site};
use crate::Quantity;
use lathe_analysis::{Calibrate, EvaluateError, Gram, Moments, Rows, SymMatrix};
use lathe_ir::{DataType, Model, Node, ScopeId, Tensor, Type, text};
use std::collections::BTreeMap;

/// Features that both samples to fit and samples to judge have.
const WIDTH: usize = 64;

/// Numbers from a seed, in `(-1, 1)`.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut one = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| one()).collect()
}

/// A model with samples of its input.
struct Bench {
    model: Model,
    fits: Tensor,
    held: Option<Tensor>,
}

impl Bench {
    /// Three layers that read the same, and one that reads the hidden units of another; so many rows of each kind.
    fn new(fits: usize, held: usize) -> Bench {
        let list = |count: usize, seed: u64| {
            let numbers = noise(count, seed);
            numbers.iter().map(|x| format!("{:e}", x * 0.2)).collect::<Vec<_>>().join(", ")
        };
        let source = format!(
            r#"<ir_version: 10, opset_import: ["" : 21]> g (float[n, {WIDTH}] x) => (float[n, 96] y, float[n, 64] z)
            <float[{WIDTH}, 96] q = {{{}}}, float[{WIDTH}, 96] k = {{{}}}, float[{WIDTH}, 128] up = {{{}}},
            float[128, 64] down = {{{}}}, float two = {{2}}>
            {{ a = MatMul (x, q) b = MatMul (x, k) c = Mul (a, b) y = Tanh (c)
               h = MatMul (x, up) r = Relu (h) d = MatMul (r, down) z = Mul (d, two) }}"#,
            list(WIDTH * 96, 1),
            list(WIDTH * 96, 2),
            list(WIDTH * 128, 3),
            list(128 * 64, 4)
        );
        let rows = |count: usize, seed: u64| Tensor::from_f32s(&[count, WIDTH], &noise(count * WIDTH, seed));
        let held = (held > 0).then(|| rows(held, 6));
        Bench { model: text::parse(&source).unwrap(), fits: rows(fits, 5), held }
    }

    /// A value of a model on samples, row by row.
    fn value(model: &Model, name: &str, samples: &Tensor) -> Vec<Vec<f64>> {
        let mut model = model.clone();
        for at in (0..model.graph.main().outputs().len()).rev() {
            model.graph.remove_output(ScopeId::MAIN, at);
        }
        let value = model.graph.find_value(name).unwrap();
        let shown = model.graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], "shown");
        model.graph.value_mut(shown).ty = Some(Type::unshaped(DataType::Float));
        model.graph.add_output(ScopeId::MAIN, shown);
        let found = lathe_testkit::evaluator().run(&model, &[("x".to_owned(), samples.clone())]).unwrap();
        let width = *found[0].1.dims().last().unwrap();
        found[0].1.to_f64s().unwrap().chunks(width).map(<[f64]>::to_vec).collect()
    }

    fn moments_on(&self, samples: &Tensor, rows: &Rows) -> Gram {
        let x = Bench::value(&self.model, &rows.value, samples);
        let (count, k) = (x.len() as f64, x[0].len());
        let mean = |of: &dyn Fn(&Vec<f64>) -> f64| x.iter().map(of).sum::<f64>() / count;
        let upper = (0..k).flat_map(|i| (i..k).map(move |j| (i, j))).map(|(i, j)| mean(&|r| r[i] * r[j]));
        let matrix = SymMatrix::from_upper(k, upper.collect()).unwrap();
        Gram { matrix, mean: (0..k).map(|i| mean(&|r| r[i])).collect(), rows: x.len() as u64 }
    }

    /// The relative error of a value of a changed model on the samples that judge.
    fn error(&self, changed: &Model, name: &str) -> f64 {
        let samples = self.held.as_ref().unwrap();
        let (whole, found) = (Bench::value(&self.model, name, samples), Bench::value(changed, name, samples));
        let pairs = || whole.iter().flatten().zip(found.iter().flatten());
        let off: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
        (off / pairs().map(|(a, _)| a * a).sum::<f64>()).sqrt()
    }

    fn propose(&self, method: &dyn Method, measure: Quantity) -> (Vec<Site>, Vec<String>) {
        let cx = MethodContext::default()
            .with_calibration(self)
            .with_quantities(vec![measure])
            .with_rows(BTreeMap::new())
            .with_settings([("drop-inputs.enabled".to_owned(), "true".to_owned())]);
        let found = method.propose(&self.model, &cx).unwrap();
        (found.sites, found.outcome.refusals.into_keys().collect())
    }

    fn carried_out(&self, method: &dyn Method, site: &Site, candidate: usize) -> Model {
        let mut changed = self.model.clone();
        let cx = MethodContext::default().with_calibration(self);
        let done = method.apply(&mut changed, site, &site.candidates[candidate], &cx).unwrap();
        assert_eq!(done.changes.len(), 1, "{:?}", done.refusals);
        changed.check().unwrap();
        changed
    }
}

impl Calibrate for Bench {
    fn gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(Some(self.moments_on(&self.fits, rows)))
    }

    fn moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let gram = self.moments_on(&self.fits, rows);
        let square = (0..gram.mean.len()).map(|i| gram.matrix.get(i, i)).collect();
        Ok(Some(Moments { square, largest: None, rows: gram.rows }))
    }

    fn held_gram(&self, rows: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(self.held.as_ref().map(|held| self.moments_on(held, rows)))
    }

    fn held_moments(&self, rows: &Rows) -> Result<Option<Moments>, EvaluateError> {
        let gram = self.held_gram(rows)?;
        let square = |gram: &Gram| (0..gram.mean.len()).map(|i| gram.matrix.get(i, i)).collect();
        Ok(gram.map(|gram| Moments { square: square(&gram), largest: None, rows: gram.rows }))
    }
}

const FITTED: [(&str, Quantity); 5] = [
    ("factorize", Quantity::Flops),
    ("factorize-jointly", Quantity::Flops),
    ("prune-channels", Quantity::Flops),
    ("dictionary", Quantity::Parameters),
    ("compensate", Quantity::Size),
];

fn method(name: &str) -> &'static dyn Method {
    METHODS.iter().copied().find(|m| m.info().name == name).unwrap()
}

/// With fewer rows than features a fit loses nothing of those that it was made for, and much of others.
#[test]
fn errors_are_those_of_rows_that_fits_have_not_seen() {
    for fits in [36, 400] {
        let bench = Bench::new(fits, 300);
        for (name, measure) in FITTED {
            let (sites, refusals) = bench.propose(method(name), measure);
            assert!(!sites.is_empty(), "{name}: {refusals:?}");
            for site in &sites {
                for index in [0, site.candidates.len() / 2, site.candidates.len() - 1] {
                    let changed = bench.carried_out(method(name), site, index);
                    let candidate = &site.candidates[index];
                    for (&tap, &stated) in site.taps.iter().zip(candidate.loss.per_tap().unwrap()) {
                        let found = bench.error(&changed, &bench.model.graph.value(tap).name);
                        let near = (found - stated).abs() < 2e-3 * stated.max(1e-3);
                        assert!(near, "{name} {} of {fits} rows: {found} found, {stated} told", candidate.label);
                    }
                }
            }
        }
    }
}

#[test]
fn without_rows_to_judge_few_are_not_fitted_to_and_many_are_trusted_less() {
    let (few, some, many) = (Bench::new(36, 0), Bench::new(80, 0), Bench::new(600, 0));
    let judged = Bench { held: Some(many.fits.clone()), ..Bench::new(80, 300) };
    for (name, measure) in FITTED {
        let (sites, refusals) = few.propose(method(name), measure);
        assert!(sites.is_empty(), "{name}");
        let reason = "fewer rows were seen of it than a fit needs, and none are held out to judge it";
        assert!(refusals.iter().any(|r| r == reason), "{name}: {refusals:?}");
        // The units of the hidden layer are more than the rows.
        let errors = |bench: &Bench| -> Vec<f64> {
            let sites = bench.propose(method(name), measure).0;
            sites.iter().flat_map(|site| &site.candidates).flat_map(|c| c.loss.per_tap().unwrap().to_vec()).collect()
        };
        assert!(errors(&some).iter().all(|error| error.is_finite()), "{name}");
        assert!(!errors(&many).is_empty() && !errors(&judged).is_empty(), "{name}");
    }
    // What 80 rows say of a layer of 64 inputs is far less than what others show.
    let first = |bench: &Bench| {
        bench.propose(method("factorize"), Quantity::Flops).0[0].candidates[6].loss.per_tap().unwrap()[0]
    };
    assert!(first(&some) > 0.8 * first(&judged), "{} {}", first(&some), first(&judged));
}

#[test]
fn codes_that_make_up_for_each_other_lose_what_they_say_and_less_than_the_nearest() {
    let bench = Bench::new(600, 300);
    let (sites, _) = bench.propose(method("quantize"), Quantity::Size);
    for site in &sites {
        let tap = &bench.model.graph.value(site.taps[0]).name;
        let error = |label: &str| {
            let index = site.candidates.iter().position(|c| c.label == label)?;
            let stated = site.candidates[index].loss.per_tap().unwrap()[0];
            let found = bench.error(&bench.carried_out(method("quantize"), site, index), tap);
            // It is told by some columns of the weight.
            assert!((found / stated - 1.0).abs() < 0.25, "{} {label}: {found} found, {stated} told", site.name);
            Some(found)
        };
        let nearest = error("int4 block 32").unwrap();
        // Inputs that have nothing in common leave nothing to make up for.
        match error("int4 block 32, GPTQ") {
            Some(fitted) => assert!(fitted < 1.02 * nearest, "{}: {fitted} {nearest}", site.name),
            None => assert_ne!(site.name, "down"),
        }
        if site.name == "down" {
            assert!(error("int4 block 32, GPTQ").unwrap() < 0.8 * nearest);
        }
    }
    // Nothing is fitted to fewer rows than there are inputs.
    let (sites, _) = Bench::new(36, 0).propose(method("quantize"), Quantity::Size);
    assert!(sites.iter().flat_map(|site| &site.candidates).all(|c| !c.label.contains("GPTQ")));
}
