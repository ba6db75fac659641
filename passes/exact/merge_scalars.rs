//! Merges arithmetic with scalar constants, and drops what leaves every number as it is but not always its sign of zero.

use super::drop_neutral::{constant_where, filled, neutral, where_not};
use crate::{
    Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Replacement, Rule, pat, rewrite, rule,
};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct MergeScalars;

static INFO: Info = Info {
    name: "merge-scalars",
    summary: "merges arithmetic with scalar constants, and drops additions of 0",
    doc: "Two multiplications or divisions by scalars become one multiplication, two additions or subtractions one \
          addition. Adding 0, Relu of what is never negative, and ArgMax of a Softmax over the same axis lose a node, \
          and so does Where with a negated or constant condition. Declines where the merged constant leaves the range \
          of normal numbers or cancels, where an inner value has other uses, and for whole numbers.",
    options: &[],
    // One rounding takes the place of two: half a unit in the last place of float32 each, 6e-8.
    kind: Kind::Equivalent { rtol: 1e-6 },
    lowers: &[Quantity::Nodes],
    source: None,
};

impl Pass for MergeScalars {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("merge-factors", pat!(outer: Mul|Div(inner: Mul|Div(..), ..)), merge_factors),
        rule("merge-factors", pat!(outer: Mul(_, inner: Mul|Div(..))), merge_factors),
        rule("merge-terms", pat!(outer: Add|Sub(inner: Add|Sub(..), ..)), merge_terms),
        rule("merge-terms", pat!(outer: Add(_, inner: Add|Sub(..))), merge_terms),
        rule("add-zero", pat!(node: Add(a, b)), |m, _| {
            let (a, b) = (m.value("a"), m.value("b"));
            if filled(m, b, 0.0) { neutral(m, a, b, 0.0) } else { neutral(m, b, a, 0.0) }
        }),
        rule("relu-of-nonnegative", pat!(Relu(inner: Sigmoid|Softmax|Exp|Sqrt|Abs(x, ..))), |m, _| {
            let inner = m.node("inner").output(0).ok_or("the inner node has no output")?;
            m.require_free(m.value("output"), inner)?;
            Ok(inner)
        })
        .sharing(),
        rule("argmax-of-softmax", pat!(outer: ArgMax(inner: Softmax|LogSoftmax(x))), |m, g| {
            let ndim = m.ndim("x")?;
            let modern = m.opset() >= 13;
            let over = m.axis(m.node("inner").int("axis").unwrap_or(if modern { -1 } else { 1 }), ndim)?;
            let axis = m.axis(m.node("outer").int("axis").unwrap_or(0), ndim)?;
            // Before opset 13 all axes from the stated one on are normalized together.
            let same = if modern { over == axis } else { over <= axis };
            m.require(same, "the maximum is taken over another axis than the normalization")?;
            let mut node = Node::new("ArgMax");
            node.attributes = m.node("outer").attributes.clone();
            Ok(Replacement::from(g.node(node, &[m.value("x")])))
        })
        .sharing(),
        rule("where-not", pat!(Where(Not(c), x, y)), where_not).sharing(),
        rule("constant-where", pat!(Where(c, x, y)), |m, _| constant_where(m)),
    ]
}

/// A node with one scalar constant operand: the other operand, the constant, and whether the constant is on the right.
fn scalar(m: &Match, node: &Node) -> Option<(ValueId, f64, bool)> {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let constant = |v: ValueId| {
        let tensor = m.graph().constant(v).filter(|t| t.dtype().is_float() && t.dims().iter().all(|&d| d == 1))?;
        // A scalar of more axes than its partner would add axes.
        let other = if v == a { b } else { a };
        let fits = tensor.dims().is_empty() || m.facts().ndim(other).is_some_and(|n| n >= tensor.dims().len());
        tensor.scalar_f64().filter(|_| fits)
    };
    match (constant(a), constant(b)) {
        (None, Some(c)) => Some((a, c, true)),
        (Some(c), None) => Some((b, c, false)),
        _ => None,
    }
}

/// A scalar operand, and whether it stands on the right.
type Scalar = (f64, bool);

/// Both nodes of a match, as the value they begin with and their constants, the inner one's first.
fn scalars(m: &Match) -> Option<(ValueId, Scalar, Scalar)> {
    let (through, outer, outer_right) = scalar(m, m.node("outer"))?;
    (Some(through) == m.node("inner").output(0)).then_some(())?;
    let (x, inner, inner_right) = scalar(m, m.node("inner"))?;
    Some((x, (inner, inner_right), (outer, outer_right)))
}

fn constant(m: &Match, g: &mut Patch, name: &str, number: f64) -> Result<ValueId, Refusal> {
    let ty = m.elem("output")?;
    let tensor = Tensor::from_f64s(ty, &[], &[number]).ok_or("constants of this type cannot be written")?;
    Ok(g.constant(name, tensor))
}

fn merge_factors(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, inner, outer) = scalars(m).ok_or_else(Refusal::no_match)?;
    let factor = |node: &Node, (number, right): (f64, bool)| match (node.is("Div"), right) {
        (false, _) => Some(number),
        (true, true) => Some(number.recip()),
        (true, false) => None,
    };
    let (inner, outer) = (factor(m.node("inner"), inner), factor(m.node("outer"), outer));
    let (Some(inner), Some(outer)) = (inner, outer) else {
        return Err("a constant is divided by the value".into());
    };
    let product = inner * outer;
    // Within these bounds float16 keeps its precision too, and no intermediate result mattered by overflowing.
    let moderate = |v: f64| (1e-3..=1e3).contains(&v.abs());
    m.require([inner, outer, product].into_iter().all(moderate), "a factor is very large or very small")?;
    let factor = constant(m, g, "factor", product)?;
    Ok(g.node(Node::new("Mul"), &[x, factor]))
}

fn merge_terms(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, (inner, inner_right), (outer, outer_right)) = scalars(m).ok_or_else(Refusal::no_match)?;
    let subtracts = |label| m.node(label).is("Sub");
    let from_constant = (subtracts("inner") && !inner_right) || (subtracts("outer") && !outer_right);
    m.require(!from_constant, "the value is subtracted from a constant")?;
    let signed = |label, number: f64| if subtracts(label) { -number } else { number };
    let (inner, outer) = (signed("inner", inner), signed("outer", outer));
    m.require(inner * outer > 0.0, "the terms cancel")?;
    let sum = inner + outer;
    m.require(sum.abs() < 6e4, "the sum is very large")?;
    let term = constant(m, g, "term", sum)?;
    Ok(g.node(Node::new("Add"), &[x, term]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn merges_factors_and_terms() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,3] x) => (float[n,3] y) <float two = {2}, float[1] eight = {8}, float one = {1}, float zero = {0}> {
                a = Mul (two, x)
                b = Div (a, eight)
                c = Add (b, one)
                d = Sub (c, zero)
                e = Add (two, c)
                f = Add (zero, e)
                y = Relu (f)
            }";
        insta::assert_snapshot!(check(&MergeScalars, graph), @"
        g (float[n,3] x) => (float[n,3] y) <
            float two = {2},
            float[1] eight = {8},
            float one = {1},
            float zero = {0},
            float b_factor = {0.25}
        > {
            b = Mul (x, b_factor)
            c = Add (b, one)
            d = Sub (c, zero)
            e = Add (two, c)
            y = Relu (e)  # float[n,3]
        }
        ");
    }

    #[test]
    fn keeps_terms_that_cancel_and_values_below_the_line() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y) <float two = {2}, float one = {1}> {
                a = Add (x, two)
                y = Sub (a, one)
            }";
        check_refuses(&MergeScalars, graph, "the terms cancel");
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y) <float two = {2}, float one = {1}> {
                a = Div (two, x)
                y = Mul (a, two)
            }";
        check_refuses(&MergeScalars, graph, "a constant is divided by the value");
    }

    #[test]
    fn drops_what_the_result_does_not_need_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, bool[n] d, float[n,4] x, float[n,4] z) => (int64[n,1] y, float[n,4] s) <bool yes = {1}> {
                y = If (c) <then_branch = then () => (int64[n,1] r) {
                    a = Softmax <axis = -1> (x)
                    r = ArgMax <axis = 1> (a)
                }, else_branch = other () => (int64[n,1] q) { q = ArgMax <axis = 1> (x) }>
                f = Sigmoid (x)
                h = Relu (f)
                w = Where (yes, h, z)
                s = Neg (w)
            }";
        insta::assert_snapshot!(check(&MergeScalars, graph), @"
        g (bool c, bool[n] d, float[n,4] x, float[n,4] z) => (int64[n,1] y, float[n,4] s) <
            bool yes = {1}
        > {
            y = If (c) <then_branch = then () => (r_1) {
                r_1 = ArgMax <axis = 1> (x)
            }, else_branch = other () => (int64[n,1] q) {
                q = ArgMax <axis = 1> (x)  # int64[n,1]
            }>  # int64[n,1]
            f = Sigmoid (x)
            s = Neg (f)  # float[n,4]
        }
        ");
    }

    #[test]
    fn keeps_a_softmax_over_another_axis() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,4] x) => (int64[1,4] y) {
                a = Softmax <axis = -1> (x)
                y = ArgMax <axis = 0> (a)
            }";
        check_refuses(&MergeScalars, graph, "the maximum is taken over another axis than the normalization");
    }
}
