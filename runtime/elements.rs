//! Reading the elements of two tensors side by side, a row at a time, so that none is widened as a whole.

use half::{bf16, f16};
use lathe_ir::{DataType, Tensor};

/// Whether elements are floats of whole bytes that are read as they lie there.
pub(crate) fn is_wide(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16)
}

/// Calls `visit` with the number of a row and the elements of both tensors in it, for every row of `width` elements that
/// `keeps` names. Both tensors are of one type.
pub(crate) fn rows(
    a: &Tensor,
    b: &Tensor,
    width: usize,
    keeps: impl Fn(usize) -> bool,
    mut visit: impl FnMut(usize, &[f64], &[f64]),
) {
    if !is_wide(a.dtype()) {
        let all = |t: &Tensor| t.to_f64s().unwrap_or_default();
        let (a, b) = (all(a), all(b));
        let rows = a.chunks(width).zip(b.chunks(width)).enumerate();
        return rows.filter(|(row, _)| keeps(*row)).for_each(|(row, (a, b))| visit(row, a, b));
    }
    let step = width * (a.dtype().bits() / 8);
    let (mut left, mut right) = (Vec::with_capacity(width), Vec::with_capacity(width));
    for (row, (x, y)) in a.bytes().chunks(step).zip(b.bytes().chunks(step)).enumerate() {
        if keeps(row) {
            decode(a.dtype(), x, &mut left);
            decode(b.dtype(), y, &mut right);
            visit(row, &left, &right);
        }
    }
}

/// Widens packed elements into `out`.
fn decode(dtype: DataType, bytes: &[u8], out: &mut Vec<f64>) {
    out.clear();
    match dtype {
        DataType::Float => out.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f64::from(f32::from_le_bytes(b)))),
        DataType::Double => out.extend(bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b))),
        DataType::Float16 => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(f16::from_le_bytes(b)))),
        _ => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b)))),
    }
}
