//! The text of every fixture after the default passes, of exports in three ways, and the plans of every lossy method. A
//! refactor shows itself by no difference here.
//!
//! `UPDATE_GOLDEN=1 cargo test --test golden` writes the files anew.

#![allow(clippy::unwrap_used)]

mod common;

use common::pairs;
use lathe_ir::{Dim, Model, Tensor, Type, text};
use lathe_passes::{
    Quantity, QuantityMap, Target,
    lossy::{METHODS, Method},
};
use onnx_lathe::{Budget, Options, Report, Selection, Sets};
use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// Ways to run: what they are called, the target and the operator set.
const WAYS: [(&str, Target, Option<i64>); 3] =
    [("portable", Target::Portable, None), ("ort", Target::Ort, None), ("opset23", Target::Portable, Some(23))];

#[test]
fn fixtures_become_what_they_were() {
    let text = |path: &Path| {
        let folder = tempfile::tempdir().unwrap();
        text::print(
            &common::optimize(path, &folder.path().join("out.onnx")).unwrap_or_else(|why| panic!("{path:?}: {why}")),
        )
    };
    let models = models("fixtures");
    compare("tests/golden", models.iter().map(|path| (stem(path), text(path))));
}

/// What PyTorch's exporters write, with what they write run beside what becomes of it.
#[test]
fn exports_become_what_they_were() {
    let models = models("fixtures/exports");
    let all = models.iter().flat_map(|path| WAYS.iter().map(move |way| (path, way)));
    let found = all.map(|(path, (name, target, opset))| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.onnx");
        let options = Options { target: *target, opset: *opset, verify: true, ..common::options(path, &out) };
        let report = onnx_lathe::optimize(&options).unwrap_or_else(|why| panic!("{path:?} {name}: {why}")).report;
        let left_out = report.warnings.iter().find(|warning| warning.contains("was left out"));
        assert!(left_out.is_none(), "{path:?} {name}: {left_out:?}");
        assert!(report.verify.is_some_and(|verify| verify.passed && verify.samples > 0), "{path:?} {name}");
        (format!("{}.{name}", stem(path)), text::print(&Model::read(&out).unwrap().model))
    });
    compare("tests/golden/exports", found);
}

/// Budgets that every method alone, and all of them together, spend on both targets.
const BUDGETS: [(&str, Quantity, f64); 3] =
    [("size 0.6", Quantity::Size, 0.6), ("flops 0.8", Quantity::Flops, 0.8), ("params 0.7", Quantity::Parameters, 0.7)];

/// Tokens of a sample of the transformer, of which two neighbours are alike.
const TOKENS: usize = 16;

#[test]
fn plans_are_what_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let mut noise = common::Noise(3);
    let mut model = Model::read(&common::fixture("transformer.onnx")).unwrap().model;
    let input = model.graph.main().inputs()[0];
    let dims = vec![Dim::Symbol("batch".to_owned()), Dim::Known(TOKENS as i64), Dim::Known(32)];
    model.graph.value_mut(input).ty = Some(Type::tensor(lathe_ir::DataType::Float, dims));
    let transformer = folder.path().join("transformer.onnx");
    fs::write(&transformer, model.to_bytes()).unwrap();
    let mut hidden = Vec::new();
    for _ in 0..128 * TOKENS / 2 {
        let token = noise.numbers(32, 1.5);
        for _ in 0..2 {
            let own = noise.numbers(32, 0.1);
            // The last features matter little.
            hidden.extend((0..32).map(|i| (token[i] + own[i]) * if i < 20 { 1.0 } else { 1e-3 }));
        }
    }
    let sets = [("transformer", "hidden", Tensor::from_f32s(&[128, TOKENS, 32], &hidden)), {
        // Images of large squares.
        let mut images = Vec::new();
        for _ in 0..24 {
            let squares = noise.numbers(49, 1.5);
            images.extend((0..28 * 28).map(|at| squares[at / 28 / 4 * 7 + at % 28 / 4]));
        }
        let own = noise.numbers(images.len(), 0.1);
        images.iter_mut().zip(own).for_each(|(x, own)| *x += own);
        ("mobilenet", "x", Tensor::from_f32s(&[24, 1, 28, 28], &images))
    }];
    let pairs = folder.path().join("pairs.onnx");
    fs::write(&pairs, text::parse(&gated_pairs()).unwrap().to_bytes()).unwrap();
    let models = [transformer, common::fixture("mobilenet.onnx"), pairs];
    let mut texts = Vec::new();
    for (model, (name, input, tensor)) in models.iter().zip(sets.into_iter().chain([("pairs", "x", pairs::samples())]))
    {
        let set = folder.path().join(format!("{name}.npz"));
        let mut npz = lathe_runtime::NpzWriter::create(&set).unwrap();
        npz.add(input, &tensor).unwrap();
        npz.finish().unwrap();
        for (way, target, _) in &WAYS[..2] {
            texts.push((format!("{name}.{way}"), plans(model, &set, *target)));
        }
    }
    compare("tests/golden/plans", texts.into_iter());
}

/// A vision transformer over pairs of equal tokens, whose feed-forward units have gates: two layers that read the same.
fn gated_pairs() -> String {
    let mut source = pairs::model();
    for i in 0..4 {
        let gate = common::Noise(30 + i).list(pairs::WIDTH * pairs::HIDDEN, 0.3);
        let (read, gated) = (format!("r{i} = Relu (u{i})"), format!("d{i} = MatMul (r{i}"));
        assert!(source.contains(&read) && source.contains(&gated));
        source = source.replace(&read, &format!("{read} w{i} = MatMul (m{i}, gate{i}) x{i} = Mul (r{i}, w{i})"));
        source = source.replace(&gated, &format!("d{i} = MatMul (x{i}"));
        source = source.replacen("int64 zero", &format!("float[32, 128] gate{i} = {{{gate}}}, int64 zero"), 1);
    }
    source
}

/// What every method alone, and all together, make of a model. Layers that read the same are left for methods.
fn plans(model: &Path, set: &Path, target: Target) -> String {
    let mut text = String::new();
    let names: Vec<&str> = METHODS.iter().map(|method: &&dyn Method| method.info().name).collect();
    for method in names.iter().copied().map(Some).chain([None]) {
        for (budget, quantity, share) in BUDGETS {
            let _ = writeln!(text, "## {} · {budget}", method.unwrap_or("all"));
            let out = tempfile::tempdir().unwrap();
            let skip = names.iter().filter(|&&name| method.is_some_and(|method| name != method));
            let settings = [("drop-inputs.enabled", "true"), ("select-visual-tokens.span", "4:8")];
            let options = Options {
                target,
                opset: Some(21),
                budget: Budget { shares: QuantityMap::default().with(quantity, share), ..Budget::default() },
                sets: Sets { calibration: Some(lathe_runtime::SetSpec::all(set)), ..Sets::default() },
                selection: Selection {
                    only: None,
                    skip: skip.copied().chain(["merge-linears"]).map(str::to_owned).collect(),
                },
                settings: settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
                ..common::options(model, &out.path().join("out.onnx"))
            };
            match onnx_lathe::optimize(&options) {
                Ok(done) => describe(&mut text, &done.report, &out.path().join("out.onnx")),
                Err(why) => {
                    let _ = writeln!(text, "{why}");
                }
            }
        }
    }
    text
}

/// A plan, what methods refused, and the operators of the result.
fn describe(text: &mut String, report: &Report, out: &Path) {
    let plan = report.plan.as_ref().unwrap();
    let _ = writeln!(text, "{} {} loses {:.2e}", plan.solver, plan.status, plan.objective);
    for choice in &plan.choices {
        let (cost, method) = (&choice.cost, choice.method.as_deref().unwrap_or("-"));
        let _ = writeln!(
            text,
            "{} | {method} | {} | {} bytes {} parameters {} flops | {:.2e}",
            choice.site, choice.option, cost.bytes, cost.parameters, cost.flops, choice.error
        );
    }
    for pass in report.passes.iter().filter(|pass| pass.kind == "lossy") {
        let _ = writeln!(text, "{}: {} changes, {} bytes", pass.name, pass.changes, pass.weight_bytes_delta);
        for refusal in &pass.refusals {
            let _ = writeln!(text, "  {} × {}, first {}", refusal.count, refusal.reason, refusal.example);
        }
    }
    let units: Vec<String> = plan.units.iter().map(|unit| format!("{}: {}", unit.kind, unit.got.join(", "))).collect();
    let _ = writeln!(text, "{}", units.join(" | "));
    let used: Vec<String> = plan.used.iter().map(|(key, used)| format!("{key} {used}")).collect();
    let _ = writeln!(text, "{}", used.join(", "));
    let _ = writeln!(text, "{:?}", common::operators(&Model::read(out).unwrap().model));
    for warning in &report.warnings {
        let _ = writeln!(text, "{warning}");
    }
}

/// The models of a folder, in order.
fn models(folder: &str) -> Vec<PathBuf> {
    let mut models: Vec<_> = fs::read_dir(common::repository(folder)).unwrap().map(|e| e.unwrap().path()).collect();
    models.retain(|path| path.extension().is_some_and(|e| e == "onnx"));
    models.sort();
    assert!(!models.is_empty());
    models
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// Compares texts with the files of their names in a folder, which holds no others.
fn compare(folder: &str, texts: impl Iterator<Item = (String, String)>) {
    let folder = common::repository(folder);
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    if update {
        fs::create_dir_all(&folder).unwrap();
    }
    let (mut different, mut names) = (Vec::new(), BTreeSet::new());
    for (name, found) in texts {
        let golden = folder.join(format!("{name}.txt"));
        if update {
            fs::write(&golden, &found).unwrap();
        } else if let Some(difference) = first_difference(&fs::read_to_string(&golden).unwrap_or_default(), &found) {
            different.push(format!("{name}: {difference}"));
        }
        names.insert(name);
    }
    let stored = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let stored: BTreeSet<String> = stored.map(|path| stem(&path)).collect();
    assert_eq!(stored, names, "{folder:?} has files of models that are gone, or lacks some");
    assert!(different.is_empty(), "UPDATE_GOLDEN=1 accepts what changed:\n{}", different.join("\n"));
}

/// The first line in which two texts differ; numbers with an exponent are measured, and may differ a little.
fn first_difference(expected: &str, found: &str) -> Option<String> {
    let near = |a: &str, b: &str| {
        let measured = |word: &str| word.parse::<f64>().ok().filter(|_| word.contains('e'));
        a == b || measured(a).zip(measured(b)).is_some_and(|(a, b)| (a - b).abs() <= 1e-9 + 0.05 * a.abs().max(b.abs()))
    };
    let alike = |a: &str, b: &str| {
        a.split(' ').count() == b.split(' ').count() && a.split(' ').zip(b.split(' ')).all(|(a, b)| near(a, b))
    };
    let same = expected.lines().zip(found.lines()).take_while(|(a, b)| alike(a, b)).count();
    if same == expected.lines().count() && same == found.lines().count() {
        return None;
    }
    let line = |text: &str| text.lines().nth(same).unwrap_or("the end").trim().to_owned();
    Some(format!("line {}: expected `{}`, found `{}`", same + 1, line(expected), line(found)))
}
