//! Replaces reads from sequences whose elements are known by the elements.

use crate::{
    Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, operands::with_axes, pat, rewrite,
    rule,
};
use lathe_ir::{Model, Node, Patch, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct InlineSequences;

static INFO: Info = Info {
    name: "inline-sequences",
    summary: "replaces reads from sequences whose elements are known by the elements",
    doc: "Exporters collect what a loop makes in a sequence and read it behind. Where a sequence is made by SequenceEmpty, \
          SequenceConstruct, SequenceInsert and SequenceErase at known positions, SequenceAt is the element, \
          SequenceLength a number and ConcatFromSequence a Concat. Declines where a sequence comes from elsewhere (an input, \
          a Loop), where a position is computed, and where it is outside the sequence.",
    options: &[],
    kind: Kind::Identical,
    lowers: &[Saving::Nodes],
    source: None,
};

impl Pass for InlineSequences {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

/// Insertions that are followed back.
const DEPTH: usize = 1024;

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("read-element", pat!(SequenceAt(sequence, position)), |m, _| {
            let elements = elements(m, m.value("sequence"))?;
            let place = place(m, m.value("position"), elements.len())?;
            let element = elements.get(place).copied().ok_or(OUTSIDE)?;
            m.require_free(m.value("output"), element)?;
            Ok(element)
        }),
        rule("count-elements", pat!(SequenceLength(sequence)), |m, g| {
            let length = elements(m, m.value("sequence"))?.len() as i64;
            let output = m.graph().is_output(m.value("output"));
            m.require(!output, "the number of elements is an output, which only a node can produce")?;
            Ok(g.constant("length", Tensor::from_i64s(&[], &[length])))
        }),
        rule("concat-elements", pat!(node: ConcatFromSequence(sequence)), concat_elements),
    ]
}

const OUTSIDE: &str = "the position is outside the sequence";

/// The elements of a sequence, in order.
fn elements(m: &Match, sequence: ValueId) -> Result<Vec<ValueId>, Refusal> {
    let graph = m.graph();
    let mut at = sequence;
    // From the last edit back to what the sequence began as.
    let mut edits = Vec::new();
    let mut found = loop {
        let node = graph.producer(at).map(|id| graph.node(id)).filter(|node| node.is_standard() && edits.len() < DEPTH);
        let node = node.ok_or("the sequence is not made of elements one by one")?;
        match node.op_type.as_str() {
            "SequenceEmpty" => break Vec::new(),
            "SequenceConstruct" => break node.inputs().iter().flatten().copied().collect(),
            "SequenceInsert" | "SequenceErase" => edits.push(node),
            "Identity" => {}
            _ => return Err("the sequence is not made of elements one by one".into()),
        }
        at = node.input(0).ok_or(Refusal::NoMatch)?;
    };
    for edit in edits.into_iter().rev() {
        if edit.is("SequenceInsert") {
            let element = edit.input(1).ok_or(Refusal::NoMatch)?;
            // One place more than there are elements: behind the last.
            let place = edit.input(2).map_or(Ok(found.len()), |v| place(m, v, found.len()))?;
            m.require(place <= found.len(), OUTSIDE)?;
            found.insert(place, element);
        } else {
            let last = found.len().checked_sub(1).ok_or(OUTSIDE)?;
            let place = edit.input(1).map_or(Ok(last), |v| place(m, v, found.len()))?;
            m.require(place <= last, OUTSIDE)?;
            found.remove(place);
        }
    }
    Ok(found)
}

/// A position counted from the front.
fn place(m: &Match, position: ValueId, length: usize) -> Result<usize, Refusal> {
    let position = m.known_int64s(position).filter(|all| all.len() == 1).ok_or("a position is computed")?[0];
    let from_front = if position < 0 { position.checked_add(length as i64) } else { Some(position) };
    from_front.and_then(|at| usize::try_from(at).ok()).ok_or_else(|| OUTSIDE.into())
}

fn concat_elements(m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
    let elements = elements(m, m.value("sequence"))?;
    m.require(!elements.is_empty(), "there are no elements to join")?;
    let node = m.node("node");
    let axis = node.int("axis").ok_or("the ConcatFromSequence states no axis")?;
    let mut parts = elements;
    if node.int("new_axis").unwrap_or(0) != 0 {
        let ndim = m.facts().ndim(parts[0]).ok_or("the number of axes of an element is unknown")?;
        let new = m.axis(axis, ndim + 1)?;
        parts = parts.into_iter().map(|part| with_axes(m, g, Node::new("Unsqueeze"), 13, part, &[new])).collect();
    }
    Ok(g.node(Node::new("Concat").with("axis", axis), &parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses};
    use insta::assert_snapshot;

    fn graph(body: &str) -> String {
        format!(
            "<ir_version: 9, opset_import: [\"\" : 17]>
            g (float[2,n] x, float[2,n] z, int64 k) => (float[2,n] y) <
                int64 zero = {{0}}, int64 one = {{1}}, int64 last = {{-1}}, int64 five = {{5}}
            > {{
                a = Neg (x)
                b = Abs (z)
                {body}
            }}"
        )
    }

    #[test]
    fn reads_what_was_inserted() {
        let body =
            "e = SequenceEmpty () s = SequenceInsert (e, a) t = SequenceInsert (s, b, zero) u = SequenceErase (t, last)
                    f = SequenceAt (t, one) g = SequenceAt (u, zero) y = Sub (f, g)";
        assert_snapshot!(check(&InlineSequences, &graph(body)), @r#"
        g (float[2,n] x, float[2,n] z, int64 k) => (float[2,n] y) <
            int64 zero = {0},
            int64 one = {1},
            int64 last = {-1},
            int64 five = {5}
        > {
            a = Neg (x)
            b = Abs (z)
            y = Sub (a, b)  # float[2,n]
        }
        "#);
    }

    #[test]
    fn joins_and_counts_elements() {
        let body = "s = SequenceConstruct (a, b) c = ConcatFromSequence <axis = 1> (s) d = ConcatFromSequence <axis = -1, new_axis = 1> (s)
                    h = SequenceLength (s) f = Cast <to = 1> (h) m = ReduceMax <keepdims = 0> (c) o = ReduceMax <axes = [2], keepdims = 0> (d)
                    p = Mul (o, m) y = Mul (p, f)";
        assert_snapshot!(check(&InlineSequences, &graph(body)), @r#"
        g (float[2,n] x, float[2,n] z, int64 k) => (float[2,n] y) <
            int64 zero = {0},
            int64 one = {1},
            int64 last = {-1},
            int64 five = {5},
            int64[1] d_axes = {2},
            int64[1] d_axes_1 = {2},
            int64 h = {2}
        > {
            a = Neg (x)
            b = Abs (z)
            f = Cast <to = 1> (h)
            c = Concat <axis = 1> (a, b)
            m = ReduceMax <keepdims = 0> (c)
            d_1 = Unsqueeze (a, d_axes)
            d_2 = Unsqueeze (b, d_axes_1)
            d = Concat <axis = -1> (d_1, d_2)
            o = ReduceMax <axes = [2], keepdims = 0> (d)
            p = Mul (o, m)
            y = Mul (p, f)  # float[2,n]
        }
        "#);
    }

    #[test]
    fn reads_in_a_branch() {
        let body = "s = SequenceConstruct (a, b) c = Cast <to = 9> (k)
                    y = If (c) <then_branch = t () => (float[2,n] p) { q = SequenceAt (s, last) p = Neg (q) },
                                else_branch = e () => (float[2,n] r) { r = Abs (x) }>";
        assert_snapshot!(check(&InlineSequences, &graph(body)), @r#"
        g (float[2,n] x, float[2,n] z, int64 k) => (float[2,n] y) <
            int64 zero = {0},
            int64 one = {1},
            int64 last = {-1},
            int64 five = {5}
        > {
            b = Abs (z)
            c = Cast <to = 9> (k)
            y = If (c) <then_branch = t () => (float[2,n] p) {
                p = Neg (b)  # float[2,n]
            }, else_branch = e () => (float[2,n] r) {
                r = Abs (x)  # float[2,n]
            }>  # float[2,n]
        }
        "#);
    }

    #[test]
    fn refuses_what_is_not_known() {
        let computed = "s = SequenceConstruct (a, b) f = SequenceAt (s, k) y = Neg (f)";
        check_refuses(&InlineSequences, &graph(computed), "a position is computed");
        let inserted = "s = SequenceConstruct (a, b) t = SequenceInsert (s, a, k) f = SequenceAt (t, zero) y = Neg (f)";
        check_refuses(&InlineSequences, &graph(inserted), "a position is computed");
        let outside = "s = SequenceConstruct (a, b) f = SequenceAt (s, five) y = Neg (f)";
        check_refuses(&InlineSequences, &graph(outside), OUTSIDE);
        for edit in ["SequenceInsert (s, a, five)", "SequenceErase (s, five)"] {
            let edited = format!("s = SequenceConstruct (a, b) t = {edit} f = SequenceAt (t, zero) y = Neg (f)");
            check_refuses(&InlineSequences, &graph(&edited), OUTSIDE);
        }
        let split = "s = SplitToSequence <axis = 0> (a, one) f = SequenceAt (s, zero) y = Concat <axis = 0> (f, f)";
        check_refuses(&InlineSequences, &graph(split), "the sequence is not made of elements one by one");
        let empty = "e = SequenceEmpty () f = ConcatFromSequence <axis = 0> (e) y = Add (a, f)";
        check_refuses(&InlineSequences, &graph(empty), "there are no elements to join");
        let joined = "s = SequenceConstruct (a, b) f = ConcatFromSequence (s) y = Add (a, f)";
        check_refuses(&InlineSequences, &graph(joined), "the ConcatFromSequence states no axis");
        let stacked = joined.replace("ConcatFromSequence", "ConcatFromSequence <axis = 0, new_axis = 1>");
        let shapeless = graph(&stacked).replace("float[2,n] x", "float[] x");
        check_refuses(&InlineSequences, &shapeless, "the number of axes of an element is unknown");
    }

    #[test]
    fn refuses_an_output_that_nothing_would_produce() {
        let text = graph("s = SequenceConstruct (x, b) y = SequenceAt (s, zero)");
        check_refuses(&InlineSequences, &text, "an output needs a node of its own graph that produces it");
        let text = graph("s = SequenceConstruct (x, b) y = SequenceAt (s, one) w = SequenceLength (s)");
        let text = text.replace("(float[2,n] y)", "(float[2,n] y, int64 w)");
        assert!(check(&InlineSequences, &text).contains("w = SequenceLength"));
        let text = graph("s = SequenceConstruct (a, b) y = Neg (a) w = SequenceLength (s)");
        let text = text.replace("(float[2,n] y)", "(float[2,n] y, int64 w)");
        check_refuses(&InlineSequences, &text, "the number of elements is an output, which only a node can produce");
    }
}
