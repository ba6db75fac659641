//! Round trips through text and what cannot be parsed.

use super::*;
use crate::{AttributeValue, Model, ScopeId, Tensor, TypeKind};

#[track_caller]
fn round_trips(text: &str) -> Model {
    let model = parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let full = print_full(&model);
    let again = parse(&full).unwrap_or_else(|error| panic!("{error}\n{full}"));
    assert_eq!(print_full(&again), full);
    assert_eq!(again.to_bytes(), model.to_bytes(), "the text loses something:\n{full}");
    model
}

/// The attributes of the only node of a graph whose node is written `y = Op <…> (x)`.
#[track_caller]
fn attribute(value: &str) -> AttributeValue {
    let model = round_trips(&format!("g (float x) => (y) {{ y = a.Op <it {value}> (x) }}"));
    let node = model.graph.nodes(ScopeId::MAIN).next().unwrap();
    model.graph.node(node).attribute("it").unwrap().clone()
}

/// The initializer `w` of this type and data.
#[track_caller]
fn tensor(ty: &str, data: &str) -> Tensor {
    let model = round_trips(&format!("g () => (w) <{ty} w = {{{data}}}> {{ }}"));
    model.graph.constant(model.graph.find_value("w").unwrap()).unwrap().clone()
}

#[track_caller]
fn fails(text: &str, message: &str) {
    match parse(text) {
        Ok(_) => panic!("parsed: {text}"),
        Err(error) => assert_eq!(error.to_string(), message),
    }
}

#[test]
fn prints_the_style_of_snapshots() {
    let text = "g (float[2,3,4] x) => (float[4,2,3] y) {
    t = Transpose <perm = [1, 0, 2]> (x)
    [last] y = Transpose <perm = [2, 1, 0]> (t)  # float[4,2,3]
}
";
    assert_eq!(print_graph(&round_trips(text)), text);
}

#[test]
fn prints_header_initializers_subgraphs_and_functions() {
    let text = r#"<
    ir_version: 10,
    opset_import: ["" : 18, "local" : 1],
    producer_name: "someone",
    model_version: 3,
    doc_string: "a \"quoted\" word",
    metadata_props: ["key": "value"]
>
g (bool c, float[N,3] x) => (float[N,3] y) <
    float[3] small = {0, -1.5, 1e20},
    float[3,4] large = ["elements": "12", "hash": "a764f3b1"]
> {
    [choose] y = If (c) <then_branch = a () => (p) {
        p = local.f <alpha = 2.0> (x, "", small)
    }, else_branch = b () => (q) <
        float one = {1}
    > {
        q = Add (x, one)
    }>  # float[N,3]
}

<
    domain: "local",
    opset_import: ["" : 18]
>
f <alpha, beta = 1.0> (a, b, c) => (d) {
    s = Constant <value_float: float = @alpha> ()
    d = Mul (a, s)
}
"#;
    let model = parse(&text.replace("[\"elements\": \"12\", \"hash\": \"a764f3b1\"]", "{1,2,3,4,5,6,7,8,9,10,11,12}"));
    let model = model.unwrap();
    assert_eq!(print(&model), text);
    round_trips(&print_full(&model));
}

#[test]
fn keeps_every_kind_of_attribute() {
    use AttributeValue::*;
    assert_eq!(attribute("= 3"), Int(3));
    assert_eq!(attribute("= -9223372036854775808"), Int(i64::MIN));
    assert_eq!(attribute(": float = 3"), Float(3.0));
    assert_eq!(attribute("= 1e-7"), Float(1e-7));
    assert_eq!(attribute("= \"a\\\"b\\\\c\\x00\\xff\nd\""), String(b"a\"b\\c\0\xff\nd".as_slice().into()));
    assert_eq!(attribute("= [1, 2]"), Ints(vec![1, 2]));
    assert_eq!(attribute("= [1, 2.5]"), Floats(vec![1.0, 2.5]));
    assert_eq!(attribute(": ints = []"), Ints(vec![]));
    assert_eq!(attribute(": floats = []"), Floats(vec![]));
    assert_eq!(attribute(": strings = []"), Strings(vec![]));
    assert_eq!(attribute(": tensors = []"), Tensors(vec![]));
    assert_eq!(attribute(": sparse_tensors = []"), SparseTensors(vec![]));
    assert_eq!(attribute(": type_protos = []"), Types(vec![]));
    assert_eq!(attribute(": graphs = []"), Graphs(vec![]));
    assert_eq!(attribute("= [\"a\", \"\"]"), Strings(vec!["a".into(), "".into()]));
    assert_eq!(attribute("= float[2] {1, 2}"), Tensor(crate::Tensor::from_f32s(&[2], &[1.0, 2.0])));
    assert_eq!(attribute(": tensor = float[2] named {1, 2}"), Tensor(crate::Tensor::from_f32s(&[2], &[1.0, 2.0])));
    assert_eq!(attribute("= int64 \"a name\" = {7}"), Tensor(crate::Tensor::from_i64s(&[], &[7])));
    assert!(matches!(attribute("= [float {1}, int64[0] {}]"), Tensors(list) if list.len() == 2));
    assert!(matches!(attribute("= seq(float[N,?,\"a b\"])"), Type(_)));
    assert!(matches!(attribute("= [float, int64[]]"), Types(list) if list.len() == 2));
    assert!(matches!(attribute("= sparse_tensor(float[9]) {float[2] {1, 2}, int64[2] {0, 3}}"), SparseTensor(_)));
    assert!(matches!(attribute("= h (int64 i) => (x) { }"), Graph(_)));
    assert!(matches!(attribute("= \"a graph\" () => (x) { }"), Graph(_)));
    assert!(
        matches!(attribute("= [h () => (x) { }, \"\" () => (z) { z = Neg (x) }]"), Graphs(list) if list.len() == 2)
    );
    assert_eq!(attribute(": ints = @other"), Reference { name: "other".into(), kind: 7 });
    assert_eq!(attribute("= @other"), Reference { name: "other".into(), kind: 0 });
}

#[test]
fn keeps_special_floats_bit_by_bit() {
    let bits = |text: &str| match attribute(text) {
        AttributeValue::Float(value) => value.to_bits(),
        other => panic!("{other:?}"),
    };
    assert_eq!(bits("= inf"), f32::INFINITY.to_bits());
    assert_eq!(bits("= -Infinity"), f32::NEG_INFINITY.to_bits());
    assert_eq!(bits("= NaN"), 0x7fc0_0000);
    assert_eq!(bits("= -nan"), 0xffc0_0000);
    assert_eq!(bits("= nan(0x7f800001)"), 0x7f80_0001);
    assert_eq!(bits("= -0.0"), 0x8000_0000);
    assert_eq!(bits(": float = -0"), 0x8000_0000);
    assert_eq!(bits("= 1e-45"), 1);
    let doubles = tensor("double[4]", "nan, -inf, nan(0x7ff0000000000001), 4.9e-324");
    assert_eq!(doubles.bytes()[16..], [1, 0, 0, 0, 0, 0, 0xf0, 0x7f, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn keeps_every_element_type() {
    assert_eq!(tensor("float[2]", "-0, 2.5").bytes(), [0, 0, 0, 0x80, 0, 0, 0x20, 0x40]);
    assert_eq!(tensor("int8[2]", "-128, 127").bytes(), [0x80, 0x7f]);
    assert_eq!(tensor("uint16", "65535").bytes(), [0xff, 0xff]);
    assert_eq!(tensor("int16", "-2").bytes(), [0xfe, 0xff]);
    assert_eq!(tensor("int32", "-1").bytes(), [0xff; 4]);
    assert_eq!(tensor("uint32", "4294967295").bytes(), [0xff; 4]);
    assert_eq!(tensor("int64", "-9223372036854775808").to_i64s(), Some(vec![i64::MIN]));
    assert_eq!(tensor("uint64", "18446744073709551615").bytes(), [0xff; 8]);
    assert_eq!(tensor("bool[3]", "1, 0, 2").bytes(), [1, 0, 2]);
    assert_eq!(tensor("string[2]", "\"a\", \"\\xff\"").string_data().unwrap()[1], b"\xff".as_slice());
    assert_eq!(tensor("float16[2]", "15360, 1.0").bytes(), [0, 0x3c, 0, 0x3c]);
    assert_eq!(tensor("bfloat16[2]", "16256, 1.0").bytes(), [0x80, 0x3f, 0x80, 0x3f]);
    assert_eq!(tensor("complex64[1]", "1, 2").len(), 1);
    assert_eq!(tensor("complex128[0]", "").len(), 0);
    assert_eq!(tensor("int4[3]", "-8, 7, -1").bytes(), [0x78, 0x0f]);
    assert_eq!(tensor("uint4[3]", "15, 1, 2").bytes(), [0x1f, 0x02]);
    assert_eq!(tensor("int2[5]", "-2, -1, 0, 1, 1").bytes(), [0b0100_1110, 1]);
    assert_eq!(tensor("uint2[2]", "3, 2").bytes(), [0b1011]);
    for ty in ["float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "float8e8m0", "uint8"] {
        assert_eq!(tensor(&format!("{ty}[2]"), "255, 1").bytes(), [255, 1]);
    }
    assert_eq!(tensor("float4e2m1[3]", "15, 1, 2").bytes(), [0x1f, 0x02]);
    for ty in ["float6e2m3", "float6e3m2"] {
        assert_eq!(tensor(&format!("{ty}[4]"), "63, 0, 1, 32").bytes(), [0b0011_1111, 0b0001_0000, 0b1000_0000]);
    }
}

#[test]
fn keeps_every_type() {
    let types = [
        "float",
        "float[]",
        "float[2,N,?,\"a b\",\"\"]",
        "seq(tensorless)",
        "seq(float[])",
        "optional(seq(int64[N]))",
        "map(string, float[2])",
        "sparse_tensor(float[4,?])",
        "sparse_tensor(float[])",
        "opaque(thing)",
        "opaque(ai.onnx.ml,thing)",
        "opaque(\"odd domain\",thing)",
        "undefined[2]",
    ];
    for ty in types.iter().filter(|ty| !ty.contains("tensorless")) {
        let model = round_trips(&format!("g ({ty} x) => (y) <{ty} z> {{ z = Neg (x) y = Neg (z) }}"));
        // Names in comments are not quoted.
        let comment = ty.replace('"', "");
        assert!(print_graph(&model).starts_with(&format!("g ({ty} x) => (y) {{\n    z = Neg (x)  # {comment}\n")));
    }
    let model = round_trips("g (x) => (x) { }");
    assert_eq!(model.graph.value(model.graph.find_value("x").unwrap()).ty, None);
    fails("g (seq(tensorless) x) => (x) { }", "line 1, column 8: `tensorless` is not a type");
    let model = round_trips("g (? x) => (x) { }");
    assert_eq!(model.graph.value(model.graph.main().inputs()[0]).ty, Some(TypeKind::Unstated.into()));
}

#[test]
fn keeps_odd_names() {
    round_trips(
        "\"\" (float \"/a/b.c\", float \"float\", float \"x\\\"y\", float \"tab\t\", \"é\", \"inf\") => (\"0\") {
            [\"label one\"] \"0\", \"\", \"float\\x0a\" = \"my-domain\".\"op::x\":\"over load\" <\"odd attr\" = 1> (\"/a/b.c\", \"float\")
            = ai.onnx.ml.NoOutput ()
            last = float (é_is_not_here, \"\")
        }"
        .replace("é_is_not_here", "\"é\"")
        .as_str(),
    );
}

#[test]
fn takes_optional_inputs_in_all_spellings() {
    for inputs in ["x, , z", "x, \"\", z", "x, '', z", "x,,z,"] {
        let model = round_trips(&format!("g (float x, float z) => (y) {{ y = Op ({inputs}) }}"));
        let node = model.graph.node(model.graph.all_nodes()[0]);
        assert_eq!(node.inputs().len(), 3);
        assert_eq!(node.input(1), None);
    }
    let model = parse("g (float x) => (y) { y = Op (,x) }").unwrap();
    assert_eq!(model.graph.node(model.graph.all_nodes()[0]).inputs().len(), 2);
}

#[test]
fn skips_comments_and_takes_attributes_after_inputs() {
    let model = round_trips("# one\ng (float x) # two <\n=> (y) { y = Op (x) <a = 1> # }\n}");
    assert_eq!(model.graph.node(model.graph.all_nodes()[0]).int("a"), Some(1));
}

#[test]
fn resolves_names_from_the_inside_out_and_in_any_order() {
    let model = round_trips(
        "g (bool c, float x) => (y) {
            y = If (c) <then_branch = a () => (x) { x = Neg (late) }, else_branch = b () => (x) { }>
            late = Exp (x)
        }",
    );
    let graph = &model.graph;
    let outer = graph.main().inputs()[1];
    let choose = graph.node(graph.nodes(ScopeId::MAIN).next().unwrap());
    assert_ne!(graph.scope(choose.subgraph("then_branch").unwrap()).outputs()[0], outer);
    assert_eq!(graph.scope(choose.subgraph("else_branch").unwrap()).outputs()[0], outer);
}

#[test]
fn an_initializer_named_like_an_input_is_its_default() {
    for text in ["g (float x = {1}) => (x) { }", "g (float x) => (x) <float x = {1}> { }"] {
        let model = round_trips(text);
        let input = model.graph.main().inputs()[0];
        assert!(model.graph.value(input).initializer().is_some());
        assert!(model.graph.constant(input).is_none());
    }
}

#[test]
fn keeps_sparse_initializers() {
    let text = "g () => (w) <
    sparse_tensor(float[3,4]) w = {float[2] {1, 2}, int64[2] {0, 7}}
> {
}
";
    assert_eq!(print_graph(&round_trips(text)), text);
}

#[test]
fn bare_graphs_get_default_versions_and_domains() {
    let model = parse("g (float x) => (y) { y = com.microsoft.Gelu (x) }").unwrap();
    assert_eq!((model.ir_version, model.opset()), (10, 21));
    assert_eq!(model.opset_of("com.microsoft"), Some(1));
    let model = parse("<opset_import: [\"\": 13]> g (float x) => (x) { }").unwrap();
    assert_eq!((model.ir_version, model.opset()), (10, 13));
}

#[test]
fn the_hash_tells_contents_apart() {
    let text = |last: &str| {
        let data = format!("g () => (w) <int8[40] w = {{{}{last}}}> {{ }}", "1,".repeat(39));
        print_graph(&parse(&data).unwrap())
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn names_what_is_wrong_and_where() {
    let abbreviated = "g () => (w) <float[9] w = [\"elements\": \"9\", \"hash\": \"00000000\"]> { }";
    fails(abbreviated, "line 1, column 27: the elements of `w` are abbreviated, print the model in full");
    let dangling = "g (float x) => (y) {\n    [n] y = Add (x, z)\n}";
    fails(dangling, "line 2, column 21: input 1 of node `n` (Add) is `z`, which nothing produces");
    fails("g (float x) => (y) { }", "line 1, column 17: output `y` of graph `g` is produced by nothing");
    fails("g (float x, float x) => (x) { }", "line 1, column 19: `x` is defined twice");
    fails("g (float x) => (x) { x = Neg (x) }", "line 1, column 22: `x` is defined twice");
    fails("g (float x) => (x) {", "line 1, column 21: expected `=`, found the end");
    fails("g (float x) (x) { }", "line 1, column 13: expected `=>`, found `(`");
    fails("", "line 1, column 1: expected the name of a graph, found the end");
    fails(
        "g () => (w) <float[3] w = {1}> { }",
        "line 1, column 27: the shape of `w` needs 3 numbers or strings, found 1",
    );
    fails("g () => (w) <int8 w = {128}> { }", "line 1, column 24: `128` is not an element of int8");
    fails("g () => (w) <float w = {1e39}> { }", "line 1, column 25: `1e39` is not a float");
    fails(
        "g () => (w) <float[N] w = {1}> { }",
        "line 1, column 27: the data of a tensor needs an element type and a shape of known sizes",
    );
    fails(
        "g () => () { = Op <a = []> () }",
        "line 1, column 24: an empty list needs an attribute type, as in `axes: ints = []`",
    );
    fails(
        "g () => () { = Op <a = [1, \"b\"]> () }",
        "line 1, column 28: expected a value of attribute type int, found string",
    );
    fails("g () => () { = Op <a: int = 1.5> () }", "line 1, column 29: `1.5` is not a 64-bit integer");
    fails("g () => () { = Op <a = \"b> () }", "line 1, column 24: the string is not closed");
    fails("<version: 3> g () => () { }", "line 1, column 2: `version` is not a header field");
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| {
        let open = "= Op <b = g () => () { ".repeat(depth);
        format!("g () => () {{ {open}{} }}", "}> () ".repeat(depth))
    };
    assert!(parse(&nested(60)).is_ok());
    assert!(parse(&nested(10_000)).unwrap_err().message.contains("nested deeper"));
    let types = format!("g ({}float{} x) => (x) {{ }}", "seq(".repeat(5_000), ")".repeat(5_000));
    assert!(parse(&types).unwrap_err().message.contains("nested deeper"));
    let sparse = format!("g () => (w) <sparse_tensor(float) w = {}", "{sparse_tensor(float) ".repeat(100_000));
    assert!(parse(&sparse).unwrap_err().message.contains("expected a dense tensor"));
}

#[test]
fn no_text_panics() {
    let seed = print_full(&parse(include_str!("tests.onnxtxt")).unwrap());
    let mut state = 7u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let pieces = [
        "<", ">", "(", ")", "{", "}", "[", "]", "\"", "\\", "=", "=>", "@", ":", ",", "float", "nan(", "é", "-", "#",
        "9", "\0",
    ];
    for _ in 0..20_000 {
        let mut text: Vec<char> = seed.chars().collect();
        for _ in 0..1 + next(4) {
            let at = next(text.len());
            match next(3) {
                0 => text.truncate(at.max(1)),
                1 => _ = text.remove(at),
                _ => _ = text.splice(at..at, pieces[next(pieces.len())].chars()),
            }
            if text.is_empty() {
                break;
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(model) = parse(&text) {
            let full = print_full(&model);
            let again = parse(&full).unwrap_or_else(|error| panic!("{error}\n{full}"));
            assert_eq!(print_full(&again), full);
        }
    }
}
