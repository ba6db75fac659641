//! Removes logic whose answer follows from the positions it compares.

use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_analysis::{Affines, DimExpr, Facts};
use lathe_ir::{Graph, Model, Node, Patch, Pattern, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldIndexArithmetic;

static INFO: Info = Info {
    name: "fold-index-arithmetic",
    summary: "removes And, Or and Where whose condition follows from index arithmetic, and rounding of sizes",
    doc: "Exported attention masks compare positions and sequence numbers that Range, Expand, GatherND and CumSum build. \
          Where the elements of such a tensor are provably `offset + slope · index`, a comparison of two of them may be \
          true everywhere: an And with it is its other operand, a Where by it is one branch. A division of sizes that rounds down, as \
          Python's does, is the Div. Declines where the \
          certainty cannot be proven for every size of the open dimensions, and leaves to drop-broadcasts what would \
          change the shape of the result.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for FoldIndexArithmetic {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

const UNCERTAIN: &str = "it is not certain which way the condition goes";

/// The input that an And, Or or Where certainly hands on, repeated to the shape of the result.
pub(super) fn decided(graph: &Graph, facts: &Facts, node: &Node) -> Option<ValueId> {
    let affines = Affines::new(graph, facts);
    let certain = |index: usize| affines.certain(node.input(index)?);
    if node.is("Where") {
        return node.input(if certain(0)? { 1 } else { 2 });
    }
    let neutral = node.is("And");
    let kept = match (certain(0), certain(1)) {
        // A decided operand that decides the whole is the whole.
        (Some(x), _) if x != neutral => 0,
        (_, Some(y)) if y != neutral => 1,
        (_, Some(_)) => 0,
        (Some(_), _) => 1,
        (None, None) => return None,
    };
    node.input(kept)
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    let either = |op: &str, a: &str, b: &str| format!("({op}({a}, {b}) | {op}({b}, {a}))");
    let less = either("And", &format!("Not({})", either("Equal", "Sign(a)", "1")), "Cast(Mod(a, b))");
    let floor = format!("Sub(quotient: Div(a, b), Cast({less}))");
    vec![
        rule("decide", pat!(node: And|Or|Where(..)), |m, _| {
            let output = m.value("output");
            let kept = decided(m.graph(), m.facts(), m.node("node")).ok_or(UNCERTAIN)?;
            // What is repeated to a larger shape is for drop-broadcasts.
            m.only_if(m.facts().same_shape(kept, output))?;
            m.require_free(output, kept)?;
            Ok(kept)
        }),
        rule("round-down", Pattern::parse(&floor), round_down).sharing(),
    ]
}

/// `a // b` of Python: one less where `a` has another sign than `b` and there is a remainder, which is nowhere. For 0, whose
/// sign is 0, there is no remainder.
fn round_down(m: &Match, _: &mut Patch) -> Result<ValueId, Refusal> {
    let not_negative = |number: &Option<DimExpr>| number.as_ref().is_some_and(|n| m.facts().is_size(n));
    let all = |name: &str| m.facts().contents(m.value(name)).is_some_and(|c| c.elements().iter().all(not_negative));
    m.require(all("a") && all("b"), "a division that rounds down may have negative operands")?;
    let (quotient, output) = (m.node("quotient").output(0).ok_or(Refusal::NoMatch)?, m.value("output"));
    m.require_free(output, quotient)?;
    Ok(quotient)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};
    use insta::assert_snapshot;

    #[test]
    fn drops_a_comparison_of_equal_positions() {
        let graph = "g (int64[S] ids, bool[S] m) => (bool[S] y) <int64 zero = {0}, int64 one = {1}> {
            s = Shape (ids)
            n = Squeeze (s)
            a = Range (zero, n, one)
            b = Add (a, one)
            c = Less (a, b)
            n2 = Not (m)
            y = And (c, n2)
        }";
        assert_snapshot!(check(&FoldIndexArithmetic, graph), @r#"
        g (int64[S] ids, bool[S] m) => (bool[S] y) <
            int64 zero = {0},
            int64 one = {1}
        > {
            y = Not (m)  # bool[S]
        }
        "#);
    }

    #[test]
    fn takes_one_branch_of_a_certain_where_in_a_subgraph() {
        let graph = "g (bool k, float[S] x) => (float[S] y) <int64 zero = {0}, int64 one = {1}, float o = {0}> {
            s = Shape (x)
            n = Squeeze (s)
            a = Range (zero, n, one)
            y = If (k) <
                then_branch = t () => (float[S] p) { q = Neg (x)  c = Equal (a, a)  p = Where (c, q, o) },
                else_branch = e () => (float[S] r) { r = Identity (x) }
            >
        }";
        assert_snapshot!(check(&FoldIndexArithmetic, graph), @r#"
        g (bool k, float[S] x) => (float[S] y) <
            int64 zero = {0},
            int64 one = {1},
            float o = {0}
        > {
            y = If (k) <then_branch = t () => (q) {
                q = Neg (x)
            }, else_branch = e () => (float[S] r) {
                r = Identity (x)  # float[S]
            }>  # float[S]
        }
        "#);
    }

    fn rounding(a: &str, sign: &str) -> String {
        format!(
            "<ir_version: 8, opset_import: [\"\" : 18]>
            g (float[n] x, int64 k) => (int64 y) <int64 b = {{20}}, int64 one = {{{sign}}}> {{
                s = Shape (x)
                n = Squeeze (s)
                sign = Sign ({a})
                same = Equal (sign, one)
                other = Not (same)
                r = Mod ({a}, b)
                left = Cast <to = 9> (r)
                less = And (other, left)
                c = Cast <to = 7> (less)
                q = Div ({a}, b)
                y = Sub (q, c)
            }}"
        )
    }

    #[test]
    fn sizes_are_rounded_down_by_a_division() {
        assert_snapshot!(check(&FoldIndexArithmetic, &rounding("n", "1")), @r#"
        g (float[n] x, int64 k) => (int64 y) <
            int64 b = {20},
            int64 one = {1}
        > {
            s = Shape (x)
            n = Squeeze (s)
            y = Div (n, b)  # int64
        }
        "#);
        check_refuses(
            &FoldIndexArithmetic,
            &rounding("k", "1"),
            "a division that rounds down may have negative operands",
        );
        check_untouched(&FoldIndexArithmetic, &rounding("n", "-1"));
    }

    #[test]
    fn keeps_what_is_not_certain_or_widens() {
        check_refuses(
            &FoldIndexArithmetic,
            "g (bool[S] a, bool[S] b) => (bool[S] y) { n = Not (a)  y = And (n, b) }",
            UNCERTAIN,
        );
        check_untouched(
            &FoldIndexArithmetic,
            "g (bool[1] m) => (bool[3] y) <int64[3] a = {0, 1, 2}, int64[3] b = {1, 2, 3}> {
                c = Less (a, b)
                n = Not (m)
                y = And (c, n)
            }",
        );
    }
}
