//! What a budget limits.

/// A quantity that a budget can limit, and that every candidate has a cost in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Quantity {
    /// Bytes of the file.
    Size,
    /// Floating-point operations of one run.
    Flops,
    /// Stored numbers.
    Parameters,
    /// Measured nanoseconds of one run.
    #[default]
    Latency,
}

impl Quantity {
    /// All of them.
    pub const ALL: [Quantity; 4] = [Quantity::Size, Quantity::Flops, Quantity::Parameters, Quantity::Latency];

    /// Its key in reports and in histories: `size`.
    pub fn key(self) -> &'static str {
        match self {
            Quantity::Size => "size",
            Quantity::Flops => "flops",
            Quantity::Parameters => "parameters",
            Quantity::Latency => "latency",
        }
    }

    /// As sentences call it: `FLOPs`.
    pub fn name(self) -> &'static str {
        match self {
            Quantity::Flops => "FLOPs",
            other => other.key(),
        }
    }

    /// The option that limits it: `--size`.
    pub fn flag(self) -> &'static str {
        match self {
            Quantity::Size => "--size",
            Quantity::Flops => "--flops",
            Quantity::Parameters => "--params",
            Quantity::Latency => "--latency",
        }
    }

    /// What it is counted in, as costs are.
    pub fn unit(self) -> &'static str {
        match self {
            Quantity::Size => "bytes",
            Quantity::Flops => "FLOP",
            Quantity::Parameters => "parameters",
            Quantity::Latency => "ns",
        }
    }
}

/// A figure for some of the quantities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantityMap<T>([Option<T>; Quantity::ALL.len()]);

impl<T> Default for QuantityMap<T> {
    fn default() -> Self {
        QuantityMap([const { None }; Quantity::ALL.len()])
    }
}

impl<T: Copy> QuantityMap<T> {
    /// A figure for every quantity.
    pub fn of_all(figure: impl FnMut(Quantity) -> T) -> Self {
        QuantityMap(Quantity::ALL.map(figure).map(Some))
    }

    /// The figure of one quantity.
    pub fn get(&self, quantity: Quantity) -> Option<T> {
        self.0[quantity as usize]
    }

    /// Gives a quantity a figure, or takes it away.
    pub fn set(&mut self, quantity: Quantity, figure: impl Into<Option<T>>) {
        self.0[quantity as usize] = figure.into();
    }

    /// The same with the figure of one quantity.
    #[must_use]
    pub fn with(mut self, quantity: Quantity, figure: impl Into<Option<T>>) -> Self {
        self.set(quantity, figure);
        self
    }

    /// What has a figure, in the order of [`Quantity::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Quantity, T)> {
        Quantity::ALL.into_iter().zip(self.0).filter_map(|(quantity, figure)| Some((quantity, figure?)))
    }

    /// Whether nothing has a figure.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// Every figure changed.
    #[must_use]
    pub fn map<U>(&self, change: impl Fn(Quantity, T) -> U) -> QuantityMap<U> {
        QuantityMap(Quantity::ALL.map(|quantity| self.get(quantity).map(|figure| change(quantity, figure))))
    }
}

impl<T: Copy + Default> QuantityMap<T> {
    /// The figure of one quantity, or the default where it has none.
    pub fn of(&self, quantity: Quantity) -> T {
        self.get(quantity).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_holds_what_was_set_in_the_order_of_the_quantities() {
        let map = QuantityMap::default().with(Quantity::Latency, 3).with(Quantity::Size, 5);
        assert_eq!(map.iter().collect::<Vec<_>>(), [(Quantity::Size, 5), (Quantity::Latency, 3)]);
        assert_eq!((map.get(Quantity::Flops), map.of(Quantity::Flops), map.of(Quantity::Size)), (None, 0, 5));
        assert_eq!(map.map(|_, x| 2 * x).get(Quantity::Latency), Some(6));
        assert!(!map.is_empty() && QuantityMap::<u64>::default().is_empty());
        assert!(map.with(Quantity::Size, None).with(Quantity::Latency, None).is_empty());
        let all = QuantityMap::of_all(|quantity| quantity.key().len());
        assert!(Quantity::ALL.iter().all(|&quantity| all.get(quantity) == Some(quantity.key().len())));
    }
}
