//! Multiplies out two constant matrices in a row.

use super::linear::{RTOL, require_no_growth, require_private};
use super::rounding::{Grid, Sum, is_weight_type, sums, weight};
use crate::{Error, Info, Kind, Match, Outcome, Pass, PassContext, Refusal, Rule, Saving, pat, rewrite, rule};
use lathe_ir::{Model, Node, Tensor, ValueId};
use std::sync::LazyLock;

/// See [`INFO`].
pub struct FoldMatmulChain;

static INFO: Info = Info {
    name: "fold-matmul-chain",
    summary: "multiplies out two constant matrices in a row where their product is no larger than both",
    doc: "(x·A)·B is x·(A·B): one product instead of two, and fewer operations and bytes as long as the inner width \
          does not make the factors smaller than their product, as a low-rank pair is meant to. A constant sum between \
          the two moves behind them. Computed in float64 and rounded once. Declines where the product would be larger \
          than the two matrices, where other nodes use one of them, on products too large to compute here, \
          and where the numbers cancel or would lose digits.",
    options: &[],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Nodes, Saving::Parameters, Saving::Flops],
    source: None,
};

/// Multiply-adds of a product that is still computed: some ten seconds.
const MAX_PRODUCTS: usize = if cfg!(test) { 1 << 14 } else { 1 << 34 };

/// How many times smaller than the matrices let expect a row of their product may be.
const MOST_CANCELLED: f64 = 256.0;

impl Pass for FoldMatmulChain {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        rewrite(model, cx, &RULES)
    }
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

fn rules() -> Vec<Rule> {
    vec![
        rule("multiply-out", pat!(MatMul(MatMul(x, a), b)), |m, g| {
            let product = product(m)?;
            let weight = g.constant("weight", product);
            let made = g.node(Node::new("MatMul"), &[m.value("x"), weight]);
            require_no_growth(m, g)?;
            Ok(made)
        }),
        rule("multiply-out-around-sum", pat!(MatMul(Add(MatMul(x, a), c), b)), |m, g| {
            let c = m.graph().constant(m.value("c")).ok_or(Refusal::NoMatch)?;
            let product = product(m)?;
            let b = matrix(m, "b")?;
            let width = b.dims()[0];
            m.require(c.dims().iter().rev().skip(1).all(|&dim| dim == 1), "the constant is not one number a column")?;
            m.require(c.len() == width || c.len() == 1, "the constant is not one number a column")?;
            let ndim = m.facts().ndim(m.value("x"));
            let narrow = c.dims().len() <= 1 || ndim.is_some_and(|n| c.dims().len() <= n);
            m.require(narrow, "the constant may have more axes than the value")?;
            let c = c.to_f64s().ok_or(Refusal::NoMatch)?;
            let numbers = b.to_f64s().ok_or(Refusal::NoMatch)?;
            let columns = numbers.len() / width;
            // Of every column the sum over the constant, and the size of its terms and of its weights.
            let mut all = vec![(0.0, 0.0, 0.0); columns];
            for (index, &x) in numbers.iter().enumerate() {
                let (term, (total, terms, weights)) = (x * c[index / columns % c.len()], &mut all[index % columns]);
                (*total, *terms, *weights) = (*total + term, *terms + term * term, *weights + x * x);
            }
            let all: Vec<Sum> = all.iter().map(|(total, t, w)| Sum::from_parts(*total, t.sqrt(), w.sqrt())).collect();
            let sum = g.constant("bias", sums(b.dtype(), &[columns], &all)?);
            let weight = g.constant("weight", product);
            let made = g.node(Node::new("MatMul"), &[m.value("x"), weight]);
            let made: ValueId = g.node(Node::new("Add"), &[made, sum]);
            require_no_growth(m, g)?;
            Ok(made)
        }),
    ]
}

/// The constant matrix behind a name.
fn matrix<'a>(m: &Match<'a>, name: &str) -> Result<&'a Tensor, Refusal> {
    let tensor = m.graph().constant(m.value(name)).ok_or(Refusal::NoMatch)?;
    m.only_if(is_weight_type(tensor.dtype()) && tensor.dims().len() == 2 && !tensor.is_empty())?;
    Ok(tensor)
}

/// `a·b`, if it is worth it.
fn product(m: &Match) -> Result<Tensor, Refusal> {
    let (a, b) = (matrix(m, "a")?, matrix(m, "b")?);
    m.only_if(m.graph().constant(m.value("x")).is_none())?;
    let (&[rows, inner], &[_, columns]) = (a.dims(), b.dims()) else { return Err(Refusal::NoMatch) };
    m.only_if(b.dims()[0] == inner && a.dtype() == b.dtype())?;
    let size = rows.saturating_mul(columns);
    m.require(size <= a.len() + b.len(), "the product is larger than the two matrices")?;
    m.require(size.saturating_mul(inner) <= MAX_PRODUCTS, "the product takes too long to compute")?;
    require_private(m)?;
    let (x, y) = (a.to_f64s().ok_or(Refusal::NoMatch)?, b.to_f64s().ok_or(Refusal::NoMatch)?);
    let numbers = multiply(&x, &y, rows, inner);
    a.release();
    b.release();
    require_no_cancellation(&x, &y, &numbers, rows)?;
    let place = |at: usize| (at / columns, at % columns);
    weight(a.dtype(), &[rows, columns], &numbers, &Grid { counts: (rows, columns), inner: 1, place })
}

/// Refuses where a row of the product is so much smaller than what it is added up from that the original rounds it away.
fn require_no_cancellation(a: &[f64], b: &[f64], product: &[f64], rows: usize) -> Result<(), Refusal> {
    let size = |numbers: &[f64]| numbers.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (inner, columns, all) = (a.len() / rows, product.len() / rows, size(b));
    let lost = |(row, sums): (&[f64], &[f64])| size(row) * all > MOST_CANCELLED * (inner as f64).sqrt() * size(sums);
    match a.chunks(inner).zip(product.chunks(columns)).any(lost) {
        true => Err("the product is much smaller than what it is added up from".into()),
        false => Ok(()),
    }
}

/// `a·b` for `a: [rows, inner]` and `b: [inner, n]`, row-major.
fn multiply(a: &[f64], b: &[f64], rows: usize, inner: usize) -> Vec<f64> {
    let columns = b.len() / inner.max(1);
    let mut sums = vec![0.0; rows * columns];
    for (row, sums) in a.chunks(inner).zip(sums.chunks_mut(columns)) {
        for (&factor, numbers) in row.iter().zip(b.chunks(columns)) {
            sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += factor * x);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check, check_refuses, check_untouched};
    use insta::assert_snapshot;

    const OPSET: &str = "<ir_version: 8, opset_import: [\"\" : 13]>";
    const WEIGHTS: &str =
        "float[2,3] a = {1, 2, 3, 4, 5, 6}, float[3,2] b = {1, -2, 3, -4, 5, -6}, float[1,3] c = {7, 8, 9}";

    #[test]
    fn multiplies_out() {
        let graph = format!(
            "{OPSET} g (float[B,N,2] x) => (float[B,N,2] y) <{WEIGHTS}> {{ t = MatMul (x, a) y = MatMul (t, b) }}"
        );
        assert_snapshot!(check(&FoldMatmulChain, &graph), @"
        g (float[B,N,2] x) => (float[B,N,2] y) <
            float[2,3] a = {1, 2, 3, 4, 5, 6},
            float[3,2] b = {1, -2, 3, -4, 5, -6},
            float[1,3] c = {7, 8, 9},
            float[2,2] y_weight = {22, -28, 49, -64}
        > {
            y = MatMul (x, y_weight)  # float[B,N,2]
        }
        ");
    }

    #[test]
    fn moves_a_sum_behind_both() {
        let graph = format!(
            "{OPSET} g (float[B,N,2] x) => (float[B,N,2] y) <{WEIGHTS}> {{ t = MatMul (x, a) s = Add (c, t) y = MatMul (s, b) }}"
        );
        assert_snapshot!(check(&FoldMatmulChain, &graph), @"
        g (float[B,N,2] x) => (float[B,N,2] y) <
            float[2,3] a = {1, 2, 3, 4, 5, 6},
            float[3,2] b = {1, -2, 3, -4, 5, -6},
            float[1,3] c = {7, 8, 9},
            float[2] y_bias = {76, -100},
            float[2,2] y_weight = {22, -28, 49, -64}
        > {
            y_1 = MatMul (x, y_weight)
            y = Add (y_1, y_bias)  # float[B,N,2]
        }
        ");
    }

    #[test]
    fn works_inside_a_subgraph() {
        let graph = format!(
            "{OPSET} g (float[N,2] x, bool e) => (float[N,2] y) <{WEIGHTS}> {{
            y = If (e) <then_branch = p () => (float[N,2] u) {{ t = MatMul (x, a) u = MatMul (t, b) }},
                        else_branch = q () => (float[N,2] v) {{ v = Identity (x) }}> }}"
        );
        check(&FoldMatmulChain, &graph);
    }

    #[test]
    fn keeps_products_that_cancel_or_lose_digits() {
        let body = "{ t = MatMul (x, a) y = MatMul (t, b) }";
        let of = |elem: &str, weights: &str, body: &str| {
            format!("{OPSET} g ({elem}[N,2] x) => ({elem}[N,2] y) <{weights}> {body}")
        };
        let cancels = "float[2,2] a = {1, 1, 1, 1}, float[2,2] b = {1e8, 3e8, -1e8, -3e8}";
        check_refuses(&FoldMatmulChain, &of("float", cancels, body), "much smaller than what it is added up from");
        let small = "float16[2,2] a = {0.001, 0.002, 0.003, 0.004}, float16[2,2] b = {0.001, 0.002, 0.003, 0.004}";
        check_refuses(&FoldMatmulChain, &of("float16", small, body), "too small for its type");
        let sum = "float[2,2] a = {1, 2, 3, 4}, float[2,2] b = {1, 1, -1, -1}, float[2] c = {1e10, 1e10}";
        let body = "{ t = MatMul (x, a) s = Add (t, c) y = MatMul (s, b) }";
        check_refuses(&FoldMatmulChain, &of("float", sum, body), "the constants cancel");
    }

    #[test]
    fn keeps_low_rank_pairs_and_graph_outputs() {
        let body = "{ t = MatMul (x, a) y = MatMul (t, b) }";
        let pair = format!(
            "{OPSET} g (float[N,3] x) => (float[N,3] y) <float[3,1] a = {{1, 2, 3}}, float[1,3] b = {{1, 2, 3}}> {body}"
        );
        check_refuses(&FoldMatmulChain, &pair, "the product is larger");
        let output = format!("{OPSET} g (float[N,2] x) => (float[N,2] y, float[N,3] t) <{WEIGHTS}> {body}");
        check_refuses(&FoldMatmulChain, &output, "an inner value has other uses");
    }

    #[test]
    fn keeps_sums_that_are_not_one_number_a_column() {
        let of = |shape: &str, c: &str, result: &str| {
            format!(
                "{OPSET} g (float[{shape}] x) => (float[{result}] y) <{WEIGHTS}, {c}> {{
                t = MatMul (x, a) s = Add (t, k) y = MatMul (s, b) }}"
            )
        };
        let rows = of("2,2", "float[2,1] k = {1, 2}", "2,2");
        check_refuses(&FoldMatmulChain, &rows, "the constant is not one number a column");
        let column = of("3,2", "float[3,1] k = {1, 2, 3}", "3,2");
        check_refuses(&FoldMatmulChain, &column, "the constant is not one number a column");
        let wide = of("N,1", "float[2] k = {1, 2}", "N,2");
        let wide = wide
            .replace("float[2,3] a = {1, 2, 3, 4, 5, 6}", "float[1,1] a = {1}")
            .replace("float[3,2] b = {1, -2, 3, -4, 5, -6}", "float[2,2] b = {1, 2, 3, 4}");
        check_untouched(&FoldMatmulChain, &wide);
        let more = of("N,2", "float[1,1,1] k = {1}", "1,N,2");
        check_refuses(&FoldMatmulChain, &more, "the constant may have more axes than the value");
    }

    #[test]
    fn keeps_products_that_take_too_long() {
        let square = vec!["1"; 900].join(", ");
        let graph = format!("{OPSET} g (float[N,30] x) => (float[N,30] y) <float[30,30] a = {{{square}}}, float[30,30] b = {{{square}}}> {{
            t = MatMul (x, a) y = MatMul (t, b) }}");
        check_refuses(&FoldMatmulChain, &graph, "the product takes too long to compute");
    }
}
