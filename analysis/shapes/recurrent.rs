//! RNN, GRU and LSTM.

use super::node::{Cx, Out, known};
use crate::dim::DimExpr;

/// Outputs `Y`, `Y_h` and, for LSTM, `Y_c`.
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    let directions = match cx.string("direction", "forward")? {
        "bidirectional" => 2,
        _ => 1,
    };
    let hidden = match cx.maybe_int("hidden_size")? {
        Some(size) => known(size),
        None => cx.dim(2, 2),
    };
    let batch_first = cx.opset >= 14 && cx.int("layout", 0)? != 0;
    let (first, second): (Option<DimExpr>, Option<DimExpr>) = (cx.dim(0, 0), cx.dim(0, 1));
    let directions = known(directions);
    let (y, state) = if batch_first {
        let y = vec![first.clone(), second, directions.clone(), hidden.clone()];
        (y, vec![first, directions, hidden])
    } else {
        let y = vec![first, directions.clone(), second.clone(), hidden.clone()];
        (y, vec![directions, second, hidden])
    };
    let state = Out::tensor(elem, Some(state));
    Some(vec![Out::tensor(elem, Some(y)), state.clone(), state])
}
