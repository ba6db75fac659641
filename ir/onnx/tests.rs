use crate::*;
use bytes::Bytes;

/// `y = If(cond, { t = x + w }, { e = Identity(x) })`, with `w` and `x` captured from outside.
fn branching() -> Model {
    let mut graph = Graph::new("main");
    let f32s = |n: i64| Some(Type::tensor(DataType::Float, vec![Dim::Symbol("N".into()), Dim::Known(n)]));
    let x = graph.add_value("x", f32s(2));
    let cond = graph.add_value("cond", Some(Type::tensor(DataType::Bool, vec![])));
    graph.add_input(ScopeId::MAIN, x);
    graph.add_input(ScopeId::MAIN, cond);
    let w = graph.add_initializer(ScopeId::MAIN, "w", Tensor::from_f32s(&[2], &[1.0, -0.0]));
    let mut branch = |op: &str, inputs: &[ValueId], name: &str| {
        let scope = graph.add_scope(name);
        let out = graph.append(scope, Node::new(op), inputs, name);
        graph.add_output(scope, out);
        scope
    };
    let then = branch("Add", &[x, w], "t");
    let other = branch("Identity", &[x], "e");
    let node = Node::new("If")
        .with("then_branch", AttributeValue::Graph(then))
        .with("else_branch", AttributeValue::Graph(other));
    let y = graph.append(ScopeId::MAIN, node, &[cond], "y");
    graph.value_mut(y).ty = f32s(2);
    graph.add_output(ScopeId::MAIN, y);
    Model { ir_version: 10, opsets: vec![(String::new(), 21)], graph, ..Model::default() }
}

#[test]
fn survives_memory_and_disk() {
    let model = branching();
    let bytes = model.to_bytes();
    let again = Model::from_bytes(Bytes::from(bytes.clone())).unwrap();
    assert_eq!(again.warnings, Vec::<String>::new());
    assert_eq!(again.model.to_bytes(), bytes);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    model.write(&path, &WriteOptions::default()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let captured = again.model.graph.captures(again.model.graph.scopes()[1]);
    let names: Vec<&str> = captured.iter().map(|&v| again.model.graph.value(v).name.as_str()).collect();
    assert_eq!(names, ["x", "w"]);
}

#[test]
fn moves_weights_outside_and_back() {
    let mut model = branching();
    let data: Vec<f32> = (0..3000).map(|i| i as f32).collect();
    model.graph.add_initializer(ScopeId::MAIN, "big", Tensor::from_f32s(&[3000], &data));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    let written = model.write(&path, &WriteOptions { external: External::Always }).unwrap();
    assert_eq!(written.data_bytes, 12000);
    let loaded = Model::read(&path).unwrap();
    assert_eq!(loaded.data_files.len(), 1);
    let value = loaded.model.graph.find_value("big").unwrap();
    assert_eq!(loaded.model.graph.constant(value).unwrap().to_f32s().unwrap(), data);
    let inline = folder.path().join("inline.onnx");
    loaded.model.write(&inline, &WriteOptions::default()).unwrap();
    assert_eq!(std::fs::read(inline).unwrap(), model.to_bytes());
    // Written over itself, while its data is mapped.
    loaded.model.write(&path, &WriteOptions { external: External::Always }).unwrap();
    assert_eq!(Model::read(&path).unwrap().model.to_bytes(), model.to_bytes());
}

#[test]
fn leaves_weights_where_they_are() {
    let mut model = branching();
    let data: Vec<f32> = (0..3000).map(|i| i as f32).collect();
    model.graph.add_initializer(ScopeId::MAIN, "big", Tensor::from_f32s(&[3000], &data));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    for external in [External::Always, External::Auto] {
        model.write(&path, &WriteOptions { external }).unwrap();
        let mut read = Model::read(&path).unwrap().model;
        let owned = Tensor::from_f32s(&[2000], &data[..2000]);
        read.graph.add_initializer(ScopeId::MAIN, "owned", owned);
        let away = tempfile::tempdir_in(folder.path()).unwrap();
        let linked = away.path().join("linked.onnx");
        read.write_linked(&linked).unwrap();
        assert!((8_000..12_000).contains(&std::fs::metadata(&linked).unwrap().len()));
        assert_eq!(Model::read(&linked).unwrap().model.to_bytes(), read.to_bytes());
        // What has taken the place of a mapped file is not what the model was read from.
        let links = || std::fs::read_dir(away.path()).unwrap().map(|entry| entry.unwrap().path());
        let link = links().find(|path| *path != linked).unwrap();
        std::fs::remove_file(link).unwrap();
        let source = if external == External::Always { folder.path().join("m.onnx.data") } else { path.clone() };
        let other = folder.path().join("other");
        std::fs::write(&other, b"something else").unwrap();
        std::fs::rename(&other, &source).unwrap();
        read.write_linked(&linked).unwrap();
        assert_eq!(Model::read(&linked).unwrap().model.to_bytes(), read.to_bytes());
    }
}

#[test]
fn weights_that_were_spilled_are_linked_too() {
    let mut model = branching();
    let folder = tempfile::tempdir().unwrap();
    let weight =
        |factor: f32| Tensor::from_f32s(&[1 << 17], &(0..1 << 17).map(|i| i as f32 * factor).collect::<Vec<_>>());
    model.graph.add_initializer(ScopeId::MAIN, "first", weight(1.0));
    let mut other = model.clone();
    model.graph.add_initializer(ScopeId::MAIN, "second", weight(2.0));
    other.graph.add_initializer(ScopeId::MAIN, "third", weight(3.0));
    let path = |name: &str| folder.path().join(name);
    for (name, model) in [("a.onnx", &model), ("b.onnx", &other), ("a.onnx", &model)] {
        model.write_linked(&path(name)).unwrap();
        assert!(std::fs::metadata(path(name)).unwrap().len() < 4096);
    }
    // The weight that both have is there once, and each has its own.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2 + 3);
    for (name, model) in [("a.onnx", model), ("b.onnx", other)] {
        assert_eq!(Model::read(&path(name)).unwrap().model.to_bytes(), model.to_bytes());
    }
}

fn refusal(folder: &std::path::Path, location: &str, offset: &str) -> String {
    let mut model = branching();
    let data = vec![0.0; 3000];
    model.graph.add_initializer(ScopeId::MAIN, "big", Tensor::from_f32s(&[3000], &data));
    let path = folder.join("m.onnx");
    model.write(&path, &WriteOptions { external: External::Always }).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let patched = replace(&replace(&bytes, b"m.onnx.data", location.as_bytes()), b"\x01\x30", offset.as_bytes());
    std::fs::write(&path, patched).unwrap();
    match Model::read(&path) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Replaces a byte string by one of the same length, so that length prefixes stay right.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn keeps_external_data_inside_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(folder.path().join("out_x.data"), vec![0; 12000]).unwrap();
    let outside = "tensor `big`: its external file `../out_.dat` lies outside the model's folder";
    assert_eq!(refusal(&inner, "../out_.dat", "\x01\x30"), outside);
    assert!(refusal(&inner, "/etc/passwd", "\x01\x30").contains("lies outside"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.path().join("out_x.data"), inner.join("link12.data")).unwrap();
        assert!(refusal(&inner, "link12.data", "\x01\x30").contains("lies outside"));
    }
    assert!(refusal(&inner, "absent_file", "\x01\x30").contains("cannot be read"));
    let beyond = "tensor `big`: it needs bytes 9 to 12009 of the external file `m.onnx.data`, which has 12000";
    assert_eq!(refusal(&inner, "m.onnx.data", "\x01\x39"), beyond);
    assert!(refusal(&inner, "m.onnx.data", "\x01-").contains("is `-`, which is no size in bytes"));
}

#[test]
fn names_what_is_wrong() {
    let error = |bytes: &[u8]| Model::from_bytes(Bytes::copy_from_slice(bytes)).unwrap_err().to_string();
    let bytes = branching().to_bytes();
    assert_eq!(error(b""), "the file is empty");
    assert!(error(&bytes[..bytes.len() / 2]).starts_with("not an ONNX model, or a damaged one"));
    assert_eq!(error(&[0x08, 0x0a]), "the file has no graph, so it is not an ONNX model");
    let dangling = replace(&bytes, b"\x04cond", b"\x04cone");
    assert_eq!(error(&dangling), "input 0 of node `y` (If) is `cone`, which nothing produces");
    let mut twice = branching();
    let cond = twice.graph.find_value("cond").unwrap();
    twice.graph.rename(cond, "x");
    let twice = twice.to_bytes();
    assert_eq!(error(&twice), "graph input `x` is defined twice");
}

#[test]
fn sorts_late_nodes_and_finds_cycles() {
    let mut graph = Graph::new("g");
    let x = graph.add_value("x", None);
    graph.add_input(ScopeId::MAIN, x);
    let (a, b) = (graph.add_value("a", None), graph.add_value("b", None));
    let second = graph.add_node(ScopeId::MAIN, Node::new("Relu"), vec![Some(a)], vec![Some(b)]);
    let first = graph.add_node(ScopeId::MAIN, Node::new("Neg"), vec![Some(x)], vec![Some(a)]);
    graph.add_output(ScopeId::MAIN, b);
    graph.sort().unwrap();
    assert_eq!(graph.nodes(ScopeId::MAIN).collect::<Vec<_>>(), [first, second]);
    graph.set_input(first, 0, Some(b));
    assert!(graph.sort().unwrap_err().to_string().contains("the nodes form a cycle"));
}

#[test]
fn replaced_outputs_keep_their_names() {
    let mut graph = Graph::new("g");
    let x = graph.add_value("x", None);
    graph.add_input(ScopeId::MAIN, x);
    let r = graph.append(ScopeId::MAIN, Node::new("Relu"), &[x], "r");
    let y = graph.append(ScopeId::MAIN, Node::new("Identity"), &[r], "y");
    let z = graph.append(ScopeId::MAIN, Node::new("Identity"), &[x], "z");
    graph.add_output(ScopeId::MAIN, y);
    graph.add_output(ScopeId::MAIN, z);
    graph.replace_uses(y, r);
    assert_eq!(graph.value(r).name, "y");
    graph.remove_node(graph.producer(y).unwrap());
    // An input cannot take the name of an output, so a copy stays between them.
    graph.replace_uses(z, x);
    let outputs = graph.main().outputs().to_vec();
    let names: Vec<&str> = outputs.iter().map(|&v| graph.value(v).name.as_str()).collect();
    assert_eq!(names, ["y", "z"]);
    assert_eq!(graph.node(graph.producer(outputs[1]).unwrap()).op_type, "Identity");
    assert_eq!(graph.value(x).name, "x");
}
