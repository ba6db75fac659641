//! Sizes that need not be known: polynomials with whole coefficients over symbols, in canonical form.
//!
//! Two expressions that compare equal are equal whatever the symbols stand for, so `==` is a proof. The reverse does not
//! hold. Every operation is checked: it answers `None` when numbers overflow or an expression grows past a fixed size,
//! and the caller then treats the result as unknown.

mod display;
mod terms;

use lathe_ir::ValueId;
use std::sync::Arc;
use terms::{Atom, Term};

/// Something an expression depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Symbol {
    /// A dimension that the model names; never negative, and equal wherever the name stands in a graph input.
    Named(Arc<str>),
    /// The size of one axis of one value; never negative.
    Size {
        /// Which inference the value belongs to: 0 for the graph itself, others for calls of local functions.
        space: u32,
        /// The value.
        value: ValueId,
        /// The axis.
        axis: u32,
    },
    /// One element of an integer tensor; of any sign.
    Element {
        /// As for [`Symbol::Size`].
        space: u32,
        /// The value.
        value: ValueId,
        /// The position of the element, row-major.
        index: u32,
    },
}

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Sum {
    constant: i64,
    /// Sorted by factors, none twice, none without factors; at least one.
    terms: Vec<Term>,
    /// How many symbols and operations are written in it.
    weight: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Repr {
    Known(i64),
    Sum(Arc<Sum>),
}

/// A whole number that may depend on symbols. See the module's documentation.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DimExpr(Repr);

/// An expression with more symbols and operations than this counts as unknown.
const MAX_WEIGHT: usize = 40;
/// Steps of a polynomial division before it counts as not divisible.
const MAX_DIVISION_STEPS: usize = 24;

impl From<i64> for DimExpr {
    fn from(value: i64) -> DimExpr {
        DimExpr(Repr::Known(value))
    }
}

impl From<Symbol> for DimExpr {
    fn from(symbol: Symbol) -> DimExpr {
        DimExpr::atom(Atom::Symbol(symbol))
    }
}

impl DimExpr {
    /// The dimension that the model calls `name`.
    pub fn named(name: &str) -> DimExpr {
        Symbol::Named(name.into()).into()
    }

    /// The number, if it does not depend on symbols.
    pub fn as_known(&self) -> Option<i64> {
        match self.0 {
            Repr::Known(value) => Some(value),
            Repr::Sum(_) => None,
        }
    }

    /// The symbol, if the expression is nothing else.
    pub fn as_symbol(&self) -> Option<&Symbol> {
        match self.as_atom()? {
            Atom::Symbol(symbol) => Some(symbol),
            _ => None,
        }
    }

    fn as_atom(&self) -> Option<&Atom> {
        match self.parts() {
            (0, [Term { factors, coefficient: 1 }]) => match factors.as_slice() {
                [atom] => Some(atom),
                _ => None,
            },
            _ => None,
        }
    }

    fn parts(&self) -> (i64, &[Term]) {
        match &self.0 {
            Repr::Known(value) => (*value, &[]),
            Repr::Sum(sum) => (sum.constant, &sum.terms),
        }
    }

    fn weight(&self) -> usize {
        match &self.0 {
            Repr::Known(_) => 1,
            Repr::Sum(sum) => sum.weight,
        }
    }

    fn atom(atom: Atom) -> DimExpr {
        let weight = atom.weight();
        let terms = vec![Term { factors: vec![atom], coefficient: 1 }];
        DimExpr(Repr::Sum(Arc::new(Sum { constant: 0, terms, weight })))
    }

    fn opaque(atom: Atom) -> Option<DimExpr> {
        if atom.weight() > MAX_WEIGHT {
            return None;
        }
        let symbol = atom.capped_by_one().cloned();
        let whole = DimExpr::atom(atom);
        Some(symbol.and_then(|symbol| whole.without_cap(&symbol)).unwrap_or(whole))
    }

    /// The expression without `min(1, symbol)`, where that makes no difference: `max(0, s + min(1, s) - 1)` is `s`.
    fn without_cap(&self, symbol: &Symbol) -> Option<DimExpr> {
        let with = |to: DimExpr| move |s: &Symbol| (s == symbol).then(|| to.clone());
        let size = DimExpr::from(symbol.clone());
        // What it is for 1, 2, …, as an expression that also has a value for 0.
        let beyond = self.substitute(&with(size.offset(1)?))?.substitute(&with(size.offset(-1)?))?;
        let none = self.substitute(&with(0.into()))?;
        (beyond.weight() < self.weight() && beyond.substitute(&with(0.into()))? == none).then_some(beyond)
    }

    /// Puts terms in canonical form.
    fn build(constant: i64, mut terms: Vec<Term>) -> Option<DimExpr> {
        terms.sort_by(|a, b| a.factors.cmp(&b.factors));
        let mut merged: Vec<Term> = Vec::with_capacity(terms.len());
        for term in terms {
            match merged.last_mut() {
                Some(last) if last.factors == term.factors => {
                    last.coefficient = last.coefficient.checked_add(term.coefficient)?;
                }
                _ => merged.push(term),
            }
        }
        merged.retain(|term| term.coefficient != 0);
        if merged.is_empty() {
            return Some(constant.into());
        }
        let weight = merged.iter().flat_map(|t| &t.factors).map(Atom::weight).sum::<usize>();
        (weight <= MAX_WEIGHT).then(|| DimExpr(Repr::Sum(Arc::new(Sum { constant, terms: merged, weight }))))
    }

    /// `self + other`.
    pub fn plus(&self, other: &DimExpr) -> Option<DimExpr> {
        let ((a, left), (b, right)) = (self.parts(), other.parts());
        let constant = a.checked_add(b)?;
        if left.is_empty() && right.is_empty() {
            return Some(constant.into());
        }
        DimExpr::build(constant, left.iter().chain(right).cloned().collect())
    }

    /// `self - other`.
    pub fn minus(&self, other: &DimExpr) -> Option<DimExpr> {
        self.plus(&other.scaled(-1)?)
    }

    /// `self + offset`.
    pub fn offset(&self, offset: i64) -> Option<DimExpr> {
        self.plus(&offset.into())
    }

    /// `self · factor`.
    pub fn scaled(&self, factor: i64) -> Option<DimExpr> {
        let (constant, terms) = self.parts();
        let constant = constant.checked_mul(factor)?;
        let scale =
            |t: &Term| Some(Term { factors: t.factors.clone(), coefficient: t.coefficient.checked_mul(factor)? });
        DimExpr::build(constant, terms.iter().map(scale).collect::<Option<_>>()?)
    }

    /// `self · other`.
    pub fn times(&self, other: &DimExpr) -> Option<DimExpr> {
        match (self.as_known(), other.as_known()) {
            (Some(a), Some(b)) => return a.checked_mul(b).map(DimExpr::from),
            (Some(a), None) => return other.scaled(a),
            (None, Some(b)) => return self.scaled(b),
            _ => {}
        }
        let (left, right) = (self.polynomial(), other.polynomial());
        if left.len() * right.len() > MAX_WEIGHT {
            return None;
        }
        let mut products = Vec::with_capacity(left.len() * right.len());
        for a in &left {
            for b in &right {
                products.push(a.times(b)?);
            }
        }
        DimExpr::from_polynomial(products)
    }

    /// The terms with the constant among them as a term without factors.
    fn polynomial(&self) -> Vec<Term> {
        let (constant, terms) = self.parts();
        let mut all = terms.to_vec();
        if constant != 0 {
            all.push(Term { factors: Vec::new(), coefficient: constant });
        }
        all
    }

    fn from_polynomial(terms: Vec<Term>) -> Option<DimExpr> {
        let mut constant = 0i64;
        let mut rest = Vec::with_capacity(terms.len());
        for term in terms {
            if term.factors.is_empty() {
                constant = constant.checked_add(term.coefficient)?;
            } else {
                rest.push(term);
            }
        }
        DimExpr::build(constant, rest)
    }

    /// `self / divisor` where the division leaves no remainder whatever the symbols are (and `divisor` is not 0).
    pub fn exact_div(&self, divisor: &DimExpr) -> Option<DimExpr> {
        if let Some(b) = divisor.as_known() {
            let (constant, terms) = self.parts();
            let whole = |a: i64| if a.checked_rem(b)? == 0 { a.checked_div(b) } else { None };
            let divide = |t: &Term| Some(Term { factors: t.factors.clone(), coefficient: whole(t.coefficient)? });
            return DimExpr::build(whole(constant)?, terms.iter().map(divide).collect::<Option<_>>()?);
        }
        let leading = divisor.leading()?;
        let mut rest = self.clone();
        let mut quotient = DimExpr::from(0);
        for _ in 0..MAX_DIVISION_STEPS {
            let Some(top) = rest.leading() else { return Some(quotient) };
            let part = DimExpr::from_polynomial(vec![top.divided_by(&leading)?])?;
            rest = rest.minus(&part.times(divisor)?)?;
            quotient = quotient.plus(&part)?;
        }
        None
    }

    /// The largest term by degree, then by factors: an order that multiplication respects. `None` for 0.
    fn leading(&self) -> Option<Term> {
        self.polynomial()
            .into_iter()
            .max_by(|a, b| a.factors.len().cmp(&b.factors.len()).then_with(|| b.factors.cmp(&a.factors)))
    }

    /// `⌊self / divisor⌋`. A divisor that is not known must be positive, as sizes that something is divided by are.
    pub fn floor_div(&self, divisor: &DimExpr) -> Option<DimExpr> {
        let Some(b) = divisor.as_known() else {
            if let Some(quotient) = self.exact_div(divisor) {
                return Some(quotient);
            }
            let proper = self.is_nonnegative() && divisor.is_nonnegative();
            return proper.then(|| DimExpr::opaque(Atom::FloorDiv(self.clone(), divisor.clone()))).flatten();
        };
        if b <= 0 {
            let a = self.as_known()?;
            let (quotient, remainder) = (a.checked_div(b)?, a.checked_rem(b)?);
            return if remainder > 0 { quotient.checked_sub(1) } else { Some(quotient) }.map(DimExpr::from);
        }
        // Whole multiples of the divisor leave the rounding: ⌊(b·q + r) / b⌋ = q + ⌊r / b⌋.
        let (constant, terms) = self.parts();
        let mut quotient = Vec::new();
        let mut rest = Vec::new();
        for term in terms {
            let (whole, left) = (term.coefficient.div_euclid(b), term.coefficient.rem_euclid(b));
            quotient.push(Term { factors: term.factors.clone(), coefficient: whole });
            if left != 0 {
                rest.push(Term { factors: term.factors.clone(), coefficient: left });
            }
        }
        let quotient = DimExpr::build(constant.div_euclid(b), quotient)?;
        if rest.is_empty() {
            return Some(quotient);
        }
        // ⌊(g·y + r) / (g·k)⌋ = ⌊(y + ⌊r / g⌋) / k⌋.
        let common = rest.iter().fold(b, |g, t| gcd(g, t.coefficient));
        for term in &mut rest {
            term.coefficient /= common;
        }
        let (mut b, mut r) = (b / common, constant.rem_euclid(b) / common);
        let mut rest = DimExpr::build(0, rest)?;
        // ⌊(⌊x / m⌋ + r) / b⌋ = ⌊(x + r·m) / (m·b)⌋.
        if let Some(Atom::FloorDiv(x, m)) = rest.as_atom()
            && let Some(m) = m.as_known()
            && m > 0
        {
            let inner = x.offset(r.checked_mul(m)?)?;
            let outer = b.checked_mul(m)?;
            if b > 1 {
                return quotient.plus(&inner.floor_div(&outer.into())?);
            }
            (b, r, rest) = (outer, 0, inner);
        }
        let part = DimExpr::opaque(Atom::FloorDiv(rest.offset(r)?, b.into()))?;
        quotient.plus(&part)
    }

    /// `⌈self / divisor⌉` for a known positive divisor.
    pub fn ceil_div(&self, divisor: i64) -> Option<DimExpr> {
        if divisor <= 0 {
            return None;
        }
        self.offset(divisor - 1)?.floor_div(&divisor.into())
    }

    /// The smaller of the two.
    pub fn smaller(&self, other: &DimExpr) -> Option<DimExpr> {
        if other.at_least(self) {
            return Some(self.clone());
        }
        if self.at_least(other) {
            return Some(other.clone());
        }
        let (a, b) = ordered(self, other);
        DimExpr::opaque(Atom::Min(a, b))
    }

    /// The larger of the two.
    pub fn larger(&self, other: &DimExpr) -> Option<DimExpr> {
        if self.at_least(other) {
            return Some(self.clone());
        }
        if other.at_least(self) {
            return Some(other.clone());
        }
        let (a, b) = ordered(self, other);
        DimExpr::opaque(Atom::Max(a, b))
    }

    /// The size that axes of these two sizes broadcast to, given that they do.
    pub fn broadcast(&self, other: &DimExpr) -> Option<DimExpr> {
        match (self.as_known(), other.as_known()) {
            (Some(1), _) => return Some(other.clone()),
            (_, Some(1)) => return Some(self.clone()),
            (Some(a), Some(b)) => return (a == b).then(|| self.clone()),
            // The other axis is 1 or the same.
            (Some(_), None) => return Some(self.clone()),
            (None, Some(_)) => return Some(other.clone()),
            _ => {}
        }
        if self == other {
            return Some(self.clone());
        }
        for (a, b) in [(self, other), (other, self)] {
            if let Some(Atom::Broadcast(x, y)) = a.as_atom()
                && (x == b || y == b)
            {
                return Some(a.clone());
            }
            // Below `a` the cap would have to be 1, which broadcasts to `a` as well.
            if b.cap_on(a).is_some_and(DimExpr::is_positive) || b.is_floor_of(a) {
                return Some(a.clone());
            }
        }
        let (a, b) = ordered(self, other);
        DimExpr::opaque(Atom::Broadcast(a, b))
    }

    /// The `cap` if the expression is `min(size, cap)`.
    fn cap_on(&self, size: &DimExpr) -> Option<&DimExpr> {
        match self.as_atom()? {
            Atom::Min(a, b) if a == size => Some(b),
            Atom::Min(a, b) if b == size => Some(a),
            _ => None,
        }
    }

    /// Whether the expression is `max(size, 0)`, which is the size: none is negative.
    fn is_floor_of(&self, size: &DimExpr) -> bool {
        let is_floor = |dim: &DimExpr| dim.as_known().is_some_and(|n| n <= 0);
        match self.as_atom() {
            Some(Atom::Max(a, b)) => (a == size && is_floor(b)) || (b == size && is_floor(a)),
            _ => false,
        }
    }

    /// Whether axes of these sizes that broadcast against one another are equally long, or one of them is certain to be
    /// 1: where `s` and `min(s, 512)` do, they are equal, and `s` and `max(s, 0)` are in any case.
    pub fn equal_where_broadcast(&self, other: &DimExpr) -> bool {
        let capped = |a: &DimExpr, b: &DimExpr| a.cap_on(b).is_some_and(DimExpr::is_positive);
        let floored = self.is_floor_of(other) || other.is_floor_of(self);
        self == other || floored || capped(self, other) || capped(other, self)
    }

    /// The simpler of two expressions: a number before others, else the shorter one.
    pub fn simpler<'a>(&'a self, other: &'a DimExpr) -> &'a DimExpr {
        let size = |dim: &DimExpr| (dim.as_known().is_none(), dim.weight());
        if size(other) < size(self) { other } else { self }
    }

    /// Whether `self ≥ other` is certain.
    pub fn at_least(&self, other: &DimExpr) -> bool {
        self == other || self.minus(other).is_some_and(|d| d.is_nonnegative())
    }

    /// Whether the value is certainly not negative.
    pub fn is_nonnegative(&self) -> bool {
        self.range().0.is_some_and(|low| low >= 0)
    }

    /// Whether the value is certainly positive.
    pub fn is_positive(&self) -> bool {
        self.range().0.is_some_and(|low| low >= 1)
    }

    /// Whether the two are certainly different.
    pub fn differs(&self, other: &DimExpr) -> bool {
        self.minus(other).is_some_and(|d| {
            let (low, high) = d.range();
            low.is_some_and(|l| l > 0) || high.is_some_and(|h| h < 0)
        })
    }

    /// The smallest and largest value it can have, where there is a bound.
    pub fn range(&self) -> (Option<i64>, Option<i64>) {
        let (constant, terms) = self.parts();
        let (mut low, mut high) = (Some(constant), Some(constant));
        for term in terms {
            let (l, h) = term.range();
            low = low.zip(l).and_then(|(a, b)| a.checked_add(b));
            high = high.zip(h).and_then(|(a, b)| a.checked_add(b));
        }
        (low, high)
    }

    /// The expression with symbols replaced; `None` from `lookup` keeps a symbol.
    pub fn substitute(&self, lookup: &dyn Fn(&Symbol) -> Option<DimExpr>) -> Option<DimExpr> {
        let (constant, terms) = self.parts();
        let mut total = DimExpr::from(constant);
        for term in terms {
            let mut product = DimExpr::from(term.coefficient);
            for factor in &term.factors {
                let value = match factor {
                    Atom::Symbol(symbol) => lookup(symbol).unwrap_or_else(|| symbol.clone().into()),
                    Atom::FloorDiv(a, b) => a.substitute(lookup)?.floor_div(&b.substitute(lookup)?)?,
                    Atom::Min(a, b) => a.substitute(lookup)?.smaller(&b.substitute(lookup)?)?,
                    Atom::Max(a, b) => a.substitute(lookup)?.larger(&b.substitute(lookup)?)?,
                    Atom::Broadcast(a, b) => a.substitute(lookup)?.broadcast(&b.substitute(lookup)?)?,
                };
                product = product.times(&value)?;
            }
            total = total.plus(&product)?;
        }
        Some(total)
    }

    /// The number it is when symbols have these values; `None` if one has none, on overflow and on division by 0.
    pub fn evaluate(&self, lookup: &dyn Fn(&Symbol) -> Option<i64>) -> Option<i64> {
        let (constant, terms) = self.parts();
        terms.iter().try_fold(constant, |total, term| {
            let mut product = term.coefficient;
            for factor in &term.factors {
                let value = match factor {
                    Atom::Symbol(symbol) => lookup(symbol)?,
                    Atom::FloorDiv(a, b) => {
                        let (a, b) = (a.evaluate(lookup)?, b.evaluate(lookup)?);
                        DimExpr::from(a).floor_div(&b.into())?.as_known()?
                    }
                    Atom::Min(a, b) => a.evaluate(lookup)?.min(b.evaluate(lookup)?),
                    Atom::Max(a, b) => a.evaluate(lookup)?.max(b.evaluate(lookup)?),
                    Atom::Broadcast(a, b) => match a.evaluate(lookup)? {
                        1 => b.evaluate(lookup)?,
                        size => size,
                    },
                };
                product = product.checked_mul(value)?;
            }
            total.checked_add(product)
        })
    }

    /// Whether `test` holds for every symbol in it.
    pub fn all_symbols(&self, test: &dyn Fn(&Symbol) -> bool) -> bool {
        let (_, terms) = self.parts();
        terms.iter().flat_map(|t| &t.factors).all(|factor| match factor {
            Atom::Symbol(symbol) => test(symbol),
            Atom::FloorDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) | Atom::Broadcast(a, b) => {
                a.all_symbols(test) && b.all_symbols(test)
            }
        })
    }

    /// Whether it has no products of symbols and no operations but sums.
    pub fn is_linear(&self) -> bool {
        let (_, terms) = self.parts();
        terms.iter().all(|t| matches!(t.factors.as_slice(), [Atom::Symbol(_)]))
    }
}

fn ordered(a: &DimExpr, b: &DimExpr) -> (DimExpr, DimExpr) {
    if a <= b { (a.clone(), b.clone()) } else { (b.clone(), a.clone()) }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The product of all of them.
pub fn product<'a>(sizes: impl IntoIterator<Item = &'a DimExpr>) -> Option<DimExpr> {
    let mut total = DimExpr::from(1);
    let mut empty = false;
    for size in sizes {
        empty |= size.as_known() == Some(0);
        total = if empty { 0.into() } else { total.times(size)? };
    }
    Some(total)
}

#[cfg(test)]
mod tests;
