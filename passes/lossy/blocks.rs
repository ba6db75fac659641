//! How a model holds quantized weights: constants of codes and scales, and the nodes that read them.

use super::{
    Weight,
    integers::{Blocks, Layout, Scheme},
    layers::Tap,
    stored::Stored,
};
use crate::Target;
use lathe_ir::{DataType, Graph, Model, Node, ScopeId, Tensor, ValueId};

const CONTRIB: &str = "com.microsoft";

/// ONNX Runtime multiplies in whole numbers from here on; its kernel for 8 bits knows nothing else.
const ACCURACY_LEVEL: i64 = 4;

/// Replaces the weight by codes and scales, for operators of `target`. It has no uses afterwards.
pub(super) fn emit(
    model: &mut Model,
    weight: &Weight,
    layout: Layout,
    scheme: Scheme,
    blocks: &Blocks,
    target: Target,
) {
    match contrib(&model.graph, weight, scheme.block).filter(|_| target == Target::Ort) {
        Some(uses) => {
            model.import(CONTRIB, 1);
            read_directly(&mut model.graph, weight, layout, scheme, blocks, &uses);
        }
        None => restore(&mut model.graph, weight, layout, scheme, blocks),
    }
}

/// Replaces a constant that is only stored otherwise.
pub(super) fn emit_stored(model: &mut Model, stored: &Stored, scheme: Scheme, blocks: &Blocks) {
    restore(&mut model.graph, &stored.weight(), stored.layout, scheme, blocks);
}

/// How an operator of ONNX Runtime reads a weight in blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    Product,
    Rows,
}

/// How every use of the weight would read it by itself; `None` if some use has no such operator.
pub(super) fn contrib(graph: &Graph, weight: &Weight, block: usize) -> Option<Vec<Reads>> {
    let reads = |tap: &Tap| {
        let node = graph.node(tap.node);
        let scaled = ["alpha", "beta"].iter().any(|f| node.float(f).is_some_and(|factor| factor != 1.0));
        match node.op_type.as_str() {
            "MatMul" => Some(Reads::Product),
            "Gemm" if !scaled => Some(Reads::Product),
            // Blocks must not reach over the end of a row.
            "Gather" if weight.dims[1].is_multiple_of(block) => Some(Reads::Rows),
            _ => None,
        }
    };
    weight.taps.iter().map(reads).collect::<Option<Vec<_>>>().filter(|_| weight.dims.len() == 2)
}

/// Whether the last block of a row is stored to its end.
pub(super) fn are_whole(graph: &Graph, weight: &Weight, block: usize, target: Target) -> bool {
    target == Target::Ort && contrib(graph, weight, block).is_some()
}

/// Stores codes and scales by rows of inputs, `[n, blocks, bytes of a block]`, and reads them where they are used.
fn read_directly(graph: &mut Graph, weight: &Weight, layout: Layout, scheme: Scheme, blocks: &Blocks, uses: &[Reads]) {
    let name = graph.value(weight.value).name.clone();
    let (outputs, k) = (layout.outer * layout.inner, layout.length);
    let count = k.div_ceil(scheme.block);
    let (codes, scales) = (packed(layout, scheme, blocks), turned(layout, count, &blocks.scales));
    let bytes = codes.len() / outputs;
    let picks = uses.contains(&Reads::Rows);
    let store = |graph: &mut Graph, part: &str, tensor: Tensor| {
        let fresh = graph.fresh_name(&format!("{name}_{part}"));
        graph.add_initializer(ScopeId::MAIN, &fresh, tensor)
    };
    let dims = if picks { vec![outputs, bytes] } else { vec![outputs, count, bytes / count] };
    let codes = Tensor::new(DataType::Uint8, dims, codes).expect("every block has its bytes");
    let codes = store(graph, "quantized", codes);
    let scales = store(graph, "scale", Tensor::from_f32s(&[outputs, count], &scales));
    let zeros = scheme.zero_points.then(|| {
        let packed = packed_zeros(layout, count, scheme, &blocks.zeros);
        let dims = vec![outputs, packed.len() / outputs];
        let zeros = Tensor::new(DataType::Uint8, dims, packed).expect("every row has its bytes");
        store(graph, "zero_point", zeros)
    });
    let mut blobs = (!picks).then_some(codes);
    for (tap, reads) in weight.taps.iter().zip(uses) {
        let data = graph.node(tap.node).input(usize::from(*reads == Reads::Rows)).expect("a tap has data");
        let added = graph.node(tap.node).input(2).filter(|_| graph.node(tap.node).is("Gemm"));
        let mut whole = match reads {
            Reads::Rows => {
                let node = own("GatherBlockQuantized", scheme).with("gather_axis", 0i64).with("quantize_axis", 1i64);
                let read: Vec<ValueId> = [codes, data, scales].into_iter().chain(zeros).collect();
                graph.append(ScopeId::MAIN, node, &read, &format!("{name}_picked"))
            }
            Reads::Product => {
                let blobs = *blobs.get_or_insert_with(|| {
                    let dims = [outputs as i64, count as i64, (bytes / count) as i64];
                    let shape = Tensor::from_i64s(&[3], &dims);
                    let shape = store(graph, "blocks", shape);
                    graph.append(ScopeId::MAIN, Node::new("Reshape"), &[codes, shape], &format!("{name}_blocks"))
                });
                let node = own("MatMulNBits", scheme).with("K", k as i64).with("N", outputs as i64);
                let node = node.with("accuracy_level", ACCURACY_LEVEL);
                let read: Vec<ValueId> = [data, blobs, scales].into_iter().chain(zeros).collect();
                graph.append(ScopeId::MAIN, node, &read, &format!("{name}_product"))
            }
        };
        if let Some(added) = added {
            whole = graph.append(ScopeId::MAIN, Node::new("Add"), &[whole, added], &format!("{name}_whole"));
        }
        graph.replace(tap.output, whole);
        let read = graph.node(tap.node).inputs().iter().flatten().copied().find(|&v| v != data);
        graph.remove_node(tap.node);
        let turn = read.filter(|&v| graph.value(v).uses().is_empty()).and_then(|v| graph.producer(v));
        if let Some(turn) = turn.filter(|&t| graph.node(t).is("Transpose")) {
            graph.remove_node(turn);
        }
    }
    if graph.value(weight.value).uses().is_empty() {
        graph.remove_initializer(weight.value);
    }
}

fn own(op: &str, scheme: Scheme) -> Node {
    let mut node = Node::new(op).with("bits", scheme.bits as i64).with("block_size", scheme.block as i64);
    node.domain = CONTRIB.to_owned();
    node
}

/// Codes above their zero point, row by row of inputs; the rest of the last block of a row stands for zeros.
fn packed(layout: Layout, scheme: Scheme, blocks: &Blocks) -> Vec<u8> {
    let zero = 1i16 << (scheme.bits - 1);
    let (length, count) = (layout.length.next_multiple_of(scheme.block), layout.length.div_ceil(scheme.block));
    let mut bytes = Vec::with_capacity(layout.outer * layout.inner * length * scheme.bits / 8);
    let mut row = vec![zero as u8; length];
    for outer in 0..layout.outer {
        for inner in 0..layout.inner {
            if scheme.zero_points {
                let last = blocks.zeros[(outer * count + count - 1) * layout.inner + inner];
                row[layout.length..].fill((i16::from(last) + zero) as u8);
            }
            for (at, code) in row.iter_mut().enumerate().take(layout.length) {
                let stored = blocks.codes[(outer * layout.length + at) * layout.inner + inner];
                *code = (i16::from(stored) + zero) as u8;
            }
            pack(&row, scheme.bits, &mut bytes);
        }
    }
    bytes
}

/// Appends numbers of so many bits from the lowest bits of a byte on.
fn pack(numbers: &[u8], bits: usize, bytes: &mut Vec<u8>) {
    let byte = |few: &[u8]| few.iter().enumerate().fold(0, |byte, (at, number)| byte | number << (at * bits));
    bytes.extend(numbers.chunks(8 / bits).map(byte));
}

/// Zero points row by row of inputs, each row to the end of its last byte.
fn packed_zeros(layout: Layout, count: usize, scheme: Scheme, zeros: &[i8]) -> Vec<u8> {
    let middle = 1i16 << (scheme.bits - 1);
    let mut bytes = Vec::new();
    for row in turned(layout, count, zeros).chunks(count) {
        let row: Vec<u8> = row.iter().map(|&zero| (i16::from(zero) + middle) as u8).collect();
        pack(&row, scheme.bits, &mut bytes);
    }
    bytes
}

/// What every block has, as `[n, blocks]`.
fn turned<T: Copy>(layout: Layout, count: usize, scales: &[T]) -> Vec<T> {
    let at = |row: usize, block: usize| {
        let (outer, inner) = (row / layout.inner, row % layout.inner);
        scales[(outer * count + block) * layout.inner + inner]
    };
    (0..layout.outer * layout.inner).flat_map(|row| (0..count).map(move |block| at(row, block))).collect()
}

/// Stores codes and scales in the shape of the constant, and a node that puts it together again.
fn restore(graph: &mut Graph, weight: &Weight, layout: Layout, scheme: Scheme, blocks: &Blocks) {
    let stored = |codes: &[i8]| match scheme.bits {
        8 => (DataType::Int8, codes.iter().map(|&c| c as u8).collect::<Vec<u8>>()),
        _ => (DataType::Int4, codes.chunks(2).map(nibbles).collect()),
    };
    let (dtype, bytes) = stored(&blocks.codes);
    let per_channel = scheme.block == usize::MAX;
    let codes = Tensor::new(dtype, weight.dims.clone(), bytes).expect("there is a code for every number");
    let mut scale_dims = weight.dims.clone();
    if per_channel {
        scale_dims.truncate(1);
    } else {
        scale_dims[layout.axis] = layout.length.div_ceil(scheme.block);
    }
    let scales = Tensor::from_f32s(&scale_dims, &blocks.scales);
    let zeros = scheme.zero_points.then(|| {
        let (dtype, bytes) = stored(&blocks.zeros);
        Tensor::new(dtype, scale_dims, bytes).expect("there is a zero point for every scale")
    });
    let name = graph.value(weight.value).name.clone();
    let store = |graph: &mut Graph, part: &str, tensor: Tensor| -> ValueId {
        let fresh = graph.fresh_name(&format!("{name}_{part}"));
        graph.add_initializer(ScopeId::MAIN, &fresh, tensor)
    };
    let (codes, scales) = (store(graph, "quantized", codes), store(graph, "scale", scales));
    let zeros = zeros.map(|zeros| store(graph, "zero_point", zeros));
    // A table is not restored as a whole for the rows that are picked of it. No operator picks rows of 4-bit numbers.
    let picks = weight.taps.iter().filter(|tap| tap.rows.is_none() && scheme.bits == 8 && !per_channel);
    for tap in picks {
        let rows = graph.node(tap.node).input(1).expect("what picks rows has indices");
        let mut pick = |from: ValueId, part: &str| {
            graph.append(ScopeId::MAIN, Node::new("Gather"), &[from, rows], &format!("{name}_{part}"))
        };
        let (codes, scales) = (pick(codes, "picked"), pick(scales, "picked_scale"));
        let node = Node::new("DequantizeLinear").with("axis", -1i64).with("block_size", scheme.block as i64);
        let restored = graph.append(ScopeId::MAIN, node, &[codes, scales], &format!("{name}_rows"));
        graph.replace(tap.output, restored);
        graph.remove_node(tap.node);
    }
    if graph.value(weight.value).uses().is_empty() {
        graph.remove_initializer(weight.value);
        return;
    }
    let node = Node::new("DequantizeLinear");
    let node = match per_channel {
        true => node.with("axis", 0i64),
        false => node.with("axis", layout.axis as i64).with("block_size", scheme.block as i64),
    };
    let read: Vec<ValueId> = [codes, scales].into_iter().chain(zeros).collect();
    let restored = graph.append(ScopeId::MAIN, node, &read, &format!("{name}_dequantized"));
    graph.replace_uses(weight.value, restored);
    graph.remove_initializer(weight.value);
}

fn nibbles(pair: &[i8]) -> u8 {
    let low = pair[0] as u8 & 0x0f;
    pair.get(1).map_or(low, |&high| low | (high as u8) << 4)
}

#[cfg(test)]
mod tests {
    use super::super::{quantize::Coded, weights};
    use super::*;
    use lathe_ir::text;

    /// What the codes and scales of a layer stand for, by the definition of `MatMulNBits`, `[n, k]`.
    fn decoded(graph: &Graph, bits: usize, k: usize) -> Vec<f32> {
        let node = graph.nodes(ScopeId::MAIN).find(|&id| graph.node(id).op_type == "MatMulNBits").unwrap();
        let node = graph.node(node);
        let constant = |index: usize| graph.constant(node.input(index).unwrap()).unwrap();
        let (codes, scales) = (constant(1).bytes(), constant(2).to_f32s().unwrap());
        let block = node.int("block_size").unwrap() as usize;
        let (count, padded) = (k.div_ceil(block), k.next_multiple_of(block));
        let unpacked = |bytes: &[u8], at: usize| {
            let per_byte = 8 / bits;
            f32::from(bytes[at / per_byte] >> (bits * (at % per_byte)) & (0xff >> (8 - bits)))
        };
        let zeros = node.input(3).map(|zeros| graph.constant(zeros).unwrap().bytes().to_vec());
        let code = |row: usize, at: usize| {
            let zero = zeros.as_ref().map_or((1 << (bits - 1)) as f32, |zeros| {
                let rows = codes.len() * 8 / bits / padded;
                let row = &zeros[zeros.len() / rows * row..][..zeros.len() / rows];
                unpacked(row, at / block)
            });
            unpacked(codes, row * padded + at) - zero
        };
        let rows = scales.len() / count;
        (0..rows).flat_map(|r| (0..padded).map(move |at| (r, at))).fold(Vec::new(), |mut all, (row, at)| {
            let value = code(row, at) * scales[row * count + at / block];
            if at < k {
                all.push(value)
            } else {
                assert_eq!(value, 0.0, "padding stands for zeros")
            }
            all
        })
    }

    #[test]
    fn products_read_what_was_coded_whatever_the_order_and_the_last_block() {
        for (dims, product, turned) in
            [("72, 64", "MatMul (x, w)", false), ("64, 72", "Gemm <transB = 1> (x, w)", true)]
        {
            let numbers: Vec<String> = (0..72 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 - 50.0)).collect();
            let source = format!(
                "<ir_version: 10, opset_import: [\"\" : 18]> g (float[n, 72] x) => (float[n, 64] y) <float[{dims}] w = {{{}}}> \
                 {{ h = {product} y = Relu (h) }}",
                numbers.join(", ")
            );
            let plain = [(8, 32), (4, 32), (4, 128), (2, 32)].map(|(bits, block)| Scheme::new(bits, block));
            let own = [(4, 32), (4, 128), (2, 32)].map(|(bits, block)| Scheme::with_zero_points(bits, block));
            for scheme in plain.into_iter().chain(own) {
                let Scheme { bits, block, .. } = scheme;
                let mut model = text::parse(&source).unwrap();
                let weight = weights(&model.graph).0.remove(0);
                let coded = Coded::of(&model.graph, &weight, scheme, &[1.0; 72]).unwrap();
                let stored = coded.restored();
                coded.emit(&mut model, &weight, Target::Ort);
                model.check().unwrap();
                let found = decoded(&model.graph, bits, 72);
                for (at, value) in found.into_iter().enumerate() {
                    let (row, column) = (at / 72, at % 72);
                    let wanted = stored[if turned { at } else { column * 64 + row }];
                    assert!((value - wanted).abs() <= 1e-5, "{product} {bits} {block} {at}: {value} {wanted}");
                }
            }
        }
    }

    /// The model with the numbers that the codes stand for in place of the weight.
    fn rounded(model: &Model, coded: &Coded) -> Model {
        let mut model = model.clone();
        let weight = weights(&model.graph).0.remove(0);
        let stored = Tensor::from_f32s(&weight.dims, &coded.restored());
        let new = model.graph.add_initializer(ScopeId::MAIN, "rounded", stored);
        model.graph.replace_uses(weight.value, new);
        model.graph.remove_initializer(weight.value);
        model
    }

    #[test]
    fn the_runtime_computes_with_the_numbers_that_codes_stand_for() {
        // 72 numbers in blocks of 32 leave a part of a block; three blocks of 4 bits have an odd number of zero points.
        for (dims, product) in [("72, 64", "MatMul (x, w)"), ("64, 72", "Gemm <transB = 1> (x, w)")] {
            let numbers: Vec<String> = (0..72 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 - 50.0)).collect();
            let source = format!(
                "<ir_version: 10, opset_import: [\"\" : 21]> g (float[3, 72] x) => (float[3, 64] y) <float[{dims}] w = {{{}}}> \
                 {{ h = {product} y = Relu (h) }}",
                numbers.join(", ")
            );
            let model = text::parse(&source).unwrap();
            let plain = [(8, 32), (4, 32), (4, 64), (4, 128), (2, 32)].map(|(bits, block)| Scheme::new(bits, block));
            let own = [(4, 32), (4, 64), (4, 128), (2, 64)].map(|(bits, block)| Scheme::with_zero_points(bits, block));
            for scheme in plain.into_iter().chain(own) {
                let Scheme { bits, block, .. } = scheme;
                let weight = weights(&model.graph).0.remove(0);
                let coded = Coded::of(&model.graph, &weight, scheme, &[1.0; 72]).unwrap();
                let reference = rounded(&model, &coded);
                for target in [Target::Portable, Target::Ort].into_iter().skip(usize::from(bits == 2)) {
                    let mut changed = model.clone();
                    coded.emit(&mut changed, &weight, target);
                    let products: Vec<_> = changed
                        .graph
                        .nodes(ScopeId::MAIN)
                        .filter(|&id| changed.graph.node(id).op_type == "MatMulNBits")
                        .collect();
                    assert_eq!(products.len(), usize::from(target == Target::Ort));
                    // In float32, not in whole numbers.
                    products.iter().for_each(|&id| changed.graph.node_mut(id).set_attribute("accuracy_level", 0i64));
                    lathe_testkit::equivalent(&reference, &changed, Some(1e-5), 1)
                        .unwrap_or_else(|why| panic!("{product} {bits} {block} {target:?}: {why}"));
                }
            }
        }
    }

    #[test]
    fn rows_are_picked_of_codes_and_not_of_a_table_that_was_restored() {
        let numbers: Vec<String> = (0..72 * 64).map(|i| format!("{:e}", (i * 37 % 101) as f32 - 50.0)).collect();
        let source = format!(
            "<ir_version: 10, opset_import: [\"\" : 21]> g (float[3, 64] x) => (float[3, 72] y, float[2, 3, 64] z) \
             <float[72, 64] w = {{{}}}, int64[2, 3] ids = {{5, 9, 0, 71, 2, 3}}> \
             {{ p = Gather (w, ids) z = Relu (p) h = Gemm <transB = 1> (x, w) y = Relu (h) }}",
            numbers.join(", ")
        );
        let model = text::parse(&source).unwrap();
        for (bits, alone) in [(8, true), (8, false), (4, false)] {
            let mut model = model.clone();
            if alone {
                let product = model.graph.nodes(ScopeId::MAIN).find(|&id| model.graph.node(id).is("Gemm")).unwrap();
                let input = model.graph.node(product).input(0).unwrap();
                let output = model.graph.node(product).output(0).unwrap();
                let same = model.graph.append(ScopeId::MAIN, Node::new("Tanh"), &[input], "same");
                model.graph.replace(output, same);
                model.graph.remove_node(product);
                let y = model.graph.main().outputs()[0];
                model.graph.value_mut(y).ty = None;
            }
            let weight = weights(&model.graph).0.remove(0);
            let coded = Coded::of(&model.graph, &weight, Scheme::new(bits, 32), &[1.0; 64]).unwrap();
            let reference = rounded(&model, &coded);
            let mut changed = model.clone();
            coded.emit(&mut changed, &weight, Target::Portable);
            changed.check().unwrap();
            let count = |op: &str| {
                changed.graph.nodes(ScopeId::MAIN).filter(|&id| changed.graph.node(id).op_type == op).count()
            };
            let expected = match (bits, alone) {
                (8, true) => (1, 2),
                (8, false) => (2, 2),
                _ => (1, 1),
            };
            assert_eq!((count("DequantizeLinear"), count("Gather")), expected);
            lathe_testkit::equivalent(&reference, &changed, Some(1e-6), 1).unwrap();
        }
        // One constant for rows and products.
        for scheme in [Scheme::new(4, 32), Scheme::with_zero_points(4, 32), Scheme::with_zero_points(2, 32)] {
            let weight = weights(&model.graph).0.remove(0);
            let coded = Coded::of(&model.graph, &weight, scheme, &[1.0; 64]).unwrap();
            let reference = rounded(&model, &coded);
            let mut changed = model.clone();
            coded.emit(&mut changed, &weight, Target::Ort);
            for id in changed.graph.nodes(ScopeId::MAIN).collect::<Vec<_>>() {
                if changed.graph.node(id).op_type == "MatMulNBits" {
                    changed.graph.node_mut(id).set_attribute("accuracy_level", 0i64);
                }
            }
            lathe_testkit::equivalent(&reference, &changed, Some(1e-5), 1)
                .unwrap_or_else(|why| panic!("{scheme:?}: {why}"));
        }
    }
}
