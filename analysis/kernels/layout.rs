//! Shapes and strides: broadcasting, and walking several tensors side by side.

/// The shape that `shapes` broadcast to by the rules of NumPy; `None` if they do not.
pub fn broadcast_dims(shapes: &[&[usize]]) -> Option<Vec<usize>> {
    let ndim = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1; ndim];
    for shape in shapes {
        for (have, &dim) in out[ndim - shape.len()..].iter_mut().zip(*shape) {
            match (*have, dim) {
                (_, 1) => {}
                (1, _) => *have = dim,
                (a, b) if a == b => {}
                _ => return None,
            }
        }
    }
    Some(out)
}

/// How far apart neighbours along each axis lie in a packed tensor, in elements.
pub(super) fn strides(dims: &[usize]) -> Vec<isize> {
    let mut out = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        // Wraps only where some size is zero, and then nothing is ever read.
        out[axis - 1] = isize::wrapping_mul(out[axis], dims[axis] as isize);
    }
    out
}

/// Strides that read a packed tensor of `dims` as if it had the shape `out`, to which it must broadcast.
pub(super) fn broadcast_strides(dims: &[usize], out: &[usize]) -> Vec<isize> {
    let own = strides(dims);
    let missing = out.len() - dims.len();
    let stretched = |axis: usize| if dims[axis] == 1 { 0 } else { own[axis] };
    (0..out.len()).map(|axis| if axis < missing { 0 } else { stretched(axis - missing) }).collect()
}

/// The number before, at and after `axis`: `dims` seen as `[outer, size, inner]`.
pub(super) fn around(dims: &[usize], axis: usize) -> (usize, usize, usize) {
    // An empty tensor may state sizes whose product overflows; nothing is ever read from it.
    let product = |dims: &[usize]| dims.iter().fold(1usize, |product, &dim| product.saturating_mul(dim));
    (product(&dims[..axis]), dims[axis], product(&dims[axis + 1..]))
}

/// Drops axes of size one and joins axes that all walks pass through in one stride.
fn joined<const K: usize>(dims: &[usize], strides: [&[isize]; K]) -> (Vec<usize>, Vec<[isize; K]>) {
    let mut sizes: Vec<usize> = Vec::with_capacity(dims.len());
    let mut steps: Vec<[isize; K]> = Vec::with_capacity(dims.len());
    for (axis, &dim) in dims.iter().enumerate() {
        if dim == 1 {
            continue;
        }
        let step: [isize; K] = std::array::from_fn(|k| strides[k][axis]);
        if let (Some(size), Some(outer)) = (sizes.last_mut(), steps.last_mut())
            && (0..K).all(|k| outer[k] == step[k].wrapping_mul(dim as isize))
        {
            *size *= dim;
            *outer = step;
            continue;
        }
        sizes.push(dim);
        steps.push(step);
    }
    (sizes, steps)
}

/// Visits a shape row by row in order: `visit(length, starts, steps)` gets where each of `K` walks starts and how far it
/// steps from one element of the row to the next.
pub(super) fn rows<const K: usize>(
    dims: &[usize],
    strides: [&[isize]; K],
    mut visit: impl FnMut(usize, [isize; K], [isize; K]),
) {
    if dims.contains(&0) {
        return;
    }
    let (mut sizes, mut steps) = joined(dims, strides);
    let length = sizes.pop().unwrap_or(1);
    let inner = steps.pop().unwrap_or([0; K]);
    let mut at = [0isize; K];
    let mut index = vec![0usize; sizes.len()];
    loop {
        visit(length, at, inner);
        let mut axis = sizes.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            for k in 0..K {
                at[k] += steps[axis][k];
            }
            if index[axis] < sizes[axis] {
                break;
            }
            for k in 0..K {
                at[k] -= steps[axis][k] * sizes[axis] as isize;
            }
            index[axis] = 0;
        }
    }
}

/// Side of the square tiles in which elements change places, so that both sides of the exchange stay in cache.
const TILE: usize = 32;

/// Reads `data` from `start` in the order that `dims` and `strides` say into a packed list.
pub(super) fn read_strided<T: Clone>(data: &[T], start: isize, dims: &[usize], strides: &[isize]) -> Vec<T> {
    if dims.contains(&0) {
        return Vec::new();
    }
    let (sizes, steps) = joined(dims, [strides]);
    let total: usize = sizes.iter().product();
    let last = sizes.len().saturating_sub(1);
    let contiguous = steps.iter().position(|&[step]| step == 1);
    if let Some(axis) = contiguous.filter(|&axis| axis != last && sizes[axis] >= 8 && sizes[last] >= 8) {
        return exchange(data, start, &sizes, &steps, axis);
    }
    let mut out = Vec::with_capacity(total);
    rows(dims, [strides], |length, [at], [step]| {
        let at = (start + at) as usize;
        match step {
            1 => out.extend_from_slice(&data[at..at + length]),
            0 => out.extend(std::iter::repeat_n(&data[at], length).cloned()),
            _ => out.extend((0..length as isize).map(|i| data[(at as isize + i * step) as usize].clone())),
        }
    });
    out
}

/// [`read_strided`] where `axis`, not the last one, is contiguous in `data`: tile by tile.
fn exchange<T: Clone>(data: &[T], start: isize, sizes: &[usize], steps: &[[isize; 1]], axis: usize) -> Vec<T> {
    let last = sizes.len() - 1;
    let own = strides(sizes);
    let (columns, across) = (sizes[last], steps[last][0]);
    let (count, down) = (sizes[axis], own[axis] as usize);
    let others: Vec<usize> = (0..last).filter(|&a| a != axis).collect();
    let outer: Vec<usize> = others.iter().map(|&a| sizes[a]).collect();
    let from: Vec<isize> = others.iter().map(|&a| steps[a][0]).collect();
    let to: Vec<isize> = others.iter().map(|&a| own[a]).collect();
    let mut out = vec![data[start as usize].clone(); sizes.iter().product()];
    rows(&outer, [&from, &to], |length, [read, write], [read_step, write_step]| {
        for i in 0..length as isize {
            let (read, write) = (start + read + i * read_step, (write + i * write_step) as usize);
            for row in (0..count).step_by(TILE) {
                for column in (0..columns).step_by(TILE) {
                    for r in row..(row + TILE).min(count) {
                        for c in column..(column + TILE).min(columns) {
                            let from = (read + r as isize + c as isize * across) as usize;
                            out[write + r * down + c] = data[from].clone();
                        }
                    }
                }
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_like_numpy() {
        assert_eq!(broadcast_dims(&[&[2, 1, 3], &[4, 1], &[]]), Some(vec![2, 4, 3]));
        assert_eq!(broadcast_dims(&[&[2], &[3]]), None);
        assert_eq!(broadcast_dims(&[&[0], &[1]]), Some(vec![0]));
        assert_eq!(broadcast_dims(&[&[0], &[2]]), None);
    }

    #[test]
    fn exchanges_like_the_plain_walk() {
        let dims = [3usize, 40, 2, 70];
        let data: Vec<u32> = (0..3 * 40 * 2 * 70).collect();
        let own = strides(&dims);
        for perm in [[3, 2, 1, 0], [0, 3, 2, 1], [1, 3, 0, 2], [2, 3, 0, 1], [0, 1, 2, 3]] {
            let out: Vec<usize> = perm.iter().map(|&axis| dims[axis]).collect();
            let steps: Vec<isize> = perm.iter().map(|&axis| own[axis]).collect();
            let mut plain = Vec::new();
            rows(&out, [&steps], |length, [at], [step]| {
                plain.extend((0..length as isize).map(|i| data[(at + i * step) as usize]));
            });
            assert_eq!(read_strided(&data, 0, &out, &steps), plain, "{perm:?}");
        }
    }
}
