//! Removes logic whose answer follows from the positions it compares.

use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, pat, rewrite, rule};
use lathe_analysis::Affines;
use lathe_ir::{Model, ValueId};

/// See [`INFO`].
pub struct FoldIndexArithmetic;

static INFO: Info = Info {
    name: "fold-index-arithmetic",
    summary: "removes And, Or and Where whose condition follows from index arithmetic",
    doc: "Exported attention masks compare positions and sequence numbers that Range, Expand, GatherND and CumSum build. \
          Where the elements of such a tensor are provably `offset + slope · index`, a comparison of two of them may be \
          true everywhere: an And with it is its other operand, a Where by it is one branch. Declines where the \
          certainty cannot be proven for every size of the open dimensions, and where its shape widens the result.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Quantity::Nodes],
    source: None,
};

impl Pass for FoldIndexArithmetic {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        rewrite(model, cx, &rules())
    }
}

const UNCERTAIN: &str = "it is not certain which way the condition goes";
const WIDENS: &str = "the condition may widen the result";

fn certain(m: &Match, name: &str) -> Option<bool> {
    Affines::new(m.graph(), m.facts()).certain(m.value(name))
}

/// The operand that an And (`neutral` true) or Or (`neutral` false) comes down to.
fn remaining(m: &Match, neutral: bool) -> Result<ValueId, Refusal> {
    let (x, y) = (certain(m, "x"), certain(m, "y"));
    let kept = match (x, y) {
        // A decided operand that decides the whole is the whole.
        (Some(x), _) if x != neutral => "x",
        (_, Some(y)) if y != neutral => "y",
        (_, Some(_)) => "x",
        (Some(_), _) => "y",
        _ => return Err(UNCERTAIN.into()),
    };
    m.require(m.same_shape(kept, "output"), WIDENS)?;
    m.require_replaceable("output", kept)?;
    Ok(m.value(kept))
}

fn rules() -> Vec<Rule> {
    vec![
        rule("decide-and", pat!(And(x, y)), |m, _| remaining(m, true)),
        rule("decide-or", pat!(Or(x, y)), |m, _| remaining(m, false)),
        rule("decide-where", pat!(Where(condition, x, y)), |m, _| {
            let taken = match certain(m, "condition") {
                Some(true) => "x",
                Some(false) => "y",
                None => return Err(UNCERTAIN.into()),
            };
            m.require(m.same_shape(taken, "output"), WIDENS)?;
            m.require_replaceable("output", taken)?;
            Ok(m.value(taken))
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
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

    #[test]
    fn keeps_what_is_not_certain_or_widens() {
        check_refuses(
            &FoldIndexArithmetic,
            "g (bool[S] a, bool[S] b) => (bool[S] y) { n = Not (a)  y = And (n, b) }",
            UNCERTAIN,
        );
        check_refuses(
            &FoldIndexArithmetic,
            "g (bool[1] m) => (bool[3] y) <int64[3] a = {0, 1, 2}, int64[3] b = {1, 2, 3}> {
                c = Less (a, b)
                n = Not (m)
                y = And (c, n)
            }",
            WIDENS,
        );
    }
}
