//! Damaged and hostile files: the reader gives a model or an error, in bounded memory, and never panics.
//!
//! The fuzz target `read_model` looks for the same with coverage guidance; this is its seeded share for every test run.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use lathe_ir::{Model, text};

const CASES: usize = 500_000;

/// How much the address space may grow over all cases: the seeds are a few kilobytes.
const MEMORY: u64 = 512 << 20;

const SEEDS: &[&str] = &[
    include_str!("../text/tests.onnxtxt"),
    "g (float[N] x) => (float[N] y) { y = Relu (x) }",
    "g (float[2] x) => (y) <float[2] w = {1, 2}, int4[3] i = {1, -2, 3}, string[2] s = {\"a\", \"\"}, float t> {
        t = Add (x, w) y = Cast <to = 1> (t) }",
    "g () => (w) <sparse_tensor(float[3,4]) w = {float[2] {1, 2}, int64[2] {0, 7}}> { }",
    "g (int64 n, bool c, float s) => (last, all) { last, all = Loop (n, c, s) <body = b (int64 i, bool go, float t)
        => (go, u, v) <float one = {1}> { u = Neg (t) v = Add (t, one) }> }",
    "g (map(string, seq(float[])) x, optional(float) o, opaque(a.b,c) q) => (x) { y = Op <ts = [float {1}], sp =
        sparse_tensor(float[9]) {float[2] {1, 2}, int64[2] {0, 3}}, ty = [seq(float)], gs = [h () => (x) { }]> (o, q) }",
];

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

/// Sizes a length field could lie about, as protobuf writes them.
const LENGTHS: &[&[u8]] = &[
    &[0],
    &[0x7f],
    &[0xff, 0x7f],
    &[0xff, 0xff, 0xff, 0xff, 0x07],
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80],
];

fn damage(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(5) / 3 {
        let at = random.below(bytes.len());
        match random.below(7) {
            _ if bytes.is_empty() => break,
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.below(256) as u8,
            3 => bytes.truncate(at),
            4 => {
                let length = LENGTHS[random.below(LENGTHS.len())];
                let removed = random.below(3).min(bytes.len() - at);
                bytes.splice(at..at + removed, length.iter().copied());
            }
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let to = from + random.below(other.len() - from);
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let end = at + random.below(16).min(bytes.len() - at);
                bytes.drain(at..end);
            }
        }
    }
    bytes
}

/// What must hold for any bytes.
fn read(bytes: Vec<u8>) -> bool {
    let Ok(loaded) = Model::from_bytes(Bytes::from(bytes)) else { return false };
    let _ = loaded.model.check();
    let text = text::print_full(&loaded.model);
    let again =
        Model::from_bytes(loaded.model.to_bytes().into()).expect("a model that was read can be written and read");
    assert_eq!(text::print_full(&again.model), text);
    true
}

/// The largest address space this process had, in bytes, where the system tells.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

#[test]
fn damaged_files_are_models_or_errors() {
    let seeds: Vec<Vec<u8>> = SEEDS.iter().map(|text| text::parse(text).unwrap().to_bytes()).collect();
    seeds.iter().for_each(|seed| assert!(read(seed.clone()), "a seed is no model"));
    let before = peak();
    let mut random = Random(1);
    let mut models = 0;
    for case in 0..CASES {
        let bytes = match case % 50 {
            0 => (0..random.below(200)).map(|_| random.below(256) as u8).collect(),
            _ => damage(&mut random, &seeds),
        };
        let shown = bytes.clone();
        match std::panic::catch_unwind(|| read(bytes)) {
            Ok(read) => models += usize::from(read),
            Err(_) => panic!("case {case} failed: {shown:02x?}"),
        }
    }
    assert!(models > CASES / 50, "too few damaged files are still models to learn from: {models}");
    if let (Some(before), Some(after)) = (before, peak()) {
        assert!(after - before < MEMORY, "reading small files took {} bytes", after - before);
    }
}

#[test]
fn a_deep_file_is_an_error() {
    let mut ty = Vec::new();
    for _ in 0..5_000 {
        // `TypeProto { sequence_type { elem_type } }`, inside out.
        ty = field(0x22, field(0x0a, ty));
    }
    let value = [field(0x0a, b"x".to_vec()), field(0x12, ty)].concat();
    let model = field(0x3a, field(0x5a, value));
    assert!(Model::from_bytes(model.into()).is_err());
}

/// A field of a message: its tag, its length, its bytes.
fn field(tag: u8, bytes: Vec<u8>) -> Vec<u8> {
    let mut outer = vec![tag];
    let mut length = bytes.len();
    while length >= 0x80 {
        outer.push(length as u8 | 0x80);
        length >>= 7;
    }
    outer.push(length as u8);
    outer.extend(bytes);
    outer
}
