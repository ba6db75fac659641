//! A small vision transformer over pairs of equal tokens.

#![allow(dead_code)] // Every test uses a part of it.

use super::Noise;
use lathe_ir::Tensor;
use std::fmt::Write as _;

/// Features of a token.
pub const WIDTH: usize = 32;

/// Hidden units of a feed-forward unit.
pub const HIDDEN: usize = 128;

/// Tokens of a sample: one to classify by, and pairs of equal ones.
pub const TOKENS: usize = 1 + 2 * PAIRS;
const PAIRS: usize = 32;

/// Its input `x`.
pub fn samples() -> Tensor {
    let rows = Noise(3).numbers(32 * (1 + PAIRS) * WIDTH, 2.0);
    Tensor::from_f32s(&[32, 1 + PAIRS, WIDTH], &rows)
}

fn listed(dims: &str, name: &str, numbers: &[f32]) -> String {
    let numbers: Vec<String> = numbers.iter().map(|x| format!("{x:e}")).collect();
    format!(", float[{dims}] {name} = {{{}}}", numbers.join(", "))
}

/// Four blocks over pairs of equal tokens. The values of the second attention and what leaves the third feed-forward unit
/// are zeros, so that neither adds anything.
pub fn model() -> String {
    let mut noise = Noise(11);
    let (mut constants, mut body) = (String::new(), String::new());
    for i in 0..4 {
        let mut qkv = noise.numbers(WIDTH * 3 * WIDTH, 0.3);
        qkv.iter_mut()
            .enumerate()
            .filter(|(at, _)| i == 1 && at % (3 * WIDTH) >= 2 * WIDTH)
            .for_each(|(_, x)| *x = 0.0);
        let up = noise.numbers(WIDTH * HIDDEN, 0.3);
        let down = noise.numbers(WIDTH * HIDDEN, if i == 2 { 0.0 } else { 0.1 });
        constants += &listed("32, 96", &format!("qkv{i}"), &qkv);
        constants += &listed("32, 128", &format!("up{i}"), &up);
        constants += &listed("128, 32", &format!("down{i}"), &down);
        let next = i + 1;
        let _ = write!(
            body,
            "n{i} = LayerNormalization (s{i}, g, b) p{i} = MatMul (n{i}, qkv{i})
             q{i}, k{i}, v{i} = Split <axis = 2, num_outputs = 3> (p{i}) "
        );
        for (name, perm) in [("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")] {
            let _ = write!(
                body,
                "{name}h{i} = Reshape ({name}{i}, heads) {name}t{i} = Transpose <perm = [{perm}]> ({name}h{i}) "
            );
        }
        let _ = write!(
            body,
            "[\"{i}/scores\"] sc{i} = MatMul (qt{i}, kt{i}) sm{i} = Softmax <axis = -1> (sc{i})
             [\"{i}/sum\"] o{i} = MatMul (sm{i}, vt{i}) ot{i} = Transpose <perm = [0, 2, 1, 3]> (o{i})
             a{i} = Reshape (ot{i}, flat) h{i} = Add (s{i}, a{i})
             m{i} = LayerNormalization (h{i}, g, b) [\"{i}/up\"] u{i} = MatMul (m{i}, up{i}) r{i} = Relu (u{i})
             [\"{i}/down\"] d{i} = MatMul (r{i}, down{i}) s{next} = Add (h{i}, d{i}) "
        );
    }
    let pairs: Vec<String> = (0..TOKENS).map(|at| at.div_ceil(2).to_string()).collect();
    format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n, 33, 32] x) => (float[n, 32] y)
         <int64[{TOKENS}] pairs = {{{}}}, int64[4] heads = {{0, {TOKENS}, 2, 16}}, int64[3] flat = {{0, {TOKENS}, 32}},
          int64 zero = {{0}}, float[32] g = {{{}}}, float[32] b = {{{}}} {constants}> {{
            s0 = Gather <axis = 1> (x, pairs) {body} s = LayerNormalization (s4, g, b) y = Gather <axis = 1> (s, zero) }}",
        pairs.join(", "),
        ["1"; WIDTH].join(", "),
        ["0.1"; WIDTH].join(", "),
    )
}
