//! Small graphs and what is inferred about them.

use super::*;
use lathe_ir::text;

/// Every output of the graph: `float[2,n + 1]`, with its elements where they are known.
fn outputs(model: &str) -> Vec<String> {
    let model = text::parse(model).unwrap();
    let facts = Facts::infer(&model);
    model.graph.main().outputs().iter().map(|&v| describe(&facts, v)).collect()
}

fn describe(facts: &Facts, value: ValueId) -> String {
    let elem = facts.elem(value).map_or("?", DataType::name);
    let Some(shape) = facts.shape(value) else { return elem.to_owned() };
    let unnamed = |d: &DimExpr| !d.all_symbols(&|s| matches!(s, Symbol::Named(_)));
    let size = |d: &DimExpr| if unnamed(d) { "?".to_owned() } else { d.to_string() };
    let mut text = format!("{elem}[{}]", shape.iter().map(size).collect::<Vec<_>>().join(","));
    if let Some(contents) = facts.contents(value)
        && contents.elements().iter().any(|e| e.as_ref().is_some_and(|e| !unnamed(e)))
    {
        let element = |e: &Option<DimExpr>| e.as_ref().map_or("?".to_owned(), size);
        text += &format!(" {{{}}}", contents.elements().iter().map(element).collect::<Vec<_>>().join(","));
    }
    text
}

/// The outputs of a graph with these inputs, operator set and nodes; the outputs are called `a`, `b`, ….
fn infer(opset: i64, inputs: &str, count: usize, nodes: &str) -> Vec<String> {
    infer_with(opset, inputs, "", count, nodes)
}

fn infer_with(opset: i64, inputs: &str, constants: &str, count: usize, nodes: &str) -> Vec<String> {
    let names: Vec<String> = ('a'..).take(count).map(|c| format!("? {c}")).collect();
    let constants = if constants.is_empty() { String::new() } else { format!("<{constants}>") };
    outputs(&format!(
        "<ir_version: 10, opset_import: [\"\" : {opset}, \"com.microsoft\" : 1]>
         g ({inputs}) => ({}) {constants} {{ {nodes} }}",
        names.join(", ")
    ))
}

#[test]
fn follows_a_reshape_through_shape_arithmetic() {
    let found = infer_with(
        17,
        "float[batch,seq,768] x",
        "int64 zero = {0}, int64 one = {1}, int64[1] front = {0}, int64[1] heads = {12}, int64[1] rest = {-1}",
        3,
        "s = Shape (x)
         n = Gather <axis = 0> (s, zero)
         m = Gather <axis = 0> (s, one)
         un = Unsqueeze (n, front)
         um = Unsqueeze (m, front)
         b = Concat <axis = 0> (un, um, heads, rest)
         a = Reshape (x, b)
         c = Transpose <perm = [0, 2, 1, 3]> (a)",
    );
    assert_eq!(found, ["float[batch,seq,12,64]", "int64[4] {batch,seq,12,-1}", "float[batch,12,seq,64]"]);
}

#[test]
fn computes_with_contents() {
    let found = infer_with(
        17,
        "float[n,3] x",
        "int64[1] two = {2}, int64[2] ones = {1, 1}, int64[2] free = {-1, 5}, int64[1] minus = {-1}, float[1] half = {2}",
        7,
        "s = Shape (x)
         a = Mul (s, two)
         b = Div (a, two)
         taken = Equal (free, minus)
         c = Where (taken, ones, free)
         d = ReduceProd <keepdims = 0> (s)
         real = Cast <to = 1> (a)
         smaller = Div (real, half)
         floored = Floor (smaller)
         e = Cast <to = 7> (floored)
         f = Max (s, ones)
         g = Mod (s, two)",
    );
    let expected = [
        "int64[2] {2*n,6}",
        "int64[2] {n,3}",
        "int64[2] {1,5}",
        "int64[] {3*n}",
        "int64[2] {n,3}",
        "int64[2] {max(1, n),3}",
        "int64[2] {n - 2*floor(n/2),1}",
    ];
    assert_eq!(found, expected);
}

#[test]
fn broadcasts() {
    let both = infer(
        17,
        "float[n,1,5] x, float[4,1] y, float[n] z, float[m] w",
        3,
        "a = Add (x, y) b = Mul (z, w) c = Sub (w, z)",
    );
    assert_eq!(both[0], "float[n,4,5]");
    assert_eq!(both[1], both[2]);
    // What broadcasts with a size other than 1 is that size or 1.
    assert_eq!(infer(17, "float[n] x, float[3] y", 1, "a = Add (x, y)"), ["float[3]"]);
    assert_eq!(infer(17, "float[2] x, float[3] y", 1, "a = Add (x, y)"), ["float[?]"]);
    // Before opset 7 the second operand never widens the first.
    assert_eq!(infer(6, "float[n,3] x, float[3] y", 1, "a = Add <broadcast = 1> (x, y)"), ["float[n,3]"]);
}

#[test]
fn placeholder_names_are_not_equal_sizes() {
    let found = infer(17, r#"float["?","?"] x, float["-1",None] y"#, 2, "a = Relu (x) b = Relu (y)");
    assert_eq!(found, ["float[?,?]", "float[?,?]"]);
    let model = text::parse(r#"g (float["?","?"] x) => (float y) { y = Transpose (x) }"#).unwrap();
    let facts = Facts::infer(&model);
    let find = |name| model.graph.find_value(name).unwrap();
    assert!(!facts.same_shape(find("x"), find("y")));
}

#[test]
fn slices_without_guessing() {
    let all = "int64[1] zero = {0}, int64[1] one = {1}, int64[1] minus = {-1}, int64[1] two = {2},
        int64[1] far = {9223372036854775807}, int64[1] back = {-9223372036854775808}";
    let slice = |inputs: &str, args: &str| infer_with(17, inputs, all, 1, &format!("a = Slice (x, {args})"))[0].clone();
    assert_eq!(slice("float[n] x", "zero, far, zero"), "float[n]");
    assert_eq!(slice("float[n] x", "one, far, zero"), "float[max(0, n - 1)]");
    assert_eq!(slice("float[n] x", "minus, far, zero"), "float[min(1, n)]");
    assert_eq!(slice("float[n] x", "zero, far, zero, two"), "float[ceil(n/2)]");
    assert_eq!(slice("float[n] x", "minus, back, zero, minus"), "float[n]");
    assert_eq!(slice("float[n] x", "one, back, zero, minus"), "float[?]");
    assert_eq!(slice("float[7] x", "one, minus, zero, two"), "float[3]");
    assert_eq!(slice("float[7] x", "minus, zero, zero, minus"), "float[6]");
    assert_eq!(slice("float[7] x", "far, back, zero, minus"), "float[7]");
    assert_eq!(slice("float[7,n] x, int64[1] e", "zero, e, zero"), "float[?,n]");
    assert_eq!(slice("float[7,n] x, int64[1] e", "zero, one, e"), "float[?,?]");
    assert_eq!(infer(9, "float[5,n] x", 1, "a = Slice <starts = [1], ends = [3]> (x)"), ["float[2,n]"]);
}

#[test]
fn reshapes_conservatively() {
    let reshape = |inputs: &str, shape: &str, node: &str| {
        infer_with(17, inputs, &format!("int64[2] shape = {shape}"), 1, node)[0].clone()
    };
    assert_eq!(reshape("float[n,6] x", "{0, -1}", "a = Reshape (x, shape)"), "float[n,6]");
    assert_eq!(reshape("float[n,6] x", "{-1, 3}", "a = Reshape (x, shape)"), "float[2*n,3]");
    assert_eq!(reshape("float[n,6] x", "{-1, 4}", "a = Reshape (x, shape)"), "float[n + floor(n/2),4]");
    assert_eq!(reshape("float[0,6] x", "{-1, 0}", "a = Reshape <allowzero = 1> (x, shape)"), "float[?,0]");
    assert_eq!(reshape("float x", "{1, 1}", "a = Reshape (x, shape)"), "float[1,1]");
    assert_eq!(infer(17, "float[4] x, int64[3] s", 1, "a = Reshape (x, s)"), ["float[?,?,?]"]);
    assert_eq!(infer(17, "float[4] x, int64[k] s", 1, "a = Reshape (x, s)"), ["float"]);
    assert_eq!(infer(1, "float[4,n] x", 1, "a = Reshape <shape = [2, -1]> (x)"), ["float[2,2*n]"]);
}

#[test]
fn respects_operator_set_versions() {
    assert_eq!(infer(11, "float[1,n] x", 1, "a = Squeeze <axes = [0]> (x)"), ["float[n]"]);
    assert_eq!(infer(13, "float[1,n] x", 1, "a = Squeeze (x)"), ["float"]);
    assert_eq!(infer(13, "float[1,3] x", 1, "a = Squeeze (x)"), ["float[3]"]);
    assert_eq!(infer(11, "float[n] x", 1, "a = Unsqueeze <axes = [0, -1]> (x)"), ["float[1,n,1]"]);
    assert_eq!(infer(11, "float[n,4] x", 1, "a = ReduceSum <axes = [1], keepdims = 0> (x)"), ["float[n]"]);
    // The attribute means nothing once axes are an input; without them everything is reduced.
    assert_eq!(infer(13, "float[n,4] x", 1, "a = ReduceSum <keepdims = 0> (x)"), ["float[]"]);
    assert_eq!(infer(13, "float[n,4] x, int64[1] i", 1, "a = ReduceSum <keepdims = 0> (x, i)"), ["float[?]"]);
    assert_eq!(infer(13, "float[n,4] x, int64[k] i", 1, "a = ReduceSum <keepdims = 0> (x, i)"), ["float"]);
    assert_eq!(infer(18, "float[n,4] x", 1, "a = ReduceMean <noop_with_empty_axes = 1> (x)"), ["float[n,4]"]);
    assert_eq!(infer(11, "float[6,n] x", 2, "a, b = Split <split = [2, 4]> (x)"), ["float[2,n]", "float[4,n]"]);
    assert_eq!(infer(18, "float[7,n] x", 2, "a, b = Split <num_outputs = 2> (x)"), ["float[4,n]", "float[3,n]"]);
    assert_eq!(infer(2, "float[n,4] x", 1, "a = Pad <pads = [0, 1, 2, 3]> (x)"), ["float[n + 2,8]"]);
    assert_eq!(infer(9, "float[n] x", 2, "a, b = Dropout (x)")[1], "float[n]");
    assert_eq!(infer(10, "float[n] x", 2, "a, b = Dropout (x)")[1], "bool[n]");
    assert_eq!(infer(9, "float[n,9] x", 2, "a, b = TopK <k = 4> (x)"), ["float[n,4]", "int64[n,4]"]);
}

#[test]
fn sizes_convolutions_and_pools() {
    let w = "float[8,3,3,3] w";
    let conv = |inputs: &str, attributes: &str| {
        infer(17, &format!("{inputs}, {w}"), 1, &format!("a = Conv <{attributes}> (x, w)"))[0].clone()
    };
    assert_eq!(conv("float[n,3,h,224] x", "pads = [1, 1, 1, 1]"), "float[n,8,h,224]");
    assert_eq!(conv("float[n,3,h,224] x", "pads = [1, 1, 1, 1], strides = [2, 2]"), "float[n,8,ceil(h/2),112]");
    assert_eq!(conv("float[n,3,h,225] x", "auto_pad = \"SAME_UPPER\", strides = [2, 2]"), "float[n,8,ceil(h/2),113]");
    assert_eq!(conv("float[n,3,h,10] x", "dilations = [1, 2]"), "float[n,8,h - 2,6]");
    let pool = |size: &str, attributes: &str| {
        infer(17, &format!("float[1,2,{size}] x"), 1, &format!("a = MaxPool <kernel_shape = [3], {attributes}> (x)"))[0]
            .clone()
    };
    assert_eq!(pool("10", "strides = [2], ceil_mode = 1"), "float[1,2,5]");
    assert_eq!(pool("h", "strides = [2], ceil_mode = 1"), "float[1,2,floor(h/2)]");
    // The last window would start in the padding, which runtimes treat differently.
    assert_eq!(pool("2", "strides = [3], pads = [1, 1], ceil_mode = 1"), "float[1,2,?]");
    assert_eq!(pool("h", "strides = [3], pads = [1, 1], ceil_mode = 1"), "float[1,2,?]");
}

#[test]
fn merges_branches() {
    let nodes = |second: &str| {
        format!(
            "a = If (c) <
                then_branch = t () => (p) {{ p = Relu (x) }},
                else_branch = e () => (q) {{ q = {second} (x) }}>"
        )
    };
    let found = |second: &str| infer(17, "bool c, float[n,4] x", 1, &nodes(second))[0].clone();
    assert_eq!(found("Neg"), "float[n,4]");
    assert_eq!(found("NonZero"), "?[?,?]");
    assert_eq!(found("Transpose <perm = [1, 0]>"), "float[?,?]");
    assert_eq!(found("Custom"), "?");
    let chosen = infer_with(17, "float[n,4] x", "bool c = {1}", 1, &nodes("NonZero"));
    assert_eq!(chosen, ["float[n,4]"]);
    // Sizes that only the branches know stay inside them.
    let inner = infer(
        17,
        "bool c, float[n] x",
        2,
        "a, b = If (c) <
            then_branch = t () => (p, p2) { p = NonZero (x) p2 = NonZero (x) },
            else_branch = e () => (q, q2) { q = NonZero (x) q2 = NonZero (x) }>",
    );
    assert_eq!(inner, ["int64[1,?]", "int64[1,?]"]);
}

#[test]
fn widens_what_a_loop_carries() {
    let body = "a, b, c = Loop (trips, yes, x, x) <body = l (int64 i, bool go, float[n,2] grows, float[n,2] stays)
        => (bool on, float more, float same, float each) {
            on = Identity (go)
            more = Concat <axis = 0> (grows, grows)
            same = Relu (stays)
            each = Relu (same)
        }>";
    let found = infer(17, "int64 trips, bool yes, float[n,2] x", 3, body);
    assert_eq!(found, ["float[?,2]", "float[n,2]", "float[?,?,2]"]);
    // Without a condition, and with the body never stopping, the trip count is the number of rounds.
    let counted = "c = Loop (trips, , x) <body = l (int64 i, bool go, float[n,2] stays)
        => (bool on, float same, float each) {
            on = Constant <value = bool {1}> ()
            same = Relu (stays)
            each = Relu (same)
        }>";
    let counted = counted.replace("c = Loop", "a, b = Loop");
    let found = infer_with(17, "float[n,2] x", "int64 trips = {3}", 2, &counted);
    assert_eq!(found, ["float[n,2]", "float[3,n,2]"]);
}

#[test]
fn contents_do_not_survive_a_loop_that_changes_them() {
    let nodes = "a = Loop (trips, yes, start) <body = l (int64 i, bool go, int64[1] at) => (bool on, int64[1] next) {
            on = Identity (go)
            next = Add (at, one)
        }>
        b = Expand (x, a)";
    let found =
        infer_with(17, "int64 trips, bool yes, float[1] x", "int64[1] start = {4}, int64[1] one = {1}", 2, nodes);
    assert_eq!(found, ["int64[1]", "float[?]"]);
}

#[test]
fn infers_through_local_functions() {
    let found = outputs(
        r#"<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
        g (float[n,6] x) => (? y, ? z) {
            y = local.halve <axis = 1> (x)
            z = local.halve (x)
        }
        <domain: "local", opset_import: ["" : 18]>
        halve <axis = 0> (v) => (w) {
            w, u = Split <axis: int = @axis, num_outputs = 2> (v)
        }"#,
    );
    assert_eq!(found, ["float[n,3]", "float[ceil(n/2),6]"]);
}

#[test]
fn recursion_of_functions_ends() {
    let found = outputs(
        r#"<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
        g (float[n] x) => (? y) { y = local.again (x) }
        <domain: "local", opset_import: ["" : 18, "local" : 1]>
        again (v) => (w) { a = local.again (v) b = local.again (v) w = Add (a, b) }"#,
    );
    assert_eq!(found, ["?"]);
}

#[test]
fn unknown_operators_are_unknown() {
    assert_eq!(infer(17, "float[n] x", 2, "a = Mystery (x) b = Relu (a)"), ["?", "?"]);
    assert_eq!(infer(17, "float[n] x", 1, "a = other.Relu (x)"), ["?"]);
}

#[test]
fn stated_types_fill_gaps_and_never_win() {
    let found = outputs(
        "g (float[n,4] x) => (float[m,5] a, float[k,7] b) <float[n,9] u> {
            a = Relu (x)
            u = Mystery (x)
            b = Relu (u)
        }",
    );
    assert_eq!(found, ["float[n,4]", "float[?,9]"]);
}

#[test]
fn nodes_may_stand_in_any_order() {
    assert_eq!(infer(17, "float[n] x", 2, "b = Neg (a) a = Relu (x)"), ["float[n]", "float[n]"]);
}

#[test]
fn equal_unknown_sizes_are_recognized() {
    let model = text::parse(
        "g (float[n,4] x, bool[n] keep) => (float y, float z, float w) {
            y = Compress <axis = 0> (x, keep)
            z = Relu (y)
            w = Compress <axis = 0> (x, keep)
        }",
    )
    .unwrap();
    let facts = Facts::infer(&model);
    let find = |name| model.graph.find_value(name).unwrap();
    assert!(facts.same_shape(find("y"), find("z")));
    assert!(!facts.same_shape(find("y"), find("w")));
}

#[test]
fn follows_contrib_operators() {
    let ms = |inputs: &str, count: usize, node: &str| infer(17, inputs, count, node);
    assert_eq!(
        ms(
            "float[b,s,64] x, uint8[96,2,16] w, float[192] k",
            1,
            "a = com.microsoft.MatMulNBits <K = 64, N = 96, bits = 4, block_size = 32> (x, w, k)"
        ),
        ["float[b,s,96]"]
    );
    assert_eq!(
        ms("float[b,s,64] x, float[b,t,64] w", 1, "a = com.microsoft.FusedMatMul <transB = 1> (x, w)"),
        ["float[b,s,t]"]
    );
    assert_eq!(
        ms(
            "float[b,s,64] q, float[b,s,32] k",
            2,
            "a, b = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, k)"
        ),
        ["float[b,s,64]", "float[b,2,?,16]"]
    );
}

#[test]
fn updates_facts_for_a_new_node() {
    let mut model = text::parse("g (float[n,4] x) => (float[n,4] y) { y = Relu (x) }").unwrap();
    let mut facts = Facts::infer(&model);
    let x = model.graph.find_value("x").unwrap();
    let shape = model.graph.add_initializer(ScopeId::MAIN, "shape", lathe_ir::Tensor::int64s(&[-1, 2]));
    let new = model.graph.append(ScopeId::MAIN, Node::new("Reshape"), &[x, shape], "new");
    facts.update(&model.graph, &model.opsets, &model.functions, model.graph.producer(new).unwrap());
    assert_eq!(describe(&facts, new), "float[2*n,2]");
}

#[test]
fn hostile_graphs_stay_small() {
    let doubling = |op: &str| {
        let mut model =
            text::parse("g (int64[1,1] x, int64[1099511627776] s) => (float y) { y = Reshape (x, s) }").unwrap();
        let mut last = model.graph.find_value("x").unwrap();
        for _ in 0..2_000 {
            let inputs = if op == "Optional" { vec![last] } else { vec![last, last] };
            last = model.graph.append(ScopeId::MAIN, Node::new(op), &inputs, "v");
        }
        let facts = Facts::infer(&model);
        (describe(&facts, last), facts.ty(last))
    };
    assert_eq!(doubling("Gather").0, "int64");
    assert_eq!(doubling("Mul").0, "int64[1,1]");
    _ = doubling("Optional");
    assert_eq!(
        infer(17, "float[1099511627776,0] x, int64[0] i", 1, "a = Gather <axis = 1> (x, i)"),
        ["float[1099511627776,0]"]
    );
    assert_eq!(infer(17, "int64[1099511627776,0] x", 1, "a = Concat <axis = 1> (x, x)"), ["int64[1099511627776,0]"]);
}

#[test]
fn a_long_chain_takes_linear_time() {
    let mut model = text::parse("g (float[n,4] x) => (float y) { y = Relu (x) }").unwrap();
    let mut last = model.graph.find_value("x").unwrap();
    for _ in 0..50_000 {
        last = model.graph.append(ScopeId::MAIN, Node::new("Relu"), &[last], "v");
    }
    let start = std::time::Instant::now();
    let facts = Facts::infer(&model);
    assert_eq!(describe(&facts, last), "float[n,4]");
    // Generous: a quadratic walk would take minutes.
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn a_dimension_named_by_a_number_is_that_number() {
    let graph =
        |x: &str| format!("g (float{x} x) => (float y) <float[8,3,8,8] w> {{ y = Conv <strides = [8, 8]> (x, w) }}");
    let w = format!("float[8,3,8,8] w = {{{}}}", vec!["0"; 8 * 3 * 64].join(","));
    let found = |x: &str| outputs(&graph(x).replace("float[8,3,8,8] w", &w))[0].clone();
    assert_eq!(found(r#"[s99,"3","32","32"]"#), "float[s99,8,4,4]");
    assert_eq!(found(r#"["08","3","32",w]"#), "float[8,8,4,floor(w/8)]");
    // Past 64 bits it is only a name, and one that begins with a digit tells nothing.
    assert_eq!(found(r#"["99999999999999999999",3,32,"3d"]"#), "float[?,8,4,?]");
}

#[test]
fn dimensions_named_by_arithmetic_are_what_they_say() {
    let found = infer(
        17,
        r#"float[batch,"past + seq",4] mask, float[batch,past,4] old, float[batch,seq,4] new, float["2*seq","a-b"] odd"#,
        4,
        "a = Concat <axis = 1> (old, new) b = Equal (a, mask) c = Transpose (odd) s = Shape <start = 1, end = 2> (mask) d = Identity (s)",
    );
    assert_eq!(
        found,
        ["float[batch,past + seq,4]", "bool[batch,past + seq,4]", "float[a-b,2*seq]", "int64[1] {past + seq}"]
    );
}

#[test]
fn what_is_added_to_a_row_of_positions_has_as_many_rows() {
    let rows = |start: &str, end: &str, table: &str| {
        let constants = format!(
            "float[1,512,8] t = {{{}}}, float[1,1,8] u = {{{}}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}",
            vec!["0"; 4096].join(","),
            ["0"; 8].join(",")
        );
        infer_with(
            17,
            "float[B,S,8] x, int64[1] k",
            &constants,
            3,
            &format!(
                "n = Shape <start = 1, end = 2> (x) m = Add (n, two) p = Slice ({table}, {start}, {end}, one)
                 a = Identity (p) b = Add (x, p) c = Concat <axis = 2> (p, x)"
            ),
        )
    };
    assert_eq!(rows("zero", "n", "t"), ["float[1,min(512, S),8]", "float[B,S,8]", "float[1,S,16]"]);
    // A longer stretch than S may be 1 row where S is more.
    assert_eq!(rows("zero", "m", "t")[1], "float[B,broadcast(S, min(512, S + 2)),8]");
    // From another start on, the table may end before S rows.
    assert_eq!(rows("two", "m", "t"), ["float[1,min(510, S),8]", "float[B,S,8]", "float[1,S,16]"]);
    assert_eq!(rows("zero", "n", "u")[1], "float[B,S,8]");
    assert_eq!(rows("zero", "k", "t")[1], "float[B,?,8]");
}

#[test]
fn a_size_of_a_value_that_is_always_computed_is_not_negative() {
    let w = format!("float[8,3,5] w = {{{}}}, int64 zero = {{0}}, int64 one = {{1}}", ["0"; 120].join(","));
    let nodes = "q = Conv (x, w) s = Shape <start = 2> (q) n = Squeeze (s) r = Range (zero, n, one) e = Expand (one, s)
                 a = Identity (r) b = ConstantOfShape (s) c = Slice (q, first, s, along) d = Add (e, r)";
    let w = format!("{w}, int64[1] first = {{0}}, int64[1] along = {{2}}");
    let found = infer_with(17, "float[B,3,t] x", &w, 4, nodes);
    assert_eq!(found, ["int64[t - 4]", "float[t - 4]", "float[B,8,t - 4]", "int64[t - 4]"]);
    // In a branch that need not run, nothing follows.
    let branch = "y = If (k) <then_branch = f () => (float[?,8,?] p) { p = Conv (x, w) }, else_branch = h () => (float[?,8,?] q) { q = Relu (z) }>";
    let model = format!("<ir_version: 8, opset_import: [\"\" : 17]> g (bool k, float[B,3,t] x, float[B,8,t] z) => (float y, ? a) <{w}, int64 four = {{4}}> {{
        {branch}
        sx = Shape <start = 2> (x)
        n = Squeeze (sx)
        m = Sub (n, four)
        a = Range (zero, m, one)
    }}");
    assert_eq!(outputs(&model)[1], "int64[max(0, t - 4)]");
}

#[test]
fn whole_division_rounds_towards_0() {
    let found = infer_with(
        17,
        "float[h,w] x",
        "int64 minus = {-1}, int64 low = {-9}, int64 eight = {8}",
        3,
        "sh = Shape <start = 0, end = 1> (x) m = Add (sh, minus) a = Div (m, eight) l = Add (sh, low) b = Div (l, eight) c = Div (sh, eight)",
    );
    assert_eq!(found, ["int64[1] {floor(max(0, h - 1)/8)}", "int64[1]", "int64[1] {floor(h/8)}"]);
}

#[test]
fn what_is_found_among_ones_is_everything() {
    let found = infer(
        17,
        "float[n,m] x",
        4,
        "s = Shape (x) f = Shape <start = 0, end = 1> (x)
         o = ConstantOfShape <value = int64[1] {1}> (f) a = NonZero (o) p = ConstantOfShape <value = float[1] {0.5}> (s) b = NonZero (p)
         z = ConstantOfShape <value = int64[1] {0}> (f) c = NonZero (z) d = NonZero (x)",
    );
    assert_eq!(found, ["int64[1,n]", "int64[2,m*n]", "int64[1,?]", "int64[2,?]"]);
}
