//! FLOPs of one node.

use super::Bindings;
use crate::{operators::Trait, shapes::Facts};
use lathe_ir::{Graph, Node, NodeId, ValueId};

/// A node with the sizes of its values.
struct Sized<'a> {
    node: &'a Node,
    facts: &'a Facts,
    bindings: &'a Bindings,
}

impl Sized<'_> {
    fn sizes(&self, value: Option<ValueId>) -> Option<Vec<u64>> {
        self.bindings.sizes(self.facts, value?)
    }

    fn input(&self, index: usize) -> Option<Vec<u64>> {
        self.sizes(self.node.input(index))
    }

    fn output(&self, index: usize) -> Option<Vec<u64>> {
        self.sizes(self.node.output(index))
    }

    fn read(&self, index: usize) -> Option<u64> {
        product(&self.input(index)?)
    }

    fn made(&self) -> Option<u64> {
        product(&self.output(0)?)
    }
}

fn product(sizes: &[u64]) -> Option<u64> {
    sizes.iter().try_fold(1u64, |total, &size| total.checked_mul(size))
}

fn times(factors: &[u64]) -> Option<u64> {
    product(factors)
}

/// How often the subgraphs of a node run, and whether that is certain.
pub(super) fn rounds(graph: &Graph, facts: &Facts, id: NodeId, bindings: &Bindings) -> (u64, bool) {
    let node = graph.node(id);
    let known = match node.op_type.as_str() {
        "If" => Some(1),
        "Loop" => {
            let trips =
                node.input(0).and_then(|v| facts.contents(v)).and_then(|c| c.elements().first().cloned().flatten());
            let trips = trips.filter(|t| t.as_known().is_none_or(|t| t <= 1 << 40));
            trips.and_then(|t| bindings.evaluate(&t))
        }
        "Scan" => node.int("num_scan_inputs").and_then(|scanned| {
            let first = node.inputs().len().checked_sub(usize::try_from(scanned).ok()?)?;
            let axis = node.ints("scan_input_axes").and_then(|a| a.first()).copied().unwrap_or(0);
            let sizes = bindings.sizes(facts, node.input(first)?)?;
            sizes.get(usize::try_from(axis).ok()?).copied()
        }),
        _ => None,
    };
    (known.unwrap_or(1), known.is_some())
}

/// What a node without subgraphs computes; `None` if its operator or its shapes are not known.
pub(super) fn of_node(graph: &Graph, facts: &Facts, id: NodeId, bindings: &Bindings) -> Option<u64> {
    let node = graph.node(id);
    let s = Sized { node, facts, bindings };
    if !matches!(node.domain.as_str(), "" | "ai.onnx" | "com.microsoft") {
        return None;
    }
    // Arithmetic on whole numbers is shape arithmetic and no floating-point work; products below count all the same.
    let whole = node.output(0).and_then(|v| facts.elem(v)).is_some_and(|e| !e.is_float());
    match node.op_type.as_str() {
        "MatMul" | "MatMulInteger" | "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" | "QLinearMatMul" => matmul(&s),
        "FusedMatMul" | "TransposeMatMul" => {
            let a = s.input(0)?;
            let depth = if node.int("transA").unwrap_or(0) != 0 { a.iter().rev().nth(1) } else { a.last() };
            times(&[2, s.made()?, *depth?])
        }
        "MatMulNBits" | "MatMulBnb4" => times(&[2, s.made()?, u64::try_from(node.int("K")?).ok()?]),
        "Gemm" | "FusedGemm" | "GemmFastGelu" => {
            let a = s.input(0)?;
            let depth = if node.int("transA").unwrap_or(0) != 0 { a.first() } else { a.get(1) };
            let bias = if node.input(2).is_some() { s.made()? } else { 0 };
            times(&[2, s.made()?, *depth?])?.checked_add(bias)
        }
        "Conv" | "ConvInteger" | "FusedConv" | "DeformConv" => conv(&s, 1, 2),
        "QLinearConv" => conv(&s, 3, 8),
        "ConvTranspose" => {
            let per_pixel = product(s.input(1)?.get(1..)?)?;
            let bias = if node.input(2).is_some() { s.made()? } else { 0 };
            times(&[2, s.read(0)?, per_pixel])?.checked_add(bias)
        }
        "Einsum" => einsum(&s),
        "Attention" | "MultiHeadAttention" | "GroupQueryAttention" => attention(&s),
        "LSTM" => recurrent(&s, 4),
        "GRU" => recurrent(&s, 3),
        "RNN" => recurrent(&s, 1),
        "AveragePool" | "LpPool" => {
            let kernel =
                node.ints("kernel_shape")?.iter().map(|&k| u64::try_from(k).ok()).collect::<Option<Vec<_>>>()?;
            s.made()?.checked_mul(product(&kernel)?)
        }
        "GlobalAveragePool" | "GlobalLpPool" | "ReduceL1" | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp"
        | "ReduceMean" | "ReduceProd" | "ReduceSum" | "ReduceSumSquare" => {
            if whole {
                Some(0)
            } else {
                s.read(0)
            }
        }
        "BatchNormalization"
        | "GroupNormalization"
        | "GroupNorm"
        | "InstanceNormalization"
        | "LayerNormalization"
        | "LogSoftmax"
        | "LpNormalization"
        | "LRN"
        | "MeanVarianceNormalization"
        | "RMSNormalization"
        | "SimplifiedLayerNormalization"
        | "SkipLayerNormalization"
        | "SkipSimplifiedLayerNormalization"
        | "Softmax"
        | "EmbedLayerNormalization"
        | "SkipGroupNorm"
        | "BiasSoftmax" => s.made()?.checked_mul(5),
        _ if Trait::PerElement.of(node) => {
            if whole {
                Some(0)
            } else {
                s.made()
            }
        }
        _ if Trait::Free.of(node) => Some(0),
        _ => None,
    }
}

fn matmul(s: &Sized) -> Option<u64> {
    times(&[2, s.made()?, *s.input(0)?.last()?])
}

fn conv(s: &Sized, weight: usize, bias: usize) -> Option<u64> {
    let made = s.made()?;
    let per_element = product(s.input(weight)?.get(1..)?)?;
    let bias = if s.node.input(bias).is_some() { made } else { 0 };
    times(&[2, made, per_element])?.checked_add(bias)
}

/// Two operands: one multiply-add for every combination of letters.
fn einsum(s: &Sized) -> Option<u64> {
    let equation = s.node.string("equation")?;
    let left = equation.split("->").next()?;
    if left.contains('.') {
        return None;
    }
    let mut letters: Vec<(char, u64)> = Vec::new();
    for (i, term) in left.split(',').enumerate() {
        for (letter, size) in term.chars().filter(|c| !c.is_whitespace()).zip(s.input(i)?) {
            if !letters.iter().any(|l| l.0 == letter) {
                letters.push((letter, size));
            }
        }
    }
    let all = letters.iter().try_fold(1u64, |n, l| n.checked_mul(l.1))?;
    if s.node.inputs().len() == 1 { Some(all) } else { all.checked_mul(2) }
}

/// Scores, softmax and the weighted sum; for the fused projection also the product with its weight.
fn attention(s: &Sized) -> Option<u64> {
    let node = s.node;
    if node.op_type == "Attention" && node.domain == "com.microsoft" {
        let (x, w) = (s.input(0)?, s.input(1)?);
        let [batch, length, width] = *x.as_slice() else { return None };
        let [_, columns] = *w.as_slice() else { return None };
        let project = times(&[2, batch, length, width, columns])?;
        let mix = times(&[4, batch, length, length, columns / 3])?;
        return project.checked_add(mix);
    }
    let (q, k) = (s.input(0)?, s.input(1)?);
    let past = match node.op_type.as_str() {
        "GroupQueryAttention" => 3,
        "MultiHeadAttention" => 6,
        _ => 4,
    };
    let past = s.input(past).and_then(|p| p.get(2).copied()).unwrap_or(0);
    let (batch, length, width) = match q.as_slice() {
        [b, heads, l, size] => (*b, *l, heads.checked_mul(*size)?),
        [b, l, width] => (*b, *l, *width),
        _ => return None,
    };
    let keys = match k.as_slice() {
        [_, _, l, _] | [_, l, _] => l.checked_add(past)?,
        _ => return None,
    };
    times(&[4, batch, length, keys, width])
}

fn recurrent(s: &Sized, gates: u64) -> Option<u64> {
    let (x, state) = (s.input(0)?, s.input(2)?);
    let [steps, batch, width] = *x.as_slice() else { return None };
    let [directions, _, hidden] = *state.as_slice() else { return None };
    times(&[2, steps, batch, directions, gates, hidden, width.checked_add(hidden)?])
}
