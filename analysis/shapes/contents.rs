//! Arithmetic on the elements of small whole-number tensors.

use super::node::Cx;
use crate::dim::DimExpr;
use lathe_ir::{DataType, element_count};

/// One element, as far as it is known.
pub(super) type Element = Option<DimExpr>;

/// Whole numbers up to this size survive in float32.
const MAX_WHOLE_FLOAT: i64 = 1 << 24;

/// The whole number that a float is; `None` for fractions, −0, and numbers that float32 could not hold.
pub(super) fn whole(value: f64) -> Option<i64> {
    let exact = value.fract() == 0.0 && value.abs() <= MAX_WHOLE_FLOAT as f64;
    (exact && !(value == 0.0 && value.is_sign_negative())).then_some(value as i64)
}

/// The element if a tensor of type `elem` holds it without wrapping or rounding.
pub(super) fn fitting(elem: Option<DataType>, element: Element) -> Element {
    let element = element?;
    let (low, high) = match elem? {
        DataType::Int64 => return Some(element),
        DataType::Int32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
        DataType::Int16 => (i64::from(i16::MIN), i64::from(i16::MAX)),
        DataType::Int8 => (i64::from(i8::MIN), i64::from(i8::MAX)),
        DataType::Uint64 => (0, i64::MAX),
        DataType::Uint32 => (0, i64::from(u32::MAX)),
        DataType::Uint16 => (0, i64::from(u16::MAX)),
        DataType::Uint8 => (0, i64::from(u8::MAX)),
        DataType::Bool => (0, 1),
        DataType::Float | DataType::Double => (-MAX_WHOLE_FLOAT, MAX_WHOLE_FLOAT),
        _ => return None,
    };
    match element.as_known() {
        Some(value) => (low <= value && value <= high).then_some(element),
        // Sizes fit 32 bits; in floats only plain sizes pass, not products of them.
        None => match elem? {
            DataType::Int32 => Some(element),
            DataType::Float | DataType::Double => element.is_linear().then_some(element),
            _ => None,
        },
    }
}

/// The known sizes of an input.
pub(super) fn sizes(cx: &Cx, index: usize) -> Option<Vec<usize>> {
    cx.facts.sizes(cx.node.input(index)?)
}

/// Applies `rule` to the elements of all inputs, broadcast against one another.
pub(super) fn broadcast(cx: &Cx, rule: impl Fn(&[&Element]) -> Element) -> Option<Vec<Element>> {
    let count = cx.node.inputs().len();
    let all: Vec<&[Element]> = (0..count).map(|i| Some(cx.contents(i)?.elements())).collect::<Option<_>>()?;
    let shapes: Vec<Vec<usize>> = (0..count).map(|i| sizes(cx, i)).collect::<Option<_>>()?;
    let ndim = shapes.iter().map(Vec::len).max()?;
    let mut out = vec![1usize; ndim];
    for shape in &shapes {
        for (axis, &size) in shape.iter().rev().enumerate() {
            let at = &mut out[ndim - 1 - axis];
            match (*at, size) {
                (a, b) if a == b => {}
                (1, b) => *at = b,
                (_, 1) => {}
                _ => return None,
            }
        }
    }
    let total = element_count(&out).filter(|&n| n <= super::MAX_CONTENTS)?;
    let none = None;
    let result = (0..total).map(|flat| {
        let position = unflatten(flat, &out);
        let place = |shape: &[usize]| {
            let skip = ndim - shape.len();
            let at = shape.iter().enumerate().map(|(axis, &size)| if size == 1 { 0 } else { position[skip + axis] });
            flatten(&at.collect::<Vec<_>>(), shape)
        };
        let operands: Vec<&Element> =
            all.iter().zip(&shapes).map(|(elements, shape)| elements.get(place(shape)).unwrap_or(&none)).collect();
        rule(&operands)
    });
    Some(result.collect())
}

/// The position along each axis of the element at `flat`.
pub(super) fn unflatten(mut flat: usize, sizes: &[usize]) -> Vec<usize> {
    let mut position = vec![0; sizes.len()];
    for (at, &size) in position.iter_mut().zip(sizes).rev() {
        *at = flat % size.max(1);
        flat /= size.max(1);
    }
    position
}

/// The row-major place of the element at `position`.
pub(super) fn flatten(position: &[usize], sizes: &[usize]) -> usize {
    position.iter().zip(sizes).fold(0, |at, (&p, &size)| at * size + p)
}

fn bit(value: bool) -> Element {
    Some(i64::from(value).into())
}

/// The elements of an arithmetic operator's output of type `elem`.
pub(super) fn arithmetic(cx: &Cx, op: &str, elem: Option<DataType>) -> Option<Vec<Element>> {
    let float = elem?.is_float();
    let fmod = op == "Mod" && cx.int("fmod", 0)? != 0;
    let two = |rule: &dyn Fn(&DimExpr, &DimExpr) -> Element| {
        broadcast(cx, |e| match e {
            [Some(a), Some(b)] => fitting(elem, rule(a, b)),
            _ => None,
        })
    };
    let fold = |rule: &dyn Fn(&DimExpr, &DimExpr) -> Element| {
        broadcast(cx, |e| {
            let mut all = e.iter().map(|e| (*e).clone());
            let first = all.next()??;
            fitting(elem, all.try_fold(first, |a, b| rule(&a, &b?)))
        })
    };
    match op {
        "Add" => two(&|a, b| a.plus(b)),
        "Sub" => two(&|a, b| a.minus(b)),
        "Mul" => broadcast(cx, |e| match e {
            [Some(a), Some(b)] => fitting(elem, a.times(b)),
            [Some(zero), _] | [_, Some(zero)] if !float && zero.as_known() == Some(0) => Some(0.into()),
            _ => None,
        }),
        "Div" if float => two(&|a, b| if b.as_known() == Some(0) { None } else { a.exact_div(b) }),
        "Div" => two(&truncated_div),
        "Mod" if !float => two(&|a, b| modulo(a, b, fmod)),
        "Min" => fold(&|a, b| a.smaller(b)),
        "Max" => fold(&|a, b| a.larger(b)),
        "Sum" => fold(&|a, b| a.plus(b)),
        "Pow" => two(&|a, b| {
            let power = u32::try_from(b.as_known()?).ok().filter(|&p| p <= 8)?;
            (0..power).try_fold(DimExpr::from(1), |total, _| total.times(a))
        }),
        "Neg" => broadcast(cx, |e| fitting(elem, e.first()?.as_ref()?.scaled(-1))),
        "Abs" => broadcast(cx, |e| {
            let a = e.first()?.as_ref()?;
            if a.is_nonnegative() {
                Some(a.clone())
            } else {
                fitting(elem, a.as_known()?.checked_abs().map(DimExpr::from))
            }
        }),
        "Sign" => broadcast(cx, |e| {
            let a = e.first()?.as_ref()?;
            if a.is_positive() { Some(1.into()) } else { a.as_known().map(|v| v.signum().into()) }
        }),
        // Whole numbers stay as they are.
        "Floor" | "Ceil" | "Round" => broadcast(cx, |e| (*e.first()?).clone()),
        "Relu" => broadcast(cx, |e| fitting(elem, e.first()?.as_ref()?.larger(&0.into()))),
        _ => None,
    }
}

/// Division of whole numbers as ONNX has it, towards zero.
fn truncated_div(a: &DimExpr, b: &DimExpr) -> Element {
    match (a.as_known(), b.as_known()) {
        (_, Some(0)) => None,
        (Some(a), Some(b)) => a.checked_div(b).map(DimExpr::from),
        (_, known) => a.exact_div(b).or_else(|| {
            if a.is_nonnegative() && b.is_nonnegative() {
                return a.floor_div(b);
            }
            // What is less than one divisor below 0 is rounded up to 0.
            let least = known.filter(|&b| b > 0)?.checked_neg()?;
            a.range().0.filter(|&low| low > least).and_then(|_| a.larger(&0.into())?.floor_div(b))
        }),
    }
}

/// The remainder, with the sign of the divisor or, for `fmod`, of the dividend.
fn modulo(a: &DimExpr, b: &DimExpr, fmod: bool) -> Element {
    match (a.as_known(), b.as_known()) {
        (_, Some(0)) => None,
        (Some(a), Some(b)) if fmod => a.checked_rem(b).map(DimExpr::from),
        (Some(_), Some(_)) => a.minus(&a.floor_div(b)?.times(b)?),
        _ if a.is_nonnegative() && b.is_nonnegative() => a.minus(&a.floor_div(b)?.times(b)?),
        _ => None,
    }
}

/// The elements of a comparison's or logical operator's output.
pub(super) fn logic(cx: &Cx, op: &str) -> Option<Vec<Element>> {
    let two = |rule: &dyn Fn(&DimExpr, &DimExpr) -> Element| {
        broadcast(cx, |e| match e {
            [Some(a), Some(b)] => rule(a, b),
            _ => None,
        })
    };
    let decide = |yes: bool, no: bool| {
        if yes {
            bit(true)
        } else if no {
            bit(false)
        } else {
            None
        }
    };
    let known = |e: &Element| e.as_ref().and_then(DimExpr::as_known);
    let above = |a: &DimExpr, b: &DimExpr| a.minus(b).is_some_and(|d| d.is_positive());
    match op {
        "Equal" => two(&|a, b| decide(a == b, a.differs(b))),
        "Greater" => two(&|a, b| decide(above(a, b), b.at_least(a))),
        "GreaterOrEqual" => two(&|a, b| decide(a.at_least(b), above(b, a))),
        "Less" => two(&|a, b| decide(above(b, a), a.at_least(b))),
        "LessOrEqual" => two(&|a, b| decide(b.at_least(a), above(a, b))),
        "Not" => broadcast(cx, |e| known(e.first()?).and_then(|v| bit(v == 0))),
        "And" => broadcast(cx, |e| match [known(e.first()?), known(e.get(1)?)] {
            [Some(0), _] | [_, Some(0)] => bit(false),
            [Some(_), Some(_)] => bit(true),
            _ => None,
        }),
        "Or" => broadcast(cx, |e| match [known(e.first()?), known(e.get(1)?)] {
            [Some(a), _] | [_, Some(a)] if a != 0 => bit(true),
            [Some(_), Some(_)] => bit(false),
            _ => None,
        }),
        "Xor" => two(&|a, b| bit((a.as_known()? != 0) != (b.as_known()? != 0))),
        _ => None,
    }
}

/// The elements of `Where`.
pub(super) fn choice(cx: &Cx) -> Option<Vec<Element>> {
    // An unknown branch must not hide the other one, so inputs without contents are not refused outright.
    broadcast(cx, |e| match e {
        [condition, yes, no] => match condition.as_ref().and_then(DimExpr::as_known) {
            Some(0) => (*no).clone(),
            Some(_) => (*yes).clone(),
            None => (*yes).clone().filter(|_| yes == no),
        },
        _ => None,
    })
}

/// The elements of a conversion from type `from` to type `to`.
pub(super) fn cast(elements: &[Element], from: Option<DataType>, to: Option<DataType>) -> Option<Vec<Element>> {
    let (from, to) = (from?, to?);
    let numeric = |t: DataType| t.is_integer() || t.is_float() || t == DataType::Bool;
    if !numeric(from) || !numeric(to) {
        return None;
    }
    let convert = |element: &Element| {
        let element = element.clone()?;
        if to == DataType::Bool {
            return if element.differs(&0.into()) { bit(true) } else { bit(element.as_known()? != 0) };
        }
        fitting(Some(to), Some(element))
    };
    Some(elements.iter().map(convert).collect())
}
