//! Removes casts and layout nodes that hand their input on unchanged.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Replacement, Rule, Saving, operands::int64s, pat,
    rewrite, rule,
};
use lathe_ir::{DataType, Model, Node, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct DropNoopLayout;

static INFO: Info = Info {
    name: "drop-noop-layout",
    summary: "removes casts and layout nodes that hand their input on unchanged",
    doc: "Casts to the type a value has, casts back from a wider type, Reshape, Flatten, Squeeze, Unsqueeze, Expand \
          and Tile (also two in a row) that end in the shape they began with, identity permutations, Slices of the \
          full range, Pads by 0, Resize by 1, Splits into one part and Concats of one are removed, and Concats lose \
          their empty inputs. Never drops a narrowing cast. Declines where shapes are not provably equal, and where \
          only a copy can give a graph input or a second output its own output name.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for DropNoopLayout {
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
        rule("drop-cast", pat!(node: Cast|CastLike(x, ..)), |m, _| {
            let from = m.elem("x")?;
            m.only_if(Some(from) == m.facts().elem(m.value("output")))?;
            unchanged(m)
        }),
        rule("compose-casts", pat!(outer: Cast(inner: Cast(x))), |m, g| {
            let (from, to) = (m.elem("x")?, m.elem("output")?);
            let between = m.facts().elem(m.made("inner")).ok_or(Refusal::NoMatch)?;
            m.require(holds_all(between, from) && to != DataType::String, "the first cast may lose something")?;
            if from == to {
                return unchanged(m);
            }
            let mut cast = Node::new("Cast");
            cast.attributes = m.node("outer").attributes.clone();
            Ok(g.node(cast, &[m.value("x")]))
        })
        .sharing(),
        rule("drop-regrouping", pat!(node: Reshape|Flatten|Squeeze|Unsqueeze|Expand|Tile(x, ..)), |m, _| {
            m.only_if(m.same_shape("x", "output"))?;
            unchanged(m)
        }),
        rule(
            "drop-inverse-regrouping",
            pat!(outer: Reshape|Flatten|Squeeze|Unsqueeze(inner: Reshape|Flatten|Squeeze|Unsqueeze(x, ..), ..)),
            |m, _| {
                m.only_if(m.same_shape("x", "output"))?;
                unchanged(m)
            },
        )
        .sharing(),
        rule("drop-transpose", pat!(node: Transpose(x)), |m, _| {
            let perm = m.perm("node")?;
            m.only_if(perm.iter().enumerate().all(|(at, &axis)| at == axis))?;
            unchanged(m)
        }),
        rule("drop-slice", pat!(node: Slice(x, ..)), |m, _| {
            m.only_if(m.same_shape("x", "output"))?;
            let steps = int64s(m, m.node("node"), "steps", 4)?.unwrap_or_default();
            m.require(steps.iter().all(|&step| step > 0), "the Slice reverses an axis")?;
            unchanged(m)
        }),
        rule("drop-pad", pat!(node: Pad(x, ..)), |m, _| {
            m.only_if(m.same_shape("x", "output"))?;
            let old = if m.node("node").attribute("paddings").is_some() { "paddings" } else { "pads" };
            let pads = int64s(m, m.node("node"), old, 1)?.ok_or(Refusal::NoMatch)?;
            m.require(pads.iter().all(|&pad| pad == 0), "the Pad shifts its input")?;
            unchanged(m)
        }),
        rule("drop-resize", pat!(node: Resize|Upsample(x, ..)), |m, _| {
            m.only_if(m.same_shape("x", "output"))?;
            let crops = m.node("node").string("coordinate_transformation_mode") == Some("tf_crop_and_resize");
            m.require(!crops, "the Resize crops")?;
            m.require(scales_are_one(m), "the scales are not known to be 1")?;
            unchanged(m)
        }),
        rule("drop-split", pat!(node: Split(x, ..)), |m, _| {
            m.only_if(m.node("node").outputs().len() == 1)?;
            unchanged(m)
        }),
        rule("drop-concat", pat!(node: Concat(x)), |m, _| unchanged(m)),
        rule("drop-empty-parts", pat!(node: Concat(_, ..)), |m, g| {
            let node = m.node("node");
            m.only_if(node.inputs().len() > 1)?;
            let axis = node.int("axis").unwrap_or(1);
            let empty = |v: &Option<ValueId>| {
                let shape = v.and_then(|v| m.facts().shape(v))?;
                let axis = m.axis(axis, shape.len()).ok()?;
                Some(shape[axis].as_known() == Some(0))
            };
            let full: Vec<Option<ValueId>> = node.inputs().iter().copied().filter(|v| empty(v) != Some(true)).collect();
            m.only_if(!full.is_empty() && full.len() < node.inputs().len())?;
            let made = g.node_with(Node::new("Concat").with("axis", axis), &full, 1);
            Ok(Replacement::from(made))
        }),
    ]
}

/// The input takes the place of the output.
fn unchanged(m: &Match) -> Result<ValueId, Refusal> {
    m.require_replaceable("output", "x")?;
    Ok(m.value("x"))
}

/// Whether a `Resize` or `Upsample` provably scales by exactly 1; sizes that equal the shape do.
fn scales_are_one(m: &Match) -> bool {
    let node = m.node("node");
    if let Some(lathe_ir::AttributeValue::Floats(scales)) = node.attribute("scales") {
        return scales.iter().all(|&scale| scale == 1.0);
    }
    let old = node.is("Upsample") || m.opset() < 11;
    let operand = |index| node.input(index).filter(|&v| m.graph().constant(v).is_none_or(|t| !t.is_empty()));
    match (operand(if old { 1 } else { 2 }), operand(3)) {
        (Some(scales), _) => {
            let scales = m.graph().constant(scales).and_then(|t| t.to_f64s());
            scales.is_some_and(|all| all.iter().all(|&scale| scale == 1.0))
        }
        (None, Some(_)) => node.string("keep_aspect_ratio_policy").is_none_or(|policy| policy == "stretch"),
        (None, None) => false,
    }
}

/// Whether every value of type `from` is one of type `to`.
fn holds_all(to: DataType, from: DataType) -> bool {
    use DataType::*;
    /// Bits of a whole number without its sign; bits of a fraction with its leading one.
    fn digits(ty: DataType) -> Option<(bool, usize)> {
        Some(match ty {
            Bool => (false, 1),
            Uint8 | Uint16 | Uint32 | Uint64 => (false, ty.bits()),
            Int8 | Int16 | Int32 | Int64 => (true, ty.bits() - 1),
            Bfloat16 => (true, 8),
            Float16 => (true, 11),
            Float => (true, 24),
            Double => (true, 53),
            _ => return None,
        })
    }
    let (Some((negative, bits)), Some((can_be_negative, room))) = (digits(from), digits(to)) else { return false };
    match (from, to) {
        (a, b) if a == b => true,
        // Bfloat16 reaches further than float16, float16 is finer.
        (Bfloat16, Float16) | (Float16, Bfloat16) | (_, Bool) => false,
        (a, b) if a.is_float() && !b.is_float() => false,
        _ => bits <= room && (can_be_negative || !negative),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};

    #[test]
    fn drops_a_cast_to_the_same_type_and_a_detour() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float16[n] x) => (float16[n] y, float16[n] z) {
                a = Relu (x)
                w = Cast <to = 1> (a)
                b = Cast <to = 10> (w)
                c = Cast <to = 10> (b)
                y = Abs (c)
                z = Neg (c)
            }";
        insta::assert_snapshot!(check(&DropNoopLayout, graph), @"
        g (float16[n] x) => (float16[n] y, float16[n] z) {
            a = Relu (x)
            y = Abs (a)  # float16[n]
            z = Neg (a)  # float16[n]
        }
        ");
    }

    #[test]
    fn keeps_a_narrowing_detour() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n] x) => (float[n] y) {
                h = Cast <to = 10> (x)
                w = Cast <to = 1> (h)
                y = Abs (w)
            }";
        check_refuses(&DropNoopLayout, graph, "the first cast may lose something");
    }

    #[test]
    fn keeps_a_cast_between_an_input_and_an_output() {
        let graph =
            "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n] x) => (float[n] y) { y = Cast <to = 1> (x) }";
        check_refuses(&DropNoopLayout, graph, "an output needs a node of its own graph that produces it");
    }

    #[test]
    fn drops_layout_nodes_without_effect() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[n,3,4,4] x) => (float[n,3,4,4] y)
               <int64[1] zero = {0}, int64[1] one = {1}, int64[1] far = {9223372036854775807}, int64[8] pads = {0,0,0,0,0,0,0,0},
                int64[4] same = {0,3,4,4}, int64[4] ones = {1,1,1,1}, float[4] scales = {1,1,1,1}, float[0] roi = {}, int64[2] flat = {0,-1}> {
                a = Relu (x)
                b = Slice (a, zero, far, one)
                c = Pad (b, pads)
                d = Reshape (c, same)
                e = Tile (d, ones)
                f = Expand (e, ones)
                h = Transpose <perm = [0,1,2,3]> (f)
                i = Resize <mode = \"nearest\"> (h, roi, scales)
                j = Concat <axis = 1> (i)
                k = Unsqueeze (j, zero)
                l = Squeeze (k, zero)
                m = Reshape (l, flat)
                o = Reshape (m, same)
                y = Neg (o)
            }";
        insta::assert_snapshot!(check(&DropNoopLayout, graph), @"
        g (float[n,3,4,4] x) => (float[n,3,4,4] y) <
            int64[1] zero = {0},
            int64[1] one = {1},
            int64[1] far = {9223372036854775807},
            int64[8] pads = {0, 0, 0, 0, 0, 0, 0, 0},
            int64[4] same = {0, 3, 4, 4},
            int64[4] ones = {1, 1, 1, 1},
            float[4] scales = {1, 1, 1, 1},
            float[0] roi = {},
            int64[2] flat = {0, -1}
        > {
            a = Relu (x)
            y = Neg (a)  # float[n,3,4,4]
        }
        ");
    }

    #[test]
    fn keeps_a_reversed_axis() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[4] x) => (float[4] y) <int64[1] last = {-1}, int64[1] far = {-9223372036854775807}, int64[1] zero = {0}, int64[1] back = {-1}> {
                a = Relu (x)
                b = Slice (a, last, far, zero, back)
                y = Neg (b)
            }";
        check_refuses(&DropNoopLayout, graph, "the Slice reverses an axis");
    }

    #[test]
    fn keeps_a_pad_that_shifts() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (float[4] x) => (float[4] y) <int64[2] pads = {1, -1}> {
                a = Relu (x)
                b = Pad (a, pads)
                y = Neg (b)
            }";
        check_refuses(&DropNoopLayout, graph, "the Pad shifts its input");
    }

    #[test]
    fn keeps_what_is_not_known_to_be_idle() {
        let refuses = |opset: i64, weights: &str, body: &str, reason: &str| {
            let ir_version = if opset < 10 { 3 } else { 8 };
            let graph = format!(
                "<ir_version: {ir_version}, opset_import: [\"\" : {opset}]>
                g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{weights}> {{ a = Relu (x) {body} y = Neg (b) }}"
            );
            check_refuses(&DropNoopLayout, &graph, reason);
        };
        let crop = "float[8] roi = {0, 0, 0, 0, 1, 1, 1, 1}, float[0] none = {}, int64[4] to = {1, 2, 4, 4}";
        let mode = "mode = \"linear\", coordinate_transformation_mode = \"tf_crop_and_resize\"";
        refuses(13, crop, &format!("b = Resize <{mode}> (a, roi, none, to)"), "the Resize crops");
        let near = "float[0] roi = {}, float[4] near = {1, 1, 1.01, 1}";
        refuses(13, near, "b = Resize <mode = \"linear\"> (a, roi, near)", "the scales are not known to be 1");
        let sizes = "float[0] none = {}, int64[4] to = {1, 2, 4, 4}, float[1,2,4,4] b";
        let keeping = "b = Resize <mode = \"linear\", keep_aspect_ratio_policy = \"not_larger\"> (a, none, none, to)";
        refuses(18, sizes, keeping, "the scales are not known to be 1");
    }

    #[test]
    fn keeps_casts_from_unknown_types() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17, \"custom\" : 1]>
            g (float[2] x) => (float[2] y) { a = custom.F (x) b = Cast <to = 11> (a) y = Cast <to = 1> (b) }";
        check_refuses(&DropNoopLayout, graph, "the element type of `x` is unknown");
    }

    #[test]
    fn drops_empty_parts_in_a_branch() {
        let graph = "<ir_version: 8, opset_import: [\"\" : 17]>
            g (bool c, float[n,3] x) => (float[n,3] y) <float[0,3] none = {}> {
                y = If (c) <then_branch = yes () => (float[n,3] p) {
                    a = Neg (x)
                    p = Concat <axis = 0> (none, a, none)
                }, else_branch = no () => (float[n,3] q) { q = Abs (x) }>
            }";
        insta::assert_snapshot!(check(&DropNoopLayout, graph), @"
        g (bool c, float[n,3] x) => (float[n,3] y) <
            float[0,3] none = {}
        > {
            y = If (c) <then_branch = yes () => (a) {
                a = Neg (x)
            }, else_branch = no () => (float[n,3] q) {
                q = Abs (x)  # float[n,3]
            }>  # float[n,3]
        }
        ");
    }

    #[test]
    fn knows_which_types_hold_which() {
        use DataType::*;
        assert!(
            holds_all(Float, Float16) && holds_all(Int64, Int32) && holds_all(Double, Int32) && holds_all(Int32, Bool)
        );
        assert!(
            !holds_all(Float16, Float)
                && !holds_all(Float, Int32)
                && !holds_all(Uint64, Int8)
                && !holds_all(Bool, Int8)
        );
    }

    #[test]
    fn keeps_what_changes_its_input() {
        let keeps = |weights: &str, body: &str| {
            let graph = format!(
                "<ir_version: 8, opset_import: [\"\" : 17]> g (float[1,2,4,4] x, float[0,3] e) => (float[] y)
                <int64[1] two = {{2}}{weights}> {{ a = Relu (x) {body} y = Neg (b) }}"
            );
            crate::testing::check_untouched(&DropNoopLayout, &graph);
        };
        keeps(", int64[2] to = {8, 4}", "b = Reshape (a, to)");
        keeps(", int64[2] to = {8, 4}, int64[1] flat = {32}", "c = Reshape (a, to) b = Reshape (c, flat)");
        keeps("", "b = Transpose <perm = [0, 1, 3, 2]> (a)");
        keeps(", int64[1] zero = {0}", "b = Slice (a, zero, two, two)");
        keeps(", float[0] none = {}, int64[4] to = {1, 2, 8, 8}", "b = Resize <mode = \"linear\"> (a, none, none, to)");
        // The other half is there though nothing reads it.
        keeps("", "b, c = Split <axis = 1> (a)");
        keeps("", "d = Relu (e) b = Concat <axis = 0> (d, d)");
        keeps("", "b = Concat <axis = 1> (a, a)");
    }
}
