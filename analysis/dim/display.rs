//! Sizes as text: `2*batch + 1`, `ceil(h/16)`.

use super::{Atom, DimExpr, Symbol, Term};
use std::fmt;

impl DimExpr {
    /// As people write it, with symbols called what `name` says; `None` where it has no name for one.
    pub fn written(&self, name: &dyn Fn(&Symbol) -> Option<String>) -> Option<String> {
        let (constant, terms) = self.parts();
        let mut text = String::new();
        let mut join = |negative: bool, part: &str| {
            text += match (text.is_empty(), negative) {
                (true, false) => "",
                (true, true) => "-",
                (false, false) => " + ",
                (false, true) => " - ",
            };
            text += part;
        };
        for Term { factors, coefficient } in terms {
            let factors = factors.iter().map(|factor| factor.written(name)).collect::<Option<Vec<_>>>()?.join("*");
            let size = coefficient.unsigned_abs();
            join(*coefficient < 0, &if size == 1 { factors } else { format!("{size}*{factors}") });
        }
        if constant != 0 || terms.is_empty() {
            join(constant < 0, &constant.unsigned_abs().to_string());
        }
        Some(text)
    }
}

impl Atom {
    fn written(&self, symbol_name: &dyn Fn(&Symbol) -> Option<String>) -> Option<String> {
        let two = |a: &DimExpr, b: &DimExpr| Some((a.written(symbol_name)?, b.written(symbol_name)?));
        Some(match self {
            Atom::Symbol(symbol) => symbol_name(symbol)?,
            Atom::FloorDiv(a, b) => {
                // ⌊(a + b - 1) / b⌋ is what people call ⌈a / b⌉.
                let up = b.as_known().filter(|&b| b > 1).and_then(|b| a.offset(1 - b)).filter(|a| a.parts().0 == 0);
                let (name, a) = up.as_ref().map_or(("floor", a), |a| ("ceil", a));
                let (above, below) = two(a, b)?;
                // A quotient divides one number or name; anything longer stands in parentheses.
                let sum = |dim: &DimExpr| dim.parts().1.len() + usize::from(dim.parts().0 != 0) > 1;
                let product = |dim: &DimExpr| dim.as_known().is_none() && dim.as_atom().is_none();
                let above = if sum(a) { format!("({above})") } else { above };
                let below = if product(b) { format!("({below})") } else { below };
                format!("{name}({above}/{below})")
            }
            Atom::Min(a, b) => two(a, b).map(|(a, b)| format!("min({a}, {b})"))?,
            Atom::Max(a, b) => two(a, b).map(|(a, b)| format!("max({a}, {b})"))?,
            Atom::Broadcast(a, b) => two(a, b).map(|(a, b)| format!("broadcast({a}, {b})"))?,
        })
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Symbol::Named(name) => f.write_str(name),
            Symbol::Size { value, axis, .. } => write!(f, "size{}.{axis}", value.index()),
            Symbol::Element { value, index, .. } => write!(f, "element{}.{index}", value.index()),
        }
    }
}

impl fmt::Display for DimExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written(&|symbol| Some(symbol.to_string())).unwrap_or_default())
    }
}

impl fmt::Debug for DimExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
