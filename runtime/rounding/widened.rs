//! A copy of a model that computes in float32 what the model computes in half precision.

use lathe_ir::{
    Attribute, AttributeValue, DataType, Graph, Initializer, Model, Node, Origin, ScopeId, Tensor, Type, TypeKind, Use,
    ValueId,
};

/// Attributes that name the type in which something is computed.
const TYPES: &[&str] = &["to", "dtype", "output_datatype", "stash_type", "softmax_precision"];

/// The copy; `None` where the model has no half precision. Inputs keep their types, so that the same samples fit, and
/// weights stay as they are stored: casts widen both. Outputs in half precision are float32.
pub(super) fn widened(model: &Model) -> Option<Model> {
    let mut copy = model.clone();
    let mut changed = false;
    for (graph, _) in copy.graphs_mut() {
        for id in graph.all_nodes() {
            for attribute in &mut graph.node_mut(id).attributes {
                changed |= widen_attribute(attribute);
            }
        }
        for value in values(graph) {
            changed |= cast(graph, value);
        }
        // Casts have taken over the types of outputs by now.
        for value in values(graph) {
            if !comes_from_outside(graph, value) {
                changed |= graph.value_mut(value).ty.as_mut().is_some_and(widen_type);
            }
        }
        graph.sort().ok()?;
    }
    changed.then_some(copy)
}

fn is_half(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Bfloat16)
}

fn values(graph: &Graph) -> Vec<ValueId> {
    let mut all = Vec::new();
    for scope in graph.scopes() {
        all.extend(graph.scope(scope).inputs());
        all.extend(graph.initializers(scope));
        all.extend(graph.nodes(scope).flat_map(|id| graph.node(id).outputs().iter().flatten().copied()));
    }
    all
}

/// Whether a value is stored or fed, and so has the type it has.
fn comes_from_outside(graph: &Graph, value: ValueId) -> bool {
    matches!(graph.value(value).origin(), Origin::Initializer(_) | Origin::Input(ScopeId::MAIN))
}

/// Puts a cast between a value in half precision that comes from outside and all that use it.
fn cast(graph: &mut Graph, value: ValueId) -> bool {
    let entry = graph.value(value);
    let scope = match entry.origin() {
        Origin::Initializer(scope) => scope,
        Origin::Input(ScopeId::MAIN) => ScopeId::MAIN,
        _ => return false,
    };
    let dtype = match entry.initializer() {
        Some(Initializer::Dense(tensor)) => Some(tensor.dtype()),
        Some(Initializer::Sparse(sparse)) => Some(sparse.values.dtype()),
        None => entry.ty.as_ref().and_then(Type::elem),
    };
    let name = entry.name.clone();
    let used = entry.uses().iter().any(|place| !matches!(place, Use::Annotation(_)));
    if !used || !dtype.is_some_and(is_half) {
        return false;
    }
    let cast = Node::new("Cast").with("to", i64::from(DataType::Float.code()));
    let wide = graph.append(scope, cast, &[value], &name);
    let id = graph.producer(wide).expect("it was just made");
    graph.replace_uses(value, wide);
    // The cast itself used the value too.
    graph.set_input(id, 0, Some(value));
    true
}

fn widen_attribute(attribute: &mut Attribute) -> bool {
    let names_a_type = TYPES.contains(&attribute.name.as_str());
    match &mut attribute.value {
        AttributeValue::Int(code) if names_a_type => {
            let half = i32::try_from(*code).ok().and_then(DataType::from_code).is_some_and(is_half);
            if half {
                *code = DataType::Float.code().into();
            }
            half
        }
        AttributeValue::Tensor(tensor) => widen_tensor(tensor),
        AttributeValue::Tensors(tensors) => tensors.iter_mut().map(widen_tensor).filter(|&widened| widened).count() > 0,
        AttributeValue::Type(ty) => widen_type(ty),
        AttributeValue::Types(types) => types.iter_mut().map(widen_type).filter(|&widened| widened).count() > 0,
        _ => false,
    }
}

fn widen_tensor(tensor: &mut Tensor) -> bool {
    if !is_half(tensor.dtype()) {
        return false;
    }
    let numbers = tensor.to_f64s().expect("floats are numbers");
    *tensor = Tensor::from_f64s(DataType::Float, tensor.dims(), &numbers).expect("float32 holds what half floats do");
    true
}

fn widen_type(ty: &mut Type) -> bool {
    match &mut ty.kind {
        TypeKind::Tensor { elem, .. } | TypeKind::SparseTensor { elem, .. } => {
            let half = elem.is_some_and(is_half);
            if half {
                *elem = Some(DataType::Float);
            }
            half
        }
        TypeKind::Sequence(inner) | TypeKind::Optional(inner) | TypeKind::Map { value: inner, .. } => widen_type(inner),
        TypeKind::Opaque { .. } | TypeKind::Unstated => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, LoadOptions, Source, testing::engine};
    use lathe_ir::text;

    #[test]
    fn a_model_without_half_precision_has_no_copy() {
        assert!(widened(&text::parse("g (float[4] x) => (float[4] y) { y = Exp (x) }").unwrap()).is_none());
    }

    #[test]
    fn the_copy_computes_in_float32() {
        // The text form writes halves as their bits: 1, 2, 3, 4 and 0.333.
        let body =
            "g (float16[4] x, bool c) => (float16[4] y, float16[4] w) <float16[4] w = {15360, 16384, 16896, 17408}> {
            a = Mul (x, w) b = Cast <to = 10> (a) k = Constant <value = float16 {13652}> () d = Div (b, k)
            y = If <then_branch = t () => (float16[4] p) { p = Add (d, w) },
                    else_branch = e () => (float16[4] q) { q = Neg (x) }> (c) }";
        let copy = widened(&text::parse(body).unwrap()).unwrap();
        copy.check().unwrap();
        let bytes = copy.to_bytes();
        let mut session = engine().load(Source::Bytes(&bytes), &LoadOptions::default()).unwrap();
        let x = Tensor::from_f64s(DataType::Float16, &[4], &[0.1, 0.2, 0.3, 0.4]).unwrap();
        let c = Tensor::from_bools(&[], &[true]);
        let outputs = session.run(&[("x".to_owned(), x.clone()), ("c".to_owned(), c)]).unwrap();
        let y = outputs[0].1.tensor().unwrap();
        let k = half::f16::from_f32(0.333).to_f32();
        let expected: Vec<f32> =
            (1u8..).zip(x.to_f64s().unwrap()).map(|(w, x)| x as f32 * f32::from(w) / k + f32::from(w)).collect();
        assert_eq!(y.to_f32s().unwrap(), expected);
        assert_eq!(outputs[1].1.tensor().unwrap().to_f32s().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    }
}
