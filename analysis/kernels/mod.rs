//! Single nodes on constant tensors, computed here, without any runtime.
//!
//! A result has the bits that ONNX Runtime's CPU kernels give, or there is none: data movement works for every element
//! type, arithmetic only where one correctly rounded (or wrapping) operation per element leaves no choice. Whatever
//! depends on summation order, on a library's `exp`, or on what C++ leaves undefined is [`Unsupported`].

// One body is written for every element type, so that what is needed for one type is idle for another.
#![allow(
    clippy::clone_on_copy,
    clippy::unnecessary_to_owned,
    clippy::useless_conversion,
    clippy::unnecessary_fallible_conversions
)]

mod cast;
mod create;
mod elements;
mod elementwise;
mod indexing;
mod layout;
mod movement;
mod reduce;
mod scatter;

pub use layout::broadcast_dims;

use lathe_ir::{AttributeValue, DataType, Node, Tensor, element_count};

/// The newest version of the standard operator set whose meaning is known here.
pub const NEWEST_OPSET: i64 = 28;

/// Why a node was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// The operator is not known here.
    #[error("the operator is not computed here")]
    Operator,
    /// The operator is known, but not in this version or with these attributes.
    #[error("the operator is not computed here with these attributes or in this version")]
    Form,
    /// The operator is known, but not for these element types.
    #[error("the operator is not computed here for this element type")]
    Type,
    /// The inputs do not fit the operator; a runtime would report them.
    #[error("the inputs do not fit the operator")]
    Invalid,
    /// The result would depend on the machine or library that computes it.
    #[error("the result may depend on who computes it")]
    NotExact,
    /// The result is larger than the caller allows.
    #[error("the result takes {bytes} bytes, more than allowed")]
    TooLarge {
        /// Bytes of the result; the largest number where it overflows.
        bytes: usize,
    },
}

type Result<T, E = Unsupported> = std::result::Result<T, E>;

/// Computes the outputs of `node` from constant `inputs`, one per input of the node (`None` where it is left out).
///
/// `opset` is the version of the standard operator set. The caller knows that no local function replaces the operator.
/// Results come in the order of the operator's outputs, for all outputs it defines at least up to the last one that
/// `node` asks for. No result of more than `limit` bytes is made.
pub fn evaluate(node: &Node, opset: i64, inputs: &[Option<&Tensor>], limit: usize) -> Result<Vec<Tensor>> {
    let (_, attributes, kernel) = find(node)?;
    if !(1..=NEWEST_OPSET).contains(&opset) {
        return Err(Unsupported::Form);
    }
    let known = |name: &str| attributes.contains(&name);
    let fixed = |value: &AttributeValue| !matches!(value, AttributeValue::Reference { .. });
    if !node.attributes.iter().all(|a| known(&a.name) && fixed(&a.value)) {
        return Err(Unsupported::Form);
    }
    let call = Call { node, opset, inputs, limit };
    match kernel {
        Kernel::One(kernel) => Ok(vec![kernel(&call)?]),
        Kernel::Several(kernel) => kernel(&call),
    }
}

/// Whether [`evaluate`] knows the operator of `node`; it may still decline types, attributes or values.
pub fn knows(node: &Node) -> bool {
    find(node).is_ok()
}

fn find(node: &Node) -> Result<&'static Entry> {
    if !node.is_standard() || !node.overload.is_empty() {
        return Err(Unsupported::Operator);
    }
    KERNELS.iter().find(|entry| entry.0 == node.op_type).ok_or(Unsupported::Operator)
}

/// Computes the one-output standard operator `op_type` without attributes: `apply("Mul", &[&a, &b])`.
pub fn apply(op_type: &str, inputs: &[&Tensor]) -> Result<Tensor> {
    let inputs: Vec<Option<&Tensor>> = inputs.iter().map(|&tensor| Some(tensor)).collect();
    let mut outputs = evaluate(&Node::new(op_type), NEWEST_OPSET, &inputs, usize::MAX)?;
    if outputs.len() == 1 { outputs.pop().ok_or(Unsupported::Invalid) } else { Err(Unsupported::Form) }
}

/// Reorders the axes: output axis `i` is input axis `perm[i]`.
pub fn transpose(tensor: &Tensor, perm: &[usize]) -> Result<Tensor> {
    movement::permute(&Call::free(&Node::default()), tensor, perm)
}

/// Joins tensors of one type along `axis`.
pub fn concat(tensors: &[&Tensor], axis: usize) -> Result<Tensor> {
    movement::join(&Call::free(&Node::default()), tensors, axis)
}

/// The slices `indices` of a tensor along `axis`, in that order.
pub fn take(tensor: &Tensor, axis: usize, indices: &[usize]) -> Result<Tensor> {
    indexing::pick(&Call::free(&Node::default()), tensor, axis, indices, &[indices.len()])
}

/// Converts elements to another type as the operator `Cast` does.
pub fn cast(tensor: &Tensor, dtype: DataType) -> Result<Tensor> {
    cast::convert(&Call::free(&Node::default()), tensor, dtype)
}

enum Kernel {
    One(fn(&Call) -> Result<Tensor>),
    Several(fn(&Call) -> Result<Vec<Tensor>>),
}
use Kernel::{One, Several};

/// An operator, the attributes it may have here, and what computes it.
type Entry = (&'static str, &'static [&'static str], Kernel);

static KERNELS: &[Entry] = &[
    ("Abs", &[], One(elementwise::abs)),
    ("Add", &[], One(elementwise::add)),
    ("And", &[], One(elementwise::and)),
    ("ArgMax", &["axis", "keepdims", "select_last_index"], One(reduce::arg_max)),
    ("ArgMin", &["axis", "keepdims", "select_last_index"], One(reduce::arg_min)),
    ("BitShift", &["direction"], One(elementwise::bit_shift)),
    ("BitwiseAnd", &[], One(elementwise::bitwise_and)),
    ("BitwiseNot", &[], One(elementwise::bitwise_not)),
    ("BitwiseOr", &[], One(elementwise::bitwise_or)),
    ("BitwiseXor", &[], One(elementwise::bitwise_xor)),
    ("Cast", &["to", "saturate", "round_mode"], One(cast::cast)),
    ("CastLike", &["saturate", "round_mode"], One(cast::cast_like)),
    ("Ceil", &[], One(elementwise::ceil)),
    ("Clip", &["min", "max"], One(elementwise::clip)),
    ("Compress", &["axis"], One(indexing::compress)),
    ("Concat", &["axis"], One(movement::concat)),
    (
        "Constant",
        &["value", "value_int", "value_ints", "value_float", "value_floats", "value_string", "value_strings"],
        One(create::constant),
    ),
    ("ConstantOfShape", &["value"], One(create::constant_of_shape)),
    ("CumSum", &["exclusive", "reverse"], One(reduce::cum_sum)),
    ("DepthToSpace", &["blocksize", "mode"], One(movement::depth_to_space)),
    ("Div", &[], One(elementwise::div)),
    ("Equal", &[], One(elementwise::equal)),
    ("Expand", &[], One(movement::expand)),
    ("EyeLike", &["dtype", "k"], One(create::eye_like)),
    ("Flatten", &["axis"], One(movement::flatten)),
    ("Floor", &[], One(elementwise::floor)),
    ("Gather", &["axis"], One(indexing::gather)),
    ("GatherElements", &["axis"], One(indexing::gather_elements)),
    ("GatherND", &["batch_dims"], One(indexing::gather_nd)),
    ("Greater", &[], One(elementwise::greater)),
    ("GreaterOrEqual", &[], One(elementwise::greater_or_equal)),
    ("Identity", &[], One(movement::identity)),
    ("IsInf", &["detect_negative", "detect_positive"], One(elementwise::is_inf)),
    ("IsNaN", &[], One(elementwise::is_nan)),
    ("Less", &[], One(elementwise::less)),
    ("LessOrEqual", &[], One(elementwise::less_or_equal)),
    ("Max", &[], One(elementwise::max)),
    ("Min", &[], One(elementwise::min)),
    ("Mod", &["fmod"], One(elementwise::modulo)),
    ("Mul", &[], One(elementwise::mul)),
    ("Neg", &[], One(elementwise::neg)),
    ("NonZero", &[], One(indexing::non_zero)),
    ("Not", &[], One(elementwise::not)),
    ("OneHot", &["axis"], One(create::one_hot)),
    ("Or", &[], One(elementwise::or)),
    ("Pad", &["mode", "pads", "value"], One(movement::pad)),
    ("Pow", &[], One(elementwise::pow)),
    ("Range", &[], One(create::range)),
    ("Reciprocal", &[], One(elementwise::reciprocal)),
    ("ReduceMax", &["axes", "keepdims", "noop_with_empty_axes"], One(reduce::max)),
    ("ReduceMean", &["axes", "keepdims", "noop_with_empty_axes"], One(reduce::mean)),
    ("ReduceMin", &["axes", "keepdims", "noop_with_empty_axes"], One(reduce::min)),
    ("ReduceProd", &["axes", "keepdims", "noop_with_empty_axes"], One(reduce::prod)),
    ("ReduceSum", &["axes", "keepdims", "noop_with_empty_axes"], One(reduce::sum)),
    ("Relu", &[], One(elementwise::relu)),
    ("Reshape", &["allowzero", "shape"], One(movement::reshape)),
    ("ReverseSequence", &["batch_axis", "time_axis"], One(indexing::reverse_sequence)),
    ("Round", &[], One(elementwise::round)),
    ("Scatter", &["axis"], One(scatter::scatter_elements)),
    ("ScatterElements", &["axis", "reduction"], One(scatter::scatter_elements)),
    ("ScatterND", &["reduction"], One(scatter::scatter_nd)),
    ("Shape", &["start", "end"], One(create::shape)),
    ("Sign", &[], One(elementwise::sign)),
    ("Size", &[], One(create::size)),
    ("Slice", &["starts", "ends", "axes"], One(movement::slice)),
    ("SpaceToDepth", &["blocksize"], One(movement::space_to_depth)),
    ("Split", &["axis", "split", "num_outputs"], Several(movement::split)),
    ("Sqrt", &[], One(elementwise::sqrt)),
    ("Squeeze", &["axes"], One(movement::squeeze)),
    ("Sub", &[], One(elementwise::sub)),
    ("Sum", &[], One(elementwise::sum)),
    ("Tile", &[], One(movement::tile)),
    ("TopK", &["axis", "largest", "sorted", "k"], Several(indexing::top_k)),
    ("Transpose", &["perm"], One(movement::transpose)),
    ("Trilu", &["upper"], One(movement::trilu)),
    ("Unsqueeze", &["axes"], One(movement::unsqueeze)),
    ("Where", &[], One(elementwise::select)),
    ("Xor", &[], One(elementwise::xor)),
];

/// One node with its inputs; the getters turn whatever is missing or malformed into a reason not to compute it.
struct Call<'a> {
    node: &'a Node,
    opset: i64,
    inputs: &'a [Option<&'a Tensor>],
    limit: usize,
}

impl<'a> Call<'a> {
    /// A call without inputs, attributes or limit, for the functions that other crates use directly.
    fn free(node: &'a Node) -> Call<'a> {
        Call { node, opset: NEWEST_OPSET, inputs: &[], limit: usize::MAX }
    }

    /// Input `index`, which must be there.
    fn input(&self, index: usize) -> Result<&'a Tensor> {
        self.optional(index).ok_or(Unsupported::Invalid)
    }

    /// Input `index`, if it is there.
    fn optional(&self, index: usize) -> Option<&'a Tensor> {
        self.inputs.get(index).copied().flatten()
    }

    /// Input `index` as a list of integers; it must have at most one axis.
    fn list(&self, index: usize) -> Result<Option<Vec<i64>>> {
        let Some(tensor) = self.optional(index) else { return Ok(None) };
        if tensor.dims().len() > 1 || !tensor.dtype().is_integer() {
            return Err(Unsupported::Invalid);
        }
        tensor.to_i64s().ok_or(Unsupported::Type).map(Some)
    }

    /// The integer attribute `name`.
    fn int(&self, name: &str) -> Result<Option<i64>> {
        match self.node.attribute(name) {
            None => Ok(None),
            Some(AttributeValue::Int(value)) => Ok(Some(*value)),
            Some(_) => Err(Unsupported::Form),
        }
    }

    /// The integer attribute `name`, which counts as `default` where it is left out.
    fn int_or(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.int(name)?.unwrap_or(default))
    }

    /// The attribute `name`, which switches something on, and whether it does; off where it is left out.
    fn flag(&self, name: &str) -> Result<bool> {
        match self.int_or(name, 0)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Unsupported::Form),
        }
    }

    /// The float attribute `name`.
    fn float(&self, name: &str) -> Result<Option<f32>> {
        match self.node.attribute(name) {
            None => Ok(None),
            Some(AttributeValue::Float(value)) => Ok(Some(*value)),
            Some(_) => Err(Unsupported::Form),
        }
    }

    /// The integer-list attribute `name`.
    fn ints(&self, name: &str) -> Result<Option<&'a [i64]>> {
        match self.node.attribute(name) {
            None => Ok(None),
            Some(AttributeValue::Ints(values)) => Ok(Some(values)),
            Some(_) => Err(Unsupported::Form),
        }
    }

    /// The string attribute `name`, which counts as `default` where it is left out.
    fn string_or(&self, name: &str, default: &'static str) -> Result<&'a str> {
        match self.node.attribute(name) {
            None => Ok(default),
            Some(AttributeValue::String(value)) => std::str::from_utf8(value).map_err(|_| Unsupported::Form),
            Some(_) => Err(Unsupported::Form),
        }
    }

    /// A list that is the attribute `name` before version `since` and input `index` from then on.
    fn list_since(&self, since: i64, name: &str, index: usize) -> Result<Option<Vec<i64>>> {
        if self.opset < since {
            if self.optional(index).is_some() {
                return Err(Unsupported::Form);
            }
            return Ok(self.ints(name)?.map(<[i64]>::to_vec));
        }
        if self.node.attribute(name).is_some() {
            return Err(Unsupported::Form);
        }
        self.list(index)
    }

    /// An axis of a tensor of `ndim` axes; negative ones count from the end.
    fn axis(&self, axis: i64, ndim: usize) -> Result<usize> {
        let from_start = if axis < 0 { axis.checked_add(ndim as i64) } else { Some(axis) };
        let index = from_start.and_then(|axis| usize::try_from(axis).ok()).filter(|&axis| axis < ndim);
        index.ok_or(Unsupported::Invalid)
    }

    /// Distinct axes of a tensor of `ndim` axes, in ascending order.
    fn axes(&self, axes: &[i64], ndim: usize) -> Result<Vec<usize>> {
        let mut found = axes.iter().map(|&axis| self.axis(axis, ndim)).collect::<Result<Vec<usize>>>()?;
        found.sort_unstable();
        if found.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Unsupported::Invalid);
        }
        Ok(found)
    }

    /// The number of elements of a result, if it is within the limit.
    fn room(&self, dtype: DataType, dims: &[usize]) -> Result<usize> {
        let count = element_count(dims);
        let bytes = count.and_then(|count| elements::footprint(dtype, count)).unwrap_or(usize::MAX);
        // One allocation can never be larger, whatever the caller allows.
        if bytes > self.limit.min(isize::MAX as usize) {
            return Err(Unsupported::TooLarge { bytes });
        }
        count.ok_or(Unsupported::TooLarge { bytes })
    }
}

/// Sizes as the operators' inputs state them; negative ones fit nothing.
fn sizes(list: &[i64]) -> Result<Vec<usize>> {
    list.iter().map(|&size| usize::try_from(size).map_err(|_| Unsupported::Invalid)).collect()
}

#[cfg(test)]
mod tests;
