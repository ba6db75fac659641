//! Turns spelled-out rotary embeddings into `RotaryEmbedding`.

use crate::{Context, Error, Info, Kind, Match, Outcome, Pass, Quantity, Refusal, Rule, operands, pat, rewrite, rule};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FuseRotary;

static INFO: Info = Info {
    name: "fuse-rotary",
    summary: "replaces the steps of a rotary embedding by one RotaryEmbedding",
    doc: "x·cos + turned(x)·sin, where turned(x) puts the negated second half of the last axis before the first, becomes \
          RotaryEmbedding, with cosines and sines of one half. Needs opset 23, heads as [batch, heads, positions, size], \
          and cosines and sines of angles whose two halves are the same value. Batches that share their angles get \
          copies of them, for all heads and layers at once where an input of the model has the same batch. Declines \
          where inner values have other uses.",
    options: &[],
    // The products are the same; a kernel may add them without rounding in between.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[Quantity::Nodes],
    source: Some("Su et al. 2021, arXiv:2104.09864"),
};

impl Pass for FuseRotary {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &Context) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let pattern = pat!(Add*(Mul*(a, b), Mul*(turned: Concat(Neg(high), low), sin)));
    vec![rule("fuse-halves", pattern, fuse)]
});

fn fuse(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let (high, low) = (m.value("high"), m.value("low"));
    let (a, b) = (m.value("a"), m.value("b"));
    // Either factor may be the rotated value.
    let (x, cos) = match (is_half(m, high, a, true), is_half(m, high, b, true)) {
        (true, _) => (a, b),
        (_, true) => (b, a),
        _ => return Err(Refusal::no_match()),
    };
    m.only_if(is_half(m, low, x, false))?;
    let [batch, _, positions, size] = m.facts().shape(x).ok_or("the shape of the heads is unknown")? else {
        return Err("the heads do not have four axes".into());
    };
    let size = size.as_known().ok_or("the size of a head is unknown")?;
    let axis = m.axis(m.node("turned").int("axis").unwrap_or(0), 4)?;
    m.only_if(axis == 3)?;
    m.require(m.opset() >= 23, "RotaryEmbedding needs opset 23")?;
    m.require_no_new_axes(x, &[])?;
    let elem = m.facts().elem(x).ok_or("the element type is unknown")?;
    m.require(matches!(elem, DataType::Float | DataType::Float16), "the elements are not float or float16")?;
    let cos = Waves::find(m, cos, "Cos", size)?;
    let sin = Waves::find(m, m.value("sin"), "Sin", size)?;
    for waves in [&cos, &sin] {
        m.require(waves.positions == *positions, "the angles are for another number of positions")?;
        let fits = waves.batch == *batch || waves.batch == DimExpr::from(1);
        m.require(fits, "the angles are for another batch")?;
    }
    let tables = [cos.halved(m, g, elem)?, sin.halved(m, g, elem)?];
    let mut inputs = vec![x];
    let mut target = None;
    for (table, waves) in tables.into_iter().zip([&cos, &sin]) {
        inputs.push(if waves.batch == *batch {
            table
        } else {
            let target = *target.get_or_insert_with(|| repeated(m, g, x, batch));
            g.node(Node::new("Expand"), &[table, target])
        });
    }
    Ok(g.node(Node::new("RotaryEmbedding"), &inputs))
}

/// The shape `[batch, 1, 1]`.
fn repeated(m: &Match, g: &mut Patch, x: ValueId, batch: &DimExpr) -> ValueId {
    if let Some(batch) = batch.as_known() {
        return g.int64s("target", &[batch, 1, 1]);
    }
    // An input of the model serves all layers at once.
    let alike = |v: &ValueId| m.facts().shape(*v).is_some_and(|shape| shape.first() == Some(batch));
    let sized = m.graph().main().inputs().iter().copied().find(alike).unwrap_or(x);
    let batch = g.node(Node::new("Shape").with("start", 0).with("end", 1), &[sized]);
    let ones = g.int64s("ones", &[1, 1]);
    g.node(Node::new("Concat").with("axis", 0), &[batch, ones])
}

/// Whether `value` is the second (`high`) or first half of the last axis of `x`.
fn is_half(m: &Match, value: ValueId, x: ValueId, high: bool) -> bool {
    let size = |v: ValueId| m.facts().shape(v)?.last()?.as_known();
    let (Some(whole), Some(half), Some(producer)) = (size(x), size(value), m.graph().producer(value)) else {
        return false;
    };
    let node = m.graph().node(producer);
    let Some(ndim) = m.facts().ndim(x).filter(|_| node.input(0) == Some(x) && half * 2 == whole) else { return false };
    if node.is("Split") {
        let outputs = [node.output(0), node.output(1)];
        let axis = m.axis(node.int("axis").unwrap_or(0), ndim);
        return axis.is_ok_and(|axis| axis == ndim - 1)
            && node.outputs().len() == 2
            && outputs[usize::from(high)] == Some(value);
    }
    let ranges = match node.is("Slice") {
        true => operands::slice_ranges(m.graph(), m.facts(), node, ndim),
        false => return false,
    };
    let end = if high { whole } else { half };
    // Slice takes ends beyond the axis for its size.
    ranges.is_ok_and(|ranges| {
        let [range] = ranges[..] else { return false };
        let from_front = |at: i64| if at < 0 { at + whole } else { at.min(whole) };
        let bounds = (from_front(range.start), from_front(range.end));
        range.axis == ndim - 1 && range.step == 1 && bounds == (end - half, end)
    })
}

/// Cosines or sines whose last axis is twice the same half.
struct Waves {
    op: &'static str,
    /// The angles of one half, `[…, positions, size / 2]`.
    angles: ValueId,
    batch: DimExpr,
    positions: DimExpr,
    /// What the waves are multiplied by.
    factor: f64,
}

impl Waves {
    /// Reads how `value`, `[batch, 1, positions, size]`, was computed.
    fn find(m: &Match, value: ValueId, op: &'static str, size: i64) -> Result<Waves, Refusal> {
        let shape = m.facts().shape(value).ok_or("the shape of the cosines or sines is unknown")?;
        let one = DimExpr::from(1);
        let (batch, positions) = match shape {
            [batch, heads, positions, _] if *heads == one => (batch.clone(), positions.clone()),
            [heads, positions, _] if *heads == one => (one, positions.clone()),
            [positions, _] => (one, positions.clone()),
            _ => return Err("the cosines or sines are not the same for all heads".into()),
        };
        let unknown = || Refusal::from("the cosines or sines are not those of angles that are computed here");
        let (mut at, mut factor) = (value, 1.0);
        let doubled = loop {
            let node = m.graph().producer(at).map(|id| m.graph().node(id)).ok_or_else(unknown)?;
            m.require(last(m, at) == Some(size), "the cosines or sines have another size than the heads")?;
            let floats = [DataType::Float, DataType::Float16, DataType::Double];
            m.require(
                m.facts().elem(at).is_some_and(|elem| floats.contains(&elem)),
                "the cosines or sines are rounded",
            )?;
            let input = node.input(0).ok_or_else(unknown)?;
            at = match node.op_type.as_str() {
                _ if !node.is_standard() || node.scope() != m.scope() => return Err(unknown()),
                name if name == op => break input,
                "Unsqueeze" | "Squeeze" | "Reshape" | "Identity" | "Cast" => input,
                "Mul" => {
                    let other = node.input(1).ok_or_else(unknown)?;
                    let number = |v| m.graph().constant(v).and_then(Tensor::scalar_f64);
                    let (inner, number) = match (number(input), number(other)) {
                        (None, Some(number)) => (input, number),
                        (Some(number), None) => (other, number),
                        _ => return Err(unknown()),
                    };
                    factor *= number;
                    inner
                }
                _ => return Err(unknown()),
            };
        };
        let joined = layout_source(m, doubled, size);
        let node = m.graph().producer(joined).map(|id| m.graph().node(id)).filter(|node| node.is("Concat"));
        let node = node.ok_or("the angles of the two halves are not joined from one value")?;
        let [Some(first), Some(second)] = *node.inputs() else {
            return Err("the angles of the two halves are not joined from one value".into());
        };
        let ndim = m.facts().ndim(joined).ok_or("the number of axes of the angles is unknown")?;
        let axis = m.axis(node.int("axis").unwrap_or(0), ndim)?;
        let twice = first == second && axis + 1 == ndim && last(m, first) == Some(size / 2) && size % 2 == 0;
        m.require(twice, "the angles of the two halves are not joined from one value")?;
        // Where nothing but these axes is longer than one, a Reshape gives them back.
        let shape = m.facts().shape(first).ok_or("the shape of the angles is unknown")?;
        let long = |shape: &[DimExpr]| shape.iter().filter(|d| **d != DimExpr::from(1)).cloned().collect::<Vec<_>>();
        let wanted = [batch.clone(), positions.clone(), DimExpr::from(size / 2)];
        m.require(long(shape) == long(&wanted), "the angles have other axes than batch, positions and size")?;
        Ok(Waves { op, angles: first, batch, positions, factor })
    }

    /// The waves of one half, `[batch, positions, size / 2]`, in the type of the heads.
    fn halved(&self, m: &Match, g: &mut Patch, elem: DataType) -> Result<ValueId, Refusal> {
        let from = m.facts().elem(self.angles).ok_or("the element type of the angles is unknown")?;
        let shape = m.facts().shape(self.angles).ok_or("the shape of the angles is unknown")?;
        let half = shape.last().and_then(DimExpr::as_known).ok_or("the size of the angles is unknown")?;
        let mut angles = self.angles;
        if shape.len() != 3 || shape[..2] != [self.batch.clone(), self.positions.clone()] {
            let sizes = match (self.batch.as_known(), self.positions.as_known()) {
                (Some(batch), _) => [batch, -1, half],
                (None, Some(positions)) => [-1, positions, half],
                (None, None) => return Err("neither the batch nor the positions of the angles are known".into()),
            };
            angles = g.reshape(angles, &sizes);
        }
        let mut waves = g.node(Node::new(self.op), &[angles]);
        if self.factor != 1.0 {
            let factor =
                Tensor::from_f64s(from, &[], &[self.factor]).ok_or("the factor of the waves is no constant")?;
            let factor = g.constant("factor", factor);
            waves = g.node(Node::new("Mul"), &[waves, factor]);
        }
        if from != elem {
            waves = g.node(Node::new("Cast").with("to", elem), &[waves]);
        }
        Ok(waves)
    }
}

fn last(m: &Match, value: ValueId) -> Option<i64> {
    m.facts().shape(value)?.last()?.as_known()
}

/// What `value` is a view of with the same last axis.
fn layout_source(m: &Match, value: ValueId, size: i64) -> ValueId {
    let mut at = value;
    while let Some(node) = m.graph().producer(at).map(|id| m.graph().node(id)) {
        let layout = ["Unsqueeze", "Squeeze", "Reshape", "Identity"].iter().any(|op| node.is(op));
        let Some(input) = node.input(0).filter(|&v| layout && last(m, v) == Some(size)) else { break };
        at = input;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};
    use insta::assert_snapshot;

    const SLICED: &str = r#"<opset_import: ["" : 23]>
        g (float[B,2,S,4] x, float[B,S] p) => (float[B,2,S,4] y)
        <float[2] frequencies = {1, 0.1}, int64[1] one = {1}, int64[1] end = {-1}, int64[1] zero = {0}, int64[1] two = {2},
         int64[1] all = {9223372036854775807}> {
            u = Unsqueeze (p, end)
            f = Mul (u, frequencies)
            both = Concat <axis = -1> (f, f)
            cosines = Cos (both)
            sines = Sin (both)
            cos = Unsqueeze (cosines, one)
            sin = Unsqueeze (sines, one)
            a = Mul (x, cos)
            low = Slice (x, zero, two, end)
            high = Slice (x, two, all, end)
            minus = Neg (high)
            turned = Concat <axis = -1> (minus, low)
            b = Mul (turned, sin)
            y = Add (a, b)
        }"#;

    #[test]
    fn fuses_the_sum_of_two_products() {
        assert_snapshot!(check(&FuseRotary, SLICED), @"
        g (float[B,2,S,4] x, float[B,S] p) => (float[B,2,S,4] y) <
            float[2] frequencies = {1, 0.1},
            int64[1] one = {1},
            int64[1] end = {-1},
            int64[1] zero = {0},
            int64[1] two = {2},
            int64[1] all = {9223372036854775807}
        > {
            u = Unsqueeze (p, end)
            f = Mul (u, frequencies)
            y_1 = Cos (f)
            y_2 = Sin (f)
            y = RotaryEmbedding (x, y_1, y_2)  # float[B,2,S,4]
        }
        ");
    }

    #[test]
    fn takes_halves_of_a_split_in_any_order_with_a_factor() {
        let graph = SLICED
            .replace("low = Slice (x, zero, two, end)", "low, high = Split <axis = -1, num_outputs = 2> (x)")
            .replace("high = Slice (x, two, all, end)", "")
            .replace("cos = Unsqueeze (cosines, one)", "more = Mul (cosines, scale) cos = Unsqueeze (more, one)")
            .replace("int64[1] one", "float scale = {1.5}, int64[1] one")
            .replace("Mul (x, cos)", "Mul (cos, x)")
            .replace("Add (a, b)", "Add (b, a)");
        let fused = check(&FuseRotary, &graph);
        assert!(fused.contains("y = RotaryEmbedding (x, ") && fused.contains("1.5"), "{fused}");
    }

    #[test]
    fn repeats_angles_that_all_batches_share() {
        let graph = SLICED.replace("float[B,S] p", "float[1,S] p");
        assert_snapshot!(check(&FuseRotary, &graph), @"
        g (float[B,2,S,4] x, float[1,S] p) => (float[B,2,S,4] y) <
            float[2] frequencies = {1, 0.1},
            int64[1] one = {1},
            int64[1] end = {-1},
            int64[1] zero = {0},
            int64[1] two = {2},
            int64[1] all = {9223372036854775807},
            int64[2] y_ones = {1, 1}
        > {
            u = Unsqueeze (p, end)
            f = Mul (u, frequencies)
            y_1 = Cos (f)
            y_2 = Sin (f)
            y_3 = Shape <start = 0, end = 1> (x)
            y_4 = Concat <axis = 0> (y_3, y_ones)
            y_5 = Expand (y_1, y_4)
            y_6 = Expand (y_2, y_4)
            y = RotaryEmbedding (x, y_5, y_6)  # float[B,2,S,4]
        }
        ");
    }

    #[test]
    fn works_in_half_precision_inside_a_branch() {
        let graph = r#"<opset_import: ["" : 23]>
            g (bool c, float16[B,2,S,4] x, float[B,S] p) => (float16[B,2,S,4] y)
            <float[2] frequencies = {1, 0.1}, int64[1] one = {1}, int64[1] end = {-1}, int64[1] zero = {0},
             int64[1] two = {2}, int64[1] four = {4}> {
                y = If (c) <then_branch = t () => (float16[B,2,S,4] r) {
                    u = Unsqueeze (p, end)
                    f = Mul (u, frequencies)
                    both = Concat <axis = -1> (f, f)
                    cosines = Cos (both)
                    sines = Sin (both)
                    cos16 = Cast <to = 10> (cosines)
                    sin16 = Cast <to = 10> (sines)
                    cos = Unsqueeze (cos16, one)
                    sin = Unsqueeze (sin16, one)
                    a = Mul (x, cos)
                    low = Slice (x, zero, two, end)
                    high = Slice (x, two, four, end)
                    minus = Neg (high)
                    turned = Concat <axis = -1> (minus, low)
                    b = Mul (turned, sin)
                    r = Add (a, b)
                }, else_branch = e () => (float16[B,2,S,4] z) { z = Neg (x) }>
            }"#;
        assert!(check(&FuseRotary, graph).contains("RotaryEmbedding"));
    }

    #[test]
    fn refuses() {
        check_refuses(&FuseRotary, &SLICED.replace(": 23", ": 22"), "needs opset 23");
        check_refuses(
            &FuseRotary,
            &SLICED
                .replace("(f, f)", "(f, u)")
                .replace("0.1}", "0.1}, float[3] other = {1, 2, 3}")
                .replace("f = Mul (u, frequencies)", "f = Mul (u, other)"),
            "not joined from one value",
        );
        check_refuses(
            &FuseRotary,
            &SLICED.replace("(float[B,2,S,4] y)", "(float[B,2,S,4] y, float[B,2,S,4] b)"),
            "graph output",
        );
        check_refuses(&FuseRotary, &SLICED.replace("sines = Sin (both)", "sines = Tanh (both)"), "not those of angles");
        check_refuses(&FuseRotary, &SLICED.replace("float", "double"), "not float or float16");
        check_untouched(
            &FuseRotary,
            &SLICED.replace("Concat <axis = -1> (minus, low)", "Concat <axis = -1> (low, minus)"),
        );
        check_untouched(&FuseRotary, &SLICED.replace("(x, two, all, end)", "(x, zero, two, end)"));
    }
}
