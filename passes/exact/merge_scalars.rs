//! Merges arithmetic with scalar constants, and drops what leaves every number as it is but not always its sign of zero.

use super::drop_neutral::{constant_where, filled, neutral, where_not};
use super::rounding::{Sum, factors, is_weight_type, require_moderate, sums};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, Patch, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct MergeScalars;

static INFO: Info = Info {
    name: "merge-scalars",
    summary: "merges arithmetic with scalar constants, and drops additions of 0",
    doc: "Two multiplications or divisions by scalars become one multiplication, two additions or subtractions one \
          addition. Adding 0 and Relu of what is never negative lose a node, and so does Where with a negated or \
          constant condition. Declines where the merged constant leaves the range of normal numbers or cancels, where \
          an inner value has other uses, and for whole numbers. A Softmax before ArgMax stays: numbers that it rounds \
          to the same and rows that are not finite have another index without it.",
    options: &[],
    // One rounding takes the place of two: half a unit in the last place of float32 each, 6e-8.
    kind: Kind::Equivalent { rtol: 1e-6 },
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for MergeScalars {
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
        rule("merge-factors", pat!(outer: Mul|Div(inner: Mul|Div(..), ..)), merge_factors),
        rule("merge-factors", pat!(outer: Mul(_, inner: Mul|Div(..))), merge_factors),
        rule("merge-terms", pat!(outer: Add|Sub(inner: Add|Sub(..), ..)), merge_terms),
        rule("merge-terms", pat!(outer: Add(_, inner: Add|Sub(..))), merge_terms),
        rule("add-zero", pat!(node: Add(a, b)), |m, _| {
            let (a, b) = (m.value("a"), m.value("b"));
            if filled(m, b, 0.0) { neutral(m, a, b, 0.0) } else { neutral(m, b, a, 0.0) }
        }),
        rule("relu-of-nonnegative", pat!(Relu(inner: Sigmoid|Softmax|Exp|Sqrt|Abs(x, ..))), |m, _| {
            let inner = m.made("inner");
            m.require_free(m.value("output"), inner)?;
            Ok(inner)
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
        let tensor = m.graph().constant(v).filter(|t| is_weight_type(t.dtype()) && t.dims().iter().all(|&d| d == 1))?;
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

fn merge_factors(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, inner, outer) = scalars(m).ok_or(Refusal::NoMatch)?;
    let factor = |node: &Node, (number, right): (f64, bool)| match (node.is("Div"), right) {
        (false, _) => Some(number),
        (true, true) => Some(number.recip()),
        (true, false) => None,
    };
    let (inner, outer) = (factor(m.node("inner"), inner), factor(m.node("outer"), outer));
    let (Some(inner), Some(outer)) = (inner, outer) else {
        return Err("a constant is divided by the value".into());
    };
    let (elem, product) = (m.elem("output")?, inner * outer);
    require_moderate(elem, &[inner, outer, product])?;
    let factor = g.constant("factor", factors(elem, &[], &[product])?);
    Ok(g.node(Node::new("Mul"), &[x, factor]))
}

fn merge_terms(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (x, (inner, inner_right), (outer, outer_right)) = scalars(m).ok_or(Refusal::NoMatch)?;
    let subtracts = |label| m.node(label).is("Sub");
    let from_constant = (subtracts("inner") && !inner_right) || (subtracts("outer") && !outer_right);
    m.require(!from_constant, "the value is subtracted from a constant")?;
    let signed = |label, number: f64| if subtracts(label) { -number } else { number };
    let (inner, outer) = (signed("inner", inner), signed("outer", outer));
    m.require(inner * outer > 0.0, "the terms cancel")?;
    let sum = Sum::of(inner, 1.0).plus(outer);
    let term = g.constant("term", sums(m.elem("output")?, &[], &[sum])?);
    Ok(g.node(Node::new("Add"), &[x, term]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};

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
    fn keeps_factors_and_terms_that_their_type_does_not_hold() {
        let of = |elem: &str, number: &str, body: &str| {
            format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g ({elem}[n] x) => ({elem}[n] y) <{elem} c = {{{number}}}> {{ {body} }}"
            )
        };
        let pair = "a = Mul (x, c) y = Mul (a, c)";
        check_refuses(&MergeScalars, &of("float16", "0.0001", pair), "a factor is very large or very small");
        check_refuses(&MergeScalars, &of("float", "1e-25", pair), "a factor is very large or very small");
        check_refuses(&MergeScalars, &of("float16", "0.003", pair), "a factor is very large or very small");
        check_refuses(&MergeScalars, &of("float16", "500.0", pair), "a factor is very large or very small");
        let pair = "a = Add (x, c) y = Add (a, c)";
        check_refuses(&MergeScalars, &of("float16", "40000.0", pair), "leave the range of its type");
        check(&MergeScalars, &of("float16", "0.25", "a = Mul (x, c) y = Mul (a, c)"));
        check(&MergeScalars, &of("float", "1e-5", "a = Mul (x, c) y = Mul (a, c)"));
    }

    #[test]
    fn keeps_the_softmax_that_an_index_is_taken_of() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,4] x) => (int64[n,1] y) { a = Softmax <axis = 1> (x) y = ArgMax <axis = 1> (a) }";
        check_untouched(&MergeScalars, graph);
    }

    #[test]
    fn drops_what_the_result_does_not_need_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, float[n,4] x, float[n,4] z) => (float[n,4] y, float[n,4] s) <bool yes = {1}> {
                y = If (c) <then_branch = then () => (float[n,4] r) {
                    a = Softmax <axis = -1> (x)
                    b = Relu (a)
                    r = Sin (b)
                }, else_branch = other () => (float[n,4] q) { q = Neg (x) }>
                f = Sigmoid (x)
                h = Relu (f)
                w = Where (yes, h, z)
                s = Neg (w)
            }";
        insta::assert_snapshot!(check(&MergeScalars, graph), @"
        g (bool c, float[n,4] x, float[n,4] z) => (float[n,4] y, float[n,4] s) <
            bool yes = {1}
        > {
            y = If (c) <then_branch = then () => (float[n,4] r) {
                a = Softmax <axis = -1> (x)
                r = Sin (a)  # float[n,4]
            }, else_branch = other () => (float[n,4] q) {
                q = Neg (x)  # float[n,4]
            }>  # float[n,4]
            f = Sigmoid (x)
            s = Neg (f)  # float[n,4]
        }
        ");
    }

    #[test]
    fn keeps_a_constant_that_a_value_is_subtracted_from() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y) <float two = {2}, float one = {1}> { a = Sub (two, x) y = Add (a, one) }";
        check_refuses(&MergeScalars, graph, "the value is subtracted from a constant");
    }

    #[test]
    fn keeps_scalars_that_add_axes() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[1,n] y) <float[1,1] two = {2}> { a = Mul (x, two) y = Mul (a, two) }";
        check_untouched(&MergeScalars, graph);
    }
}
