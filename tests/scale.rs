//! Time per node stays flat from 100 to 50,000 nodes.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use lathe_ir::{DataType, Dim, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};
use onnx_lathe::optimize;
use std::time::{Duration, Instant};

const MAIN: ScopeId = ScopeId::MAIN;

/// Nodes of one block of [`model`].
const BLOCK: usize = 20;

/// A chain of blocks as exporters write them: a layer, shape arithmetic, a pair of transposes, things to fold.
fn model(nodes: usize) -> Model {
    let mut graph = Graph::new("chain");
    let ty = Type::tensor(DataType::Float, vec![Dim::Symbol("batch".to_owned()), Dim::Known(8)]);
    let mut x = graph.add_value("x", Some(ty.clone()));
    graph.add_input(MAIN, x);
    for index in 0..nodes / BLOCK {
        x = block(&mut graph, x, index);
    }
    graph.value_mut(x).ty = Some(ty);
    graph.add_output(MAIN, x);
    Model { ir_version: 8, opsets: vec![(String::new(), 17)], graph, ..Model::default() }
}

fn block(graph: &mut Graph, x: ValueId, index: usize) -> ValueId {
    let weight: Vec<f32> = (0..64).map(|k| ((k * 37 + index * 11) % 17) as f32 / 64.0 - 0.1).collect();
    let weight = graph.add_initializer(MAIN, "w", Tensor::from_f32s(&[8, 8], &weight));
    let bias = graph.add_initializer(MAIN, "b", Tensor::from_f32s(&[8], &[index as f32 / 100.0; 8]));
    let ints = |graph: &mut Graph, values: &[i64]| graph.add_initializer(MAIN, "c", Tensor::int64s(values));
    let product = graph.append(MAIN, Node::new("MatMul"), &[x, weight], "product");
    let sum = graph.append(MAIN, Node::new("Add"), &[product, bias], "sum");
    // Shape, two Gathers, two Unsqueezes, Concat: the target of a Reshape that only splits the last axis.
    let shape = graph.append(MAIN, Node::new("Shape"), &[sum], "shape");
    let (zero, axis) = (ints(graph, &[0]), ints(graph, &[0]));
    let first = graph.append(MAIN, Node::new("Gather"), &[shape, zero], "first");
    let scalar = graph.append(MAIN, Node::new("Squeeze"), &[first, axis], "scalar");
    let again = graph.append(MAIN, Node::new("Unsqueeze"), &[scalar, axis], "again");
    let tail = ints(graph, &[2, 4]);
    let target = graph.append(MAIN, Node::new("Concat").with("axis", 0), &[again, tail], "target");
    let split = graph.append(MAIN, Node::new("Reshape"), &[sum, target], "split");
    let perm = || Node::new("Transpose").with("perm", vec![0, 2, 1]);
    let there = graph.append(MAIN, perm(), &[split], "there");
    let middle = graph.append(MAIN, Node::new("Relu"), &[there], "middle");
    let back = graph.append(MAIN, perm(), &[middle], "back");
    let flat = ints(graph, &[0, 8]);
    let joined = graph.append(MAIN, Node::new("Reshape"), &[back, flat], "joined");
    let copy = graph.append(MAIN, Node::new("Identity"), &[joined], "copy");
    let one = graph.add_initializer(MAIN, "one", Tensor::from_f32s(&[], &[1.0]));
    let same = graph.append(MAIN, Node::new("Mul"), &[copy, one], "same");
    let left = graph.append(MAIN, Node::new("Sigmoid"), &[same], "left");
    let right = graph.append(MAIN, Node::new("Sigmoid"), &[same], "right");
    let gate = graph.append(MAIN, Node::new("Mul"), &[left, right], "gate");
    let cast = graph.append(MAIN, Node::new("Cast").with("to", DataType::Float), &[gate], "cast");
    let bounded = graph.append(MAIN, Node::new("Tanh"), &[cast], "bounded");
    graph.append(MAIN, Node::new("Add"), &[bounded, x], "out")
}

#[test]
fn time_per_node_stays_flat() {
    let folder = tempfile::tempdir().unwrap();
    let mut per_node = Vec::new();
    for nodes in [100, 1_000, 10_000, 50_000] {
        let (path, out) = (folder.path().join("model.onnx"), folder.path().join("out.onnx"));
        std::fs::write(&path, model(nodes).to_bytes()).unwrap();
        // The shortest of several runs is the one that the machine's other work disturbed least.
        let runs = (20_000 / nodes).clamp(5, 20);
        let mut best = Duration::MAX;
        let mut left = 0;
        for _ in 0..runs {
            let start = Instant::now();
            let done = optimize(&common::options(&path, &out)).unwrap();
            best = best.min(start.elapsed());
            left = done.report.output.nodes;
        }
        let micros = best.as_secs_f64() * 1e6 / nodes as f64;
        println!("{nodes:>6} nodes to {left:>6}: {best:>10.1?}, {micros:>6.1} µs a node");
        per_node.push(micros);
    }
    let (end_to_end, from_cheapest) = (per_node[3] / per_node[0], per_node[3] / per_node[1].min(per_node[2]));
    println!("growth to 50,000 nodes: {end_to_end:.2} from 100, {from_cheapest:.2} from the cheapest size");
    // A model of 100 nodes fits into the processor's caches with everything that is known about it.
    assert!(end_to_end < 3.0, "time per node grows by {end_to_end:.2} from 100 to 50,000 nodes");
    // A small model fits into the processor's caches and a large one does not; a pass that looks at every node for
    // every node would show as a factor of fifty.
    assert!(from_cheapest < 4.0, "time per node grows by {from_cheapest:.2} from the cheapest size to 50,000 nodes");
}
