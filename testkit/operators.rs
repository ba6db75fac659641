//! Random small models over most of the standard operator set, with one open axis and constants that are special.

use lathe_analysis::Random;
use lathe_ir::{DataType, Dim, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};

const MAIN: ScopeId = ScopeId::MAIN;

/// A size: a number, or the open axis of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Open,
    Known(usize),
}

use Size::{Known, Open};

#[derive(Clone)]
struct Value {
    id: ValueId,
    elem: DataType,
    dims: Vec<Size>,
}

impl Value {
    fn open(&self) -> bool {
        self.dims.contains(&Open)
    }

    /// The number of elements for one step of the open axis.
    fn elements(&self) -> usize {
        self.dims.iter().map(|d| if let Known(n) = d { *n } else { 1 }).product()
    }
}

struct Mix {
    graph: Graph,
    random: Random,
    pool: Vec<Value>,
}

/// A model of four to sixteen nodes over about 150 operators, which `seed` determines.
///
/// Its inputs have an axis `N` that may be anything from 0 on. Constants hold what arithmetic trips over: zeros of both
/// signs, infinities, NaN, numbers whose products underflow or overflow, the ends of int64. Chains that passes look for
/// are mixed in: scales after scales, biases after biases, reshapes after reshapes, normalizations, activations that are
/// spelled out. Operator set 18.
pub fn operator_model(seed: u64) -> Model {
    let mut mix = Mix { graph: Graph::new("operators"), random: Random::named(seed, "operators"), pool: vec![] };
    mix.inputs();
    let steps = 3 + mix.random.index(8);
    for _ in 0..steps {
        mix.step();
    }
    mix.finish()
}

/// Inputs for [`operator_model`]: the open axis has `size` steps; with `special` an eighth of the floats are zeros of
/// both signs, denormals and large numbers.
pub fn operator_inputs(model: &Model, seed: u64, size: usize, special: bool) -> Vec<(String, Tensor)> {
    let mut inputs = Vec::new();
    for &id in model.graph.main().inputs() {
        let value = model.graph.value(id);
        let known = value.ty.as_ref().and_then(|ty| Some((ty.elem()?, ty.shape()?)));
        let (elem, shape) = known.expect("the inputs of these models are tensors of known type");
        let dims: Vec<usize> = shape.dims.iter().map(|d| d.known().map_or(size, |n| n as usize)).collect();
        let mut random = Random::named(seed, &value.name);
        let count: usize = dims.iter().product();
        let numbers: Vec<f64> = (0..count)
            .map(|_| match elem {
                DataType::Int64 => random.between(-3, 3) as f64,
                DataType::Bool => f64::from(u8::from(random.one_in(2))),
                _ if special && random.one_in(8) => SPECIAL_INPUTS[random.index(SPECIAL_INPUTS.len())],
                _ => f64::from(random.normal() as f32),
            })
            .collect();
        let tensor = Tensor::from_f64s(elem, &dims, &numbers).expect("these types hold these numbers");
        inputs.push((value.name.clone(), tensor));
    }
    inputs
}

const SPECIAL_INPUTS: &[f64] = &[0.0, -0.0, 1e-40, -1e-40, 1e-20, 1e4, -1e4, 1.0, -1.0, 0.5];

/// Floats that constants are made of beside ordinary ones.
const SPECIAL_FLOATS: &[f32] = &[
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-25,
    1e25,
    1e10,
    1e-40,
    6.0,
    3.0,
    0.5,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MIN,
    2.0,
];

const SPECIAL_INTEGERS: &[i64] = &[0, 1, -1, 2, i64::MAX, i64::MIN, (1 << 60) + 1, -(1 << 60) - 1];

impl Mix {
    fn inputs(&mut self) {
        const SHAPES: &[&[Size]] = &[
            &[Open, Known(4)],
            &[Open],
            &[Known(2), Open, Known(4)],
            &[Open, Known(3), Known(4)],
            &[Open, Known(4), Known(4), Known(4)],
            &[Known(1), Known(4), Open, Known(4)],
            &[Open, Open],
        ];
        let count = 1 + self.random.index(2);
        for index in 0..count {
            let dims = SHAPES[self.random.index(SHAPES.len())].to_vec();
            let elem = match self.random.index(8) {
                0 => DataType::Int64,
                1 => DataType::Double,
                _ => DataType::Float,
            };
            let id = self.graph.add_value(format!("x{index}"), Some(ty(elem, &dims)));
            self.graph.add_input(MAIN, id);
            self.pool.push(Value { id, elem, dims });
        }
    }

    fn pick(&mut self, fits: impl Fn(&Value) -> bool) -> Option<Value> {
        let all: Vec<&Value> = self.pool.iter().filter(|v| fits(v)).collect();
        let from = if self.random.one_in(3) { 0 } else { all.len().saturating_sub(3) };
        let all = &all[from..];
        if all.is_empty() { None } else { Some(all[self.random.index(all.len())].clone()) }
    }

    fn float(&mut self) -> Option<Value> {
        self.pick(|v| v.elem == DataType::Float)
    }

    fn real(&mut self) -> Option<Value> {
        self.pick(|v| matches!(v.elem, DataType::Float | DataType::Double))
    }

    fn push(&mut self, node: Node, inputs: &[ValueId], elem: DataType, dims: Vec<Size>) -> Value {
        let id = self.graph.append(MAIN, node, inputs, "t");
        let value = Value { id, elem, dims };
        self.pool.push(value.clone());
        value
    }

    fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_initializer(MAIN, "c", Tensor::int64s(values))
    }

    fn scalar(&mut self, elem: DataType, value: f64) -> ValueId {
        let tensor = Tensor::from_f64s(elem, &[], &[value]).expect("these types hold these numbers");
        self.graph.add_initializer(MAIN, "c", tensor)
    }

    fn weight(&mut self, elem: DataType, dims: &[usize]) -> ValueId {
        let count = dims.iter().product();
        let values: Vec<f64> = (0..count).map(|_| f64::from((self.random.normal() * 0.5) as f32)).collect();
        let tensor = Tensor::from_f64s(elem, dims, &values).expect("floats hold these numbers");
        self.graph.add_initializer(MAIN, "w", tensor)
    }

    /// A number that passes like to fold: special every other time.
    fn number(&mut self) -> f64 {
        if self.random.one_in(2) {
            f64::from(SPECIAL_FLOATS[self.random.index(SPECIAL_FLOATS.len())])
        } else {
            f64::from((self.random.normal() * 2.0) as f32)
        }
    }

    /// A constant that broadcasts to `value` without adding axes: one number, a row, or one with leading ones.
    fn constant_for(&mut self, value: &Value) -> ValueId {
        if value.elem == DataType::Int64 {
            let number = SPECIAL_INTEGERS[self.random.index(SPECIAL_INTEGERS.len())];
            return self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[number]));
        }
        let last = value.dims.last().copied();
        match (self.random.index(4), last) {
            (0, Some(Known(n))) => self.weight(value.elem, &[n]),
            (1, _) => {
                let number = self.number();
                let ones = vec![1; value.dims.len()];
                let tensor = Tensor::from_f64s(value.elem, &ones, &[number]).expect("floats hold these numbers");
                self.graph.add_initializer(MAIN, "c", tensor)
            }
            _ => {
                let number = self.number();
                self.scalar(value.elem, number)
            }
        }
    }

    fn step(&mut self) {
        let made = match self.random.index(30) {
            0..=3 => self.unary(),
            4..=6 => self.binary(),
            7 => self.compare(),
            8 => self.logic(),
            9 => self.choose(),
            10 => self.integers(),
            11 | 12 => self.reshape(),
            13 => self.transpose(),
            14 => self.layout(),
            15 => self.cut(),
            16 => self.join(),
            17 => self.gather(),
            18 => self.scatter(),
            19 | 20 => self.reduce(),
            21 => self.along_axis(),
            22 => self.product(),
            23 => self.window(),
            24 => self.normalize(),
            25 => self.shapes(),
            26 => self.quantize(),
            27 | 28 => self.chain(),
            _ => self.spelled(),
        };
        if made.is_none() {
            self.unary();
        }
    }

    fn unary(&mut self) -> Option<Value> {
        const FLOAT: &[&str] = &[
            "Acos",
            "Acosh",
            "Asin",
            "Asinh",
            "Atan",
            "Atanh",
            "Celu",
            "Cos",
            "Cosh",
            "Elu",
            "HardSigmoid",
            "HardSwish",
            "LeakyRelu",
            "Mish",
            "Selu",
            "Shrink",
            "Sin",
            "Sinh",
            "Softplus",
            "Softsign",
            "Tan",
            "ThresholdedRelu",
            "Round",
            "Erf",
        ];
        const BOTH: &[&str] = &[
            "Abs",
            "Ceil",
            "Exp",
            "Floor",
            "Log",
            "Neg",
            "Reciprocal",
            "Relu",
            "Sigmoid",
            "Sign",
            "Sqrt",
            "Tanh",
            "Identity",
        ];
        let x = self.real().or_else(|| self.pool.first().cloned())?;
        if x.elem == DataType::Int64 {
            let op = ["Abs", "Neg", "Sign", "Identity"][self.random.index(4)];
            return Some(self.push(Node::new(op), &[x.id], x.elem, x.dims));
        }
        let op = if x.elem == DataType::Float && self.random.one_in(2) {
            FLOAT[self.random.index(FLOAT.len())]
        } else {
            BOTH[self.random.index(BOTH.len())]
        };
        Some(self.push(Node::new(op), &[x.id], x.elem, x.dims))
    }

    fn binary(&mut self) -> Option<Value> {
        const OPS: &[&str] = &["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum", "PRelu", "Mod"];
        let x = self.real()?;
        let op = OPS[self.random.index(OPS.len())];
        // ONNX Runtime has these for float32 only.
        let op = if x.elem != DataType::Float && matches!(op, "PRelu" | "Mean") { "Add" } else { op };
        let other = self.pick(|v| v.elem == x.elem && v.dims == x.dims)?;
        let other = if self.random.one_in(2) { other.id } else { self.constant_for(&x) };
        let swap = op != "PRelu" && self.random.one_in(3);
        let inputs = if swap { [other, x.id] } else { [x.id, other] };
        let node = if op == "Mod" { Node::new(op).with("fmod", 1) } else { Node::new(op) };
        Some(self.push(node, &inputs, x.elem, x.dims))
    }

    fn compare(&mut self) -> Option<Value> {
        const OPS: &[&str] = &["Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"];
        let x = self.pick(|v| v.elem != DataType::Bool)?;
        if x.elem == DataType::Float && self.random.one_in(3) {
            let op = if self.random.one_in(2) { "IsNaN" } else { "IsInf" };
            return Some(self.push(Node::new(op), &[x.id], DataType::Bool, x.dims));
        }
        let other = self.constant_for(&x);
        let op = OPS[self.random.index(OPS.len())];
        Some(self.push(Node::new(op), &[x.id, other], DataType::Bool, x.dims))
    }

    fn logic(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Bool)?;
        if self.random.one_in(3) {
            return Some(self.push(Node::new("Not"), &[x.id], x.elem, x.dims));
        }
        let other = if self.random.one_in(2) {
            let flag = self.random.one_in(2);
            self.graph.add_initializer(MAIN, "c", Tensor::from_bools(&[], &[flag]))
        } else {
            self.pick(|v| v.elem == DataType::Bool && v.dims == x.dims)?.id
        };
        let op = ["And", "Or", "Xor", "Equal"][self.random.index(4)];
        Some(self.push(Node::new(op), &[x.id, other], DataType::Bool, x.dims))
    }

    fn choose(&mut self) -> Option<Value> {
        match self.random.index(4) {
            0 => {
                let x = self.real()?;
                let (low, high) = (self.number(), self.number());
                // Bounds that are no numbers, or stand the wrong way round, have no agreed meaning.
                let finite = |v: f64| if v.is_nan() { 0.0 } else { v };
                let (low, high) = (finite(low).min(finite(high)), finite(low).max(finite(high)));
                let bounds = [self.scalar(x.elem, low), self.scalar(x.elem, high)];
                Some(self.push(Node::new("Clip"), &[x.id, bounds[0], bounds[1]], x.elem, x.dims))
            }
            1 => {
                let x = self.pick(|v| v.elem != DataType::Bool)?;
                let to = [DataType::Float, DataType::Double, DataType::Bool][self.random.index(3)];
                Some(self.push(Node::new("Cast").with("to", to), &[x.id], to, x.dims))
            }
            2 => {
                let x = self.pick(|v| v.elem == DataType::Bool || v.elem == DataType::Int64)?;
                let like = self.real()?;
                Some(self.push(Node::new("CastLike"), &[x.id, like.id], like.elem, x.dims))
            }
            _ => {
                let c = self.pick(|v| v.elem == DataType::Bool)?;
                let x = self.pick(|v| v.elem == DataType::Float && v.dims == c.dims)?;
                let other = self.constant_for(&x);
                let inputs = if self.random.one_in(2) { [c.id, x.id, other] } else { [c.id, other, x.id] };
                Some(self.push(Node::new("Where"), &inputs, x.elem, x.dims))
            }
        }
    }

    fn integers(&mut self) -> Option<Value> {
        let Some(x) = self.pick(|v| v.elem == DataType::Int64) else {
            let x = self.float()?;
            let bounded = self.push(Node::new("Softsign"), &[x.id], x.elem, x.dims);
            return Some(self.push(
                Node::new("Cast").with("to", DataType::Int64),
                &[bounded.id],
                DataType::Int64,
                bounded.dims,
            ));
        };
        match self.random.index(4) {
            0 => {
                let mut bounds: Vec<i64> =
                    (0..2).map(|_| SPECIAL_INTEGERS[self.random.index(SPECIAL_INTEGERS.len())]).collect();
                bounds.sort_unstable();
                let bounds: Vec<ValueId> = bounds
                    .into_iter()
                    .map(|b| self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[b])))
                    .collect();
                Some(self.push(Node::new("Clip"), &[x.id, bounds[0], bounds[1]], x.elem, x.dims))
            }
            1 => {
                let op = ["Div", "Mod"][self.random.index(2)];
                let number = [1, 2, 3, -2][self.random.index(4)];
                let other = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[number]));
                Some(self.push(Node::new(op), &[x.id, other], x.elem, x.dims))
            }
            _ => {
                let op = ["Add", "Sub", "Mul", "Max", "Min"][self.random.index(5)];
                let other = self.constant_for(&x);
                Some(self.push(Node::new(op), &[x.id, other], x.elem, x.dims))
            }
        }
    }

    fn reshape(&mut self) -> Option<Value> {
        let x = self.pick(|v| !v.dims.is_empty())?;
        match self.random.index(5) {
            0 => {
                let axis = self.random.index(x.dims.len() + 1);
                let product = |part: &[Size]| -> Option<Size> {
                    match part.iter().filter(|d| **d == Open).count() {
                        0 => Some(Known(part.iter().map(|d| if let Known(n) = d { *n } else { 1 }).product())),
                        1 if part.iter().all(|d| matches!(d, Open | Known(1))) => Some(Open),
                        _ => None,
                    }
                };
                let dims = vec![product(&x.dims[..axis])?, product(&x.dims[axis..])?];
                Some(self.push(Node::new("Flatten").with("axis", axis as i64), &[x.id], x.elem, dims))
            }
            1 => {
                let axis = self.random.index(x.dims.len() + 1);
                let axes = self.ints(&[axis as i64]);
                let mut dims = x.dims.clone();
                dims.insert(axis, Known(1));
                Some(self.push(Node::new("Unsqueeze"), &[x.id, axes], x.elem, dims))
            }
            2 => {
                let axis = x.dims.iter().position(|d| *d == Known(1))?;
                let axes = self.ints(&[axis as i64]);
                let mut dims = x.dims.clone();
                dims.remove(axis);
                Some(self.push(Node::new("Squeeze"), &[x.id, axes], x.elem, dims))
            }
            3 => {
                // Two known neighbours are joined; everything else is copied with 0.
                let at = (1..x.dims.len()).find(|&i| matches!((x.dims[i - 1], x.dims[i]), (Known(_), Known(_))))?;
                let (Known(a), Known(b)) = (x.dims[at - 1], x.dims[at]) else { return None };
                let mut dims = x.dims.clone();
                dims.splice(at - 1..=at, [Known(a * b)]);
                let minus = self.random.one_in(2) && dims.iter().filter(|d| **d == Open).count() == 1;
                let target: Vec<i64> = dims
                    .iter()
                    .enumerate()
                    .map(|(i, d)| match d {
                        Known(n) => *n as i64,
                        Open if minus => -1,
                        Open if i < at => 0,
                        Open => i64::MIN,
                    })
                    .collect();
                if target.contains(&i64::MIN) {
                    return None;
                }
                let target = self.ints(&target);
                Some(self.push(Node::new("Reshape"), &[x.id, target], x.elem, dims))
            }
            _ => {
                // The first axis as computed from the shape, the rest joined.
                let rest = &x.dims[1..];
                if rest.contains(&Open) || rest.is_empty() {
                    return None;
                }
                let joined: usize = rest.iter().map(|d| if let Known(n) = d { *n } else { 1 }).product();
                let shape = self.graph.append(MAIN, Node::new("Shape"), &[x.id], "shape");
                let zero = self.ints(&[0]);
                let last = if self.random.one_in(2) && x.dims[0] != Open { -1 } else { joined as i64 };
                let last = self.ints(&[last]);
                let first = self.graph.append(MAIN, Node::new("Gather").with("axis", 0), &[shape, zero], "first");
                let target = self.graph.append(MAIN, Node::new("Concat").with("axis", 0), &[first, last], "target");
                Some(self.push(Node::new("Reshape"), &[x.id, target], x.elem, vec![x.dims[0], Known(joined)]))
            }
        }
    }

    fn transpose(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.dims.len() > 1)?;
        let mut perm: Vec<usize> = (0..x.dims.len()).collect();
        for at in (1..perm.len()).rev() {
            perm.swap(at, self.random.index(at + 1));
        }
        let dims = perm.iter().map(|&p| x.dims[p]).collect();
        let perm: Vec<i64> = perm.into_iter().map(|p| p as i64).collect();
        Some(self.push(Node::new("Transpose").with("perm", perm), &[x.id], x.elem, dims))
    }

    fn layout(&mut self) -> Option<Value> {
        match self.random.index(6) {
            0 => {
                let x = self.pick(|v| !v.dims.is_empty() && v.elements() < 512)?;
                let times: Vec<usize> = x.dims.iter().map(|_| 1 + self.random.index(2)).collect();
                if x.dims.iter().zip(&times).any(|(d, t)| *d == Open && *t != 1) {
                    return None;
                }
                let dims = x.dims.iter().zip(&times).map(|(d, t)| if let Known(n) = d { Known(n * t) } else { *d });
                let dims = dims.collect();
                let times = self.ints(&times.iter().map(|&t| t as i64).collect::<Vec<_>>());
                Some(self.push(Node::new("Tile"), &[x.id, times], x.elem, dims))
            }
            1 => {
                let x = self.pick(|v| v.dims.len() < 4 && v.elements() < 512)?;
                let mut target = vec![2];
                target.extend(x.dims.iter().map(|_| 1));
                let shape = self.ints(&target);
                let mut dims = x.dims.clone();
                dims.insert(0, Known(2));
                Some(self.push(Node::new("Expand"), &[x.id, shape], x.elem, dims))
            }
            2 => {
                let x = self.pick(|v| v.elem == DataType::Float && !v.dims.is_empty())?;
                let axis = x.dims.iter().rposition(|d| *d != Open)?;
                let (before, after) = (self.random.index(2), self.random.index(2));
                let mut pads = vec![0i64; 2 * x.dims.len()];
                (pads[axis], pads[x.dims.len() + axis]) = (before as i64, after as i64);
                let mut dims = x.dims.clone();
                if let Known(n) = &mut dims[axis] {
                    *n += before + after;
                }
                let pads = self.ints(&pads);
                let value = self.number();
                let value = self.scalar(DataType::Float, value);
                Some(self.push(Node::new("Pad"), &[x.id, pads, value], x.elem, dims))
            }
            3 => {
                let x = self.pick(|v| {
                    v.elem == DataType::Float && matches!(v.dims[..], [_, Known(c), _, Known(_)] if c % 4 == 0)
                })?;
                let ([_, _, Known(_), _], false) = (&x.dims[..], x.dims[0] == Open && x.dims[2] == Open) else {
                    return None;
                };
                let [n, Known(c), Known(h), Known(w)] = x.dims[..] else { return None };
                let mode = if self.random.one_in(2) { "DCR" } else { "CRD" };
                let node = Node::new("DepthToSpace").with("blocksize", 2).with("mode", mode);
                Some(self.push(node, &[x.id], x.elem, vec![n, Known(c / 4), Known(2 * h), Known(2 * w)]))
            }
            4 => {
                let x = self.pick(|v| {
                    v.elem == DataType::Float
                        && matches!(v.dims[..], [_, Known(_), Known(h), Known(w)] if h % 2 == 0 && w % 2 == 0)
                })?;
                let [n, Known(c), Known(h), Known(w)] = x.dims[..] else { return None };
                let node = Node::new("SpaceToDepth").with("blocksize", 2);
                Some(self.push(node, &[x.id], x.elem, vec![n, Known(4 * c), Known(h / 2), Known(w / 2)]))
            }
            _ => {
                let x = self.pick(|v| v.dims.len() >= 2 && v.elem == DataType::Float)?;
                let node = Node::new("Trilu").with("upper", i64::from(self.random.one_in(2)));
                Some(self.push(node, &[x.id], x.elem, x.dims))
            }
        }
    }

    fn cut(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.dims.iter().any(|d| matches!(d, Known(n) if *n > 1)))?;
        let axis = x.dims.iter().position(|d| matches!(d, Known(n) if *n > 1))?;
        let Known(n) = x.dims[axis] else { return None };
        if self.random.one_in(2) {
            let left = 1 + self.random.index(n - 1);
            let sizes = self.ints(&[left as i64, (n - left) as i64]);
            let names = [self.graph.fresh_name("left"), self.graph.fresh_name("right")];
            let outputs = names.map(|name| self.graph.add_value(name, None));
            let node = Node::new("Split").with("axis", axis as i64);
            self.graph.add_node(MAIN, node, vec![Some(x.id), Some(sizes)], outputs.map(Some).to_vec());
            for (id, size) in outputs.into_iter().zip([left, n - left]) {
                let mut dims = x.dims.clone();
                dims[axis] = Known(size);
                self.pool.push(Value { id, elem: x.elem, dims });
            }
            return self.pool.last().cloned();
        }
        let (start, end, step): (i64, i64, i64) = match self.random.index(4) {
            0 => (0, i64::MAX, 2),
            1 => (-1, i64::MIN, -1),
            2 => (1, n as i64, 1),
            _ => (0, n as i64 - 1, 1),
        };
        let size = match (start, step) {
            (0, 2) => n.div_ceil(2),
            (-1, _) => n,
            _ => n - 1,
        };
        let arguments = [start, end, axis as i64, step].map(|v| self.ints(&[v]));
        let mut dims = x.dims.clone();
        dims[axis] = Known(size);
        let inputs = [x.id, arguments[0], arguments[1], arguments[2], arguments[3]];
        Some(self.push(Node::new("Slice"), &inputs, x.elem, dims))
    }

    fn join(&mut self) -> Option<Value> {
        let x = self.pick(|v| !v.dims.is_empty())?;
        let axis = x.dims.iter().rposition(|d| *d != Open)?;
        let other = self.pick(|v| {
            v.elem == x.elem
                && v.dims.len() == x.dims.len()
                && (0..v.dims.len()).all(|i| if i == axis { v.dims[i] != Open } else { v.dims[i] == x.dims[i] })
        })?;
        let (Known(a), Known(b)) = (x.dims[axis], other.dims[axis]) else { return None };
        let mut dims = x.dims.clone();
        dims[axis] = Known(a + b);
        if a + b > 64 {
            return None;
        }
        let node = Node::new("Concat").with("axis", axis as i64);
        Some(self.push(node, &[x.id, other.id], x.elem, dims))
    }

    fn gather(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.dims.iter().any(|d| matches!(d, Known(n) if *n > 1)))?;
        let axis = x.dims.iter().rposition(|d| matches!(d, Known(n) if *n > 1))?;
        let Known(n) = x.dims[axis] else { return None };
        let at = self.random.between(-(n as i64), n as i64 - 1);
        let mut dims = x.dims.clone();
        match self.random.index(4) {
            0 => {
                let index = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[at]));
                dims.remove(axis);
                Some(self.push(Node::new("Gather").with("axis", axis as i64), &[x.id, index], x.elem, dims))
            }
            1 => {
                let index = self.ints(&[at, 0, n as i64 - 1]);
                dims[axis] = Known(3);
                Some(self.push(Node::new("Gather").with("axis", axis as i64), &[x.id, index], x.elem, dims))
            }
            2 if !x.open() && x.dims.len() == 2 => {
                let [Known(a), Known(_)] = x.dims[..] else { return None };
                let indices: Vec<i64> = (0..a * 2).map(|_| self.random.between(0, n as i64 - 1)).collect();
                let indices = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[a, 2], &indices));
                let node = Node::new("GatherElements").with("axis", axis as i64);
                (axis == 1).then(|| self.push(node, &[x.id, indices], x.elem, vec![Known(a), Known(2)]))
            }
            _ => {
                let Known(first) = x.dims[0] else { return None };
                let index = self.random.index(first) as i64;
                let index = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[1, 1], &[index]));
                dims[0] = Known(1);
                Some(self.push(Node::new("GatherND"), &[x.id, index], x.elem, dims))
            }
        }
    }

    fn scatter(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Float && !v.open() && v.dims.len() == 2)?;
        let [Known(a), Known(b)] = x.dims[..] else { return None };
        let (row, column) = (self.random.index(a) as i64, self.random.index(b) as i64);
        if self.random.one_in(2) {
            let indices = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[1, 1], &[column]));
            let update = self.weight(DataType::Float, &[1, 1]);
            let node = Node::new("ScatterElements").with("axis", 1);
            return Some(self.push(node, &[x.id, indices, update], x.elem, x.dims));
        }
        let indices = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[1, 2], &[row, column]));
        let update = self.weight(DataType::Float, &[1]);
        Some(self.push(Node::new("ScatterND"), &[x.id, indices, update], x.elem, x.dims))
    }

    fn reduce(&mut self) -> Option<Value> {
        const BY_INPUT: &[&str] = &[
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceSumSquare",
        ];
        let x = self.pick(|v| v.elem == DataType::Float && !v.dims.is_empty())?;
        let axis = x.dims.iter().rposition(|d| *d != Open)?;
        let keep = self.random.one_in(2);
        let mut dims = x.dims.clone();
        if keep {
            dims[axis] = Known(1);
        } else {
            dims.remove(axis);
        }
        if self.random.one_in(4) {
            let op = if self.random.one_in(2) { "ArgMax" } else { "ArgMin" };
            let node = Node::new(op)
                .with("axis", axis as i64)
                .with("keepdims", i64::from(keep))
                .with("select_last_index", i64::from(self.random.one_in(3)));
            return Some(self.push(node, &[x.id], DataType::Int64, dims));
        }
        let op = BY_INPUT[self.random.index(BY_INPUT.len())];
        let axis = if self.random.one_in(2) { axis as i64 } else { axis as i64 - x.dims.len() as i64 };
        let axes = self.ints(&[axis]);
        Some(self.push(Node::new(op).with("keepdims", i64::from(keep)), &[x.id, axes], x.elem, dims))
    }

    fn along_axis(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Float && !v.dims.is_empty())?;
        let axis = x.dims.iter().rposition(|d| *d != Open)?;
        match self.random.index(7) {
            0 => Some(self.push(Node::new("Softmax").with("axis", axis as i64), &[x.id], x.elem, x.dims)),
            1 => Some(self.push(Node::new("LogSoftmax").with("axis", axis as i64), &[x.id], x.elem, x.dims)),
            2 => Some(self.push(Node::new("Hardmax").with("axis", axis as i64), &[x.id], x.elem, x.dims)),
            3 => {
                let axis = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[axis as i64]));
                let node = Node::new("CumSum").with("exclusive", i64::from(self.random.one_in(2)));
                Some(self.push(node, &[x.id, axis], x.elem, x.dims))
            }
            4 => {
                let k = self.ints(&[1]);
                let mut dims = x.dims.clone();
                dims[axis] = Known(1);
                let names = [self.graph.fresh_name("values"), self.graph.fresh_name("indices")];
                let outputs = names.map(|name| self.graph.add_value(name, None));
                let node = Node::new("TopK").with("axis", axis as i64);
                self.graph.add_node(MAIN, node, vec![Some(x.id), Some(k)], outputs.map(Some).to_vec());
                for (id, elem) in outputs.into_iter().zip([DataType::Float, DataType::Int64]) {
                    self.pool.push(Value { id, elem, dims: dims.clone() });
                }
                self.pool.last().cloned()
            }
            5 => {
                let node =
                    Node::new("LpNormalization").with("axis", axis as i64).with("p", 1 + self.random.index(2) as i64);
                Some(self.push(node, &[x.id], x.elem, x.dims))
            }
            _ => {
                let arg = Node::new("ArgMax").with("axis", axis as i64).with("keepdims", 0);
                let soft = self.graph.append(MAIN, Node::new("Softmax").with("axis", axis as i64), &[x.id], "soft");
                let mut dims = x.dims;
                dims.remove(axis);
                Some(self.push(arg, &[soft], DataType::Int64, dims))
            }
        }
    }

    fn product(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Float && matches!(v.dims.last(), Some(Known(_))))?;
        let Some(Known(k)) = x.dims.last().copied() else { return None };
        let n = [1, 3, 4][self.random.index(3)];
        let mut dims = x.dims.clone();
        *dims.last_mut()? = Known(n);
        match self.random.index(4) {
            0 if x.dims.len() == 2 => {
                let turned = self.random.one_in(2);
                let w = if turned { self.weight(x.elem, &[n, k]) } else { self.weight(x.elem, &[k, n]) };
                let b = self.weight(x.elem, &[n]);
                let node = Node::new("Gemm").with("transB", i64::from(turned)).with("alpha", 0.5f32);
                Some(self.push(node, &[x.id, w, b], x.elem, dims))
            }
            1 if x.dims.len() >= 2 => {
                let mut perm: Vec<i64> = (0..x.dims.len() as i64).collect();
                let len = perm.len();
                perm.swap(len - 1, len - 2);
                let turned = self.graph.append(MAIN, Node::new("Transpose").with("perm", perm), &[x.id], "turned");
                let mut dims = x.dims.clone();
                let rows = dims[len - 2];
                dims[len - 1] = rows;
                Some(self.push(Node::new("MatMul"), &[x.id, turned], x.elem, dims))
            }
            2 if x.dims.len() == 2 => {
                let w = self.weight(x.elem, &[k, n]);
                Some(self.push(Node::new("Einsum").with("equation", "ij,jk->ik"), &[x.id, w], x.elem, dims))
            }
            _ => {
                let w = self.weight(x.elem, &[k, n]);
                let y = self.push(Node::new("MatMul"), &[x.id, w], x.elem, dims.clone());
                if self.random.one_in(2) {
                    let other = self.constant_for(&y);
                    let op = ["Add", "Mul", "Div", "Sub"][self.random.index(4)];
                    return Some(self.push(Node::new(op), &[y.id, other], y.elem, dims));
                }
                Some(y)
            }
        }
    }

    fn window(&mut self) -> Option<Value> {
        let x = self.pick(|v| {
            v.elem == DataType::Float
                && matches!(v.dims[..], [_, Known(_), Known(h), Known(w)] if h >= 2 && w >= 2 && h <= 16 && w <= 16)
        })?;
        let [n, Known(c), Known(h), Known(w)] = x.dims[..] else { return None };
        match self.random.index(6) {
            0 | 1 => {
                let m = 1 + self.random.index(4);
                let weight = self.weight(x.elem, &[m, c, 3, 3]);
                let bias = self.weight(x.elem, &[m]);
                let node = Node::new("Conv").with("pads", vec![1, 1, 1, 1]);
                let y = self.push(node, &[x.id, weight, bias], x.elem, vec![n, Known(m), Known(h), Known(w)]);
                if self.random.one_in(2) {
                    let scale = self.weight(x.elem, &[m, 1, 1]);
                    let op = ["Add", "Mul", "Sub"][self.random.index(3)];
                    return Some(self.push(Node::new(op), &[y.id, scale], y.elem, y.dims));
                }
                Some(y)
            }
            2 => {
                let weight = self.weight(x.elem, &[c, 2, 2, 2]);
                let node = Node::new("ConvTranspose").with("strides", vec![2, 2]);
                Some(self.push(node, &[x.id, weight], x.elem, vec![n, Known(2), Known(2 * h), Known(2 * w)]))
            }
            3 => {
                let op = if self.random.one_in(2) { "MaxPool" } else { "AveragePool" };
                let node = Node::new(op).with("kernel_shape", vec![2, 2]);
                Some(self.push(node, &[x.id], x.elem, vec![n, Known(c), Known(h - 1), Known(w - 1)]))
            }
            4 => {
                let op = if self.random.one_in(2) { "GlobalMaxPool" } else { "GlobalAveragePool" };
                Some(self.push(Node::new(op), &[x.id], x.elem, vec![n, Known(c), Known(1), Known(1)]))
            }
            _ => Some(self.push(Node::new("LRN").with("size", 3), &[x.id], x.elem, x.dims)),
        }
    }

    fn normalize(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Float && v.dims.len() >= 2)?;
        match (self.random.index(4), &x.dims[..]) {
            (0, [_, Known(c), ..]) => {
                let c = *c;
                let variance: Vec<f32> = (0..c).map(|_| 0.5 + self.random.uniform() as f32).collect();
                let variance = self.graph.add_initializer(MAIN, "variance", Tensor::from_f32s(&[c], &variance));
                let [scale, shift, mean] = [(); 3].map(|()| self.weight(DataType::Float, &[c]));
                let inputs = [x.id, scale, shift, mean, variance];
                Some(self.push(Node::new("BatchNormalization"), &inputs, x.elem, x.dims))
            }
            (1, [_, Known(c), _, ..]) => {
                let c = *c;
                let [scale, shift] = [(); 2].map(|()| self.weight(DataType::Float, &[c]));
                Some(self.push(Node::new("InstanceNormalization"), &[x.id, scale, shift], x.elem, x.dims))
            }
            (_, [.., Known(w)]) => {
                let w = *w;
                let [scale, shift] = [(); 2].map(|()| self.weight(DataType::Float, &[w]));
                Some(self.push(Node::new("LayerNormalization"), &[x.id, scale, shift], x.elem, x.dims))
            }
            _ => None,
        }
    }

    /// Shape arithmetic whose results are used as data.
    fn shapes(&mut self) -> Option<Value> {
        let x = self.pick(|v| !v.dims.is_empty())?;
        match self.random.index(5) {
            0 => {
                let rank = x.dims.len();
                Some(self.push(Node::new("Shape"), &[x.id], DataType::Int64, vec![Known(rank)]))
            }
            1 => Some(self.push(Node::new("Size"), &[x.id], DataType::Int64, vec![])),
            2 => {
                let shape = self.graph.append(MAIN, Node::new("Shape"), &[x.id], "shape");
                let value = self.number() as f32;
                let node = Node::new("ConstantOfShape").with("value", Tensor::from_f32s(&[1], &[value]));
                Some(self.push(node, &[shape], DataType::Float, x.dims))
            }
            3 => {
                let size = self.graph.append(MAIN, Node::new("Shape").with("start", 0).with("end", 1), &[x.id], "size");
                let zero = self.ints(&[0]);
                let size = self.graph.append(MAIN, Node::new("Squeeze"), &[size, zero], "size");
                let [start, step] = [0, 1].map(|v| self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[v])));
                let dims = vec![x.dims[0]];
                Some(self.push(Node::new("Range"), &[start, size, step], DataType::Int64, dims))
            }
            _ => {
                let x = self.pick(|v| v.elem == DataType::Float && v.dims.len() == 2)?;
                Some(self.push(Node::new("EyeLike"), &[x.id], DataType::Float, x.dims))
            }
        }
    }

    fn quantize(&mut self) -> Option<Value> {
        let x = self.float()?;
        if self.random.one_in(4) && matches!(x.dims.last(), Some(Known(_))) {
            let index = self.push(Node::new("Softsign"), &[x.id], x.elem, x.dims);
            let index = self.graph.append(MAIN, Node::new("Cast").with("to", DataType::Int64), &[index.id], "index");
            let depth = self.graph.add_initializer(MAIN, "c", Tensor::from_i64s(&[], &[3]));
            let values = self.graph.add_initializer(MAIN, "c", Tensor::from_f32s(&[2], &[0.0, 1.0]));
            let dims = self.pool.last()?.dims.iter().copied().chain([Known(3)]).collect();
            return Some(self.push(Node::new("OneHot"), &[index, depth, values], DataType::Float, dims));
        }
        let scale = self.graph.add_initializer(MAIN, "scale", Tensor::from_f32s(&[], &[0.05]));
        let zero = Tensor::from_f64s(DataType::Uint8, &[], &[128.0])?;
        let zero = self.graph.add_initializer(MAIN, "zero", zero);
        let there = self.graph.append(MAIN, Node::new("QuantizeLinear"), &[x.id, scale, zero], "q");
        Some(self.push(Node::new("DequantizeLinear"), &[there, scale, zero], x.elem, x.dims))
    }

    /// Two nodes of a kind one after another, as passes join them.
    fn chain(&mut self) -> Option<Value> {
        let x = self.real()?;
        let (first, second) = match self.random.index(6) {
            0 => ("Mul", "Mul"),
            1 => ("Add", "Sub"),
            2 => ("Add", "Add"),
            3 => ("Div", "Div"),
            4 => ("Mul", "Div"),
            _ => ("Max", "Min"),
        };
        let a = self.constant_for(&x);
        // The same number again, as what undoes itself has.
        let b = if self.random.one_in(2) { a } else { self.constant_for(&x) };
        let once = self.push(Node::new(first), &[x.id, a], x.elem, x.dims.clone());
        Some(self.push(Node::new(second), &[once.id, b], x.elem, x.dims))
    }

    /// Activations and normalizations, spelled out with constants of several ranks, right and almost right.
    fn spelled(&mut self) -> Option<Value> {
        let x = self.pick(|v| v.elem == DataType::Float && matches!(v.dims.last(), Some(Known(_))))?;
        let constant = |mix: &mut Mix, value: f32| {
            let dims: &[usize] = [&[][..], &[1], &[1, 1, 1]][mix.random.index(3)];
            let rank = dims.len();
            let dims = if rank > x.dims.len() { &[][..] } else { dims };
            let off = if mix.random.one_in(6) { 1.01 } else { 1.0 };
            mix.graph.add_initializer(MAIN, "c", Tensor::from_f32s(dims, &[value * off]))
        };
        let dims = x.dims.clone();
        match self.random.index(4) {
            0 => {
                let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|v| constant(self, v));
                let divided = self.push(Node::new("Div"), &[x.id, root], x.elem, dims.clone());
                let erf = self.push(Node::new("Erf"), &[divided.id], x.elem, dims.clone());
                let sum = self.push(Node::new("Add"), &[erf.id, one], x.elem, dims.clone());
                let product = self.push(Node::new("Mul"), &[x.id, sum.id], x.elem, dims.clone());
                Some(self.push(Node::new("Mul"), &[product.id, half], x.elem, dims))
            }
            1 => {
                let [three, six] = [3.0, 6.0].map(|v| constant(self, v));
                let bounds = [self.scalar(x.elem, 0.0), self.scalar(x.elem, 6.0)];
                let sum = self.push(Node::new("Add"), &[x.id, three], x.elem, dims.clone());
                let clip = self.push(Node::new("Clip"), &[sum.id, bounds[0], bounds[1]], x.elem, dims.clone());
                if self.random.one_in(2) {
                    return Some(self.push(Node::new("Div"), &[clip.id, six], x.elem, dims));
                }
                let product = self.push(Node::new("Mul"), &[x.id, clip.id], x.elem, dims.clone());
                Some(self.push(Node::new("Div"), &[product.id, six], x.elem, dims))
            }
            2 => {
                let sigmoid = self.push(Node::new("Sigmoid"), &[x.id], x.elem, dims.clone());
                Some(self.push(Node::new("Mul"), &[x.id, sigmoid.id], x.elem, dims))
            }
            _ => {
                let axes = self.ints(&[-1]);
                let mut narrow = dims.clone();
                *narrow.last_mut()? = Known(1);
                let mean = self.push(Node::new("ReduceMean"), &[x.id, axes], x.elem, narrow.clone());
                let centred = self.push(Node::new("Sub"), &[x.id, mean.id], x.elem, dims.clone());
                let square = self.push(Node::new("Mul"), &[centred.id, centred.id], x.elem, dims.clone());
                let variance = self.push(Node::new("ReduceMean"), &[square.id, axes], x.elem, narrow.clone());
                let epsilon = constant(self, 1e-5);
                let sum = self.push(Node::new("Add"), &[variance.id, epsilon], x.elem, narrow.clone());
                let root = self.push(Node::new("Sqrt"), &[sum.id], x.elem, narrow);
                Some(self.push(Node::new("Div"), &[centred.id, root.id], x.elem, dims))
            }
        }
    }

    /// The last value and some others become outputs; what they do not need stays, as dead code.
    fn finish(mut self) -> Model {
        let made: Vec<Value> = self.pool.iter().filter(|v| self.graph.producer(v.id).is_some()).cloned().collect();
        let extra = self.random.index(3);
        let mut outputs: Vec<Value> = made.last().cloned().into_iter().collect();
        for _ in 0..extra {
            if let Some(value) = made.get(self.random.index(made.len()))
                && outputs.iter().all(|o| o.id != value.id)
            {
                outputs.push(value.clone());
            }
        }
        for (index, output) in outputs.iter().enumerate() {
            self.graph.rename(output.id, format!("y{index}"));
            self.graph.value_mut(output.id).ty = Some(ty(output.elem, &output.dims));
            self.graph.add_output(MAIN, output.id);
        }
        Model { ir_version: 8, opsets: vec![(String::new(), 18)], graph: self.graph, ..Model::default() }
    }
}

fn ty(elem: DataType, dims: &[Size]) -> Type {
    let dim = |size: &Size| match size {
        Open => Dim::Symbol("N".into()),
        Known(n) => Dim::Known(*n as i64),
    };
    Type::tensor(elem, dims.iter().map(dim).collect())
}
