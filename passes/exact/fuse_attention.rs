//! Turns spelled-out attention into one operator.

mod bias;
mod cache;
mod causal_mask;
mod group_query;
mod heads;
mod multi_head;
mod product;
mod projections;
mod rotary;
mod scores;
mod sizes;
mod standard;
mod walk;

use self::{
    heads::{Heads, Role},
    product::Product,
    scores::{Factor, Spelled, Term},
};
use super::norm_parts::import_contrib;
use crate::{
    Error, Info, Kind, Match, Opt, Outcome, Pass, PassContext, Refusal, Replacement, Saving, Target,
    operands::with_axes, pat, rewrite, rule,
};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Model, Node, NodeId, Patch, ValueId};

/// See [`INFO`].
pub struct FuseAttention;

static INFO: Info = Info {
    name: "fuse-attention",
    summary: "replaces the steps of an attention by one node",
    doc: "Scores, scale, masks, softmax and the weighted sum become one operator, and with them the splitting and \
          joining of heads where it is next to them. Masks and biases are added up to one. Under the target ort that is \
          MultiHeadAttention, or Attention where queries, keys and values are products of one value with constant \
          weights that nothing else uses, or GroupQueryAttention where all sizes are known and heads share keys, are \
          rotated by computed angles or have a soft cap, or where that is asked for and keys and values come from a \
          cache; otherwise it is the Attention of opset 23, where batch and \
          lengths are known not to be 0, which ONNX Runtime refuses. A mask that is provably causal turns into the \
          causal form. Declines where the weights have other uses, and where shapes are not known well enough to prove \
          the form.",
    options: &[Opt {
        name: "grouped-caches",
        unit: "true or false",
        default: "false",
        doc: "whether attention with a cache becomes GroupQueryAttention, whose cache can be quantized, under the target ort",
    }],
    // The fused kernels sum scores and weights in blocks, and scale before or after the product.
    kind: Kind::Equivalent { rtol: 1e-4 },
    lowers: &[Saving::Nodes],
    source: Some("Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245"),
};

impl Pass for FuseAttention {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let rules = [
            rule("fuse-attention", pat!(MatMul(weights, values)), fuse),
            rule("fuse-attention", pat!(Einsum(weights, values)), fuse),
        ];
        let outcome = rewrite(model, cx, &rules)?;
        if !outcome.changes.is_empty() {
            import_contrib(model);
        }
        Ok(outcome)
    }
}

fn fuse(m: &Match, g: &mut Patch) -> Result<Replacement, Refusal> {
    let node = m.graph().node(m.root());
    // The most frequent product by far is that of a layer with its weight.
    let sum = Product::of(m, node).ok_or(Refusal::NoMatch)?;
    let (sum, spelled) = match (scores::read(m, &sum.left), sum) {
        (Ok(spelled), sum) => (sum, spelled),
        (Err(Refusal::NoMatch), sum) => {
            let sum = sum.reversed().ok_or(Refusal::NoMatch)?;
            let spelled = scores::read(m, &sum.left)?;
            (sum, spelled)
        }
        (Err(refusal), _) => return Err(refusal),
    };
    let attention = Attention::find(m, spelled, sum)?;
    match m.context().target {
        Target::Ort => multi_head::fuse(m, g, &attention),
        _ => standard::fuse(m, g, &attention).map(Replacement::from),
    }
}

/// What all attention operators need to know.
struct Attention {
    q: Heads,
    k: Heads,
    v: Heads,
    factors: Vec<Factor>,
    terms: Vec<Term>,
    scale: f32,
    softcap: Option<f32>,
    zeroes_nan: bool,
    /// One more score for each query, `[batch, heads, queries, 1]`, that has no value.
    sink: Option<ValueId>,
    /// The nodes of all steps, which go away.
    nodes: Vec<NodeId>,
    elem: DataType,
    /// The sizes of the leading axes: those of a batch and heads, a batch, or none.
    lead: Vec<DimExpr>,
    /// The order in which the product with the values has its axes.
    order: Vec<usize>,
}

impl Attention {
    /// Finds the heads of an attention whose steps are known and that ends in the product `sum`.
    fn find(m: &Match, spelled: Spelled, sum: Product) -> Result<Attention, Refusal> {
        let [lead @ .., queries, _] = spelled.sizes.as_slice() else {
            return Err("the scores have less than two axes".into());
        };
        let mut leads = vec![lead.to_vec()];
        if lead.len() == 1 {
            // Batch and heads may have become one axis for the product.
            leads.splice(..0, heads::split_lead(m, &spelled.product.left));
        }
        let mut heads = Err(Refusal::NoMatch);
        for lead in leads {
            heads = Attention::heads(m, &spelled, &sum, queries, &lead).map(|heads| (heads, lead));
            if heads.is_ok() {
                break;
            }
        }
        let ([q, k, v], lead) = heads?;
        let scale = (spelled.scale * q.scale * k.scale) as f32;
        m.require(scale.is_finite() && scale != 0.0, "the scale is 0 or not finite")?;
        let elem = m.facts().elem(v.value).ok_or("the element type is unknown")?;
        let alike = [&q, &k].iter().all(|heads| m.facts().elem(heads.value) == Some(elem));
        m.require(alike, "queries, keys and values have different types")?;
        Ok(Attention {
            q,
            k,
            v,
            factors: spelled.factors,
            terms: spelled.terms,
            scale,
            softcap: spelled.softcap.map(|cap| cap as f32),
            zeroes_nan: spelled.zeroes_nan,
            sink: spelled.sink,
            nodes: spelled.nodes,
            elem,
            lead,
            order: sum.order,
        })
    }

    /// Queries, keys and values whose leading sizes are `lead`.
    fn heads(
        m: &Match,
        spelled: &Spelled,
        sum: &Product,
        queries: &DimExpr,
        lead: &[DimExpr],
    ) -> Result<[Heads; 3], Refusal> {
        let q = Heads::read(m, &spelled.product.left, Role::Queries, lead)?;
        let k = Heads::read(m, &spelled.product.right, Role::Keys, lead)?;
        let v = Heads::read(m, &sum.right, Role::Values, lead)?;
        m.require(q.lead == lead && q.length == *queries, "the queries are not provably as many as the scores")?;
        m.require(k.lead == v.lead && k.lead.len() == lead.len(), "keys and values have different heads")?;
        let front = lead.len().saturating_sub(1).max(lead.len().min(1));
        m.require(k.lead[..front] == lead[..front], "the keys are broadcast along the batch")?;
        // Where nothing broadcasts the scores along the keys, the product with the values takes as many.
        let same_length = k.length == v.length || k.length == spelled.keys;
        m.require(same_length && q.size == k.size, "queries, keys and values do not fit")?;
        m.only_if(q.count()? % k.count()? == 0)?;
        Ok([q, k, v])
    }

    fn count(&self) -> Result<i64, Refusal> {
        self.q.count()
    }

    /// How many heads of queries share keys and values.
    fn groups(&self) -> Result<i64, Refusal> {
        Ok(self.q.count()? / self.k.count()?)
    }

    /// The queries times what the scores are multiplied by, in their place.
    fn split_queries(&self, m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
        let mut queries = self.q.split(g);
        for factor in &self.factors {
            let lead = &factor.at[..factor.at.len() - 2];
            m.require(lead == self.lead.as_slice(), "the axes of the scores are regrouped before they are multiplied")?;
            let op = if factor.divides { "Div" } else { "Mul" };
            queries = g.node(Node::new(op), &[queries, factor.value]);
        }
        Ok(queries)
    }

    /// The queries with their heads side by side, `[batch, length, count · size]`.
    fn joined_queries(&self, m: &Match, g: &mut Patch) -> Result<ValueId, Refusal> {
        if self.factors.is_empty() {
            return self.q.joined(m, g);
        }
        let queries = self.split_queries(m, g)?;
        let perm: Vec<usize> = (0..self.lead.len() + 2).collect();
        self.q.join(m, g, queries, &perm)
    }

    /// The value `[batch, length, count · size]` that an operator made, as the product with the values has it.
    fn restored(&self, m: &Match, g: &mut Patch, joined: ValueId) -> Result<ValueId, Refusal> {
        let joined = if self.zeroes_nan && bias::may_be_infinite(m, &self.terms, self.elem) {
            let missing = g.node(Node::new("IsNaN"), &[joined]);
            let zero = g.constant("zero", walk::number(self.elem, 0.0)?);
            g.node(Node::new("Where"), &[missing, zero, joined])
        } else {
            joined
        };
        let near = [self.q.value, self.k.value];
        let to = m.shape("output")?;
        // The sizes of the product before its axes are ordered otherwise.
        let mut plain = to.to_vec();
        for (at, &axis) in self.order.iter().enumerate() {
            plain[axis] = to[at].clone();
        }
        let lead = &plain[..plain.len().saturating_sub(2)];
        let grouped = lead != self.lead.as_slice();
        let canonical: Vec<usize> = (0..self.lead.len() + 2).collect();
        let rows = heads::rows(&canonical);
        let order = if grouped { &canonical } else { &self.order };
        let order: Vec<usize> = order.iter().map(|&axis| rows[axis]).collect();
        let heads = match self.lead.as_slice() {
            [] => with_axes(m, g, Node::new("Squeeze"), 13, joined, &[0]),
            [_] => joined,
            [_, _] => g.reshape(joined, &[0, 0, self.count()?, self.v.size]),
            [front @ .., count] => {
                let tail = [self.q.length.clone(), count.clone(), self.v.size.into()];
                let to: Vec<DimExpr> = front.iter().cloned().chain(tail).collect();
                sizes::reshape(m, g, joined, &to, &near)?
            }
        };
        let heads = heads::transposed(g, heads, &order);
        if grouped {
            let regrouped = sizes::reshape(m, g, heads, &plain, &near)?;
            return Ok(heads::transposed(g, regrouped, &self.order));
        }
        Ok(heads)
    }
}

#[cfg(test)]
mod tests;
