//! Makes one Gemm of a product of matrices with the sum after it and the transposes before it.

use super::linear::{RTOL, require_private};
use super::rounding::is_weight_type;
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{DataType, Model, Node, Patch, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FuseGemm;

static INFO: Info = Info {
    name: "fuse-gemm",
    summary: "makes one Gemm of a matrix product with the sum after it and the transposes before it",
    doc: "MatMul of two values that certainly have two axes becomes a Gemm together with the Add after it, if what is \
          added certainly broadcasts to the product, and with a Transpose before it. A Transpose before a Gemm goes \
          into transA or transB, so that a stored weight with several users is not copied, and an Add after a Gemm \
          that adds nothing yet into it. Never adds a node. Declines where the number of axes is unknown, and on \
          types and versions without Gemm.",
    options: &[],
    // Sums may be accumulated in another order, starting from what is added.
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for FuseGemm {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("matmul-add", pat!(Add(product: MatMul(a, b), c)), |m, g| {
            m.only_if(m.ndim("a") == Ok(2) && m.ndim("b") == Ok(2))?;
            require_private(m)?;
            require_gemm(m)?;
            require_broadcast(m)?;
            Ok(g.node(Node::new("Gemm"), &[m.value("a"), m.value("b"), m.value("c")]))
        }),
        rule("gemm-add", pat!(Add(gemm: Gemm(a, b), c)), |m, g| {
            require_private(m)?;
            require_gemm(m)?;
            require_broadcast(m)?;
            let mut node = m.node("gemm").clone();
            node.remove_attribute("beta");
            Ok(g.node(node, &[m.value("a"), m.value("b"), m.value("c")]))
        }),
        rule("transpose-gemm-left", pat!(gemm: Gemm(turn: Transpose(a), _, ..)), |m, g| turned(m, g, 0, "transA")),
        rule("transpose-gemm-right", pat!(gemm: Gemm(_, turn: Transpose(a), ..)), |m, g| turned(m, g, 1, "transB")),
        rule("transpose-matmul-left", pat!(product: MatMul(turn: Transpose(a), b)), |m, g| {
            m.only_if(m.ndim("a") == Ok(2) && m.ndim("b") == Ok(2) && m.opset() >= 11)?;
            require_private(m)?;
            require_gemm(m)?;
            m.only_if(m.perm("turn")? == [1, 0])?;
            Ok(g.node(Node::new("Gemm").with("transA", 1), &[m.value("a"), m.value("b")]))
        }),
        rule("transpose-matmul-right", pat!(product: MatMul(a, turn: Transpose(b))), |m, g| {
            m.only_if(m.ndim("a") == Ok(2) && m.ndim("b") == Ok(2) && m.opset() >= 11)?;
            require_private(m)?;
            require_gemm(m)?;
            m.only_if(m.perm("turn")? == [1, 0])?;
            Ok(g.node(Node::new("Gemm").with("transB", 1), &[m.value("a"), m.value("b")]))
        }),
    ]
}

/// Refuses where Gemm does not compute with the type of `a` or does not broadcast what is added.
fn require_gemm(m: &Match) -> Result<(), Refusal> {
    let elem = m.elem("a")?;
    m.only_if(is_weight_type(elem))?;
    m.require(m.opset() >= 7, "before opset 7 Gemm broadcasts only where an attribute says so")?;
    m.require(elem != DataType::Bfloat16 || m.opset() >= 13, "Gemm has no bfloat16 before opset 13")
}

/// Refuses unless `c` certainly broadcasts to the product without making it larger.
fn require_broadcast(m: &Match) -> Result<(), Refusal> {
    let (product, c) = (m.graph().node(m.bindings.nodes()[1]).output(0).expect("the match uses it"), m.value("c"));
    let unknown = "what is added may be larger than the product";
    let shape = m.facts().shape(c).ok_or(unknown)?;
    let whole = m.facts().shape(product).ok_or(unknown)?;
    m.require(whole.len() == 2 && shape.len() <= 2, unknown)?;
    let fits = shape.iter().rev().zip(whole.iter().rev()).all(|(dim, full)| dim.as_known() == Some(1) || dim == full);
    m.require(fits, unknown)
}

/// The Gemm with the Transpose of one operand in its attribute.
fn turned(m: &Match, g: &mut Patch, index: usize, attribute: &str) -> Result<ValueId, Refusal> {
    m.only_if(m.perm("turn")? == [1, 0])?;
    require_private(m)?;
    let mut node = m.node("gemm").clone();
    let flag = i64::from(node.int(attribute).unwrap_or(0) == 0);
    node.set_attribute(attribute, flag);
    let mut inputs = node.inputs().to_vec();
    inputs[index] = Some(m.value("a"));
    Ok(g.node_with(node, &inputs, 1)[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    const OPSET: &str = "<ir_version: 8, opset_import: [\"\" : 13]>";

    #[test]
    fn takes_the_sum_and_both_transposes() {
        let graph = format!(
            "{OPSET} g (float[3,N] x, float[4,3] w, float[N,1] c) => (float[N,4] y) {{
            a = Transpose <perm = [1, 0]> (x) b = Transpose (w) t = MatMul (a, b) y = Add (c, t) }}"
        );
        assert_snapshot!(check(&FuseGemm, &graph), @"
        g (float[3,N] x, float[4,3] w, float[N,1] c) => (float[N,4] y) {
            y = Gemm <transA = 1, transB = 1> (x, w, c)  # float[N,4]
        }
        ");
    }

    #[test]
    fn leaves_a_tied_weight_as_it_is_stored() {
        let graph = format!(
            "{OPSET} g (int64[N] i) => (float[N,3] y) <float[3,2] w = {{1, 2, 3, 4, 5, 6}}> {{
            x = Gather (w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }}"
        );
        assert_snapshot!(check(&FuseGemm, &graph), @"
        g (int64[N] i) => (float[N,3] y) <
            float[3,2] w = {1, 2, 3, 4, 5, 6}
        > {
            x = Gather (w, i)
            y = Gemm <transB = 1> (x, w)  # float[N,3]
        }
        ");
    }

    #[test]
    fn gives_a_gemm_its_sum() {
        let graph = format!(
            "{OPSET} g (float[N,2] x, float[2,3] w, float[3] c) => (float[N,3] y) {{
            t = Gemm <alpha = 2.0, beta = 3.0> (x, w) y = Add (t, c) }}"
        );
        check(&FuseGemm, &graph);
    }

    #[test]
    fn works_inside_a_subgraph() {
        let graph = format!(
            "{OPSET} g (float[N,2] x, float[2,3] w, float[3] c, bool e) => (float[N,3] y) {{
            y = If (e) <then_branch = a () => (float[N,3] p) {{ t = MatMul (x, w) p = Add (t, c) }},
                        else_branch = b () => (float[N,3] q) {{ q = MatMul (x, w) }}> }}"
        );
        check(&FuseGemm, &graph);
    }

    #[test]
    fn keeps_what_it_must() {
        let wide = format!(
            "{OPSET} g (float[N,2] x, float[2,3] w, float[M,3] c) => (float[K,3] y) {{
            t = MatMul (x, w) y = Add (t, c) }}"
        );
        check_refuses(&FuseGemm, &wide, "what is added may be larger");
        let output = format!(
            "{OPSET} g (float[N,2] x, float[2,3] w, float[3] c) => (float[N,3] t, float[N,3] y) {{
            t = MatMul (x, w) y = Add (t, c) }}"
        );
        check_refuses(&FuseGemm, &output, "an inner value has other uses");
        let old = output.replace(": 13", ": 6").replace("float[N,3] t, ", "");
        check_refuses(&FuseGemm, &old, "before opset 7");
    }

    #[test]
    fn leaves_stacks_of_matrices() {
        let graph = format!(
            "{OPSET} g (float[B,N,2] x, float[2,3] w, float[3] c) => (float[B,N,3] y) {{
            t = MatMul (x, w) y = Add (t, c) }}"
        );
        let mut model = crate::testing::model(&graph);
        assert_eq!(FuseGemm.apply(&mut model, &PassContext::default()).unwrap(), Outcome::default());
    }

    #[test]
    fn keeps_products_of_types_that_gemm_has_not_yet() {
        let graph = "<ir_version: 7, opset_import: [\"\" : 12]> g (float[N,2] x) => (float[N,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[3] c = {1, 2, 3}> {
            h = Cast <to = 16> (x) v = Cast <to = 16> (w) d = Cast <to = 16> (c) t = MatMul (h, v) s = Add (t, d) y = Cast <to = 1> (s) }";
        check_refuses(&FuseGemm, graph, "Gemm has no bfloat16 before opset 13");
    }

    #[test]
    fn keeps_products_that_gemm_does_not_have() {
        let keeps = |graph: &str| {
            let graph = format!("<ir_version: 8, opset_import: [\"\" : 13]> g {graph}");
            crate::testing::check_untouched(&FuseGemm, &graph);
        };
        keeps("(float[4,2] a, float[5,4,3] b) => (float[] y) { t = Transpose <perm = [1, 0]> (a) y = MatMul (t, b) }");
        keeps("(float[5,2,4] a, float[3,4] b) => (float[] y) { t = Transpose <perm = [1, 0]> (b) y = MatMul (a, t) }");
        keeps("(float[2,4] a, float[4,3] b) => (float[] y) { t = Transpose <perm = [0, 1]> (a) y = MatMul (t, b) }");
        keeps("(float[2,4] a, float[4,3] b) => (float[] y) { t = Transpose <perm = [0, 1]> (b) y = MatMul (a, t) }");
        keeps("(float[2,4] a, float[4,3] b) => (float[] y) { t = Transpose <perm = [0, 1]> (a) y = Gemm (t, b) }");
        keeps(
            "(int32[2,4] a, int32[4,3] b) => (int32[] y) { t = Transpose <perm = [1, 0]> (a) u = Neg (t) v = Transpose <perm = [1, 0]> (u) y = MatMul (v, b) }",
        );
        let deep = "<ir_version: 8, opset_import: [\"\" : 13]> g (float[2,3] a, float[3,4] b, float[1,2,4] c) => (float[1,2,4] y) {
            t = MatMul (a, b) y = Add (t, c) }";
        check_refuses(&FuseGemm, deep, "what is added may be larger than the product");
    }
}
