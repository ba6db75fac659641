//! Small random models: valid, typed, deterministic, and full of what optimizers trip over.

use lathe_analysis::Random;
use lathe_ir::{DataType, Dim, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};

const MAIN: ScopeId = ScopeId::MAIN;

/// A float value and its shape.
#[derive(Clone)]
struct Float {
    id: ValueId,
    dims: Vec<usize>,
}

struct Builder {
    graph: Graph,
    random: Random,
    pool: Vec<Float>,
    weights: Vec<Float>,
}

/// A model of about five to thirty nodes that `seed` determines.
///
/// Elementwise operators, products, convolutions, layout changes, reductions, shape arithmetic, `If` and `Loop` bodies
/// that capture outer values, duplicated subexpressions, nodes that do nothing, shared weights, several outputs.
/// Operator set 17; all values stay in a moderate range.
pub fn random_model(seed: u64) -> Model {
    let mut build = Builder { graph: Graph::new("random"), random: Random::new(seed), pool: vec![], weights: vec![] };
    build.random.next_u64();
    let inputs = 1 + build.random.index(2);
    for index in 0..inputs {
        build.add_input(index);
    }
    let steps = 4 + build.random.index(16);
    for _ in 0..steps {
        build.step();
    }
    build.finish()
}

impl Builder {
    fn add_input(&mut self, index: usize) {
        let shapes: &[&[usize]] = &[&[2, 3], &[4], &[2, 3, 4], &[1, 3, 6, 6], &[1, 4, 5], &[3, 1], &[]];
        let dims = shapes[self.random.index(shapes.len())].to_vec();
        let ty = Type::tensor(DataType::Float, dims.iter().map(|&d| Dim::Known(d as i64)).collect());
        let id = self.graph.add_value(format!("x{index}"), Some(ty));
        self.graph.add_input(MAIN, id);
        self.pool.push(Float { id, dims });
    }

    fn pick(&mut self) -> Float {
        // Recent values are preferred, so that graphs grow deep and not only wide.
        let len = self.pool.len();
        let at = if self.random.one_in(3) { self.random.index(len) } else { len - 1 - self.random.index(len.min(3)) };
        self.pool[at].clone()
    }

    fn push(&mut self, node: Node, inputs: &[ValueId], dims: Vec<usize>) {
        let id = self.graph.append(MAIN, node, inputs, "t");
        self.pool.push(Float { id, dims });
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_initializer(MAIN, "axes", Tensor::int64s(values))
    }

    /// A weight of this shape: one that is there already, now and then.
    fn weight(&mut self, dims: &[usize]) -> ValueId {
        if let Some(known) = self.weights.iter().find(|w| w.dims == dims)
            && self.random.one_in(2)
        {
            return known.id;
        }
        let count = dims.iter().product();
        let scale = 0.5;
        let values: Vec<f32> = (0..count).map(|_| (self.random.normal() * scale) as f32).collect();
        let id = self.graph.add_initializer(MAIN, "w", Tensor::from_f32s(dims, &values));
        self.weights.push(Float { id, dims: dims.to_vec() });
        id
    }

    fn step(&mut self) {
        match self.random.index(20) {
            0 | 1 => self.unary(),
            2..=4 => self.binary(),
            5 => self.product(),
            6 => self.convolution(),
            7 => self.reshape(),
            8 => self.transpose(),
            9 => self.slice(),
            10 => self.concat(),
            11 => self.split(),
            12 => self.reduce(),
            13 => self.softmax(),
            14 => self.choose(),
            15 => self.casts(),
            16 => self.nothing(),
            17 => self.duplicate(),
            18 => self.branch(),
            _ => self.repeat(),
        }
    }

    fn unary(&mut self) {
        const OPS: &[&str] = &["Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Erf", "Sin", "Softsign", "Floor"];
        let (x, op) = (self.pick(), OPS[self.random.index(OPS.len())]);
        self.push(Node::new(op), &[x.id], x.dims);
    }

    fn binary(&mut self) {
        const OPS: &[&str] = &["Add", "Sub", "Mul", "Max", "Min"];
        let (x, op) = (self.pick(), OPS[self.random.index(OPS.len())]);
        let same: Vec<Float> = self.pool.iter().filter(|v| v.dims == x.dims).cloned().collect();
        let other = match self.random.index(4) {
            0 => self.weight(&[]),
            1 if !x.dims.is_empty() => self.weight(&x.dims[x.dims.len() - 1..]),
            2 => self.weight(&x.dims),
            _ => same[self.random.index(same.len())].id,
        };
        let inputs = if self.random.one_in(2) { [x.id, other] } else { [other, x.id] };
        // Products are squashed, or a chain of them overflows.
        self.push(Node::new(op), &inputs, x.dims.clone());
        if op == "Mul" {
            let product = self.pool[self.pool.len() - 1].id;
            self.push(Node::new("Tanh"), &[product], x.dims);
        }
    }

    fn product(&mut self) {
        let x = self.pick();
        let Some(&k) = x.dims.last() else { return self.unary() };
        let n = 1 + self.random.index(5);
        let w = self.weight(&[k, n]);
        let mut dims = x.dims.clone();
        *dims.last_mut().expect("a last axis was just seen") = n;
        if x.dims.len() == 2 && self.random.one_in(2) {
            let b = self.weight(&[n]);
            return self.push(Node::new("Gemm"), &[x.id, w, b], dims);
        }
        self.push(Node::new("MatMul"), &[x.id, w], dims.clone());
        if self.random.one_in(2) {
            let (product, bias) = (self.pool[self.pool.len() - 1].id, self.weight(&[n]));
            self.push(Node::new("Add"), &[product, bias], dims);
        }
    }

    fn convolution(&mut self) {
        let Some(x) = self.pool.iter().rev().find(|v| v.dims.len() == 4 && v.dims[2] >= 3 && v.dims[3] >= 3).cloned()
        else {
            return self.product();
        };
        let m = 1 + self.random.index(4);
        let w = self.weight(&[m, x.dims[1], 3, 3]);
        let dims = vec![x.dims[0], m, x.dims[2], x.dims[3]];
        let node = Node::new("Conv").with("pads", vec![1, 1, 1, 1]);
        if self.random.one_in(2) {
            let b = self.weight(&[m]);
            self.push(node, &[x.id, w, b], dims.clone());
        } else {
            self.push(node, &[x.id, w], dims.clone());
        }
        if self.random.one_in(2) {
            let conv = self.pool[self.pool.len() - 1].id;
            let positive: Vec<f32> = (0..m).map(|_| 0.5 + self.random.uniform() as f32).collect();
            let variance = self.graph.add_initializer(MAIN, "variance", Tensor::from_f32s(&[m], &positive));
            let (scale, shift, mean) = (self.weight(&[m]), self.weight(&[m]), self.weight(&[m]));
            self.push(Node::new("BatchNormalization"), &[conv, scale, shift, mean, variance], dims);
        }
    }

    /// Reshapes to a constant, or to a shape that is computed from the value's own.
    fn reshape(&mut self) {
        let x = self.pick();
        let count: usize = x.dims.iter().product();
        if x.dims.is_empty() || self.random.one_in(2) {
            let target = if count.is_multiple_of(2) { vec![2, count / 2] } else { vec![count] };
            let shape: Vec<i64> = target.iter().map(|&d| d as i64).collect();
            let shape = self.ints(&shape);
            return self.push(Node::new("Reshape"), &[x.id, shape], target);
        }
        let shape = self.graph.append(MAIN, Node::new("Shape"), &[x.id], "shape");
        let (zero, rest) = (self.ints(&[0]), self.ints(&[-1]));
        let first = self.graph.append(MAIN, Node::new("Gather").with("axis", 0), &[shape, zero], "first");
        let target = self.graph.append(MAIN, Node::new("Concat").with("axis", 0), &[first, rest], "target");
        self.push(Node::new("Reshape"), &[x.id, target], vec![x.dims[0], count / x.dims[0].max(1)]);
    }

    fn transpose(&mut self) {
        let x = self.pick();
        let mut perm: Vec<usize> = (0..x.dims.len()).collect();
        for at in (1..perm.len()).rev() {
            perm.swap(at, self.random.index(at + 1));
        }
        let dims = perm.iter().map(|&p| x.dims[p]).collect();
        let perm: Vec<i64> = perm.into_iter().map(|p| p as i64).collect();
        self.push(Node::new("Transpose").with("perm", perm), &[x.id], dims);
    }

    fn slice(&mut self) {
        let x = self.pick();
        let Some(axis) = (0..x.dims.len()).rev().find(|&a| x.dims[a] > 1) else { return self.unary() };
        let end = 1 + self.random.index(x.dims[axis]);
        let (from, to, axes) = (self.ints(&[0]), self.ints(&[end as i64]), self.ints(&[axis as i64]));
        let mut dims = x.dims;
        dims[axis] = end;
        self.push(Node::new("Slice"), &[x.id, from, to, axes], dims);
    }

    fn concat(&mut self) {
        let x = self.pick();
        let Some(last) = x.dims.len().checked_sub(1) else { return self.unary() };
        let fits = |v: &&Float| v.dims.len() == x.dims.len() && v.dims[..last] == x.dims[..last];
        let others: Vec<Float> = self.pool.iter().filter(fits).cloned().collect();
        let other = others[self.random.index(others.len())].clone();
        let mut dims = x.dims;
        dims[last] += other.dims[last];
        if dims.iter().product::<usize>() < 4096 {
            self.push(Node::new("Concat").with("axis", -1), &[x.id, other.id], dims);
        }
    }

    fn split(&mut self) {
        let x = self.pick();
        let Some(axis) = (0..x.dims.len()).find(|&a| x.dims[a] > 1) else { return self.unary() };
        let left = 1 + self.random.index(x.dims[axis] - 1);
        let sizes = self.ints(&[left as i64, (x.dims[axis] - left) as i64]);
        let names = [self.graph.fresh_name("left"), self.graph.fresh_name("right")];
        let outputs = names.map(|name| self.graph.add_value(name, None));
        let node = Node::new("Split").with("axis", axis as i64);
        self.graph.add_node(MAIN, node, vec![Some(x.id), Some(sizes)], outputs.map(Some).to_vec());
        for (id, size) in outputs.into_iter().zip([left, x.dims[axis] - left]) {
            let mut dims = x.dims.clone();
            dims[axis] = size;
            self.pool.push(Float { id, dims });
        }
    }

    fn reduce(&mut self) {
        const OPS: &[&str] = &["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"];
        let (x, op) = (self.pick(), OPS[self.random.index(OPS.len())]);
        let Some(last) = x.dims.len().checked_sub(1) else { return self.unary() };
        let keep = self.random.one_in(2);
        let mut dims = x.dims;
        if keep {
            dims[last] = 1;
        } else {
            dims.pop();
        }
        self.push(Node::new(op).with("axes", vec![-1]).with("keepdims", i64::from(keep)), &[x.id], dims);
    }

    fn softmax(&mut self) {
        let x = self.pick();
        if x.dims.is_empty() {
            return self.unary();
        }
        self.push(Node::new("Softmax").with("axis", -1), &[x.id], x.dims);
    }

    fn choose(&mut self) {
        let x = self.pick();
        let (bound, other) = (self.weight(&[]), self.weight(&x.dims));
        let greater = self.graph.append(MAIN, Node::new("Greater"), &[x.id, bound], "greater");
        self.push(Node::new("Where"), &[greater, x.id, other], x.dims);
    }

    fn casts(&mut self) {
        const VIA: &[DataType] = &[DataType::Double, DataType::Float16, DataType::Int32, DataType::Float];
        let (x, via) = (self.pick(), VIA[self.random.index(VIA.len())]);
        // NaN and infinities have no whole number; a bounded value comes first.
        let bounded = self.graph.append(MAIN, Node::new("Softsign"), &[x.id], "bounded");
        let there = self.graph.append(MAIN, Node::new("Cast").with("to", via), &[bounded], "there");
        self.push(Node::new("Cast").with("to", DataType::Float), &[there], x.dims);
    }

    /// A node, or a few, that change nothing or almost nothing.
    fn nothing(&mut self) {
        let x = self.pick();
        let scalar =
            |build: &mut Builder, value: f32| build.graph.add_initializer(MAIN, "c", Tensor::from_f32s(&[], &[value]));
        match self.random.index(8) {
            0 => self.push(Node::new("Identity"), &[x.id], x.dims),
            1 => {
                let zero = scalar(self, 0.0);
                let op = if self.random.one_in(2) { "Add" } else { "Sub" };
                self.push(Node::new(op), &[x.id, zero], x.dims);
            }
            2 => {
                let one = scalar(self, 1.0);
                let op = if self.random.one_in(2) { "Mul" } else { "Div" };
                self.push(Node::new(op), &[x.id, one], x.dims);
            }
            3 => {
                let perm: Vec<i64> = (0..x.dims.len() as i64).collect();
                self.push(Node::new("Transpose").with("perm", perm), &[x.id], x.dims);
            }
            4 => {
                let shape: Vec<i64> = x.dims.iter().map(|&d| d as i64).collect();
                let shape = self.ints(&shape);
                self.push(Node::new("Reshape"), &[x.id, shape], x.dims);
            }
            5 => self.push(Node::new("Cast").with("to", DataType::Float), &[x.id], x.dims),
            6 => self.push(Node::new("Dropout"), &[x.id], x.dims),
            _ => {
                let negated = self.graph.append(MAIN, Node::new("Neg"), &[x.id], "negated");
                self.push(Node::new("Neg"), &[negated], x.dims);
            }
        }
    }

    /// The same expression twice, and a use of both.
    fn duplicate(&mut self) {
        let x = self.pick();
        let first = self.graph.append(MAIN, Node::new("Sigmoid"), &[x.id], "twin");
        let second = self.graph.append(MAIN, Node::new("Sigmoid"), &[x.id], "twin");
        self.push(Node::new("Add"), &[first, second], x.dims);
    }

    /// An `If` whose branches capture outer values; its condition is a constant half of the time.
    fn branch(&mut self) {
        let x = self.pick();
        let same: Vec<Float> = self.pool.iter().filter(|v| v.dims == x.dims).cloned().collect();
        let other = same[self.random.index(same.len())].id;
        let condition = if self.random.one_in(2) {
            let value = self.random.one_in(2);
            self.graph.add_initializer(MAIN, "flag", Tensor::from_bools(&[], &[value]))
        } else {
            let sum = Node::new("ReduceSum").with("keepdims", 0);
            let total = self.graph.append(MAIN, sum, &[x.id], "total");
            let bound = self.weight(&[]);
            self.graph.append(MAIN, Node::new("Greater"), &[total, bound], "flag")
        };
        let scope = |build: &mut Builder, node: Node, inputs: &[ValueId]| {
            let scope = build.graph.add_scope("branch");
            let output = build.graph.append(scope, node, inputs, "chosen");
            build.graph.value_mut(output).ty = Some(float_type(&x.dims));
            build.graph.add_output(scope, output);
            lathe_ir::AttributeValue::Graph(scope)
        };
        let then_branch = scope(self, Node::new("Tanh"), &[x.id]);
        let else_branch = scope(self, Node::new("Max"), &[x.id, other]);
        let node = Node::new("If").with("then_branch", then_branch).with("else_branch", else_branch);
        self.push(node, &[condition], x.dims);
    }

    /// A `Loop` that captures an outer value and carries one.
    fn repeat(&mut self) {
        let x = self.pick();
        let trips = self.random.between(0, 3);
        let count = self.graph.add_initializer(MAIN, "trips", Tensor::from_i64s(&[], &[trips]));
        let go = self.graph.add_initializer(MAIN, "go", Tensor::from_bools(&[], &[true]));
        let body = self.graph.add_scope("body");
        let mut input = |name: &str, ty: Type| {
            let name = self.graph.fresh_name(name);
            let value = self.graph.add_value(name, Some(ty));
            self.graph.add_input(body, value);
            value
        };
        input("i", Type::tensor(DataType::Int64, vec![]));
        let going = input("going", Type::tensor(DataType::Bool, vec![]));
        let carried = input("carried", float_type(&x.dims));
        let still = self.graph.append(body, Node::new("Identity"), &[going], "still");
        self.graph.value_mut(still).ty = Some(Type::tensor(DataType::Bool, vec![]));
        let sum = self.graph.append(body, Node::new("Add"), &[carried, x.id], "sum");
        let next = self.graph.append(body, Node::new("Tanh"), &[sum], "next");
        self.graph.value_mut(next).ty = Some(float_type(&x.dims));
        self.graph.add_output(body, still);
        self.graph.add_output(body, next);
        let node = Node::new("Loop").with("body", lathe_ir::AttributeValue::Graph(body));
        self.push(node, &[count, go, x.id], x.dims.clone());
    }

    /// The last value and some others become outputs; what they do not need stays, as dead code.
    fn finish(mut self) -> Model {
        let is_input = |v: &Float| self.graph.producer(v.id).is_none();
        let made: Vec<Float> = self.pool.iter().filter(|v| !is_input(v)).cloned().collect();
        let extra = self.random.index(3);
        let mut outputs: Vec<Float> = made.last().cloned().into_iter().collect();
        for _ in 0..extra {
            if let Some(value) = made.get(self.random.index(made.len()))
                && outputs.iter().all(|o| o.id != value.id)
            {
                outputs.push(value.clone());
            }
        }
        for (index, output) in outputs.iter().enumerate() {
            self.graph.rename(output.id, format!("y{index}"));
            self.graph.value_mut(output.id).ty = Some(float_type(&output.dims));
            self.graph.add_output(MAIN, output.id);
        }
        Model { ir_version: 8, opsets: vec![(String::new(), 17)], graph: self.graph, ..Model::default() }
    }
}

fn float_type(dims: &[usize]) -> Type {
    Type::tensor(DataType::Float, dims.iter().map(|&d| Dim::Known(d as i64)).collect())
}

#[cfg(test)]
mod tests {
    use super::random_model;
    use crate::{Claim, equivalent};

    #[test]
    fn every_random_model_runs_and_is_itself() {
        for seed in 0..300 {
            let model = random_model(seed);
            equivalent(&model, &model, Claim::Identical, seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        }
    }

    #[test]
    fn a_seed_gives_one_model() {
        assert_eq!(random_model(3).to_bytes(), random_model(3).to_bytes());
        assert_ne!(random_model(3).to_bytes(), random_model(4).to_bytes());
    }
}
