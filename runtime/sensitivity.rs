//! How much the outputs of a model move per unit of relative error of values inside it.
//!
//! Copies of the model add to every probed value an amplitude times the value's own features, permuted and with random
//! signs: an error as large as asked for, that is linear in the value as the error of a changed weight is. Where a sample
//! can run as a row of a batch, many errors are tried at a time (`batched.rs`); elsewhere one after another (`single.rs`).

mod batched;
mod counted;
mod edit;
mod kept;
mod single;

use crate::{
    Child, Distance, LoadOptions, RuntimeError, SetSpec,
    content::short,
    statistics::{StatisticsError, resolve},
    trials,
    wire::{GatherJob, Gathered, TrialJob},
};
use batched::RowsOrigin;
use lathe_analysis::{Facts, View};
use lathe_ir::{Model, ValueId};
use serde::Serialize;
use std::{collections::BTreeSet, path::PathBuf};

/// The relative error that is tried: small enough for outputs to answer in proportion to its square, large enough to
/// stand out of rounding.
const AMPLITUDE: f64 = 0.1;

/// The oldest operator set that has what is appended in the form it is appended.
const OLDEST_OPSET: i64 = 13;

/// A value to probe, with the axis of its features.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// The name of the value.
    pub value: String,
    /// Which axis holds the features.
    pub view: View,
}

/// What a probe needs besides the model.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// Threads, provider and device.
    pub load: LoadOptions,
    /// How outputs are compared.
    pub distance: Distance,
    /// Seeds the permutations and signs.
    pub seed: u64,
    /// The folder where results are kept for later runs, beside statistics; `None` keeps none.
    pub cache: Option<PathBuf>,
}

/// The rise of the outputs' distance per squared relative error of each value; `None` where a value cannot be probed,
/// because it holds no floats or the size of its features is not known, or where that takes too long.
///
/// Every value is tried on as many samples as a few passes over the set allow, at least one; the samples take turns.
pub fn sensitivities(
    child: &Child,
    model: &Model,
    set: &SetSpec,
    probes: &[Probe],
    options: &ProbeOptions,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    let gather = |job: &GatherJob| Ok(child.gather(std::slice::from_ref(job))?.pop().unwrap_or_default());
    let runs = Runs { gather: &gather, tries: &|job| child.trials(job) };
    let measure = || sensitivities_with(&runs, model, set, probes, options);
    let Some(cache) = &options.cache else { return measure() };
    let what = (probes, options.distance, options.seed, AMPLITUDE, batched::SETTINGS, single::SETTINGS);
    let folder = cache.join(short(&child.run_hash(model, set, &options.load, &what)?));
    if let Some(kept) = kept::read(&folder).filter(|kept| kept.len() == probes.len()) {
        return Ok(kept);
    }
    let measured = measure()?;
    // What cannot be kept is measured again.
    let _ = kept::write(&folder, &measured);
    Ok(measured)
}

/// Who runs the copies.
struct Runs<'a> {
    gather: &'a dyn Fn(&GatherJob) -> Result<Gathered, RuntimeError>,
    tries: &'a dyn Fn(&TrialJob) -> Result<Vec<f64>, RuntimeError>,
}

/// What is to be measured on what.
struct Task<'a> {
    runs: &'a Runs<'a>,
    model: &'a Model,
    facts: &'a Facts,
    set: &'a SetSpec,
    probes: &'a [Probe],
    /// The values of the probes.
    values: Vec<ValueId>,
    options: &'a ProbeOptions,
}

fn sensitivities_with(
    runs: &Runs<'_>,
    model: &Model,
    set: &SetSpec,
    probes: &[Probe],
    options: &ProbeOptions,
) -> Result<Vec<Option<f64>>, StatisticsError> {
    if model.opset() < OLDEST_OPSET {
        return Err(StatisticsError::OldOpset { found: model.opset(), needed: OLDEST_OPSET });
    }
    let facts = &Facts::infer(model);
    let values = probes.iter().map(|probe| resolve(model, &probe.value)).collect::<Result<Vec<_>, _>>()?;
    let task = Task { runs, model, facts, set, probes, values, options };
    let mut rises = task.in_batches()?;
    let open: Vec<usize> = (0..probes.len()).filter(|&index| rises[index].is_none()).collect();
    single::measure(&task, &open, &mut rises)?;
    Ok(rises)
}

impl Task<'_> {
    /// What can be measured with samples as rows of batches.
    fn in_batches(&self) -> Result<Vec<Option<f64>>, StatisticsError> {
        let nothing = vec![None; self.probes.len()];
        let Some(samples) = batched::samples(self)? else { return Ok(nothing) };
        // Rows that come late are other samples to whoever counted them before.
        let late = !counted::counts_samples(self.model, self.facts, &samples, &self.values);
        for rows in late.then_some(RowsOrigin::FromErrors).into_iter().chain([RowsOrigin::FromInputs]) {
            match batched::disturbed(self, &samples, rows) {
                // An operator may refuse operands of one and of several samples.
                Err(StatisticsError::Runtime(
                    RuntimeError::Load { .. }
                    | RuntimeError::Run { .. }
                    | RuntimeError::Child(_)
                    | RuntimeError::Ended { .. },
                )) => {}
                other => return other,
            }
        }
        Ok(nothing)
    }

    /// Everything that an error of a probed value can reach.
    fn moved(&self) -> BTreeSet<ValueId> {
        trials::downstream(&self.model.graph, &self.values)
    }

    /// Whether an output that counts holds real numbers, which answer to small errors.
    fn has_numbers(&self) -> bool {
        trials::holds_numbers(self.model)
    }
}

/// The names of the outputs that count, for messages.
fn counted_names(task: &Task<'_>) -> Vec<String> {
    batched::counted(task).iter().map(|&v| task.model.graph.value(v).name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        NpzWriter, SampleSet,
        sessions::SessionStore,
        statistics::serve,
        testing::{Build, engine},
    };
    use lathe_ir::{DataType, Node, Tensor, Type, text};
    use std::cell::Cell;

    /// What a set shows of a model.
    struct Bench {
        model: Model,
        folder: tempfile::TempDir,
        distance: Distance,
    }

    /// What it is, a model, its set, and whether a sample is a row of a batch.
    type Case = (&'static str, String, Vec<(&'static str, Tensor)>, bool);

    /// What was measured, and whether any of it came of batches, and of single errors.
    struct Measured {
        found: Vec<Option<f64>>,
        batched: bool,
        single: bool,
    }

    impl Bench {
        fn new(model: Model, set: &[(&str, Tensor)]) -> Bench {
            let folder = tempfile::tempdir().unwrap();
            let mut npz = NpzWriter::create(&folder.path().join("set.npz")).unwrap();
            set.iter().for_each(|(name, tensor)| npz.add(name, tensor).unwrap());
            npz.finish().unwrap();
            Bench { model, folder, distance: Distance::Relative }
        }

        fn task<T>(
            &self,
            probes: &[Probe],
            run: impl FnOnce(&Runs<'_>, &SetSpec, &ProbeOptions) -> T,
        ) -> (T, bool, bool) {
            let (batched, single) = (Cell::new(false), Cell::new(false));
            let gather = |job: &GatherJob| {
                batched.set(true);
                serve(engine(), job, &mut |_: &str| {}).map_err(|e| RuntimeError::Child(e.to_string()))
            };
            let tries = |job: &TrialJob| {
                single.set(true);
                let found = trials::serve(&SessionStore::new(engine(), 1 << 20), job, &mut |_: &str| {})
                    .map_err(|e| RuntimeError::Child(e.to_string()))?;
                Ok(found.into_iter().map(|rise| rise.unwrap_or(f64::INFINITY)).collect())
            };
            let runs = Runs { gather: &gather, tries: &tries };
            let set = SetSpec::all(self.folder.path().join("set.npz"));
            SampleSet::open(&set, &self.model).unwrap();
            assert!(!probes.is_empty());
            let options = ProbeOptions { load: LoadOptions::default(), distance: self.distance, seed: 1, cache: None };
            let found = run(&runs, &set, &options);
            (found, batched.get(), single.get())
        }

        fn measure(&self, probes: &[Probe]) -> Result<Measured, StatisticsError> {
            let (found, batched, single) =
                self.task(probes, |runs, set, options| sensitivities_with(runs, &self.model, set, probes, options));
            Ok(Measured { found: found?, batched, single })
        }

        fn of(&self, names: &[&str]) -> Vec<Option<f64>> {
            self.measure(&probes(names)).unwrap().found
        }
    }

    fn probes(names: &[&str]) -> Vec<Probe> {
        names.iter().map(|&name| Probe { value: name.to_owned(), view: View::Axis(-1) }).collect()
    }

    fn numbers(dims: &[usize]) -> Tensor {
        let count: usize = dims.iter().product();
        let all: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin() + 0.3).collect();
        Tensor::from_f32s(dims, &all)
    }

    fn near(found: &[Option<f64>], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found.unwrap() - expected).abs() < 1e-3 * expected.max(1e-2), "{found:?} is not {expected}");
        }
    }

    /// `y = a + 2a` where `a = x·w`.
    fn bench() -> Bench {
        let source = r#"<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3] x) => (float[n, 4] y)
            <float[3, 4] w = {1, 2, 0, 1, 0, 1, 1, -1, 2, 0, 1, 1}, float two = {2}>
            { a = MatMul (x, w) b = Mul (a, two) y = Add (a, b) }"#;
        Bench::new(text::parse(source).unwrap(), &[("x", numbers(&[4, 3]))])
    }

    #[test]
    fn an_error_of_the_output_counts_once_and_one_of_a_part_by_its_share() {
        // y = 3a: an error of a moves y as much as a itself, one of b = 2a by two thirds of it.
        near(&bench().of(&["a", "b", "y"]), &[1.0, 4.0 / 9.0, 1.0]);
    }

    #[test]
    fn rows_from_inputs_and_from_errors_and_single_errors_are_the_same() {
        let bench = bench();
        let probes = probes(&["x", "a", "b", "y"]);
        let facts = Facts::infer(&bench.model);
        let (all, ..) = bench.task(&probes, |runs, set, options| {
            let values = probes.iter().map(|probe| resolve(&bench.model, &probe.value).unwrap()).collect();
            let task = Task { runs, model: &bench.model, facts: &facts, set, probes: &probes, values, options };
            let samples = batched::samples(&task).unwrap().unwrap();
            let batched = |rows| batched::disturbed(&task, &samples, rows).unwrap();
            let mut single = vec![None; 4];
            single::measure(&task, &[0, 1, 2, 3], &mut single).unwrap();
            [batched(RowsOrigin::FromInputs), batched(RowsOrigin::FromErrors), single]
        });
        assert_eq!(all[0], all[1]);
        // The signs are others, which what is linear does not see.
        let same = |at: usize| (all[2][at].unwrap() - all[0][at].unwrap()).abs() < 1e-4;
        assert!((1..4).all(same) && all[2][0].unwrap() > 0.0, "{all:?}");
    }

    #[test]
    fn a_model_that_counts_its_samples_runs_with_as_many_from_the_start() {
        // y = reshape(a, [samples, -1]): where the samples are counted at the input, one row would be expected.
        let build_model = |counts: bool| {
            let mut build = Build::new();
            let x = build.input("x", DataType::Float, &["n", "3"]);
            let weight = [1.0, 2.0, 0.0, 1.0, -1.0, 1.0, 2.0, 0.5, 1.0];
            let w = build.constant("w", Tensor::from_f32s(&[3, 3], &weight));
            let a = build.node(Node::new("MatMul"), &[x, w], "a");
            let shape = build.node(Node::new("Shape"), &[x], "shape");
            let start = build.constant("start", Tensor::int64s(&[i64::from(!counts)]));
            let end = build.constant("end", Tensor::int64s(&[2 - i64::from(counts)]));
            let one = build.node(Node::new("Slice"), &[shape, start, end], "one");
            let rest = build.constant("rest", Tensor::int64s(&[-1]));
            let (first, last) = if counts { (one, rest) } else { (rest, one) };
            let target = build.node(Node::new("Concat").with("axis", 0i64), &[first, last], "target");
            let y = build.node(Node::new("Reshape"), &[a, target], "y");
            build.output(y, Type::unshaped(DataType::Float)).model()
        };
        for counts in [true, false] {
            let model = build_model(counts);
            let probed = model.graph.find_value("a").unwrap();
            let facts = Facts::infer(&model);
            let samples = facts.shape(model.graph.find_value("x").unwrap()).unwrap()[0].clone();
            assert_eq!(counted::counts_samples(&model, &facts, &samples, &[probed]), counts);
        }
        let found = Bench::new(build_model(true), &[("x", numbers(&[2, 3]))]).measure(&probes(&["a"])).unwrap();
        near(&found.found, &[1.0]);
        assert!(found.batched && !found.single);
    }

    #[test]
    fn outputs_answer_to_the_position_that_they_read_and_to_no_other() {
        let source = r#"<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4, 3] x) => (float[n, 3] y) <int64 first = {0}>
            { a = Neg (x) y = Gather <axis = 1> (a, first) }"#;
        let bench = Bench::new(text::parse(source).unwrap(), &[("x", numbers(&[2, 4, 3]))]);
        let views = [View::Axis(-1), View::Position(0), View::Position(3), View::Position(4)];
        let probes = views.map(|view| Probe { value: "a".to_owned(), view });
        let found = bench.measure(&probes).unwrap().found;
        near(&found[..2], &[1.0, 1.0]);
        assert_eq!((found[2], found[3]), (Some(0.0), None));
    }

    #[test]
    fn an_input_can_be_probed() {
        assert!(bench().of(&["x"])[0].unwrap() > 0.0);
    }

    /// Whatever the interface is, an error of `a` moves `y = 2a` as much as `a` itself.
    #[test]
    fn every_interface_can_be_measured() {
        let body = "a = Neg (x) b = Mul (a, a) y = Add (a, a)";
        let source = |inputs: &str, outputs: &str, body: &str| {
            format!(
                r#"<ir_version: 10, opset_import: ["" : 18]> g ({inputs}) => ({outputs})
                <float two = {{2}}, int64[1] all = {{-1}}, int64[2] ids = {{-1, 1}}> {{ {body} }}"#
            )
        };
        let x = ("x", numbers(&[6, 3]));
        let scalars = ("s", Tensor::from_f32s(&[6], &[2.0; 6]));
        let words: Vec<bytes::Bytes> = (0..6).map(|i| format!("word {i}").into()).collect();
        let cases: Vec<Case> = vec![
            ("rows", source("float[n, 3] x", "float[n, 3] y", body), vec![x.clone()], true),
            (
                "an input of no axes",
                source("float s, float[n, 3] x", "float[n, 3] y", "a = Neg (x) y = Mul (a, s)"),
                vec![x.clone(), scalars],
                true,
            ),
            (
                "the same number in every run",
                source("float[n, 3] x, float s", "float[n, 3] y", "a = Neg (x) y = Mul (a, s)"),
                vec![x.clone(), ("s", Tensor::from_f32s(&[], &[2.0]))],
                true,
            ),
            (
                "strings",
                source(
                    "string[n] words, float[n, 3] x",
                    "float[n, 3] y, string[n] z",
                    "a = Neg (x) y = Add (a, a) z = Identity (words)",
                ),
                vec![x.clone(), ("words", Tensor::strings(vec![6], words).unwrap())],
                true,
            ),
            ("one axis more", source("float[n, 3] x", "float[n, 3] y", body), vec![("x", numbers(&[4, 5, 3]))], false),
            ("a fixed batch", source("float[2, 3] x", "float[2, 3] y", body), vec![x.clone()], false),
            (
                "samples on another axis",
                source("float[t, n, 3] x", "float[t, n, 3] y", body),
                vec![("x", numbers(&[3, 7, 2, 3]))],
                false,
            ),
            (
                "other samples on the second axis of another input",
                source(
                    "float[n, 3] x, float[t, n, 3] m",
                    "float[t, n, 3] y",
                    "a = Neg (x) b = Add (a, a) z = Sub (m, m) y = Add (z, b)",
                ),
                vec![("x", numbers(&[3, 2, 3])), ("m", numbers(&[3, 4, 2, 3]))],
                false,
            ),
            (
                "one number for all samples",
                source("float[n, 3] x", "float y", "a = Neg (x) y = ReduceSum <keepdims = 0> (a)"),
                vec![x.clone()],
                false,
            ),
            (
                "an output without samples",
                source(
                    "float[n, 3] x",
                    "float[n, 3] y, int64[2] k, float z",
                    "a = Neg (x) y = Add (a, a) k = Identity (ids) z = Identity (two)",
                ),
                vec![x.clone()],
                true,
            ),
            (
                "a sequence",
                source("float[n, 3] x", "seq(float[n, 3]) y", "a = Neg (x) y = SequenceConstruct (a, a)"),
                vec![x.clone()],
                false,
            ),
        ];
        for (name, source, set, batched) in cases {
            let bench = Bench::new(text::parse(&source).unwrap_or_else(|e| panic!("{name}: {e}")), &set);
            let found = bench.measure(&probes(&["a"])).unwrap_or_else(|e| panic!("{name}: {e}"));
            let answer = found.found[0].unwrap_or_else(|| panic!("{name}: nothing"));
            // A sequence has two members, and a sum of few numbers answers by chance.
            let expected = if name == "a sequence" { 2.0 } else { 1.0 };
            let chance = name == "one number for all samples" && answer > 0.0;
            assert!(chance || (answer - expected).abs() < 1e-3, "{name}: {answer}");
            assert_eq!((found.batched && !found.single, name), (batched, name));
        }
    }

    /// `y = a[indices, :]`, where the indices were counted before there were rows with errors.
    #[test]
    fn rows_that_are_picked_by_their_count_are_all_there() {
        let source = r#"<ir_version: 10, opset_import: ["" : 18]> g (float[n, 3] x) => (float[n, 3] y)
            <int64 zero = {0}, int64 one = {1}> {
            a = Neg (x) s = Shape (x) n = Gather (s, zero) i = Range (zero, n, one) y = Gather (a, i) }"#;
        let found =
            Bench::new(text::parse(source).unwrap(), &[("x", numbers(&[6, 3]))]).measure(&probes(&["a"])).unwrap();
        near(&found.found, &[1.0]);
        assert!(found.batched && !found.single);
    }

    #[test]
    fn outputs_of_whole_numbers_tell_nothing() {
        let source = r#"<ir_version: 10, opset_import: ["" : 18]> g (float[n, 3] x) => (int64[n, 1] y, float[1] k)
            <float[1] c = {1}> { a = Neg (x) y = ArgMax <axis = 1> (a) k = Identity (c) }"#;
        let found =
            Bench::new(text::parse(source).unwrap(), &[("x", numbers(&[6, 3]))]).measure(&probes(&["a"])).unwrap();
        assert_eq!((found.found, found.single), (vec![None], false));
    }

    #[test]
    fn what_is_not_finite_says_nothing_and_what_is_finite_no_more_is_lost() {
        let source = |ports: &str, body: &str| {
            let head = format!(r#"<ir_version: 10, opset_import: ["" : 18]> g {ports}"#);
            text::parse(&format!("{head} <float[3] mask = {{0, -3.4e38, 0}}, float[3] ones = {{1, 1, 1}}, float[1] none = {{0}}> {{ {body} }}")).unwrap()
        };
        let ports = "(float[n, 3] x) => (float[n, 3] y)";
        // Behind the mask: -inf in the second column of every row.
        let masked = "a = Neg (x) m = Add (mask, mask) s = Add (a, m) y = LogSoftmax (s)";
        for distance in [Distance::Relative, Distance::Divergence] {
            for model in [source(ports, masked), source("(float[2, 3] x) => (float[2, 3] y)", masked)] {
                let bench = Bench { distance, ..Bench::new(model, &[("x", numbers(&[6, 3]))]) };
                let found = bench.of(&["a"])[0].unwrap();
                assert!(found.is_finite() && found > 1e-3, "{distance:?}: {found}");
            }
        }
        // Errors of numbers near zero make their roots NaN.
        let roots = Bench::new(source(ports, "a = Abs (x) y = Sqrt (a)"), &[("x", numbers(&[6, 3]))]);
        assert!(roots.of(&["a"])[0].unwrap() > 0.0);
        for ports in [ports, "(float[2, 3] x) => (float[2, 3] y)"] {
            let nothing = Bench::new(
                source(ports, "a = Neg (x) b = Mul (a, none) y = Div (b, none)"),
                &[("x", numbers(&[6, 3]))],
            );
            let message = nothing.measure(&probes(&["a"])).err().unwrap().to_string();
            assert!(message.contains("output `y` of the model is NaN or infinite in all its elements"), "{message}");
        }
    }
}
