//! The arithmetic between two evaluations of the network: scaled sums, clipping, guidance.

use super::{Clip, Error};
use lathe_ir::{AttributeValue, DataType, Dim, Graph, Node, ScopeId, Tensor, ValueId};

/// A factor: known when the graph is made, or computed in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Factor {
    /// A number.
    Number(f64),
    /// A scalar of float32.
    Value(ValueId),
}

impl Factor {
    fn is(self, number: f64) -> bool {
        self == Factor::Number(number)
    }
}

/// Appends nodes to one scope of a graph.
pub(crate) struct Sums<'a> {
    /// The graph.
    pub graph: &'a mut Graph,
    /// Where the nodes go.
    pub scope: ScopeId,
}

impl Sums<'_> {
    /// A node with one output.
    pub fn node(&mut self, op: &str, inputs: &[ValueId], name: &str) -> ValueId {
        self.graph.append(self.scope, Node::new(op), inputs, name)
    }

    /// A constant; it stands in the main graph, where every scope sees it.
    pub fn constant(&mut self, tensor: Tensor, name: &str) -> ValueId {
        self.graph.add_initializer(ScopeId::MAIN, name, tensor)
    }

    /// A scalar of float32.
    pub fn number(&mut self, number: f64, name: &str) -> ValueId {
        self.constant(Tensor::from_f32s(&[], &[number as f32]), name)
    }

    /// A list of whole numbers.
    pub fn int64s(&mut self, numbers: &[i64], name: &str) -> ValueId {
        self.constant(Tensor::int64s(numbers), name)
    }

    /// A conversion, unless `value` is of the type already.
    pub fn cast(&mut self, value: ValueId, from: DataType, to: DataType, name: &str) -> ValueId {
        if from == to {
            return value;
        }
        self.graph.append(self.scope, Node::new("Cast").with("to", to), &[value], name)
    }

    /// `value · factor`, in the element type of `value`.
    pub fn scaled(&mut self, value: ValueId, factor: Factor, dtype: DataType, name: &str) -> Result<ValueId, Error> {
        let factor = match factor {
            Factor::Number(1.0) => return Ok(value),
            Factor::Number(number) => {
                let tensor = Tensor::from_f64s(dtype, &[], &[number]);
                let tensor = tensor.ok_or_else(|| Error::Network(format!("{dtype} cannot be weighted")))?;
                self.constant(tensor, &format!("{name}.factor"))
            }
            Factor::Value(factor) => self.cast(factor, DataType::Float, dtype, &format!("{name}.factor")),
        };
        Ok(self.node("Mul", &[value, factor], name))
    }

    /// `Σ value · factor`. Terms whose factor is zero are left out; without any, it is the first one times zero.
    pub fn sum(&mut self, terms: &[(ValueId, Factor)], dtype: DataType, name: &str) -> Result<ValueId, Error> {
        let mut sum = None;
        for &(value, factor) in terms.iter().filter(|(_, factor)| !factor.is(0.0)) {
            let term = self.scaled(value, factor, dtype, name)?;
            sum = Some(match sum {
                None => term,
                Some(sum) => self.node("Add", &[sum, term], name),
            });
        }
        match (sum, terms.first()) {
            (Some(sum), _) => Ok(sum),
            (None, Some(&(value, factor))) => self.scaled(value, factor, dtype, name),
            (None, None) => Err(Error::Plan("a sum of nothing".to_owned())),
        }
    }

    /// The row of a table that belongs to this iteration.
    pub fn row(&mut self, table: ValueId, iteration: ValueId, name: &str) -> ValueId {
        self.graph.append(self.scope, Node::new("Gather").with("axis", 0), &[table, iteration], name)
    }

    /// The halves of a value along its first axis.
    pub fn halves(&mut self, value: ValueId, name: &str) -> [ValueId; 2] {
        let outputs = ["a", "b"].map(|half| {
            let name = self.graph.fresh_name(&format!("{name}.{half}"));
            self.graph.add_value(name, None)
        });
        let node = Node::new("Split").with("axis", 0).with("num_outputs", 2);
        self.graph.add_node(self.scope, node, vec![Some(value)], outputs.map(Some).to_vec());
        outputs
    }

    /// Two values, one after the other along the first axis.
    pub fn joined(&mut self, a: ValueId, b: ValueId, name: &str) -> ValueId {
        self.graph.append(self.scope, Node::new("Concat").with("axis", 0), &[a, b], name)
    }

    /// An estimate of the clean sample as the scheduler clips it.
    pub fn clipped(&mut self, value: ValueId, clip: Clip, dims: &[Dim]) -> Result<ValueId, Error> {
        match clip {
            Clip::None => Ok(value),
            Clip::Clamp(range) => {
                let (low, high) = (self.number(-range, "low"), self.number(range, "high"));
                Ok(self.node("Clip", &[value, low, high], "clipped"))
            }
            Clip::Threshold { ratio, max } => self.thresholded(value, ratio, max, dims),
        }
    }

    /// Clamps to a quantile of the absolute values of each sample, between 1 and `max`, and divides by it.
    fn thresholded(&mut self, value: ValueId, ratio: f64, max: f64, dims: &[Dim]) -> Result<ValueId, Error> {
        let sizes: Option<Vec<i64>> = dims.iter().skip(1).map(Dim::known).collect();
        let count = sizes.map(|sizes| sizes.iter().product::<i64>()).filter(|&n| n > 0);
        let count = count.ok_or_else(|| {
            Error::Unsupported("`thresholding` = true of a latent of open size, whose quantile is not known".to_owned())
        })?;
        let position = ratio * (count - 1) as f64;
        let low = position.floor();
        let kept = count - low as i64;
        let shape = self.int64s(&[-1, count], "flat");
        let flat = self.node("Reshape", &[value, shape], "flat");
        let sizes = self.node("Abs", &[flat], "sizes");
        let most = self.int64s(&[kept], "kept");
        let names = ["largest", "places"].map(|name| {
            let name = self.graph.fresh_name(name);
            self.graph.add_value(name, None)
        });
        let node = Node::new("TopK").with("axis", 1);
        self.graph.add_node(self.scope, node, vec![Some(sizes), Some(most)], names.map(Some).to_vec());
        let column = |sums: &mut Self, index: i64| {
            let index = sums.int64s(&[index], "column");
            sums.graph.append(sums.scope, Node::new("Gather").with("axis", 1), &[names[0], index], "quantile")
        };
        let (below, above) = (column(self, kept - 1), column(self, (kept - 2).max(0)));
        let weight = position - low;
        let terms = [(below, Factor::Number(1.0 - weight)), (above, Factor::Number(weight))];
        let quantile = self.sum(&terms, DataType::Float, "quantile")?;
        let (one, max) = (self.number(1.0, "one"), self.number(max, "max"));
        let bound = self.node("Clip", &[quantile, one, max], "bound");
        let ones: Vec<i64> = std::iter::once(-1).chain(dims.iter().skip(1).map(|_| 1)).collect();
        let ones = self.int64s(&ones, "ones");
        let bound = self.node("Reshape", &[bound, ones], "bound");
        let least = self.node("Neg", &[bound], "least");
        let inside = self.node("Min", &[value, bound], "inside");
        let inside = self.node("Max", &[inside, least], "inside");
        Ok(self.node("Div", &[inside, bound], "thresholded"))
    }

    /// `uncond + scale·(cond − uncond)`, pulled by `rescale` towards the deviation of `cond`.
    pub fn guided(
        &mut self,
        cond: ValueId,
        uncond: ValueId,
        scale: Factor,
        rescale: f64,
        ndim: usize,
    ) -> Result<ValueId, Error> {
        let pull = self.node("Sub", &[cond, uncond], "pull");
        let pull = self.scaled(pull, scale, DataType::Float, "pull")?;
        let guided = self.node("Add", &[uncond, pull], "guided");
        if rescale == 0.0 {
            return Ok(guided);
        }
        let (wanted, found) = (self.deviation(cond, ndim)?, self.deviation(guided, ndim)?);
        let ratio = self.node("Div", &[wanted, found], "ratio");
        let ratio = self.scaled(ratio, Factor::Number(rescale), DataType::Float, "ratio")?;
        let rest = self.number(1.0 - rescale, "rest");
        let factor = self.node("Add", &[ratio, rest], "factor");
        Ok(self.node("Mul", &[guided, factor], "rescaled"))
    }

    /// The deviation of each sample over all its axes.
    fn deviation(&mut self, value: ValueId, ndim: usize) -> Result<ValueId, Error> {
        let axes: Vec<i64> = (1..ndim as i64).collect();
        let mean = self.mean(value, &axes);
        let centred = self.node("Sub", &[value, mean], "centred");
        let squares = self.node("Mul", &[centred, centred], "squares");
        let variance = self.mean(squares, &axes);
        Ok(self.node("Sqrt", &[variance], "deviation"))
    }

    fn mean(&mut self, value: ValueId, axes: &[i64]) -> ValueId {
        let axes = self.int64s(axes, "axes");
        self.node("ReduceMean", &[value, axes], "mean")
    }

    /// The mean absolute value of everything, as a scalar.
    pub fn mean_size(&mut self, value: ValueId, name: &str) -> ValueId {
        let sizes = self.node("Abs", &[value], name);
        self.graph.append(self.scope, Node::new("ReduceMean").with("keepdims", 0), &[sizes], name)
    }

    /// A node with subgraphs and several outputs.
    pub fn control(
        &mut self,
        op: &str,
        bodies: &[(&str, ScopeId)],
        inputs: Vec<Option<ValueId>>,
        outputs: usize,
    ) -> Vec<ValueId> {
        let mut node = Node::new(op);
        for &(name, scope) in bodies {
            node = node.with(name, AttributeValue::Graph(scope));
        }
        let made: Vec<ValueId> = (0..outputs)
            .map(|_| {
                let name = self.graph.fresh_name("result");
                self.graph.add_value(name, None)
            })
            .collect();
        self.graph.add_node(self.scope, node, inputs, made.iter().map(|&v| Some(v)).collect());
        made
    }
}
