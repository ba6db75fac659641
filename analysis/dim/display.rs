//! Sizes as text: `2*batch + 1`.

use super::{Atom, DimExpr, Symbol};
use std::fmt;

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Symbol::Named(name) => f.write_str(name),
            Symbol::Size { value, axis, .. } => write!(f, "size{}.{axis}", value.index()),
            Symbol::Element { value, index, .. } => write!(f, "element{}.{index}", value.index()),
        }
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Symbol(symbol) => symbol.fmt(f),
            Atom::FloorDiv(a, b) => write!(f, "floor(({a})/({b}))"),
            Atom::Min(a, b) => write!(f, "min({a}, {b})"),
            Atom::Max(a, b) => write!(f, "max({a}, {b})"),
            Atom::Broadcast(a, b) => write!(f, "broadcast({a}, {b})"),
        }
    }
}

impl fmt::Display for DimExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (constant, terms) = self.parts();
        for (i, term) in terms.iter().enumerate() {
            match (i, term.coefficient < 0) {
                (0, false) => {}
                (0, true) => f.write_str("-")?,
                (_, false) => f.write_str(" + ")?,
                (_, true) => f.write_str(" - ")?,
            }
            let size = term.coefficient.unsigned_abs();
            if size != 1 {
                write!(f, "{size}*")?;
            }
            for (j, factor) in term.factors.iter().enumerate() {
                if j > 0 {
                    f.write_str("*")?;
                }
                factor.fmt(f)?;
            }
        }
        match constant {
            _ if terms.is_empty() => write!(f, "{constant}"),
            0 => Ok(()),
            c if c < 0 => write!(f, " - {}", c.unsigned_abs()),
            c => write!(f, " + {c}"),
        }
    }
}

impl fmt::Debug for DimExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
