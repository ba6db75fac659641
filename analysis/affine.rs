//! Index arithmetic: whole-number tensors whose elements are affine in their own indices.
//!
//! Exporters write positions, index grids and masks as long chains of `Range`, `Unsqueeze`, `Expand`, `GatherND` and
//! comparisons. What such a chain holds is often no more than `offset + Σ slope · index`, which decides masks exactly.
//! What is found holds wherever every open dimension is at least one: an empty tensor has no elements to speak of.

use crate::{DimExpr, Facts, Symbol};
use lathe_ir::{DataType, Graph, Node, ValueId};
use std::{cell::RefCell, collections::HashMap};

/// Chains longer than this are not followed.
const DEPTH: usize = 256;
/// Constants with more elements than this are not looked at.
const LARGEST_CONSTANT: usize = 4096;

/// The element at index `(i₀, i₁, …)` is `offset + Σ slopes[a] · iₐ`. Booleans count as 0 and 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affine {
    /// The element at index 0.
    pub offset: i64,
    /// One slope per axis.
    pub slopes: Vec<i64>,
}

impl Affine {
    fn constant(offset: i64, ndim: usize) -> Affine {
        Affine { offset, slopes: vec![0; ndim] }
    }

    /// The value of every element, if they are all the same whatever the shape is.
    pub fn uniform(&self) -> Option<i64> {
        self.slopes.iter().all(|&s| s == 0).then_some(self.offset)
    }

    fn combine(&self, other: &Affine, op: impl Fn(i64, i64) -> Option<i64>) -> Option<Affine> {
        let slopes = self.slopes.iter().zip(&other.slopes).map(|(&a, &b)| op(a, b)).collect::<Option<_>>()?;
        Some(Affine { offset: op(self.offset, other.offset)?, slopes })
    }

    fn scaled(&self, factor: i64) -> Option<Affine> {
        let slopes = self.slopes.iter().map(|s| s.checked_mul(factor)).collect::<Option<_>>()?;
        Some(Affine { offset: self.offset.checked_mul(factor)?, slopes })
    }
}

/// The affine values of one graph, found as they are asked for.
pub struct Affines<'a> {
    graph: &'a Graph,
    facts: &'a Facts,
    known: RefCell<HashMap<ValueId, Option<Affine>>>,
}

impl<'a> Affines<'a> {
    /// Nothing is computed yet.
    pub fn new(graph: &'a Graph, facts: &'a Facts) -> Affines<'a> {
        Affines { graph, facts, known: RefCell::default() }
    }

    /// The affine form of a whole-number or boolean tensor, if it provably has one.
    pub fn of(&self, value: ValueId) -> Option<Affine> {
        self.find(value, 0)
    }

    /// The boolean that every element of `value` is, if that is certain.
    pub fn certain(&self, value: ValueId) -> Option<bool> {
        (self.facts.elem(value)? == DataType::Bool).then(|| self.of(value)?.uniform().map(|v| v != 0)).flatten()
    }

    /// Whether `condition`, `[…, query, key]`, is true exactly where the key does not come after the query: a
    /// conjunction of certainties and one comparison `key ≤ query` of the positions along the last two axes.
    pub fn is_causal(&self, condition: ValueId) -> bool {
        self.conjunction(condition, 0) == Some(true)
    }

    /// `Some(true)` for a causal comparison, `Some(false)` for a certainty, `None` for anything else.
    fn conjunction(&self, value: ValueId, depth: usize) -> Option<bool> {
        if self.certain(value) == Some(true) {
            return Some(false);
        }
        if depth > DEPTH {
            return None;
        }
        let node = self.graph.node(self.graph.producer(value)?);
        let input = |index: usize| node.input(index);
        if node.is("And") {
            let (a, b) = (self.conjunction(input(0)?, depth + 1)?, self.conjunction(input(1)?, depth + 1)?);
            return Some(a || b);
        }
        if node.is("Identity") {
            return self.conjunction(input(0)?, depth + 1);
        }
        // `low ≤ high` or `low < high`, as written either way round.
        if !node.is_standard() {
            return None;
        }
        let ndim = self.facts.ndim(value)?;
        let (first, second) = self.pair(node, 0)?;
        let (low, high, strict) = match node.op_type.as_str() {
            "LessOrEqual" => (first, second, 0),
            "GreaterOrEqual" => (second, first, 0),
            "Less" => (first, second, 1),
            "Greater" => (second, first, 1),
            _ => return None,
        };
        let difference = low.combine(&high, i64::checked_sub)?;
        let (batch, last) = difference.slopes.split_at(ndim.checked_sub(2)?);
        let causal = difference.offset == -strict && batch.iter().all(|&s| s == 0) && last == [-1, 1];
        causal.then_some(true)
    }

    fn find(&self, value: ValueId, depth: usize) -> Option<Affine> {
        if depth > DEPTH {
            return None;
        }
        if let Some(known) = self.known.borrow().get(&value) {
            return known.clone();
        }
        let found = self.infer(value, depth);
        self.known.borrow_mut().insert(value, found.clone());
        found
    }

    fn infer(&self, value: ValueId, depth: usize) -> Option<Affine> {
        let elem = self.facts.elem(value)?;
        if !elem.is_integer() && elem != DataType::Bool {
            return None;
        }
        let ndim = self.facts.ndim(value)?;
        if let Some(tensor) = self.graph.constant(value) {
            return (tensor.len() <= LARGEST_CONSTANT).then(|| fit(&tensor.to_i64s()?, tensor.dims())).flatten();
        }
        if let Some(known) = self.facts.contents(value).and_then(|c| c.known()) {
            return fit(&known, &self.facts.sizes(value)?);
        }
        let node = self.graph.node(self.graph.producer(value)?);
        if !node.is_standard() || node.output(0) != Some(value) {
            return None;
        }
        let at = |index: usize| self.find(node.input(index)?, depth + 1);
        match node.op_type.as_str() {
            "Identity" => at(0),
            "Cast" => match (self.facts.elem(node.input(0)?)?, elem) {
                (DataType::Bool, _) | (_, DataType::Int64) => at(0),
                (_, DataType::Bool) => at(0)?.uniform().map(|v| Affine::constant(i64::from(v != 0), ndim)),
                (from, to) if from == to => at(0),
                _ => at(0).filter(|a| a.uniform().is_some_and(|v| (-128..128).contains(&v))),
            },
            "Range" => {
                let (start, step) = (self.single(node.input(0)?)?, self.single(node.input(2)?)?);
                Some(Affine { offset: start, slopes: vec![step] })
            }
            "ConstantOfShape" => match node.attribute("value") {
                None => None,
                Some(lathe_ir::AttributeValue::Tensor(t)) => Some(Affine::constant(t.scalar_i64()?, ndim)),
                Some(_) => None,
            },
            "Expand" | "Neg" | "Not" | "Add" | "Sub" | "Mul" => match node.op_type.as_str() {
                "Expand" => self.spread(node.input(0)?, value, depth + 1),
                "Neg" => at(0)?.scaled(-1),
                "Not" => at(0)?.uniform().map(|v| Affine::constant(1 - v, ndim)),
                op => {
                    let (a, b) = self.pair(node, depth)?;
                    match op {
                        "Add" => return a.combine(&b, i64::checked_add),
                        "Sub" => return a.combine(&b, i64::checked_sub),
                        _ => {}
                    }
                    match (a.uniform(), b.uniform()) {
                        (Some(factor), _) => b.scaled(factor),
                        (_, Some(factor)) => a.scaled(factor),
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
                let difference = a.combine(&b, i64::checked_sub)?.uniform()?;
                let holds = match node.op_type.as_str() {
                    "Equal" => difference == 0,
                    "Less" => difference < 0,
                    "LessOrEqual" => difference <= 0,
                    "Greater" => difference > 0,
                    _ => difference >= 0,
                };
                Some(Affine::constant(i64::from(holds), ndim))
            }
            "Unsqueeze" | "Squeeze" | "Reshape" | "Flatten" => self.regroup(node.input(0)?, value, depth),
            "Transpose" => {
                let input = at(0)?;
                let slope = |axis: &i64| input.slopes.get(usize::try_from(*axis).ok()?).copied();
                let slopes = match node.ints("perm") {
                    Some(perm) => perm.iter().map(slope).collect::<Option<_>>()?,
                    None => input.slopes.iter().rev().copied().collect(),
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
                sums.slopes[axis] = step;
                plain.then_some(sums)
            }
            "Gather" => {
                let (data, indices) = (at(0)?, at(1)?);
                let axis = from_front(node.int("axis").unwrap_or(0), data.slopes.len())?;
                let mut found = Affine::constant(data.offset, 0);
                let scaled = self.index(&indices)?.scaled(data.slopes[axis])?;
                found.offset = found.offset.checked_add(scaled.offset)?;
                found.slopes = [&data.slopes[..axis], &scaled.slopes, &data.slopes[axis + 1..]].concat();
                Some(found)
            }
            "GatherND" => self.gather_nd(node, ndim, depth),
            _ => None,
        }
    }

    /// An index that is provably not negative: negative ones count from the end.
    fn index<'b>(&self, index: &'b Affine) -> Option<&'b Affine> {
        (index.offset >= 0 && index.slopes.iter().all(|&s| s >= 0)).then_some(index)
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
        let mut slopes = vec![0; lead];
        for (axis, size) in from.iter().enumerate() {
            slopes.push(match affine.slopes[axis] {
                // A single element has no slope.
                _ if size.range().1 == Some(1) => 0,
                0 => 0,
                slope if same(size, &to[lead + axis]) => slope,
                _ => return None,
            });
        }
        Some(Affine { offset: affine.offset, slopes })
    }

    /// Both operands of an elementwise operator, broadcast against each other.
    fn pair(&self, node: &Node, depth: usize) -> Option<(Affine, Affine)> {
        let (a, b) = (node.input(0)?, node.input(1)?);
        let (left, right) = (self.facts.shape(a)?, self.facts.shape(b)?);
        let ndim = left.len().max(right.len());
        let broadcast = |value: ValueId, mine: &[DimExpr], other: &[DimExpr]| {
            let affine = self.find(value, depth + 1)?;
            let mut slopes = vec![0; ndim - mine.len()];
            for (axis, size) in mine.iter().enumerate() {
                let beside = (axis + other.len()).checked_sub(mine.len()).map(|at| &other[at]);
                slopes.push(match affine.slopes[axis] {
                    _ if size.range().1 == Some(1) => 0,
                    0 => 0,
                    slope if beside.is_none_or(|o| o.range().1 == Some(1) || same(size, o)) => slope,
                    _ => return None,
                });
            }
            Some(Affine { offset: affine.offset, slopes })
        };
        Some((broadcast(a, left, right)?, broadcast(b, right, left)?))
    }

    /// The same elements where only axes of size one come or go.
    fn regroup(&self, input: ValueId, output: ValueId, depth: usize) -> Option<Affine> {
        let affine = self.find(input, depth + 1)?;
        let (from, to) = (self.facts.shape(input)?, self.facts.shape(output)?);
        if let Some(value) = affine.uniform() {
            return Some(Affine::constant(value, to.len()));
        }
        let one = |size: &DimExpr| size.as_known() == Some(1);
        let mut axes = from.iter().enumerate().filter(|(_, size)| !one(size));
        let mut slopes = Vec::with_capacity(to.len());
        for size in to {
            if one(size) {
                slopes.push(0);
                continue;
            }
            let (axis, before) = axes.next()?;
            if !same(before, size) {
                return None;
            }
            slopes.push(affine.slopes[axis]);
        }
        axes.next().is_none().then_some(Affine { offset: affine.offset, slopes })
    }

    fn slice(&self, node: &Node, depth: usize) -> Option<Affine> {
        let mut affine = self.find(node.input(0)?, depth + 1)?;
        if affine.uniform().is_some() {
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
            let slope = affine.slopes[axis];
            if slope == 0 {
                continue;
            }
            if start < 0 || step < 1 {
                return None;
            }
            affine.offset = affine.offset.checked_add(slope.checked_mul(start)?)?;
            affine.slopes[axis] = slope.checked_mul(step)?;
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
        let inside = parts.iter().find(|(_, length, _)| *length != Some(1)).map(|(.., a)| a.slopes[axis]);
        let between = parts.get(1).and_then(|(.., a)| a.offset.checked_sub(first.offset));
        let mut whole = first.clone();
        whole.slopes[axis] = inside.or(between).unwrap_or(0);
        for (start, length, part) in &parts {
            let offset = whole.offset.checked_add(whole.slopes[axis].checked_mul(*start)?)?;
            let mut slopes = part.slopes.clone();
            if *length == Some(1) {
                slopes[axis] = whole.slopes[axis];
            }
            if part.offset != offset || slopes != whole.slopes {
                return None;
            }
        }
        Some(whole)
    }

    fn gather_nd(&self, node: &Node, ndim: usize, depth: usize) -> Option<Affine> {
        let data = self.find(node.input(0)?, depth + 1)?;
        if let Some(value) = data.uniform() {
            return Some(Affine::constant(value, ndim));
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
        let mut found = Affine { offset: data.offset, slopes: vec![0; outer] };
        for (axis, &component) in grid.inputs().iter().enumerate() {
            if self.facts.shape(component?)?[outer].as_known() != Some(1) {
                return None;
            }
            let slope = *data.slopes.get(axis)?;
            if slope == 0 {
                continue;
            }
            let component = self.find(component?, depth + 1)?;
            let mut scaled = self.index(&component)?.scaled(slope)?;
            scaled.slopes.truncate(outer);
            found = found.combine(&scaled, i64::checked_add)?;
        }
        found.slopes.extend(data.slopes.get(grid.inputs().len()..)?);
        (found.slopes.len() == ndim).then_some(found)
    }
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

/// The affine form of given elements, row-major, if they have one.
fn fit(elements: &[i64], dims: &[usize]) -> Option<Affine> {
    let offset = *elements.first()?;
    let mut stride = 1;
    let mut slopes = vec![0; dims.len()];
    for axis in (0..dims.len()).rev() {
        if dims[axis] > 1 {
            slopes[axis] = elements.get(stride)?.checked_sub(offset)?;
        }
        stride *= dims[axis];
    }
    for (position, &element) in elements.iter().enumerate() {
        let (mut rest, mut expected) = (position, offset);
        for axis in (0..dims.len()).rev() {
            let index = i64::try_from(rest % dims[axis]).ok()?;
            expected = expected.checked_add(slopes[axis].checked_mul(index)?)?;
            rest /= dims[axis];
        }
        if expected != element {
            return None;
        }
    }
    Some(Affine { offset, slopes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    /// A causal mask as exporters write it for packed sequences: positions by `GatherND`, a sequence number by `CumSum`.
    const PACKED: &str = "g (int64[B,S] ids) => (bool[B,1,S,S] mask) <
        int64 zero = {0}, int64 one = {1}, int64[1] v0 = {0}, int64[1] v1 = {1}, int64[1] m1 = {-1}, int64 last = {-1},
        int64[3] a123 = {1,2,3}, int64[2] a01 = {0,1}, int64[1] v2 = {2}, int64[1] v3 = {3}, int64[1] big = {9223372036854775807}
    > {
        b = Shape <start = 0, end = 1> (ids)
        s = Shape <start = 1, end = 2> (ids)
        n = Squeeze (s)
        bn = Squeeze (b)
        iota = Range (zero, n, one)
        row = Unsqueeze (iota, v0)
        target = Concat <axis = 0> (b, v1)
        positions = Expand (row, target)
        first = Slice (positions, v0, v1, v1, v1)
        before = Sub (first, one)
        cat = Concat <axis = -1> (before, positions)
        left = Slice (cat, v0, s, m1, v1)
        right = Slice (cat, v1, big, m1, v1)
        diff = Sub (right, left)
        same = Equal (diff, one)
        jump = Not (same)
        jumps = Cast <to = 7> (jump)
        packs = CumSum (jumps, last)
        batch = Range (zero, bn, one)
        batch4 = Unsqueeze (batch, a123)
        seq3 = Unsqueeze (iota, a01)
        query4 = Unsqueeze (seq3, v3)
        key4 = Unsqueeze (seq3, v2)
        qmax = Max (batch4, query4)
        qshape = Shape (qmax)
        qb = Expand (batch4, qshape)
        qq = Expand (query4, qshape)
        qb5 = Unsqueeze (qb, m1)
        qq5 = Unsqueeze (qq, m1)
        qgrid = Concat <axis = -1> (qb5, qq5)
        kmax = Max (batch4, key4)
        kshape = Shape (kmax)
        kb = Expand (batch4, kshape)
        kk = Expand (key4, kshape)
        kb5 = Unsqueeze (kb, m1)
        kk5 = Unsqueeze (kk, m1)
        kgrid = Concat <axis = -1> (kb5, kk5)
        qpack = GatherND (packs, qgrid)
        kpack = GatherND (packs, kgrid)
        together = Equal (qpack, kpack)
        qpos = GatherND (positions, qgrid)
        kpos = GatherND (positions, kgrid)
        causal = LessOrEqual (kpos, qpos)
        mask = And (together, causal)
    }";

    #[test]
    fn sees_through_a_packed_sequence_mask() {
        let model = text::parse(PACKED).unwrap();
        let facts = Facts::infer(&model);
        let affines = Affines::new(&model.graph, &facts);
        let value = |name: &str| model.graph.find_value(name).unwrap();
        assert_eq!(affines.of(value("cat")), Some(Affine { offset: -1, slopes: vec![0, 1] }));
        assert_eq!(affines.of(value("qpos")), Some(Affine { offset: 0, slopes: vec![0, 0, 1, 0] }));
        assert_eq!(affines.certain(value("together")), Some(true));
        assert_eq!(affines.certain(value("causal")), None);
        assert!(affines.is_causal(value("mask")));
    }

    #[test]
    fn a_window_or_a_reversed_comparison_is_not_causal() {
        for change in [("LessOrEqual (kpos", "GreaterOrEqual (kpos"), ("LessOrEqual (kpos", "Less (kpos")] {
            let model = text::parse(&PACKED.replace(change.0, change.1)).unwrap();
            let facts = Facts::infer(&model);
            let mask = model.graph.find_value("mask").unwrap();
            assert!(!Affines::new(&model.graph, &facts).is_causal(mask));
        }
    }

    #[test]
    fn fits_small_constants() {
        assert_eq!(fit(&[5, 7, 6, 8], &[2, 2]), Some(Affine { offset: 5, slopes: vec![1, 2] }));
        assert_eq!(fit(&[5, 7, 6, 9], &[2, 2]), None);
        assert_eq!(fit(&[3], &[]), Some(Affine { offset: 3, slopes: vec![] }));
    }
}
