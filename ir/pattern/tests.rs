use super::*;
use crate::text;

/// Matches `pattern` at the node that makes `y`, and says what its names stand for.
fn find(pattern: &str, graph: &str) -> Option<String> {
    find_with(Pattern::parse(pattern), graph)
}

fn find_with(pattern: Pattern, graph: &str) -> Option<String> {
    let model = text::parse(&format!(
        "<opset_import: [\"\" : 18]> g (float[N,4] x, float[N,4] z, float[4] w) => (float[N,4] y) <
            float half = {{0.5}}, float two = {{2}}, float three = {{3}}, float one = {{1}}, float minus = {{-1}},
            float root = {{1.4142135}}, float inverse = {{0.70710677}}, float[1,1] wide = {{0.5}}, int64 square = {{2}},
            float16 half16 = {{14336}}> {{ {graph} }}"
    ))
    .unwrap();
    let graph = &model.graph;
    let root = graph.producer(graph.find_value("y").unwrap()).unwrap();
    assert!(
        pattern.roots().iter().any(|(_, op)| *op == graph.node(root).op_type) || pattern.find(graph, root).is_none()
    );
    let found = pattern.find(graph, root)?;
    assert_eq!(found.nodes()[0], root);
    let mut said = Vec::new();
    for name in pattern.names() {
        if let Some(value) = found.value(name) {
            said.push(format!("{name}={}", graph.value(value).name));
        }
        if let Some(number) = found.number(name) {
            said.push(format!("{name}={number}"));
        }
        for node in found.labelled(name) {
            said.push(format!("{name}:{}", graph.value(graph.node(node).output(0).unwrap()).name));
        }
    }
    Some(said.join(" "))
}

const GELU: &str = "Mul*(x, 0.5, Add*(Erf(Mul*(x, 0.7071067811865476)), 1))";

#[test]
fn matches_commutative_operators_either_way_round() {
    let graph = "e = Erf (x) s = Mul (half, x) y = Mul (s, e)";
    let found = find("out: Mul(Erf(x), inner: Mul(x, 0.5))", graph);
    assert_eq!(found.unwrap(), "inner:s out:y x=x");
}

#[test]
fn needs_the_same_value_for_the_same_name() {
    let graph = "e = Erf (x) s = Mul (half, x) y = Mul (s, e)";
    assert_eq!(find("Mul(Mul(x, 0.5), x)", graph), None);
    assert_eq!(find("Mul(Mul(x, 0.25), _)", graph), None);
    assert_eq!(find("Mul*(x, 0.5, Erf(x), x)", "e = Erf (x) s = Mul (half, x) t = Mul (s, e) y = Mul (t, z)"), None);
}

#[test]
fn skips_optional_nodes() {
    let graph = "e = Erf (x) s = Mul (half, x) y = Mul (s, e)";
    assert_eq!(find("Mul(c: Cast?(Erf(x)), Mul(Cast?(x), _))", graph).unwrap(), "x=x");
    let graph = "e = Erf (x) c = Cast <to = 1> (e) y = Mul (c, x)";
    assert_eq!(find("Mul(c: Cast?(Erf(x)), x)", graph).unwrap(), "c:c x=x");
}

#[test]
fn a_product_has_any_order_and_association() {
    let argument = ["a = Div (x, root)", "a = Mul (inverse, x)"];
    let gate = "e = Erf (a) g = Add (one, e)";
    let products = [
        "p = Mul (x, g) y = Mul (half, p)",
        "p = Mul (half, g) y = Mul (p, x)",
        "p = Mul (x, wide) y = Mul (g, p)",
        "p = Div (x, two) y = Mul (p, g)",
        "p = Mul (x, g) y = Div (p, two)",
        "p = Div (g, two) y = Mul (x, p)",
        "p = Div (two, g) y = Div (x, p)",
        "p = Reciprocal (two) q = Mul (half, x) y = Mul (g, q)",
        "p = Neg (x) q = Neg (g) r = Mul (p, half) y = Mul (r, q)",
    ];
    for argument in argument {
        for product in products {
            let graph = format!("{argument} {gate} {product}");
            assert_eq!(find(GELU, &graph).as_deref(), Some("x=x"), "{graph}");
        }
    }
}

#[test]
fn other_numbers_and_factors_do_not_match() {
    let gate = "a = Div (x, root) e = Erf (a) g = Add (one, e)";
    for other in [
        "p = Mul (x, g) y = Mul (p, two)",
        "p = Mul (x, g) y = Div (p, half)",
        "p = Neg (x) q = Mul (p, half) y = Mul (q, g)",
        "p = Mul (z, g) y = Mul (half, p)",
        "p = Mul (x, g) q = Mul (half, p) y = Mul (q, z)",
        "y = Mul (g, x)",
        "p = Mul (x, x) q = Mul (half, p) y = Mul (q, g)",
        "p = Add (x, g) y = Mul (half, p)",
    ] {
        assert_eq!(find(GELU, &format!("{gate} {other}")), None, "{other}");
    }
    for gate in [
        "a = Div (x, two) e = Erf (a) g = Add (one, e)",
        "a = Div (root, x) e = Erf (a) g = Add (one, e)",
        "a = Div (x, root) e = Erf (a) g = Sub (one, e)",
        "a = Div (x, root) e = Erf (a) g = Add (two, e)",
    ] {
        assert_eq!(find(GELU, &format!("{gate} p = Mul (x, g) y = Mul (p, half)")), None, "{gate}");
    }
}

#[test]
fn powers_are_read_in_every_spelling() {
    let pattern = "Mul*(x, Pow(Add(z, w), -0.5))";
    for spelling in [
        "r = Sqrt (s) y = Div (x, r)",
        "r = Sqrt (s) i = Reciprocal (r) y = Mul (i, x)",
        "r = Sqrt (s) i = Div (one, r) y = Mul (i, x)",
        "r = Reciprocal (s) i = Sqrt (r) y = Mul (x, i)",
        "r = Div (one, s) i = Sqrt (r) y = Mul (x, i)",
        "r = Pow (s, half) y = Div (x, r)",
        "m = Neg (half) r = Sqrt (s) i = Pow (r, minus) y = Mul (x, i)",
    ] {
        let graph = format!("s = Add (z, w) {spelling}");
        assert_eq!(find(pattern, &graph).as_deref(), Some("w=w x=x z=z"), "{spelling}");
    }
    for other in ["r = Sqrt (s) y = Mul (x, r)", "y = Div (x, s)", "r = Sqrt (s) i = Sqrt (r) y = Div (x, i)"] {
        assert_eq!(find(pattern, &format!("s = Add (z, w) {other}")), None, "{other}");
    }
    for square in ["y = Mul (x, x)", "y = Pow (x, two)", "y = Pow (x, square)", "n = Neg (x) y = Mul (n, n)"] {
        assert_eq!(find("Pow*(x, 2)", square).as_deref(), Some(if square.starts_with('n') { "x=n" } else { "x=x" }));
    }
    for cube in ["y = Pow (x, three)", "s = Mul (x, x) y = Mul (x, s)", "s = Pow (x, two) y = Mul (s, x)"] {
        assert_eq!(find("Pow*(x, 3)", cube).as_deref(), Some("x=x"), "{cube}");
    }
    assert_eq!(find("Pow*(x, 3)", "s = Mul (x, x) y = Mul (s, s)"), None);
}

#[test]
fn roots_do_not_forget_signs() {
    // √(x²) is |x|, and (√x)² is not a number where x is negative.
    assert_eq!(find("Mul*(x, 2)", "s = Mul (x, x) r = Sqrt (s) y = Mul (r, two)").unwrap(), "x=r");
    assert_eq!(find("Mul*(Pow(x, 1), Erf(x))", "s = Sqrt (x) q = Mul (s, s) e = Erf (x) y = Mul (q, e)"), None);
    assert_eq!(find("Mul*(Pow(x, -0.5), Erf(x))", "s = Mul (x, minus) r = Sqrt (s) e = Erf (x) y = Div (e, r)"), None);
}

#[test]
fn sums_have_signs_and_numbers() {
    let pattern = "Add*(x, -Erf(z), 1)";
    for sum in [
        "a = Sub (x, e) y = Add (a, one)",
        "a = Sub (one, e) y = Add (x, a)",
        "a = Sub (e, one) y = Sub (x, a)",
        "n = Neg (e) a = Add (n, half) b = Add (a, x) y = Add (b, half)",
    ] {
        assert_eq!(find(pattern, &format!("e = Erf (z) {sum}")).as_deref(), Some("x=x z=z"), "{sum}");
    }
    for other in ["a = Add (x, e) y = Add (a, one)", "a = Sub (x, e) y = Sub (a, one)", "y = Sub (x, e)"] {
        assert_eq!(find(pattern, &format!("e = Erf (z) {other}")), None, "{other}");
    }
}

#[test]
fn tells_a_number() {
    let pattern = "Mul*(x, Sigmoid(Mul*(x, #alpha)))";
    assert_eq!(find(pattern, "s = Sigmoid (x) y = Mul (x, s)").unwrap(), "alpha=1 x=x");
    assert_eq!(find(pattern, "a = Mul (x, three) s = Sigmoid (a) y = Mul (x, s)").unwrap(), "alpha=3 x=x");
    assert_eq!(find(pattern, "a = Div (x, two) b = Neg (a) s = Sigmoid (b) y = Mul (x, s)").unwrap(), "alpha=-0.5 x=x");
    assert_eq!(find(pattern, "a = Mul (x, w) s = Sigmoid (a) y = Mul (x, s)"), None);
}

#[test]
fn a_name_is_no_number_that_changes_nothing() {
    let graph = "r = Sqrt (z) i = Div (one, r) y = Mul (x, i)";
    assert_eq!(find("Mul*(x, Pow(z, -0.5), scale)", graph), None);
    assert_eq!(find("Mul*(x, Pow(z, -0.5), scale)", &graph.replace("one", "two")).unwrap(), "scale=two x=x z=z");
    assert_eq!(
        find("Mul*(x, Pow(z, -0.5), scale)", &format!("{} y = Mul (p, w)", graph.replace("y =", "p ="))).unwrap(),
        "scale=w x=x z=z"
    );
}

#[test]
fn takes_the_first_alternative_that_fits() {
    let pattern = "Mul((Neg(x) | Erf(x) | x), (Add|Sub(x, w) | z))";
    assert_eq!(find(pattern, "e = Erf (x) y = Mul (e, z)").unwrap(), "x=x z=z");
    assert_eq!(find(pattern, "e = Erf (x) s = Sub (x, w) y = Mul (e, s)").unwrap(), "w=w x=x");
    assert_eq!(find(pattern, "s = Add (x, w) y = Mul (x, s)").unwrap(), "w=w x=x");
    let root = "(a: Mul(x, 0.5) | b: Erf(x))";
    assert_eq!(find(root, "y = Erf (x)").unwrap(), "b:y x=x");
    assert_eq!(find(root, "y = Mul (x, half)").unwrap(), "a:y x=x");
    assert_eq!(find(root, "y = Mul (x, two)"), None);
}

#[test]
fn a_shared_factor_may_be_a_product_itself() {
    // x·i + (w − z·i) with i = w/√x.
    let graph = "r = Sqrt (x) i = Div (w, r) a = Mul (x, i) b = Mul (z, i) c = Sub (w, b) y = Add (a, c)";
    let pattern = "Add*(Mul*(x, Pow(x, -0.5), scale), shift, -Mul*(mean, Pow(x, -0.5), scale))";
    assert_eq!(find(pattern, graph).unwrap(), "mean=z scale=w shift=w x=x");
}

#[test]
fn passes_casts_where_it_is_told_to() {
    let graph = "a = Mul (x, inverse) c = Cast <to = 10> (a) e = Erf (c) g = Cast <to = 1> (e) h = Add (g, one)
                 p = Mul (x, half) y = Mul (p, h)";
    assert_eq!(find(GELU, graph), None);
    assert_eq!(find_with(Pattern::parse(GELU).through_casts(), graph).unwrap(), "x=x");
    let inside = "a = Mul (x, half) c = Cast <to = 10> (a) y = Mul (c, half16)";
    assert_eq!(find_with(Pattern::parse("Mul*(x, 0.25)").through_casts(), inside).unwrap(), "x=x");
}

#[test]
fn says_which_constants_were_numbers() {
    let model = text::parse(
        "g (float[N,4] x) => (float[N,4] y) <float[1,1] a = {0.5}, float b = {0.5}> { p = Mul (x, a) y = Mul (p, b) }",
    )
    .unwrap();
    let root = model.graph.producer(model.graph.find_value("y").unwrap()).unwrap();
    let found = Pattern::parse("Mul*(x, 0.25)").find(&model.graph, root).unwrap();
    let names: Vec<&str> = found.constants().iter().map(|&v| model.graph.value(v).name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn takes_bounded_time() {
    // Each product doubles the number of ways to take the whole apart, and none of them fits.
    let mut body = "p0 = Mul (x, z) ".to_owned();
    for i in 1..200 {
        let before = i - 1;
        body += &format!("q{i} = Mul (p{before}, x) r{i} = Mul (z, p{before}) p{i} = Mul (q{i}, r{i}) ");
    }
    let started = std::time::Instant::now();
    let pattern = "Mul*(a, b, c, d, e, f, g, h, Erf(a))";
    for _ in 0..100 {
        assert_eq!(find(pattern, &format!("{body} y = Mul (p199, x)")), None);
    }
    // A long chain of numbers ends too.
    let mut body = "p0 = Mul (x, half) ".to_owned();
    for i in 1..2000 {
        body += &format!("p{i} = Mul (p{}, two) ", i - 1);
    }
    assert_eq!(find("Mul*(x, 0.3)", &format!("{body} y = Mul (p1999, half)")), None);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
#[should_panic(expected = "goes on after its root")]
fn a_pattern_ends_with_its_root() {
    Pattern::parse("Mul(x, y) Add(x, y)");
}

#[test]
#[should_panic(expected = "only the terms of a sum have signs")]
fn a_factor_has_no_sign() {
    Pattern::parse("Mul*(x, -y)");
}
