//! Operators that write elements at computed indices.

use super::{
    Call, Result, Unsupported,
    elements::moved,
    indexing::{element_places, tuple_places},
};
use lathe_ir::Tensor;

/// Writes are only defined where no place is written twice, and only plain ones are done here.
fn distinct(call: &Call, places: &[usize]) -> Result<()> {
    if call.string_or("reduction", "none")? != "none" {
        return Err(Unsupported::Form);
    }
    let mut sorted = places.to_vec();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) { Err(Unsupported::NotExact) } else { Ok(()) }
}

pub(super) fn scatter_elements(call: &Call) -> Result<Tensor> {
    let (input, at, updates) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let axis = call.axis(call.int_or("axis", 0)?, input.dims().len())?;
    if at.dims() != updates.dims() {
        return Err(Unsupported::Invalid);
    }
    let places = element_places(input, at, axis)?;
    distinct(call, &places)?;
    write(call, input, updates, &places, 1)
}

pub(super) fn scatter_nd(call: &Call) -> Result<Tensor> {
    let (input, at, updates) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let (dims, shape) = (input.dims(), at.dims());
    let &tuple = shape.last().ok_or(Unsupported::Invalid)?;
    if tuple == 0 || tuple > dims.len() {
        return Err(Unsupported::Invalid);
    }
    let mut expected = shape[..shape.len() - 1].to_vec();
    expected.extend_from_slice(&dims[tuple..]);
    if updates.dims() != expected {
        return Err(Unsupported::Invalid);
    }
    let (places, inner) = tuple_places(dims, at, 0)?;
    distinct(call, &places)?;
    write(call, input, updates, &places, inner)
}

/// `input` with the blocks of `inner` elements at `places` replaced by those of `updates`, in order.
fn write(call: &Call, input: &Tensor, updates: &Tensor, places: &[usize], inner: usize) -> Result<Tensor> {
    moved!(call, &[input, updates], input.dims().to_vec(), |data| {
        let mut out = data[0].to_vec();
        for (&place, new) in places.iter().zip(data[1].chunks_exact(inner.max(1))) {
            out[place..place + inner].clone_from_slice(new);
        }
        out
    })
}
