//! Sets as NumPy and ONNX write them, read in every way they can be.

use super::*;
use crate::testing::Build;
use lathe_ir::{Node, Type};
use std::{fs, path::Path};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/sets").join(name)
}

/// Inputs `x`, float of these dimensions, and `k`, int64 of the first of them.
fn model(x: &[&str], k: &[&str]) -> Model {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, x);
    build.input("k", DataType::Int64, k);
    let y = build.node(Node::new("Relu"), &[x], "y");
    build.output(y, Type::unshaped(DataType::Float)).model()
}

fn rows() -> Model {
    model(&["n", "3"], &["n"])
}

fn spec(name: &str) -> SetSpec {
    SetSpec::all(fixture(name))
}

/// The shape of `x` and the values of `k`, batch by batch.
fn read(spec: &SetSpec, model: &Model) -> Vec<(Vec<usize>, Vec<i64>)> {
    let set = SampleSet::open(spec, model).unwrap();
    let batches: Vec<Batch> = set.batches().collect::<Result<_, _>>().unwrap();
    assert_eq!(batches.len(), set.batch_count());
    assert_eq!(batches.iter().map(|b| b.samples).sum::<usize>(), set.len());
    let one = |batch: &Batch| {
        let find = |name: &str| &batch.inputs.iter().find(|(n, _)| n == name).unwrap().1;
        let (x, k) = (find("x"), find("k").to_i64s().unwrap());
        // The fixtures count upwards, so that a row out of place shows.
        let first: Vec<f64> = x.to_f64s().unwrap().chunks(3).map(|row| row[0] * 8.0 / 3.0).collect();
        assert_eq!(first, k.iter().map(|&k| k as f64).collect::<Vec<_>>());
        (x.dims().to_vec(), k)
    };
    batches.iter().map(one).collect()
}

fn refused(spec: &SetSpec, model: &Model) -> String {
    SampleSet::open(spec, model).unwrap_err().to_string()
}

#[test]
fn rows_are_batched_as_asked() {
    for name in ["good.npz", "deflated.npz", "big_endian.npz", "arrays"] {
        let batch = |batch| SetSpec { batch: Some(batch), ..spec(name) };
        let found = read(&batch(3), &rows());
        assert_eq!(found[0], (vec![3, 3], vec![0, 1, 2]), "{name}");
        assert_eq!(found[2], (vec![2, 3], vec![6, 7]), "{name}");
        assert_eq!(read(&spec(name), &rows()).len(), 1, "a small model runs all eight at once");
    }
}

#[test]
fn a_fixed_first_dimension_says_how_many_rows_run_together() {
    assert_eq!(read(&spec("good.npz"), &model(&["1", "3"], &["1"])).len(), 8);
    assert_eq!(read(&spec("deflated.npz"), &model(&["4", "3"], &["4"]))[1], (vec![4, 3], vec![4, 5, 6, 7]));
    // The ids have no rows of their own, so one run takes one of each.
    assert_eq!(read(&spec("good.npz"), &model(&["n", "3"], &[]))[7], (vec![1, 3], vec![7]));
    let message = refused(&spec("good.npz"), &model(&["5", "3"], &["5"]));
    assert!(message.contains("has 8 rows, expected a multiple of 5"), "{message}");
}

#[test]
fn one_axis_more_is_one_run_in_each_row() {
    assert_eq!(read(&spec("runs.npz"), &rows())[1], (vec![2, 3], vec![2, 3]));
    assert_eq!(SampleSet::open(&spec("runs.npz"), &rows()).unwrap().len(), 4);
}

/// `x` of three numbers a row and `s` of no axes, which the set has once or for every row.
#[test]
fn an_array_of_no_axes_is_the_same_in_every_run() {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "3"]);
    build.input("s", DataType::Float, &[]);
    let y = build.node(Node::new("Relu"), &[x], "y");
    let model = build.output(y, Type::unshaped(DataType::Float)).model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.npz");
    let rows = Tensor::from_f32s(&[6, 3], &[1.0; 18]);
    let read = |s: Tensor, batch: usize| -> Vec<(usize, f32)> {
        let mut npz = crate::NpzWriter::create(&path).unwrap();
        npz.add("x", &rows).unwrap();
        npz.add("s", &s).unwrap();
        npz.finish().unwrap();
        let set = SampleSet::open(&SetSpec { batch: Some(batch), ..SetSpec::all(&path) }, &model).unwrap();
        let one = |batch: Result<Batch, SetError>| {
            let batch = batch.unwrap();
            (batch.samples, batch.inputs[1].1.to_f32s().unwrap()[0])
        };
        set.batches().map(one).collect()
    };
    assert_eq!(read(Tensor::from_f32s(&[], &[2.5]), 4), [(4, 2.5), (2, 2.5)]);
    let each = read(Tensor::from_f32s(&[6], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), 4);
    assert_eq!(each, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0].map(|s| (1, s)));
}

#[test]
fn labels_that_are_not_read_may_be_there() {
    let unread = |name: &str| SetSpec { unread: Some("labels".into()), batch: Some(8), ..spec(name) };
    for name in ["labelled.npz", "good.npz"] {
        assert_eq!(read(&unread(name), &rows()).len(), 1, "{name}");
        let set = SampleSet::open(&unread(name), &rows()).unwrap();
        assert!(set.batches().all(|batch| batch.unwrap().labels.is_none()));
    }
    let message = refused(&spec("labelled.npz"), &rows());
    assert!(message.contains("array `labels`") && message.contains("is no input of the model"), "{message}");
}

#[test]
fn the_last_quarter_is_held_out() {
    let part = |name: &str, part| {
        let spec = SetSpec { part, batch: Some(8), ..spec(name) };
        read(&spec, &rows()).into_iter().flat_map(|(_, k)| k).collect::<Vec<_>>()
    };
    for name in ["good.npz", "deflated.npz"] {
        assert_eq!(part(name, Part::Calibration), [0, 1, 2, 3, 4, 5]);
        assert_eq!(part(name, Part::Validation), [6, 7]);
    }
    let chosen = SetSpec { chosen: Some(vec![1, 4, 5]), batch: Some(2), ..spec("deflated.npz") };
    assert_eq!(read(&chosen, &rows()), [(vec![2, 3], vec![1, 4]), (vec![1, 3], vec![5])]);
    let whole = SetSpec { part: Part::Validation, ..SetSpec::all(fixture("onnx/test_data_set_0")) };
    assert_eq!(SampleSet::open(&whole, &rows()).unwrap().part(), Part::All);
}

#[test]
fn files_of_a_folder_follow_each_other() {
    let folder = tempfile::tempdir().unwrap();
    for number in [10, 2, 1] {
        let source = if number == 2 { "runs.npz" } else { "good.npz" };
        fs::copy(fixture(source), folder.path().join(format!("part_{number}.npz"))).unwrap();
    }
    let found = read(&SetSpec { batch: Some(8), ..SetSpec::all(folder.path()) }, &rows());
    assert_eq!(found.iter().map(|(dims, _)| dims[0]).collect::<Vec<_>>(), [8, 2, 2, 2, 2, 8]);
}

#[test]
fn test_data_sets_are_runs() {
    let found = read(&spec("onnx"), &rows());
    assert_eq!(found, [(vec![3, 3], vec![0, 1, 2]), (vec![3, 3], vec![4, 5, 6])]);
    assert_eq!(read(&spec("onnx/test_data_set_1"), &rows()).len(), 1);
    let message = refused(&spec("onnx"), &model(&["2", "3"], &["n"]));
    assert!(message.contains("has the shape [3, 3], expected [2,3]"), "{message}");
}

#[test]
fn labels_come_with_their_samples() {
    let spec = SetSpec { labels: Some("labels".into()), batch: Some(5), ..spec("labelled.npz") };
    let set = SampleSet::open(&spec, &rows()).unwrap();
    let labels = |b: Result<Batch, SetError>| b.unwrap().labels.unwrap().to_i64s().unwrap();
    assert!(set.batches().all(|batch| batch.unwrap().labels.is_some()));
    assert_eq!(set.batches().map(labels).collect::<Vec<_>>(), [vec![0, 1, 2, 0, 1], vec![2, 0, 1]]);
    let message = refused(&SetSpec { labels: Some("classes".into()), ..spec.clone() }, &rows());
    assert!(message.contains("expected an array `classes`, found `k`, `labels`, `x`"), "{message}");
    let message = refused(&SetSpec { labels: Some("x".into()), ..crate::sets::tests::spec("good.npz") }, &rows());
    assert!(message.contains("expected whole numbers"), "{message}");
}

#[test]
fn damage_is_found_while_reading() {
    let folder = tempfile::tempdir().unwrap();
    for (name, message) in [("good.npz", "its checksum is"), ("deflated.npz", "array `k`")] {
        let mut bytes = fs::read(fixture(name)).unwrap();
        // Inside the data of `k`, the last member, before the directory.
        let data =
            bytes.windows(4).rposition(|w| w == b"PK\x03\x04").unwrap() + if name == "good.npz" { 200 } else { 110 };
        bytes[data] ^= 0x41;
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let found = SampleSet::open(&SetSpec::all(&path), &rows());
        let found = found.and_then(|set| set.batches().collect::<Result<Vec<_>, _>>().map(|_| ()));
        let found = found.unwrap_err().to_string();
        assert!(found.contains(message), "{name}: {found}");
    }
}

#[test]
fn no_prefix_of_a_set_is_a_set() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["deflated.npz", "arrays/x.npy"] {
        let bytes = fs::read(fixture(name)).unwrap();
        let path = folder.path().join(Path::new(name).file_name().unwrap());
        let single = model(&["n", "3"], &["n"]);
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(SampleSet::open(&SetSpec::all(&path), &single).is_err(), "{length} bytes of {name}");
        }
    }
}

#[test]
fn a_small_change_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let (path, model) = (folder.path().join("set.npz"), rows());
    for name in ["good.npz", "deflated.npz", "pickle.npz"] {
        let bytes = fs::read(fixture(name)).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= [0x01, 0x80, 0xff][at % 3];
            fs::write(&path, changed).unwrap();
            if let Ok(set) = SampleSet::open(&SetSpec { batch: Some(4), ..SetSpec::all(&path) }, &model) {
                set.batches().take_while(Result::is_ok).for_each(drop);
            }
        }
    }
}

#[test]
fn nan_is_named_with_its_sample() {
    let batched = SetSpec { batch: Some(2), ..spec("nan.npz") };
    let message = SampleSet::open(&batched, &rows()).unwrap().check_values().unwrap_err().to_string();
    assert!(message.contains("array `x`") && message.contains("NaN in sample 5,"), "{message}");
    assert!(SampleSet::open(&spec("good.npz"), &rows()).unwrap().check_values().is_ok());
}
