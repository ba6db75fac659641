//! Caches are found or declined with a reason, scales follow from what was seen, and the result is run on the runtime: as it is,
//! and with float caches around it.

use super::*;
use crate::testing::model;
use lathe_ir::{Model, Tensor, text};

const INT8: CacheType = CacheType { bits: 8, by_channel: true };
const INT4: CacheType = CacheType { bits: 4, by_channel: true };

/// Four heads of eight numbers that share two of keys and values, with a cache of any length.
const GRAPH: &str = r#"<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[1,S,32] q, float[1,S,16] k, float[1,S,16] v, float[1,2,P,8] pk, float[1,2,P,8] pv, int32[1] last, int32[1] total)
    => (float[1,S,32] y, float[1,2,T,8] nk, float[1,2,T,8] nv) {
        y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, pk, pv, last, total)
    }"#;

fn floats(seed: u32, dims: &[usize], scale: f32) -> Tensor {
    let count = dims.iter().product::<usize>() as u32;
    let one = |at: u32| ((at.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 16) % 1001) as f32 / 500.0 - 1.0;
    Tensor::from_f32s(dims, &(0..count).map(|at| one(at) * scale).collect::<Vec<_>>())
}

fn whole(value: i32) -> Tensor {
    Tensor::from_f64s(DataType::Int32, &[1], &[f64::from(value)]).unwrap()
}

/// Three new positions behind four, whose keys and values are `past`.
fn inputs(past: [Tensor; 2]) -> Vec<(String, Tensor)> {
    let [keys, values] = past;
    let all = [
        ("q", floats(1, &[1, 3, 32], 1.0)),
        ("k", floats(2, &[1, 3, 16], 1.0)),
        ("v", floats(3, &[1, 3, 16], 1.0)),
        ("pk", keys),
        ("pv", values),
        ("last", whole(6)),
        ("total", whole(7)),
    ];
    all.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

fn run(model: &Model, inputs: &[(String, Tensor)]) -> Vec<Tensor> {
    let found = lathe_testkit::evaluator().run(model, inputs);
    found.unwrap_or_else(|why| panic!("{why}\n{}", text::print(model))).into_iter().map(|(_, tensor)| tensor).collect()
}

/// Scales that reach 1 in every channel.
fn scales(caches: &Caches, wanted: CacheType) -> Scales {
    let ones = |cache: &CacheNode| vec![1.0; cache.heads * cache.size];
    Scales::reaching(caches, wanted, caches.nodes.iter().map(|cache| [ones(cache), ones(cache)]).collect())
}

fn quantized(graph: &str, wanted: CacheType) -> Quantized {
    let model = model(graph);
    let caches = Caches::find(&model, wanted).unwrap();
    let quantized = quantize(&model, &caches, wanted, &scales(&caches, wanted));
    quantized.model.check().unwrap();
    quantized
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (a.to_f32s().unwrap(), b.to_f32s().unwrap());
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn inputs_and_outputs_change_and_say_so() {
    let int8 = quantized(GRAPH, INT8);
    let printed = text::print(&int8.model);
    assert!(printed.contains("int8[1, 2, P, 8] pk") || printed.contains("int8[1,2,P,8] pk"), "{printed}");
    assert!(
        printed.contains("k_quant_type = \"PER_CHANNEL\"") && printed.contains("kv_cache_bit_width = 8"),
        "{printed}"
    );
    let names: Vec<&str> = int8.ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["pk", "pv", "nk", "nv"]);
    assert_eq!(int8.outputs().map(|port| port.name.as_str()).collect::<Vec<_>>(), ["nk", "nv"]);
    let (_, said) = int8.model.metadata.iter().find(|(key, _)| key == "onnx_lathe.kv_cache").unwrap();
    assert!(said.starts_with("pk: float[1,2,P,8] -> int8[1,2,P,8]\n"), "{said}");
    let int4 = quantized(GRAPH, INT4);
    assert_eq!((int4.ports[3].before.as_str(), int4.ports[3].after.as_str()), ("float[1,2,T,8]", "uint8[1,2,T,4]"));
}

/// The runtime reads the codes that the nodes around the model write, and the other way round.
#[test]
fn float_caches_around_the_model_are_what_its_codes_stand_for() {
    for wanted in [INT8, INT4, CacheType { by_channel: false, ..INT8 }, CacheType { by_channel: false, ..INT4 }] {
        let quantized = quantized(GRAPH, wanted);
        let step = 1.0 / wanted.largest() as f32;
        let lowest = -wanted.largest() as i32 - 1;
        let codes: Vec<i32> = (0..64).map(|at| lowest + at * 37 % (2 - 2 * lowest - 2)).collect();
        let numbers: Vec<f32> = codes.iter().map(|&code| code as f32 * step).collect();
        let stored: Vec<f64> = match wanted.bits {
            8 => codes.iter().map(|&code| f64::from(code)).collect(),
            // The first of two in the low half, both 8 above what they stand for.
            _ => codes.as_chunks::<2>().0.iter().map(|&[low, high]| f64::from(low + 8 + 16 * (high + 8))).collect(),
        };
        let last = 8 / wanted.packed() as usize;
        let stored = Tensor::from_f64s(wanted.elem(), &[1, 2, 4, last], &stored).unwrap();
        let numbers = Tensor::from_f32s(&[1, 2, 4, 8], &numbers);
        let own = run(&quantized.model, &inputs([stored.clone(), stored]));
        let around = run(&with_float_caches(&quantized), &inputs([numbers.clone(), numbers.clone()]));
        assert_eq!(own[0].to_f32s(), around[0].to_f32s(), "{wanted}");
        let float = run(&model(GRAPH), &inputs([numbers.clone(), numbers]));
        for at in [1, 2] {
            let (float, around) = (&float[at], &around[at]);
            let worst = largest_difference(float, around);
            assert!(worst <= 0.5 * step + 1e-6 && worst > 0.0, "{wanted}: {worst} beside {step}");
        }
    }
}

#[test]
fn attention_loses_little_with_int8_and_more_with_int4() {
    let past = [floats(4, &[1, 2, 4, 8], 1.0), floats(5, &[1, 2, 4, 8], 1.0)];
    let float = run(&model(GRAPH), &inputs(past.clone()));
    let lost = |wanted| {
        largest_difference(&float[0], &run(&with_float_caches(&quantized(GRAPH, wanted)), &inputs(past.clone()))[0])
    };
    let (int8, int4) = (lost(INT8), lost(INT4));
    assert!(int8 > 0.0 && int8 < 0.02 && int4 > 2.0 * int8 && int4 < 0.2, "{int8} {int4}");
}

#[test]
fn a_rotated_pair_shares_its_scale_and_dead_channels_have_one() {
    let caches = Caches::find(&model(GRAPH), INT8).unwrap();
    let mut keys = vec![127.0; 16];
    (keys[1], keys[5], keys[8], keys[12]) = (254.0, 1.0, 0.0, 0.0);
    let scales = Scales::reaching(&caches, INT8, vec![[keys.clone(), keys]]);
    let (keys, values) = (scales.steps(0, 0), scales.steps(0, 1));
    assert_eq!((keys[1], keys[5], values[1], values[5]), (2.0, 2.0, 2.0, 1.0 / 127.0));
    assert_eq!(keys[8], 254.0 * 1e-3 / 127.0);
    let nothing = Scales::reaching(&caches, INT8, vec![[vec![0.0; 16], vec![0.0; 16]]]);
    assert_eq!(nothing.steps(0, 0)[0], 1.0 / 127.0);
    let whole = CacheType { by_channel: false, ..INT8 };
    let scales = Scales::reaching(&caches, whole, vec![[vec![127.0; 16], vec![0.0; 16]]]);
    assert!(scales.steps(0, 0).iter().all(|&step| step == 1.0));
}

#[test]
fn codes_end_where_a_group_loses_least() {
    let caches = Caches::find(&model(GRAPH), INT4).unwrap();
    let scales = Scales::reaching(&caches, INT4, vec![[vec![7.0; 16], vec![7.0; 16]]]);
    // Channel 0 of the keys wants the third share and its pair, channel 4, loses more there; values stand alone.
    let errors: Vec<Vec<f64>> = (0..CLIPS.len())
        .map(|share| {
            (0..16)
                .map(|at| {
                    if (at, share) == (0, 2) {
                        1.0
                    } else if (at, share) == (4, 1) {
                        0.5
                    } else {
                        2.0
                    }
                })
                .collect()
        })
        .collect();
    let clipped = scales.clipped(&caches, &[[errors.clone(), errors]]);
    assert_eq!((clipped.steps(0, 0)[0], clipped.steps(0, 0)[4]), (CLIPS[1], CLIPS[1]));
    assert_eq!((clipped.steps(0, 1)[0], clipped.steps(0, 1)[4], clipped.steps(0, 1)[3]), (CLIPS[2], CLIPS[1], 1.0));
}

#[test]
fn statistics_are_taken_of_what_a_cache_holds() {
    let model = model(GRAPH);
    let caches = Caches::find(&model, INT4).unwrap();
    let watched = Watched::numbers(&model, &caches);
    watched.model.check().unwrap();
    assert_eq!((watched.rows.len(), watched.rows[0][0].len()), (1, 1));
    let errors = Watched::errors(&model, &caches, INT4, &scales(&caches, INT4));
    errors.model.check().unwrap();
    assert_eq!(errors.rows[0][1].len(), CLIPS.len());
}

#[test]
fn declines_with_a_reason() {
    let refuse = |graph: &str, wanted: CacheType, reason: &str| {
        let why = Caches::find(&model(graph), wanted).unwrap_err();
        assert!(why.contains(reason), "{why}");
    };
    let plain = r#"<opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }"#;
    refuse(plain, INT8, "--target ort writes it");
    let multi = r#"<opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[1,S,16] q, float[1,2,P,8] pk, float[1,2,P,8] pv) => (float[1,S,16] y, float[1,2,T,8] nk, float[1,2,T,8] nv)
        { y, nk, nv = com.microsoft.MultiHeadAttention <num_heads = 2> (q, q, q, "", "", "", pk, pv) }"#;
    refuse(multi, INT8, "1 caches belong to other attention operators");
    let bare = GRAPH.replace("(q, k, v, pk, pv, last, total)", "(q, k, v, \"\", \"\", last, total)");
    refuse(&bare, INT8, "none of the model's 1 GroupQueryAttention takes a cache");
    let inner = GRAPH.replace(", float[1,2,T,8] nv)", ")");
    refuse(&inner, INT8, "`nv` is no output of the model");
    let read = GRAPH
        .replace("float[1,S,32] y,", "float[1,S,32] y, float[1,2,P,8] other,")
        .replace("{\n", "{ other = Neg (pk)\n");
    refuse(&read, INT8, "`pk` has other uses");
    let half = GRAPH.replace("float[", "float16[");
    refuse(&half, INT8, "`pk` is not float32");
    refuse(&GRAPH.replace("\"\" : 17", "\"\" : 12"), INT8, "it needs operator set 13");
    let again = Caches::find(&quantized(GRAPH, INT8).model, INT8).unwrap_err();
    assert!(again.contains("its cache is quantized already"), "{again}");
    let fixed = GRAPH.replace("float[1,2,P,8] pk, ", "").replace("(q, k, v, pk,", "(q, k, v, made,");
    let fixed = fixed.replace("{\n", "{ made = Neg (pv)\n");
    refuse(&fixed, INT8, "`made` is no input of the model");
}

#[test]
fn sizes_of_a_cache_may_be_read() {
    let sized = |shape: &str| {
        let graph = GRAPH.replace("float[1,S,32] y,", "float[1,S,32] y, int64[N] n,");
        graph.replace("{\n", &format!("{{ {shape}\n"))
    };
    for shape in ["n = Shape <start = 2, end = 3> (pk)", "s = Shape (pk) n = Gather (s, third)"] {
        let graph =
            sized(shape).replace("int64[N] n", "int64[1] n").replace("T,8] nv)", "T,8] nv) <int64[1] third = {2}>");
        assert!(Caches::find(&model(&graph), INT4).is_ok(), "{shape}");
    }
    let whole = Caches::find(&model(&sized("n = Shape (pk)").replace("int64[N] n", "int64[4] n")), INT4).unwrap_err();
    assert!(whole.contains("`pk` has other uses"), "{whole}");
}

#[test]
fn types_have_names() {
    for text in ["int8", "int4", "int8:tensor", "int4:tensor"] {
        assert_eq!(CacheType::parse(text).unwrap().to_string(), text);
    }
    for text in ["int2", "int8:channel", "float16", ""] {
        assert_eq!(CacheType::parse(text), None);
    }
}
