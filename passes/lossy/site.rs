//! A place in a model, what could be done there, and what that costs and loses.

use lathe_ir::{NodeId, ValueId};
use serde::{Deserialize, Serialize};
use std::{any::Any, fmt, sync::Arc};

/// Bytes that a node and the names of two tensors add to a file, roughly.
pub(super) const OVERHEAD: u64 = 200;

/// What something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Bytes in the file: padding, scales, zero points, masks and positions included.
    pub bytes: u64,
    /// Stored numbers.
    pub parameters: u64,
    /// Floating-point operations per row of the layer's input.
    pub flops_per_row: u64,
}

impl Cost {
    /// Both together.
    pub(super) fn and(&self, other: &Cost) -> Cost {
        Cost {
            bytes: self.bytes + other.bytes,
            parameters: self.parameters + other.parameters,
            flops_per_row: self.flops_per_row + other.flops_per_row,
        }
    }
}

/// What a candidate loses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Loss {
    /// The relative L2 error of every tap of the site over the calibration set: ‖X(W − Ŵ)‖ / ‖Y‖.
    PerTap(Vec<f64>),
    /// How far the outputs of the model are from where they were, measured with this candidate carried out alone: a
    /// squared relative L2 error or a Kullback-Leibler divergence in nats.
    Measured(f64),
}

impl Loss {
    /// The errors of the taps, as long as nothing was measured.
    pub fn per_tap(&self) -> Option<&[f64]> {
        match self {
            Loss::PerTap(errors) => Some(errors),
            Loss::Measured(_) => None,
        }
    }

    /// What was measured.
    pub fn measured(&self) -> Option<f64> {
        match *self {
            Loss::PerTap(_) => None,
            Loss::Measured(loss) => Some(loss),
        }
    }
}

/// One way to do the work of a site.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// As reports call it: `int4 block 32`. For people; nothing is read out of it.
    pub label: String,
    /// What it takes.
    pub cost: Cost,
    /// What it loses.
    pub loss: Loss,
    /// What the method that proposes it has to know in order to carry it out.
    pub edit: Edit,
}

/// What a candidate is to its method: a value of a type of the method's own, made and read by it alone.
#[derive(Clone)]
pub struct Edit(Arc<dyn EditValue>);

/// What an [`Edit`] can hold.
trait EditValue: Any + fmt::Debug + Send + Sync {
    fn equals(&self, other: &dyn EditValue) -> bool;
}

impl<T: Any + fmt::Debug + PartialEq + Send + Sync> EditValue for T {
    fn equals(&self, other: &dyn EditValue) -> bool {
        (other as &dyn Any).downcast_ref::<T>().is_some_and(|other| self == other)
    }
}

impl Edit {
    /// An edit of a method.
    pub fn new<T: Any + fmt::Debug + PartialEq + Send + Sync>(value: T) -> Edit {
        Edit(Arc::new(value))
    }

    /// The edit as its method made it. Panics on an edit of another method.
    pub(super) fn of<T: Any>(&self) -> &T {
        (&*self.0 as &dyn Any).downcast_ref().expect("a method carries out the candidates that it proposed")
    }
}

impl fmt::Debug for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PartialEq for Edit {
    fn eq(&self, other: &Edit) -> bool {
        self.0.equals(&*other.0)
    }
}

/// A place where a method could act.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The constant whose products are approximated; `None` where the site is no single layer's, and operations are
    /// counted for a whole run.
    pub weight: Option<ValueId>,
    /// Every value that would change or go, in order: constants, and what nodes give. Sites of one footprint exclude each
    /// other; a site with a larger footprint holds those with a part of it: they exist only where it stays as it is, or
    /// where its candidate leaves them ([`super::Method::effect_on_nested`]). A site that shares but a part of its footprint with
    /// another is refused.
    pub footprint: Vec<ValueId>,
    /// The nodes that would change, in order; for a single constant, those that use it.
    pub nodes: Vec<NodeId>,
    /// As reports call it: the name of the constant.
    pub name: String,
    /// The values whose errors count: the outputs of the nodes that use the constant.
    pub taps: Vec<ValueId>,
    /// What it takes as it is.
    pub baseline: Cost,
    /// What could be done instead.
    pub candidates: Vec<Candidate>,
    /// Whether settings ask for one of the candidates, so that the site cannot stay as it is.
    pub required: bool,
    /// Whether candidates can be carried out on a copy of the nodes alone, so that each is timed; if not, each takes its
    /// share of the operations.
    pub isolatable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_what_its_method_made_and_equals_its_like() {
        let (four, eight) = (Edit::new(4usize), Edit::new(8usize));
        assert_eq!(*four.of::<usize>(), 4);
        assert_eq!(four, Edit::new(4usize));
        assert!(four != eight && four != Edit::new(4u8) && four != Edit::new("4"));
        assert_eq!(format!("{eight:?}"), "8");
    }

    #[test]
    #[should_panic(expected = "a method carries out the candidates that it proposed")]
    fn an_edit_of_another_method_is_a_fault() {
        Edit::new("rank 4").of::<usize>();
    }
}
