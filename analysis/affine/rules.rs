//! What operators make of affine tensors.

use super::{Affine, Affines, is_zero};
use crate::{DimExpr, Symbol};
use lathe_ir::{DataType, Node, ValueId};

impl Affines<'_> {
    /// What a standard node computes as its first output, `value`, whose element type is a whole number or a boolean.
    pub(super) fn computed(&self, node: &Node, value: ValueId, depth: usize) -> Option<Affine> {
        let (elem, ndim) = (self.facts.elem(value)?, self.facts.ndim(value)?);
        let at = |index: usize| self.find(node.input(index)?, depth + 1);
        match node.op_type.as_str() {
            "Identity" => at(0),
            "Cast" => match (self.facts.elem(node.input(0)?)?, elem) {
                (DataType::Bool, _) | (_, DataType::Int64) => at(0),
                (_, DataType::Bool) => at(0)?.uniform().map(|v| Affine::constant(i64::from(v != 0), ndim)),
                // Nothing changes where the new type holds what the old one held.
                _ => at(0),
            },
            "Range" => {
                let (start, step) = (at(0)?.offset, self.single(node.input(2)?)?);
                Some(Affine { offset: start, slopes: vec![step.into()] })
            }
            "ConstantOfShape" => match node.attribute("value") {
                None => None,
                Some(lathe_ir::AttributeValue::Tensor(t)) => Some(Affine::constant(t.scalar_i64()?, ndim)),
                Some(_) => None,
            },
            "Expand" | "Tile" | "Neg" | "Not" | "Add" | "Sub" | "Mul" => match node.op_type.as_str() {
                "Expand" | "Tile" => self.spread(node.input(0)?, value, depth + 1),
                "Neg" => at(0)?.times(&(-1).into()),
                "Not" => at(0)?.uniform().map(|v| Affine::constant(1 - v, ndim)),
                op => {
                    let (a, b) = self.pair(node, depth)?;
                    match op {
                        "Add" => return a.plus(&b),
                        "Sub" => return a.minus(&b),
                        _ => {}
                    }
                    match (a.is_flat(), b.is_flat()) {
                        (true, _) => b.times(&a.offset),
                        (_, true) => a.times(&b.offset),
                        _ => None,
                    }
                }
            },
            "And" | "Or" => {
                // One operand may decide alone.
                let decisive = i64::from(node.op_type == "Or");
                let (a, b) = (at(0).and_then(|a| a.uniform()), at(1).and_then(|b| b.uniform()));
                if a == Some(decisive) || b == Some(decisive) {
                    return Some(Affine::constant(decisive, ndim));
                }
                (a.is_some() && b.is_some()).then(|| Affine::constant(1 - decisive, ndim))
            }
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" => {
                let (a, b) = self.pair(node, depth)?;
                let holds = compare(&node.op_type, &a.minus(&b)?, self.facts.shape(value)?)?;
                Some(Affine::constant(i64::from(holds), ndim))
            }
            // No whole number becomes NaN or, in these types, infinite.
            "IsNaN" | "IsInf" => {
                let cast = self.graph.node(self.graph.producer(node.input(0)?)?);
                let whole = |elem: DataType| elem.is_integer() || elem == DataType::Bool;
                let wide = matches!(self.facts.elem(node.input(0)?)?, DataType::Float | DataType::Double);
                let never = cast.is("Cast") && wide && whole(self.facts.elem(cast.input(0)?)?);
                never.then(|| Affine::constant(0, ndim))
            }
            "Where" => match self.certain(node.input(0)?)? {
                true => self.spread(node.input(1)?, value, depth + 1),
                false => self.spread(node.input(2)?, value, depth + 1),
            },
            "Unsqueeze" | "Squeeze" | "Reshape" | "Flatten" => self.regroup(node.input(0)?, value, depth),
            "Transpose" => {
                let input = at(0)?;
                let slope = |axis: &i64| input.slopes.get(usize::try_from(*axis).ok()?).cloned();
                let slopes = match node.ints("perm") {
                    Some(perm) => perm.iter().map(slope).collect::<Option<_>>()?,
                    None => input.slopes.iter().rev().cloned().collect(),
                };
                Some(Affine { offset: input.offset, slopes })
            }
            "Slice" => self.slice(node, depth),
            "Concat" => self.concat(node, ndim, depth),
            "CumSum" => {
                let step = at(0)?.uniform()?;
                if step == 0 {
                    return Some(Affine::constant(0, ndim));
                }
                let plain = node.int("exclusive").unwrap_or(0) == 0 && node.int("reverse").unwrap_or(0) == 0;
                let axis = from_front(self.single(node.input(1)?)?, ndim)?;
                let mut sums = Affine::constant(step, ndim);
                sums.slopes[axis] = step.into();
                plain.then_some(sums)
            }
            "Gather" => {
                let data = at(0)?;
                let axis = from_front(node.int("axis").unwrap_or(0), data.slopes.len())?;
                // Which element is taken makes no difference along an axis without slope.
                if is_zero(&data.slopes[axis]) {
                    let axes = vec![0.into(); self.facts.ndim(node.input(1)?)?];
                    let slopes = [&data.slopes[..axis], &axes, &data.slopes[axis + 1..]].concat();
                    return Some(Affine { offset: data.offset, slopes });
                }
                let scaled = self.index(&at(1)?, node.input(1)?)?.times(&data.slopes[axis])?;
                let slopes = [&data.slopes[..axis], &scaled.slopes, &data.slopes[axis + 1..]].concat();
                Some(Affine { offset: data.offset.plus(&scaled.offset)?, slopes })
            }
            "GatherND" => self.gather_nd(node, ndim, depth),
            // The older exporter counts by looking for what is not 0 among ones.
            "NonZero" => {
                let every = at(0)?.uniform()? != 0 && self.facts.ndim(node.input(0)?)? == 1;
                every.then(|| Affine { offset: 0.into(), slopes: vec![0.into(), 1.into()] })
            }
            _ => None,
        }
    }

    /// An index that is provably not negative: negative ones count from the end.
    fn index<'b>(&self, index: &'b Affine, value: ValueId) -> Option<&'b Affine> {
        index.bounds(self.facts.shape(value)?)?.0.is_nonnegative().then_some(index)
    }

    /// The only element of a value, if it is known.
    fn single(&self, value: ValueId) -> Option<i64> {
        match self.graph.constant(value) {
            Some(tensor) => tensor.scalar_i64(),
            None => match self.facts.contents(value)?.known()?.as_slice() {
                [one] => Some(*one),
                _ => None,
            },
        }
    }

    fn numbers(&self, value: ValueId) -> Option<Vec<i64>> {
        match self.graph.constant(value) {
            Some(tensor) => tensor.to_i64s(),
            None => self.facts.contents(value)?.known(),
        }
    }

    /// `value` broadcast to the shape of `target`.
    fn spread(&self, value: ValueId, target: ValueId, depth: usize) -> Option<Affine> {
        let affine = self.find(value, depth + 1)?;
        let (from, to) = (self.facts.shape(value)?, self.facts.shape(target)?);
        let lead = to.len().checked_sub(from.len())?;
        let mut slopes = vec![0.into(); lead];
        for (axis, size) in from.iter().enumerate() {
            let slope = &affine.slopes[axis];
            // A single element has no slope.
            let flat = is_zero(slope) || size.range().1 == Some(1);
            if !flat && !same(size, &to[lead + axis]) {
                return None;
            }
            slopes.push(if flat { 0.into() } else { slope.clone() });
        }
        Some(Affine { offset: affine.offset, slopes })
    }

    /// Both operands of an elementwise operator, broadcast against each other.
    pub(super) fn pair(&self, node: &Node, depth: usize) -> Option<(Affine, Affine)> {
        let (a, b) = (node.input(0)?, node.input(1)?);
        let (left, right) = (self.facts.shape(a)?, self.facts.shape(b)?);
        let ndim = left.len().max(right.len());
        let broadcast = |value: ValueId, mine: &[DimExpr], other: &[DimExpr]| {
            let affine = self.find(value, depth + 1)?;
            let mut slopes = vec![0.into(); ndim - mine.len()];
            for (axis, size) in mine.iter().enumerate() {
                let beside = (axis + other.len()).checked_sub(mine.len()).map(|at| &other[at]);
                let slope = &affine.slopes[axis];
                let flat = is_zero(slope) || size.range().1 == Some(1);
                if !flat && !beside.is_none_or(|o| o.range().1 == Some(1) || meet(size, o)) {
                    return None;
                }
                slopes.push(if flat { 0.into() } else { slope.clone() });
            }
            Some(Affine { offset: affine.offset, slopes })
        };
        Some((broadcast(a, left, right)?, broadcast(b, right, left)?))
    }

    /// The same elements where only axes of size one come or go.
    fn regroup(&self, input: ValueId, output: ValueId, depth: usize) -> Option<Affine> {
        let affine = self.find(input, depth + 1)?;
        let (from, to) = (self.facts.shape(input)?, self.facts.shape(output)?);
        if affine.is_flat() {
            return Some(Affine::constant(affine.offset, to.len()));
        }
        let one = |size: &DimExpr| size.as_known() == Some(1);
        let mut axes = from.iter().enumerate().filter(|(_, size)| !one(size));
        let mut slopes = Vec::with_capacity(to.len());
        for size in to {
            if one(size) {
                slopes.push(0.into());
                continue;
            }
            let (axis, before) = axes.next()?;
            if !same(before, size) {
                return None;
            }
            slopes.push(affine.slopes[axis].clone());
        }
        axes.next().is_none().then_some(Affine { offset: affine.offset, slopes })
    }

    fn slice(&self, node: &Node, depth: usize) -> Option<Affine> {
        let mut affine = self.find(node.input(0)?, depth + 1)?;
        if affine.is_flat() {
            return Some(affine);
        }
        let starts = self.numbers(node.input(1)?)?;
        let axes = match node.input(3) {
            Some(axes) => self.numbers(axes)?,
            None => (0..starts.len() as i64).collect(),
        };
        let steps = match node.input(4) {
            Some(steps) => self.numbers(steps)?,
            None => vec![1; starts.len()],
        };
        for ((start, axis), step) in starts.into_iter().zip(axes).zip(steps) {
            let axis = from_front(axis, affine.slopes.len())?;
            if is_zero(&affine.slopes[axis]) {
                continue;
            }
            if start < 0 || step < 1 {
                return None;
            }
            affine.offset = affine.moved(axis, start)?;
            affine.slopes[axis] = affine.slopes[axis].scaled(step)?;
        }
        Some(affine)
    }

    fn concat(&self, node: &Node, ndim: usize, depth: usize) -> Option<Affine> {
        let axis = from_front(node.int("axis")?, ndim)?;
        let mut parts = Vec::new();
        let mut start = Some(0i64);
        let sizes: Vec<&DimExpr> =
            node.inputs().iter().map(|&v| self.facts.shape(v?)?.get(axis)).collect::<Option<_>>()?;
        for (index, &input) in node.inputs().iter().enumerate() {
            let affine = self.find(input?, depth + 1)?;
            // The first element of a tensor beside the tensor itself: if there is none, both are empty.
            let beside = |other: &DimExpr| DimExpr::from(1).smaller(other).as_ref() == Some(sizes[index]);
            let length = match (sizes[index].as_known(), sizes.as_slice()) {
                (None, [a, b]) if beside(if index == 0 { b } else { a }) => Some(1),
                (known, _) => known,
            };
            if length == Some(0) {
                continue;
            }
            parts.push((start?, length, affine));
            start = start.zip(length).and_then(|(s, l)| s.checked_add(l));
        }
        let (_, _, first) = parts.first()?;
        // The slope along the axis: of a part with more than one element, else between the first two parts.
        let inside = parts.iter().find(|(_, length, _)| *length != Some(1)).map(|(.., a)| a.slopes[axis].clone());
        let between = || parts.get(1).and_then(|(.., a)| a.offset.minus(&first.offset));
        let mut whole = first.clone();
        whole.slopes[axis] = inside.or_else(between).unwrap_or(0.into());
        for (start, length, part) in &parts {
            let offset = whole.moved(axis, *start)?;
            let mut slopes = part.slopes.clone();
            if *length == Some(1) {
                slopes[axis] = whole.slopes[axis].clone();
            }
            if part.offset != offset || slopes != whole.slopes {
                return None;
            }
        }
        Some(whole)
    }

    fn gather_nd(&self, node: &Node, ndim: usize, depth: usize) -> Option<Affine> {
        let data = self.find(node.input(0)?, depth + 1)?;
        if data.is_flat() {
            return Some(Affine::constant(data.offset, ndim));
        }
        if node.int("batch_dims").unwrap_or(0) != 0 {
            return None;
        }
        let indices = node.input(1)?;
        let outer = self.facts.ndim(indices)?.checked_sub(1)?;
        let grid = self.graph.node(self.graph.producer(indices)?);
        if !grid.is("Concat") || from_front(grid.int("axis")?, outer + 1)? != outer {
            return None;
        }
        let mut found = Affine::constant(data.offset, outer);
        for (axis, &component) in grid.inputs().iter().enumerate() {
            if self.facts.shape(component?)?[outer].as_known() != Some(1) {
                return None;
            }
            let slope = data.slopes.get(axis)?;
            if is_zero(slope) {
                continue;
            }
            let component = self.find(component?, depth + 1)?;
            let mut scaled = self.index(&component, grid.inputs()[axis]?)?.times(slope)?;
            scaled.slopes.truncate(outer);
            found = found.plus(&scaled)?;
        }
        found.slopes.extend_from_slice(data.slopes.get(grid.inputs().len()..)?);
        (found.slopes.len() == ndim).then_some(found)
    }
}

/// Whether `difference` compares with 0 in this way everywhere (or nowhere) in a tensor of this shape.
fn compare(op: &str, difference: &Affine, shape: &[DimExpr]) -> Option<bool> {
    let (low, high) = difference.bounds(shape)?;
    let (least, most) = (low.range().0, high.range().1);
    let (below, above) = (most.is_some_and(|m| m < 0), least.is_some_and(|l| l > 0));
    let (not_below, not_above) = (least.is_some_and(|l| l >= 0), most.is_some_and(|m| m <= 0));
    let (yes, no) = match op {
        "Equal" => (not_below && not_above, below || above),
        "Less" => (below, not_below),
        "LessOrEqual" => (not_above, above),
        "Greater" => (above, not_above),
        _ => (not_below, below),
    };
    (yes || no).then_some(yes)
}

/// Whether two axes that are broadcast against one another are equally long, or one of them is a single element.
fn meet(a: &DimExpr, b: &DimExpr) -> bool {
    a.equal_where_broadcast(b) || same(a, b)
}

/// Whether two sizes are equal wherever every open size is at least one.
fn same(a: &DimExpr, b: &DimExpr) -> bool {
    let shifted = |size: &DimExpr| {
        size.substitute(&|symbol| match symbol {
            Symbol::Element { .. } => None,
            _ => DimExpr::from(symbol.clone()).offset(1),
        })
    };
    a == b || matches!((shifted(a), shifted(b)), (Some(a), Some(b)) if a == b)
}

fn from_front(axis: i64, ndim: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + ndim as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&a| a < ndim)
}
