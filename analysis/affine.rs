//! Index arithmetic: whole-number tensors whose elements are affine in their own indices.
//!
//! Exporters write positions, index grids and masks as long chains of `Range`, `Unsqueeze`, `Expand`, `GatherND` and
//! comparisons. What such a chain holds is often no more than `offset + Σ slope · index`, which decides masks exactly.
//! What is found holds wherever every open dimension is at least one: an empty tensor has no elements to speak of.

mod rules;

use crate::{DimExpr, Facts};
use lathe_ir::{DataType, Graph, ValueId};
use std::{cell::RefCell, collections::HashMap};

/// Chains longer than this are not followed.
const DEPTH: usize = 256;
/// Constants with more elements than this are not looked at.
const LARGEST_CONSTANT: usize = 4096;

/// The element at index `(i₀, i₁, …)` is `offset + Σ slopes[a] · iₐ`. Booleans count as 0 and 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affine {
    /// The element at index 0.
    pub offset: DimExpr,
    /// One slope per axis.
    pub slopes: Vec<DimExpr>,
}

impl Affine {
    fn constant(offset: impl Into<DimExpr>, ndim: usize) -> Affine {
        Affine { offset: offset.into(), slopes: vec![0.into(); ndim] }
    }

    /// 0, 1, 2, … along one axis.
    pub fn counting() -> Affine {
        Affine { offset: 0.into(), slopes: vec![1.into()] }
    }

    /// The affine form of given elements, row-major, if they have one.
    pub fn fit(elements: &[i64], dims: &[usize]) -> Option<Affine> {
        let offset: i64 = *elements.first()?;
        let mut stride = 1;
        let mut slopes = vec![0i64; dims.len()];
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
        Some(Affine { offset: offset.into(), slopes: slopes.into_iter().map(DimExpr::from).collect() })
    }

    /// The number that every element is, if they are all the same whatever the shape is.
    pub fn uniform(&self) -> Option<i64> {
        self.offset.as_known().filter(|_| self.is_flat())
    }

    /// Whether all elements are the same.
    fn is_flat(&self) -> bool {
        self.slopes.iter().all(is_zero)
    }

    fn plus(&self, other: &Affine) -> Option<Affine> {
        let slopes = self.slopes.iter().zip(&other.slopes).map(|(a, b)| a.plus(b)).collect::<Option<_>>()?;
        Some(Affine { offset: self.offset.plus(&other.offset)?, slopes })
    }

    fn minus(&self, other: &Affine) -> Option<Affine> {
        self.plus(&other.times(&(-1).into())?)
    }

    fn times(&self, factor: &DimExpr) -> Option<Affine> {
        let slopes = self.slopes.iter().map(|slope| slope.times(factor)).collect::<Option<_>>()?;
        Some(Affine { offset: self.offset.times(factor)?, slopes })
    }

    /// The element at `index` along an axis.
    fn moved(&self, axis: usize, index: i64) -> Option<DimExpr> {
        self.offset.plus(&self.slopes[axis].scaled(index)?)
    }

    /// The smallest and the largest element of a tensor of this shape that has any.
    fn bounds(&self, shape: &[DimExpr]) -> Option<(DimExpr, DimExpr)> {
        let (mut low, mut high) = (self.offset.clone(), self.offset.clone());
        for (slope, size) in self.slopes.iter().zip(shape).filter(|(slope, _)| !is_zero(slope)) {
            let end = match (slope.is_nonnegative(), slope.scaled(-1)?.is_nonnegative()) {
                (true, _) => &mut high,
                (_, true) => &mut low,
                _ => return None,
            };
            *end = end.plus(&size.offset(-1)?.times(slope)?)?;
        }
        let there = |bound: DimExpr| not_empty(&bound, shape);
        Some((there(low)?, there(high)?))
    }
}

/// An expression with every size among `shape` written as one more than another: a tensor with elements has no axis of
/// size 0.
fn not_empty(expression: &DimExpr, shape: &[DimExpr]) -> Option<DimExpr> {
    expression.substitute(&|symbol| {
        let size = DimExpr::from(symbol.clone());
        if shape.contains(&size) { size.offset(1) } else { None }
    })
}

fn is_zero(number: &DimExpr) -> bool {
    number.as_known() == Some(0)
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
        self.causal_offset(condition).is_some_and(|offset| offset.as_known() == Some(0))
    }

    /// The `offset` for which `condition`, `[…, query, key]`, is true exactly where `key ≤ query + offset`: a
    /// conjunction of certainties and such comparisons. Behind a cache the offset is the number of cached positions.
    pub fn causal_offset(&self, condition: ValueId) -> Option<DimExpr> {
        self.conjunction(condition, 0).flatten()
    }

    /// The offset of a causal comparison, `Some(None)` for a certainty, `None` for anything else.
    fn conjunction(&self, value: ValueId, depth: usize) -> Option<Option<DimExpr>> {
        if self.certain(value) == Some(true) {
            return Some(None);
        }
        if depth > DEPTH {
            return None;
        }
        let node = self.graph.node(self.graph.producer(value)?);
        let input = |index: usize| node.input(index);
        if node.is("And") {
            return match (self.conjunction(input(0)?, depth + 1)?, self.conjunction(input(1)?, depth + 1)?) {
                (Some(a), Some(b)) => (a == b).then_some(Some(a)),
                (a, b) => Some(a.or(b)),
            };
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
        let difference = low.minus(&high)?;
        let (batch, last) = difference.slopes.split_at(ndim.checked_sub(2)?);
        let causal = batch.iter().all(is_zero) && last == [DimExpr::from(-1), DimExpr::from(1)];
        // `key - query + d < 0` is `key ≤ query - d - 1`.
        causal.then(|| difference.offset.scaled(-1)?.offset(-strict)).flatten().map(Some)
    }

    fn find(&self, value: ValueId, depth: usize) -> Option<Affine> {
        if depth > DEPTH {
            return None;
        }
        if let Some(known) = self.known.borrow().get(&value) {
            return known.clone();
        }
        let found = self.infer(value, depth).filter(|affine| self.fits(value, affine).unwrap_or(false));
        self.known.borrow_mut().insert(value, found.clone());
        found
    }

    /// Whether the element type holds every element: sizes fit 31 bits, and so do the differences of positions.
    fn fits(&self, value: ValueId, affine: &Affine) -> Option<bool> {
        const STEEPEST: i64 = 1 << 31;
        let elem = self.facts.elem(value)?;
        let up_to = |most: i64| affine.slopes.iter().all(|s| s.as_known().is_none_or(|slope| slope.abs() <= most));
        let positions = up_to(STEEPEST);
        if elem == DataType::Int64 {
            return Some(positions);
        }
        let (low, high) = affine.bounds(self.facts.shape(value)?)?;
        let (least, most) = match elem {
            DataType::Bool => (0, 1),
            DataType::Uint64 => (0, i64::MAX),
            DataType::Uint32 => (0, i64::from(u32::MAX)),
            DataType::Int32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
            DataType::Int16 => (i64::from(i16::MIN), i64::from(i16::MAX)),
            DataType::Uint16 => (0, i64::from(u16::MAX)),
            DataType::Int8 => (-128, 127),
            DataType::Uint8 => (0, 255),
            _ => return None,
        };
        let (smallest, largest) = (low.range().0, high.range().1);
        let small = up_to(1) && affine.slopes.iter().all(|slope| slope.as_known().is_some());
        Some(match (smallest, largest) {
            (Some(smallest), Some(largest)) => least <= smallest && largest <= most,
            (smallest, _) if elem == DataType::Uint64 => smallest.is_some_and(|s| s >= 0) && positions,
            // A position is a size or a difference of sizes.
            _ => elem == DataType::Int32 && small && affine.offset.is_linear(),
        })
    }

    fn infer(&self, value: ValueId, depth: usize) -> Option<Affine> {
        let elem = self.facts.elem(value)?;
        if !elem.is_integer() && elem != DataType::Bool {
            return None;
        }
        let ndim = self.facts.ndim(value)?;
        if let Some(tensor) = self.graph.constant(value) {
            return (tensor.len() <= LARGEST_CONSTANT)
                .then(|| Affine::fit(&tensor.to_i64s()?, tensor.dims()))
                .flatten();
        }
        if let Some(contents) = self.facts.contents(value) {
            if let Some(known) = contents.known() {
                return Affine::fit(&known, &self.facts.sizes(value)?);
            }
            if let [Some(only)] = contents.elements() {
                return Some(Affine::constant(only.clone(), ndim));
            }
        }
        let node = self.graph.node(self.graph.producer(value)?);
        if !node.is_standard() || node.output(0) != Some(value) {
            return None;
        }
        self.computed(node, value, depth)
    }
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
        assert_eq!(
            affines.of(value("cat")),
            Some(Affine { offset: (-1).into(), slopes: [0, 1].map(DimExpr::from).to_vec() })
        );
        assert_eq!(
            affines.of(value("qpos")),
            Some(Affine { offset: 0.into(), slopes: [0, 0, 1, 0].map(DimExpr::from).to_vec() })
        );
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

    /// What is certain about a condition `y` of positions along `S`, beside `P` positions before them.
    fn certain(nodes: &str) -> Option<bool> {
        let model = text::parse(&format!(
            "<ir_version: 9, opset_import: [\"\" : 17]>
             g (float[B,S] x, float[B,P] old, int64 k) => (bool y) <
                int64 zero = {{0}}, int64 one = {{1}}, int64 minus = {{-1}}, int64 five = {{5}}, int64[1] front = {{0}}, int64[1] last = {{1}}, int8 big = {{100}}
            > {{
                s1 = Shape <start = 1> (x)
                p1 = Shape <start = 1> (old)
                s = Squeeze (s1, front)
                p = Squeeze (p1, front)
                t = Add (p, s)
                i = Range (zero, s, one)
                q = Range (p, t, one)
                j = Range (zero, t, one)
                column = Unsqueeze (i, last)
                {nodes}
            }}"
        ))
        .unwrap();
        let facts = Facts::infer(&model);
        Affines::new(&model.graph, &facts).certain(model.graph.find_value("y").unwrap())
    }

    #[test]
    fn positions_lie_in_their_range() {
        assert_eq!(certain("y = GreaterOrEqual (i, zero)"), Some(true));
        assert_eq!(certain("y = Greater (i, minus)"), Some(true));
        assert_eq!(certain("y = Greater (i, zero)"), None);
        assert_eq!(certain("y = Less (i, s)"), Some(true));
        assert_eq!(certain("y = LessOrEqual (s, i)"), Some(false));
        assert_eq!(certain("y = Equal (i, minus)"), Some(false));
        assert_eq!(certain("y = Less (column, s)"), Some(true));
        assert_eq!(certain("y = Less (i, column)"), None);
        assert_eq!(certain("y = Less (q, t)"), Some(true));
        assert_eq!(certain("y = Less (q, p)"), Some(false));
        assert_eq!(certain("y = GreaterOrEqual (q, i)"), Some(true));
        assert_eq!(certain("z = Sub (zero, i) y = Greater (z, zero)"), Some(false));
        assert_eq!(certain("y = Less (k, s)"), None);
        assert_eq!(certain("z = Add (k, one) y = Less (k, z)"), Some(true));
    }

    #[test]
    fn a_size_may_be_0_where_the_tensor_is_not_empty() {
        assert_eq!(certain("y = Greater (s, zero)"), None);
        assert_eq!(certain("y = GreaterOrEqual (s, zero)"), Some(true));
        // The range has elements only where there are some of S.
        assert_eq!(certain("z = Expand (s, s1) y = Greater (z, zero)"), Some(true));
        assert_eq!(certain("z = Expand (s, p1) y = Greater (z, zero)"), None);
        // With P = 0 the first of them is 0.
        assert_eq!(certain("y = Greater (q, zero)"), None);
    }

    #[test]
    fn narrow_types_wrap() {
        assert_eq!(certain("z = Cast <to = 3> (i) y = Greater (z, minus8)".replace("minus8", "big").as_str()), None);
        assert_eq!(certain("z = Cast <to = 6> (i) m = Cast <to = 6> (minus) y = Greater (z, m)"), Some(true));
        assert_eq!(certain("z = Cast <to = 12> (minus) w = Cast <to = 12> (zero) y = Less (z, w)"), None);
        assert_eq!(certain("two = Add (big, big) y = Less (big, two)"), None);
    }

    #[test]
    fn whole_numbers_are_not_nan() {
        assert_eq!(certain("f = Cast <to = 1> (k) y = IsNaN (f)"), Some(false));
        assert_eq!(certain("f = Cast <to = 11> (i) y = IsInf (f)"), Some(false));
        assert_eq!(certain("f = Cast <to = 10> (k) y = IsInf (f)"), None);
        assert_eq!(certain("y = IsNaN (x)"), None);
    }

    #[test]
    fn counts_and_repeats() {
        let ones = "ones = ConstantOfShape <value = int64[1] {1}> (s1) c = NonZero (ones)";
        assert_eq!(certain(&format!("{ones} y = Less (c, s)")), Some(true));
        assert_eq!(certain(&format!("{ones} y = GreaterOrEqual (c, zero)")), Some(true));
        assert_eq!(certain(&format!("{ones} y = GreaterOrEqual (c, one)")), None);
        let tiled =
            "pair = Concat <axis = 0> (s1, one1) one1 = Constant <value_ints = [1]> () two = Unsqueeze (i, front)";
        assert_eq!(certain(&format!("{tiled} z = Tile (two, pair) y = Less (z, s)")), Some(true));
        let along =
            "pair = Concat <axis = 0> (one1, s1) one1 = Constant <value_ints = [1]> () two = Unsqueeze (i, front)";
        assert_eq!(certain(&format!("{along} z = Tile (two, pair) y = Less (z, s)")), None);
    }

    #[test]
    fn slopes_may_be_sizes() {
        // Row-major numbers of a table with S columns and P rows: below P·S, and not below S from the second row on.
        let table = "rows = Range (zero, p, one) r = Unsqueeze (rows, last) m = Mul (r, s) at = Add (m, i)";
        assert_eq!(certain(&format!("{table} all = Mul (p, s) y = Less (at, all)")), Some(true));
        assert_eq!(certain(&format!("{table} y = GreaterOrEqual (at, i)")), Some(true));
        assert_eq!(certain(&format!("{table} y = Less (at, s)")), None);
        assert_eq!(certain(&format!("{table} less = Sub (at, m) y = Less (less, s)")), Some(true));
    }

    #[test]
    fn chooses_among_positions() {
        assert_eq!(certain("c = Less (i, s) z = Where (c, i, minus) y = GreaterOrEqual (z, zero)"), Some(true));
        assert_eq!(certain("c = Less (i, five) z = Where (c, i, minus) y = GreaterOrEqual (z, zero)"), None);
    }

    #[test]
    fn a_cache_moves_the_diagonal() {
        let offset = |nodes: &str| {
            let model = text::parse(&format!(
                "<ir_version: 9, opset_import: [\"\" : 17]>
                 g (float[B,S] x, float[B,P] old) => (bool y) <int64 zero = {{0}}, int64 one = {{1}}, int64[1] front = {{0}}, int64[1] last = {{1}}> {{
                    s1 = Shape <start = 1> (x) s = Squeeze (s1, front) p1 = Shape <start = 1> (old) p = Squeeze (p1, front)
                    t = Add (p, s) j = Range (zero, t, one) q0 = Range (p, t, one) q = Unsqueeze (q0, last) {nodes}
                }}"
            ))
            .unwrap();
            let facts = Facts::infer(&model);
            let affines = Affines::new(&model.graph, &facts);
            affines.causal_offset(model.graph.find_value("y").unwrap()).map(|offset| offset.to_string())
        };
        assert_eq!(offset("y = LessOrEqual (j, q)").as_deref(), Some("P"));
        assert_eq!(offset("y = Greater (q, j)").as_deref(), Some("P - 1"));
        assert_eq!(offset("c = GreaterOrEqual (j, zero) d = LessOrEqual (j, q) y = And (c, d)").as_deref(), Some("P"));
        assert_eq!(offset("c = Less (j, q) d = LessOrEqual (j, q) y = And (c, d)"), None);
        assert_eq!(offset("y = LessOrEqual (q, j)"), None);
    }

    #[test]
    fn fits_small_constants() {
        assert_eq!(
            Affine::fit(&[5, 7, 6, 8], &[2, 2]),
            Some(Affine { offset: 5.into(), slopes: [1, 2].map(DimExpr::from).to_vec() })
        );
        assert_eq!(Affine::fit(&[5, 7, 6, 9], &[2, 2]), None);
        assert_eq!(Affine::fit(&[3], &[]), Some(Affine { offset: 3.into(), slopes: Vec::new() }));
    }
}
