//! Removes arithmetic and logic that hands its input on bit by bit.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Rule, Saving, pat, rewrite, rule,
};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct DropNeutral;

static INFO: Info = Info {
    name: "drop-neutral",
    summary: "removes arithmetic and logic that hands its input on unchanged",
    doc: "Multiplying or dividing by 1, subtracting +0, adding -0 (or 0 to whole numbers), raising to the power 1, And \
          with true, Or and Xor with false, double Not and Neg, idempotent functions applied twice, and (over whole numbers) \
          Where with a constant condition are removed; Where swaps its branches instead of negating; Min, Max and Sum of their own \
          kind take its operands; Clip of Clip becomes one. Declines where a constant broadcasts its partner to a \
          larger shape.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for DropNeutral {
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
        rule("drop-one", pat!(node: Mul(a, b)), |m, _| either(m, 1.0)),
        rule("divide-by-one", pat!(node: Div(a, b)), |m, _| right(m, 1.0)),
        rule("power-one", pat!(node: Pow(a, b)), |m, _| right(m, 1.0)),
        rule("subtract-zero", pat!(node: Sub(a, b)), |m, _| right(m, 0.0)),
        rule("add-zero", pat!(node: Add(a, b)), |m, _| {
            // In floats, x + 0 turns -0 into +0; only -0 leaves every number as it is.
            let whole = m.elem("output").is_ok_and(|ty| ty.is_integer());
            either(m, if whole { 0.0 } else { -0.0 })
        }),
        rule("and-true", pat!(node: And(a, b)), |m, _| either(m, 1.0)),
        rule("or-false", pat!(node: Or|Xor(a, b)), |m, _| either(m, 0.0)),
        rule("double-negation", pat!(outer: Not|Neg(inner: Not|Neg(x))), |m, _| {
            m.only_if(m.node("outer").op_type == m.node("inner").op_type)?;
            m.require_replaceable("output", "x")?;
            Ok(m.value("x"))
        })
        .sharing(),
        rule(
            "apply-once",
            pat!(outer: Relu|Abs|Ceil|Floor|Round|Sign(inner: Relu|Abs|Ceil|Floor|Round|Sign(x))),
            |m, _| {
                m.only_if(m.node("outer").op_type == m.node("inner").op_type)?;
                let once = m.made("inner");
                m.require_free(m.value("output"), once)?;
                Ok(once)
            },
        )
        .sharing(),
        rule("where-not", pat!(Where(Not(c), x, y)), |m, g| {
            m.only_if(!is_float(m))?;
            where_not(m, g)
        })
        .sharing(),
        rule("constant-where", pat!(Where(c, x, y)), |m, _| {
            m.only_if(!is_float(m))?;
            constant_where(m)
        }),
        rule("flatten-variadic", pat!(outer: Min|Max|Sum(inner: Min|Max|Sum(..), ..)), |m, g| {
            let (outer, inner) = (m.node("outer"), m.node("inner"));
            // The inner node comes first, so that the operands meet in the same order as before.
            m.only_if(outer.op_type == inner.op_type && outer.input(0) == inner.output(0))?;
            m.require(m.opset() >= 8, "before opset 8 operands are not broadcast")?;
            let all: Vec<Option<ValueId>> = inner.inputs().iter().chain(&outer.inputs()[1..]).copied().collect();
            Ok(Replacement::from(g.node_with(Node::new(outer.op_type.clone()), &all, 1)))
        }),
        rule("compose-clips", pat!(outer: Clip(inner: Clip(x, ..), ..)), compose_clips),
    ]
}

/// ONNX Runtime may turn -0 into +0 on its way through a Where over floats.
fn is_float(m: &Match) -> bool {
    !m.elem("output").is_ok_and(|ty| !ty.is_float())
}

/// Swaps the branches of a `Where` instead of negating its condition.
pub(super) fn where_not(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    Ok(g.node(Node::new("Where"), &[m.value("c"), m.value("y"), m.value("x")]))
}

/// The branch of a `Where` that a constant condition chooses everywhere.
pub(super) fn constant_where(m: &Match) -> Result<ValueId, Refusal> {
    let conditions = small(m, m.value("c"));
    m.only_if(conditions.as_ref().is_some_and(|all| !all.is_empty()))?;
    let first = conditions.iter().flatten().all(|&c| c == 1.0);
    let second = conditions.iter().flatten().all(|&c| c == 0.0);
    m.only_if(first || second)?;
    let chosen = if first { "x" } else { "y" };
    m.require(m.same_shape(chosen, "output"), "the chosen branch is broadcast to a larger shape")?;
    m.require_replaceable("output", chosen)?;
    Ok(m.value(chosen))
}

/// The elements of a small constant.
pub(super) fn small(m: &Match, value: ValueId) -> Option<Vec<f64>> {
    m.graph().constant(value).filter(|tensor| tensor.len() <= 1 << 16)?.to_f64s()
}

/// Whether every element of a constant has exactly the bits of `number`.
pub(super) fn filled(m: &Match, value: ValueId, number: f64) -> bool {
    small(m, value).is_some_and(|all| all.iter().all(|x| x.to_bits() == number.to_bits()))
}

/// `x` of `f(x, constant)`, if the constant is `number` everywhere and does not broadcast `x`.
pub(super) fn neutral(m: &Match, x: ValueId, constant: ValueId, number: f64) -> Result<ValueId, Refusal> {
    m.only_if(filled(m, constant, number))?;
    let output = m.value("output");
    let dims = m.graph().constant(constant).map_or(&[][..], Tensor::dims);
    let narrow =
        dims.iter().all(|&d| d == 1) && (dims.is_empty() || m.facts().ndim(x).is_some_and(|n| n >= dims.len()));
    m.require(narrow || m.facts().same_shape(x, output), "the constant broadcasts its partner to a larger shape")?;
    m.require_free(output, x)?;
    Ok(x)
}

fn right(m: &Match, number: f64) -> Result<ValueId, Refusal> {
    neutral(m, m.value("a"), m.value("b"), number)
}

fn either(m: &Match, number: f64) -> Result<ValueId, Refusal> {
    let (a, b) = (m.value("a"), m.value("b"));
    if filled(m, b, number) { neutral(m, a, b, number) } else { neutral(m, b, a, number) }
}

/// A bound of a `Clip`.
#[derive(Clone, Copy)]
struct Bound {
    number: Number,
    /// The constant that states it; older versions state it in an attribute.
    value: Option<ValueId>,
}

/// A number that is compared without rounding.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Number {
    Whole(i64),
    Real(f64),
}

impl Number {
    /// The only element of a constant, if its type is a whole number of up to 63 bits or a float.
    fn of(tensor: &Tensor) -> Option<Number> {
        if tensor.dtype().is_float() {
            return tensor.scalar_f64().map(Number::Real);
        }
        tensor.scalar_i64().map(Number::Whole)
    }
}

/// The bounds of a `Clip` that states both as constants, in order.
fn bounds(m: &Match, node: &Node) -> Option<(Bound, Bound)> {
    let bound = |name, index| match (node.float(name), node.input(index)) {
        (Some(bound), _) => Some(Bound { number: Number::Real(bound.into()), value: None }),
        (None, value) => Some(Bound { number: Number::of(m.graph().constant(value?)?)?, value }),
    };
    let (low, high) = (bound("min", 1)?, bound("max", 2)?);
    (low.number <= high.number).then_some((low, high))
}

fn compose_clips(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (inner, outer) = (bounds(m, m.node("inner")), bounds(m, m.node("outer")));
    let (Some((a, b)), Some((c, d))) = (inner, outer) else {
        return Err("a bound is computed or has more than 63 bits, or the bounds cross".into());
    };
    let both_zeros = |p: Bound, q: Bound| match (p.number, q.number) {
        (Number::Real(p), Number::Real(q)) => p == q && p.to_bits() != q.to_bits(),
        _ => false,
    };
    m.require(!both_zeros(a, c) && !both_zeros(b, d), "the bounds are zeros of different signs")?;
    let clamped = |bound: Bound| match bound.number {
        number if number < c.number => c,
        number if number > d.number => d,
        _ => bound,
    };
    let (low, high) = (clamped(a), clamped(b));
    let clip = Node::new("Clip");
    match (low.value, high.value, low.number, high.number) {
        (Some(low), Some(high), ..) => Ok(g.node(clip, &[m.value("x"), low, high])),
        (None, None, Number::Real(low), Number::Real(high)) => {
            Ok(g.node(clip.with("min", low as f32).with("max", high as f32), &[m.value("x")]))
        }
        _ => Err(Refusal::NoMatch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn drops_arithmetic_without_effect() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,3] x) => (float[n,3] y)
               <float one = {1}, float[1] ones = {1}, float zero = {0}, float[1,3] minus = {-0.0, -0.0, -0.0}> {
                r = Neg (x)
                a = Mul (one, r)
                b = Div (a, ones)
                c = Sub (b, zero)
                d = Add (minus, c)
                e = Pow (d, one)
                f = Neg (e)
                h = Neg (f)
                y = Abs (h)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (float[n,3] x) => (float[n,3] y) <
            float one = {1},
            float[1] ones = {1},
            float zero = {0},
            float[1,3] minus = {-0, -0, -0}
        > {
            h = Neg (x)
            y = Abs (h)  # float[n,3]
        }
        ");
    }

    #[test]
    fn drops_logic_without_effect_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, bool[n] x, int32[n] p, int32[n] q) => (int32[n] y) <bool yes = {1}, bool[1] no = {0}> {
                y = If (c) <then_branch = then () => (int32[n] r) {
                    a = And (yes, x)
                    b = Or (a, no)
                    d = Xor (no, b)
                    e = Not (d)
                    r = Where (e, p, q)
                }, else_branch = other () => (int32[n] s) { s = Where (x, p, q) }>
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (bool c, bool[n] x, int32[n] p, int32[n] q) => (int32[n] y) <
            bool yes = {1},
            bool[1] no = {0}
        > {
            y = If (c) <then_branch = then () => (r_1) {
                r_1 = Where (x, q, p)
            }, else_branch = other () => (int32[n] s) {
                s = Where (x, p, q)  # int32[n]
            }>  # int32[n]
        }
        ");
    }

    #[test]
    fn keeps_an_addition_that_changes_minus_zero() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x, int64[n] i) => (float[n] y, int64[n] j) <float zero = {0}, int64 none = {0}> {
                a = Neg (x)
                b = Add (a, zero)
                y = Abs (b)
                k = Neg (i)
                l = Add (k, none)
                j = Abs (l)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (float[n] x, int64[n] i) => (float[n] y, int64[n] j) <
            float zero = {0},
            int64 none = {0}
        > {
            a = Neg (x)
            b = Add (a, zero)
            y = Abs (b)  # float[n]
            k = Neg (i)
            j = Abs (k)  # int64[n]
        }
        ");
    }

    #[test]
    fn keeps_a_constant_that_broadcasts() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[3] x) => (float[2,3] y) <float[2,1] zero = {0, 0}> { y = Sub (x, zero) }";
        check_refuses(&DropNeutral, graph, "the constant broadcasts its partner to a larger shape");
    }

    #[test]
    fn composes_clips_and_idempotents() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y, float[n] z) <float zero = {0}, float six = {6}, float one = {1}, float ten = {10}> {
                a = Clip (x, zero, six)
                y = Clip (a, one, ten)
                r = Relu (x)
                s = Relu (r)
                t = Relu (s)
                z = Sqrt (t)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (float[n] x) => (float[n] y, float[n] z) <
            float zero = {0},
            float six = {6},
            float one = {1},
            float ten = {10}
        > {
            r = Relu (x)
            z = Sqrt (r)  # float[n]
            y = Clip (x, one, six)  # float[n]
        }
        ");
    }

    #[test]
    fn composes_clips_of_whole_numbers_that_floats_cannot_hold() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (int64[n] x, uint64[n] u) => (int64[n] y, uint64[n] v)
               <int64 a = {-4611686018427387905}, int64 b = {4611686018427387905}, int64 c = {-1152921504606846977},
                int64 d = {1152921504606846977}, uint64 e = {3}, uint64 f = {9223372036854775809}> {
                i = Clip (x, a, b)
                y = Clip (i, c, d)
                p = Clip (u, e, f)
                v = Clip (p, e, f)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (int64[n] x, uint64[n] u) => (int64[n] y, uint64[n] v) <
            int64 a = {-4611686018427387905},
            int64 b = {4611686018427387905},
            int64 c = {-1152921504606846977},
            int64 d = {1152921504606846977},
            uint64 e = {3},
            uint64 f = {9223372036854775809}
        > {
            p = Clip (u, e, f)
            v = Clip (p, e, f)  # uint64[n]
            y = Clip (x, c, d)  # int64[n]
        }
        ");
    }

    #[test]
    fn composes_clips_of_attributes_that_exclude_one_another() {
        let graph = "<ir_version: 4, opset_import: [\"\" : 9]>
            g (float[n] x) => (float[n] y, float[n] z) {
                a = Clip <min = -1.0, max = 2.0> (x)
                y = Clip <min = 0.0, max = 1.0> (a)
                b = Clip <min = 3.0, max = 4.0> (x)
                z = Clip <min = 0.0, max = 1.0> (b)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (float[n] x) => (float[n] y, float[n] z) {
            y = Clip <min = 0.0, max = 1.0> (x)  # float[n]
            z = Clip <min = 1.0, max = 1.0> (x)  # float[n]
        }
        ");
    }

    #[test]
    fn keeps_operands_that_old_versions_do_not_broadcast() {
        let graph = "<ir_version: 3, opset_import: [\"\" : 7]>
            g (float[2] a, float[2] b, float[2] c) => (float[2] y) { p = Max (a, b) y = Max (p, c) }";
        check_refuses(&DropNeutral, graph, "before opset 8 operands are not broadcast");
    }

    #[test]
    fn keeps_clips_between_zeros_of_both_signs() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y) <float zero = {0}, float minus = {-0.0}, float one = {1}> {
                a = Clip (x, minus, one)
                y = Clip (a, zero, one)
            }";
        check_refuses(&DropNeutral, graph, "the bounds are zeros of different signs");
    }

    #[test]
    fn keeps_clips_whose_bounds_are_computed() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x, float low) => (float[n] y) <float six = {6}> {
                a = Clip (x, low, six)
                y = Clip (a, low, six)
            }";
        check_refuses(&DropNeutral, graph, "a bound is computed or has more than 63 bits, or the bounds cross");
    }

    #[test]
    fn keeps_a_branch_of_a_where_that_is_broadcast() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (int64[1] x, int64[n] y) => (int64[n] z) <bool yes = {1}> { z = Where (yes, x, y) }";
        check_refuses(&DropNeutral, graph, "the chosen branch is broadcast to a larger shape");
    }

    #[test]
    fn takes_the_operands_of_the_same_kind() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] a, float[n] b, float[n] c) => (float[n] y, float[n] z) {
                p = Max (a, b)
                y = Max (p, c)
                s = Sum (a, b)
                t = Sum (s, c)
                z = Neg (t)
            }";
        insta::assert_snapshot!(check(&DropNeutral, graph), @"
        g (float[n] a, float[n] b, float[n] c) => (float[n] y, float[n] z) {
            t = Sum (a, b, c)
            z = Neg (t)  # float[n]
            y = Max (a, b, c)  # float[n]
        }
        ");
    }

    #[test]
    fn keeps_nodes_that_differ_or_round() {
        let keeps = |body: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g (float[2] a, float[2] b, int64[2] i, int64[2] j, bool[2] c)
                => (float[2] y, int64[2] k) <bool[2] yes = {{1, 1}}, bool[2] mixed = {{1, 0}}> {{ {body} }}"
            );
            crate::testing::check_untouched(&DropNeutral, &graph);
        };
        keeps("p = Abs (a) y = Floor (p) k = Neg (i)");
        keeps("p = Min (a, b) y = Max (p, a) k = Neg (i)");
        keeps("p = Max (a, b) y = Sum (p, a) k = Neg (i)");
        // ONNX Runtime may turn -0 into +0 on its way through a Where.
        keeps("p = Not (c) y = Where (p, a, b) k = Neg (i)");
        keeps("p = Sin (a) q = Where (yes, p, b) y = Neg (q) k = Neg (i)");
        keeps("y = Neg (a) p = Abs (i) q = Abs (j) r = Where (mixed, p, q) k = Neg (r)");
        keeps("y = Neg (a) p = Abs (i) q = Abs (j) r = Where (c, p, q) k = Neg (r)");
    }
}
