//! Products of matrices by heads, written as `MatMul` or `Einsum`.

use super::walk::producer;
use crate::Match;
use lathe_ir::{Node, NodeId, ValueId};

/// An operand of a product: `Transpose(value, perm)` is `[…, rows, columns]`.
#[derive(Clone)]
pub(super) struct Operand {
    /// The value.
    pub value: ValueId,
    /// The order of its axes.
    pub perm: Vec<usize>,
}

impl Operand {
    /// The value that the product takes as it is, and the Transpose before it that belongs to the product.
    pub(super) fn upright(&self, m: &Match) -> Option<(ValueId, Option<NodeId>)> {
        if self.perm.is_sorted() {
            return Some((self.value, None));
        }
        let (id, turn) = producer(m, self.value).filter(|(_, node)| node.is("Transpose"))?;
        let perm = turn.ints("perm")?;
        let undone = self.perm.iter().enumerate().all(|(to, &at)| perm.get(at) == Some(&(to as i64)));
        undone.then_some((turn.input(0)?, Some(id)))
    }
}

/// `[…, rows, inner] · […, inner, columns]`.
pub(super) struct Product {
    /// `[…, rows, inner]`.
    pub left: Operand,
    /// `[…, inner, columns]`.
    pub right: Operand,
    /// The result is `Transpose([…, rows, columns], order)`.
    pub order: Vec<usize>,
}

impl Product {
    /// Reads a node as a product, if it is one of two computed values.
    pub(super) fn of(m: &Match, node: &Node) -> Option<Product> {
        let (a, b) = (node.input(0)?, node.input(1)?);
        let computed = m.graph().constant(a).is_none() && m.graph().constant(b).is_none();
        if !node.is_standard() || !computed || node.inputs().len() != 2 {
            return None;
        }
        match node.op_type.as_str() {
            "MatMul" => {
                let operand = |value: ValueId| Some(Operand { value, perm: (0..m.facts().ndim(value)?).collect() });
                let order = (0..m.facts().ndim(node.output(0)?)?).collect();
                Some(Product { left: operand(a)?, right: operand(b)?, order })
            }
            "Einsum" => {
                let [left, right, order] = einsum(node.string("equation")?)?;
                Some(Product {
                    left: Operand { value: a, perm: left },
                    right: Operand { value: b, perm: right },
                    order,
                })
            }
            _ => None,
        }
    }

    /// The product that makes `value`, with its last axis the columns.
    pub(super) fn making(m: &Match, value: ValueId) -> Option<Product> {
        let product = Product::of(m, producer(m, value)?.1)?;
        let product = if product.order.is_sorted() { product } else { product.reversed()? };
        product.order.is_sorted().then_some(product)
    }

    /// The product with its operands the other way round, as the transpose of what it is.
    pub(super) fn reversed(mut self) -> Option<Product> {
        let swap = |perm: &mut Vec<usize>| -> Option<()> {
            let last = perm.len().checked_sub(1)?;
            perm.swap(last.checked_sub(1)?, last);
            Some(())
        };
        swap(&mut self.left.perm)?;
        swap(&mut self.right.perm)?;
        let ndim = self.order.len();
        for axis in &mut self.order {
            *axis = match ndim - *axis {
                1 => ndim - 2,
                2 => ndim - 1,
                _ => *axis,
            };
        }
        Some(Product { left: self.right, right: self.left, order: self.order })
    }
}

/// The orders of the axes of both operands and of the result of a product over one label that keeps one of either
/// operand and everything else.
fn einsum(equation: &str) -> Option<[Vec<usize>; 3]> {
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let (inputs, output) = equation.split_once("->")?;
    let (left, right) = inputs.split_once(',')?;
    let labels = |text: &str| -> Option<Vec<char>> {
        let all: Vec<char> = text.chars().collect();
        let plain = all.iter().all(char::is_ascii_alphabetic);
        let once = all.iter().enumerate().all(|(at, label)| !all[..at].contains(label));
        (plain && once && all.len() >= 2).then_some(all)
    };
    let (left, right, output) = (labels(left)?, labels(right)?, labels(output)?);
    let one = |mut found: Vec<char>| if found.len() == 1 { found.pop() } else { None };
    let only = |here: &[char], there: &[char]| {
        one(here.iter().filter(|label| !there.contains(label) && output.contains(label)).copied().collect())
    };
    let (rows, columns) = (only(&left, &right)?, only(&right, &left)?);
    let inner = one(left.iter().filter(|label| right.contains(label) && !output.contains(label)).copied().collect())?;
    let lead: Vec<char> = output.iter().filter(|&&label| label != rows && label != columns).copied().collect();
    let order_of = |labels: &[char], last: [char; 2]| -> Option<Vec<usize>> {
        let wanted = lead.iter().copied().chain(last);
        let perm: Vec<usize> = wanted.map(|label| labels.iter().position(|&l| l == label)).collect::<Option<_>>()?;
        (perm.len() == labels.len()).then_some(perm)
    };
    let canonical: Vec<char> = lead.iter().copied().chain([rows, columns]).collect();
    let order = output.iter().map(|label| canonical.iter().position(|l| l == label)).collect::<Option<_>>()?;
    Some([order_of(&left, [rows, inner])?, order_of(&right, [inner, columns])?, order])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_equations() {
        let read = einsum("b h i d, b h j d -> b h i j");
        assert_eq!(read, Some([vec![0, 1, 2, 3], vec![0, 1, 3, 2], vec![0, 1, 2, 3]]));
        let read = einsum("bhij,bjhd->bihd");
        assert_eq!(read, Some([vec![0, 1, 2, 3], vec![0, 2, 1, 3], vec![0, 2, 1, 3]]));
        for other in ["bij,bjk->bk", "ii,ij->ij", "...ij,...jk->...ik", "ij,jk", "bij,bjk,k->bik", "bijc,bjck->bik"] {
            assert_eq!(einsum(other), None, "{other}");
        }
    }
}
