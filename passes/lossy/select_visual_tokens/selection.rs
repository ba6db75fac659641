//! Which tokens stay: nodes that choose by score and by how unlike tokens are.

use crate::lossy::reduce_tokens::emit::Writer;
use lathe_ir::{AttributeValue, DataType, Node, ScopeId, Tensor, Type, ValueId};
use serde::{Deserialize, Serialize};

/// Below every score and every distance.
pub(super) const NEVER: f32 = -1e30;

/// By what tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Form {
    /// By their score, then by how unlike those before they are.
    Score,
    /// By how unlike those before they are, times their score.
    Spread,
    /// Some so, and some that are not in the frame before; what is goes to what it is like there.
    Video,
}

/// How many tokens of every part are chosen in which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    /// By their score; the others are unlike these.
    pub key: usize,
    /// By their score.
    pub task: usize,
    /// One after another, by how unlike those before they are.
    pub spread: usize,
    /// Of frames that are merged over time, by how unlike those of the frame before they are.
    pub merged: usize,
}

impl Counts {
    pub fn all(&self) -> usize {
        self.key + self.task + self.spread + self.merged
    }
}

/// Tokens to choose from.
pub(super) struct Selection {
    /// Rows of length 1, `[batch, part, width]`.
    pub unit: ValueId,
    /// `[batch, part]`.
    pub score: ValueId,
    pub part: usize,
    pub counts: Counts,
    pub form: Form,
}

impl Selection {
    /// The positions of those that are chosen, rising, `[batch, k]`.
    pub fn index(&self, w: &mut Writer<'_>) -> ValueId {
        let mut all = Vec::new();
        let (key, score) = self.best(w, self.score, self.counts.key);
        all.push(key);
        let mut taken = vec![key];
        if self.counts.task > 0 {
            let (task, _) = self.best(w, score, self.counts.task);
            all.push(task);
            taken.push(task);
        }
        if self.counts.spread > 0 {
            all.push(self.spread(w, key, &taken));
        }
        let index = w.join(&all, 1);
        let many = w.ints(&[self.counts.all() as i64]);
        w.pair(Node::new("TopK").with("largest", 0i64), &[index, many]).0
    }

    /// The positions of the largest scores, and the scores without them.
    fn best(&self, w: &mut Writer<'_>, score: ValueId, count: usize) -> (ValueId, ValueId) {
        let many = w.ints(&[count as i64]);
        let (values, index) = w.pair(Node::new("TopK"), &[score, many]);
        (index, self.without(w, score, index, values))
    }

    /// Numbers with [`NEVER`] at these positions; `like` is any value of the shape of the positions.
    fn without(&self, w: &mut Writer<'_>, numbers: ValueId, index: ValueId, like: ValueId) -> ValueId {
        let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
        let zero = w.node(Node::new("Sub"), &[like, like]);
        let never = w.node(Node::new("Add"), &[zero, never]);
        w.node(Node::new("ScatterElements").with("axis", 1i64), &[numbers, index, never])
    }

    /// The positions of tokens each of which is as far as can be from those before it, `[batch, count]`.
    fn spread(&self, w: &mut Writer<'_>, key: ValueId, taken: &[ValueId]) -> ValueId {
        let keys = w.rows(self.unit, key);
        let turned = w.node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[keys]);
        let similar = w.node(Node::new("MatMul"), &[self.unit, turned]); // [batch, part, key]
        let last = w.ints(&[-1]);
        let nearest = w.node(Node::new("ReduceMax").with("keepdims", 0i64), &[similar, last]);
        let one = w.constant(Tensor::from_f32s(&[], &[1.0]));
        let mut far = w.node(Node::new("Sub"), &[one, nearest]);
        if self.form == Form::Spread {
            far = w.node(Node::new("Mul"), &[far, self.score]);
        }
        for &index in taken {
            let like = w.node(Node::new("Cast").with("to", i64::from(DataType::Float.code())), &[index]);
            far = self.without(w, far, index, like);
        }
        let range: Vec<i64> = (0..self.part as i64).collect();
        let range = w.ints(&range);
        let never = w.constant(Tensor::from_f32s(&[], &[NEVER]));
        let trips = w.constant(Tensor::from_i64s(&[], &[self.counts.spread as i64]));
        let graph = &mut *w.graph;
        let scope = graph.add_scope("spread");
        let mut input = |name: &str, ty: Type| {
            let name = graph.fresh_name(name);
            let value = graph.add_value(name, Some(ty));
            graph.add_input(scope, value);
            value
        };
        input("iteration", Type::tensor(DataType::Int64, Vec::new()));
        let going = input("going", Type::tensor(DataType::Bool, Vec::new()));
        let before = input("far", Type::unshaped(DataType::Float));
        let mut node = |node: Node, inputs: &[ValueId]| graph.append(scope, node, inputs, "spread");
        let pick = node(Node::new("ArgMax").with("axis", 1i64).with("keepdims", 1i64), &[before]); // [batch, 1]
        let place = node(Node::new("Unsqueeze"), &[pick, last]);
        let row = node(Node::new("GatherND").with("batch_dims", 1i64), &[self.unit, place]); // [batch, 1, width]
        let row = node(Node::new("Transpose").with("perm", vec![0i64, 2, 1]), &[row]);
        let similar = node(Node::new("MatMul"), &[self.unit, row]);
        let similar = node(Node::new("Squeeze"), &[similar, last]);
        let mut own = node(Node::new("Sub"), &[one, similar]);
        if self.form == Form::Spread {
            own = node(Node::new("Mul"), &[own, self.score]);
        }
        let nearer = node(Node::new("Min"), &[before, own]);
        let picked = node(Node::new("Equal"), &[pick, range]);
        let after = node(Node::new("Where"), &[picked, never, nearer]);
        let goes_on = node(Node::new("Identity"), &[going]);
        for output in [goes_on, after, pick] {
            graph.add_output(scope, output);
        }
        let names = ["far_left", "picks"].map(|name| graph.fresh_name(name));
        let [left, picks] = names.map(|name| graph.add_value(name, None));
        let body = Node::new("Loop").with("body", AttributeValue::Graph(scope));
        graph.add_node(ScopeId::MAIN, body, vec![Some(trips), None, Some(far)], vec![Some(left), Some(picks)]);
        // [count, batch, 1]
        let flat = w.node(Node::new("Squeeze"), &[picks, last]);
        w.node(Node::new("Transpose").with("perm", vec![1i64, 0]), &[flat])
    }
}
