//! The cosines and sines of a rotary embedding.

use crate::{Match, Refusal};
use lathe_analysis::DimExpr;
use lathe_ir::{DataType, Node, Patch, Tensor, ValueId};

/// Cosines or sines whose last axis is twice the same half.
pub(super) struct Waves {
    op: &'static str,
    /// The angles of one half, `[…, positions, size / 2]`.
    angles: ValueId,
    pub batch: DimExpr,
    pub positions: DimExpr,
    /// What the waves are multiplied by.
    factor: f64,
}

impl Waves {
    /// Reads how `value`, `[batch, 1, positions, size]`, was computed.
    pub(super) fn find(m: &Match, value: ValueId, op: &'static str, size: i64) -> Result<Waves, Refusal> {
        let shape = m.facts().shape(value).ok_or("the shape of the cosines or sines is unknown")?;
        let one = DimExpr::from(1);
        let (batch, positions) = match shape {
            [batch, heads, positions, _] if *heads == one => (batch.clone(), positions.clone()),
            [heads, positions, _] if *heads == one => (one, positions.clone()),
            [positions, _] => (one, positions.clone()),
            _ => return Err("the cosines or sines are not the same for all heads".into()),
        };
        let unknown = || Refusal::from("the cosines or sines are not those of angles that are computed here");
        let (mut at, mut factor) = (value, 1.0);
        let doubled = loop {
            let node = m.graph().producer(at).map(|id| m.graph().node(id)).ok_or_else(unknown)?;
            m.require(last(m, at) == Some(size), "the cosines or sines have another size than the heads")?;
            let floats = [DataType::Float, DataType::Float16, DataType::Double];
            m.require(
                m.facts().elem(at).is_some_and(|elem| floats.contains(&elem)),
                "the cosines or sines are rounded",
            )?;
            let input = node.input(0).ok_or_else(unknown)?;
            at = match node.op_type.as_str() {
                _ if !node.is_standard() || node.scope() != m.scope() => return Err(unknown()),
                name if name == op => break input,
                "Unsqueeze" | "Squeeze" | "Reshape" | "Identity" | "Cast" => input,
                "Mul" => {
                    let other = node.input(1).ok_or_else(unknown)?;
                    let number = |v| m.graph().constant(v).and_then(Tensor::scalar_f64);
                    let (inner, number) = match (number(input), number(other)) {
                        (None, Some(number)) => (input, number),
                        (Some(number), None) => (other, number),
                        _ => return Err(unknown()),
                    };
                    factor *= number;
                    inner
                }
                _ => return Err(unknown()),
            };
        };
        let joined = layout_source(m, doubled, size);
        let node = m.graph().producer(joined).map(|id| m.graph().node(id)).filter(|node| node.is("Concat"));
        let node = node.ok_or("the angles of the two halves are not joined from one value")?;
        let [Some(first), Some(second)] = *node.inputs() else {
            return Err("the angles of the two halves are not joined from one value".into());
        };
        let ndim = m.facts().ndim(joined).ok_or("the number of axes of the angles is unknown")?;
        let axis = m.axis(node.int("axis").unwrap_or(0), ndim)?;
        let twice = first == second && axis + 1 == ndim && last(m, first) == Some(size / 2) && size % 2 == 0;
        m.require(twice, "the angles of the two halves are not joined from one value")?;
        // Where nothing but these axes is longer than one, a Reshape gives them back.
        let shape = m.facts().shape(first).ok_or(Refusal::NoMatch)?;
        let long = |shape: &[DimExpr]| shape.iter().filter(|d| **d != DimExpr::from(1)).cloned().collect::<Vec<_>>();
        let wanted = [batch.clone(), positions.clone(), DimExpr::from(size / 2)];
        m.require(long(shape) == long(&wanted), "the angles have other axes than batch, positions and size")?;
        Ok(Waves { op, angles: first, batch, positions, factor })
    }

    /// The waves of one half in the type of the heads: `[batch, positions, size / 2]`, or `[batch · positions, size / 2]`
    /// unless `standard`.
    pub(super) fn halved(&self, m: &Match, g: &mut Patch, elem: DataType, standard: bool) -> Result<ValueId, Refusal> {
        let from = m.facts().elem(self.angles).ok_or("the element type of the angles is unknown")?;
        let shape = m.facts().shape(self.angles).ok_or(Refusal::NoMatch)?;
        let half = shape.last().and_then(DimExpr::as_known).ok_or(Refusal::NoMatch)?;
        let mut angles = self.angles;
        if !standard {
            if shape.len() != 2 {
                angles = g.reshape(angles, &[-1, half]);
            }
        } else if shape.len() != 3 || shape[..2] != [self.batch.clone(), self.positions.clone()] {
            let sizes = match (self.batch.as_known(), self.positions.as_known()) {
                (Some(batch), _) => [batch, -1, half],
                (None, Some(positions)) => [-1, positions, half],
                (None, None) => return Err("neither the batch nor the positions of the angles are known".into()),
            };
            angles = g.reshape(angles, &sizes);
        }
        let mut waves = g.node(Node::new(self.op), &[angles]);
        if self.factor != 1.0 {
            let factor = Tensor::from_f64s(from, &[], &[self.factor]).ok_or(Refusal::NoMatch)?;
            let factor = g.constant("factor", factor);
            waves = g.node(Node::new("Mul"), &[waves, factor]);
        }
        if from != elem {
            waves = g.node(Node::new("Cast").with("to", elem), &[waves]);
        }
        Ok(waves)
    }
}

fn last(m: &Match, value: ValueId) -> Option<i64> {
    m.facts().shape(value)?.last()?.as_known()
}

/// What `value` is a view of with the same last axis.
fn layout_source(m: &Match, value: ValueId, size: i64) -> ValueId {
    let mut at = value;
    while let Some(node) = m.graph().producer(at).map(|id| m.graph().node(id)) {
        let layout = ["Unsqueeze", "Squeeze", "Reshape", "Identity"].iter().any(|op| node.is(op));
        let Some(input) = node.input(0).filter(|&v| layout && last(m, v) == Some(size)) else { break };
        at = input;
    }
    at
}
