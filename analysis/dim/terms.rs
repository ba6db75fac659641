//! What polynomials of sizes are made of: products of symbols and of operations that are no product or sum.

use super::{DimExpr, Symbol};

/// The smallest and the largest value, where there is a bound.
pub(super) type Range = (Option<i64>, Option<i64>);

/// What stands for itself in a polynomial.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Atom {
    Symbol(Symbol),
    /// The quotient rounded towards minus infinity.
    FloorDiv(DimExpr, DimExpr),
    Min(DimExpr, DimExpr),
    Max(DimExpr, DimExpr),
    /// The size that two axes broadcast to: the second if the first is 1, else the first.
    Broadcast(DimExpr, DimExpr),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Term {
    /// Sorted; a repeated atom is a power.
    pub factors: Vec<Atom>,
    /// Never 0.
    pub coefficient: i64,
}

impl Term {
    pub fn times(&self, other: &Term) -> Option<Term> {
        let mut factors: Vec<Atom> = self.factors.iter().chain(&other.factors).cloned().collect();
        factors.sort();
        Some(Term { factors, coefficient: self.coefficient.checked_mul(other.coefficient)? })
    }

    pub fn divided_by(&self, other: &Term) -> Option<Term> {
        if self.coefficient.checked_rem(other.coefficient)? != 0 {
            return None;
        }
        let mut factors = self.factors.clone();
        for factor in &other.factors {
            factors.remove(factors.iter().position(|f| f == factor)?);
        }
        Some(Term { factors, coefficient: self.coefficient.checked_div(other.coefficient)? })
    }

    pub fn range(&self) -> Range {
        let ranges: Vec<_> = self.factors.iter().map(Atom::range).collect();
        let (low, high) = match ranges.as_slice() {
            [only] => *only,
            // Only products of sizes are bounded; a product of anything else is rare.
            _ if ranges.iter().all(|(low, _)| low.is_some_and(|l| l >= 0)) => {
                let product = |pick: fn(&Range) -> Option<i64>| {
                    ranges.iter().try_fold(1i64, |total, range| total.checked_mul(pick(range)?))
                };
                (Some(product(|r| r.0).unwrap_or(0)), product(|r| r.1))
            }
            _ => (None, None),
        };
        let scale = |bound: Option<i64>| bound.and_then(|b| b.checked_mul(self.coefficient));
        if self.coefficient >= 0 { (scale(low), scale(high)) } else { (scale(high), scale(low)) }
    }
}

impl Atom {
    /// The size `s` of a `min(1, s)` in it.
    pub fn capped_by_one(&self) -> Option<&Symbol> {
        fn inside(dim: &DimExpr) -> Option<&Symbol> {
            dim.parts().1.iter().flat_map(|t| &t.factors).find_map(Atom::capped_by_one)
        }
        match self {
            Atom::Symbol(_) => None,
            Atom::Min(a, b) if a.as_known() == Some(1) => match b.as_symbol() {
                Some(Symbol::Element { .. }) | None => inside(b),
                symbol => symbol,
            },
            Atom::FloorDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) | Atom::Broadcast(a, b) => {
                inside(a).or_else(|| inside(b))
            }
        }
    }

    pub fn weight(&self) -> usize {
        match self {
            Atom::Symbol(_) => 1,
            Atom::FloorDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) | Atom::Broadcast(a, b) => {
                1 + a.weight() + b.weight()
            }
        }
    }

    pub fn range(&self) -> Range {
        let either = |a: Option<i64>, b: Option<i64>, pick: fn(i64, i64) -> i64| match (a, b) {
            (Some(a), Some(b)) => Some(pick(a, b)),
            (one, other) => one.or(other),
        };
        match self {
            Atom::Symbol(Symbol::Element { .. }) => (None, None),
            Atom::Symbol(_) => (Some(0), None),
            Atom::FloorDiv(a, b) => match b.as_known() {
                Some(b) if b > 0 => {
                    let (low, high) = a.range();
                    (low.map(|l| l.div_euclid(b)), high.map(|h| h.div_euclid(b)))
                }
                // Both are known not to be negative when this atom is made.
                _ => (Some(0), a.range().1),
            },
            Atom::Min(a, b) => {
                let ((la, ha), (lb, hb)) = (a.range(), b.range());
                (la.zip(lb).map(|(x, y)| x.min(y)), either(ha, hb, i64::min))
            }
            Atom::Max(a, b) => {
                let ((la, ha), (lb, hb)) = (a.range(), b.range());
                (either(la, lb, i64::max), ha.zip(hb).map(|(x, y)| x.max(y)))
            }
            Atom::Broadcast(a, b) => {
                let ((la, ha), (lb, hb)) = (a.range(), b.range());
                (la.zip(lb).map(|(x, y)| x.min(y)), ha.zip(hb).map(|(x, y)| x.max(y)))
            }
        }
    }
}
