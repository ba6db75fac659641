//! Carries it out: types of inputs and outputs, scales, and what the operator is told.

use super::{CacheType, Caches, Scales, find::PAST};
use lathe_ir::{Dim, Model, ScopeId, Type, TypeKind, ValueId};

/// The metadata of a model whose caches are quantized: a line `NAME: BEFORE -> AFTER` for each input and output that changed.
const METADATA: &str = "onnx_lathe.kv_cache";

/// Where `GroupQueryAttention` reads the scales of keys and values.
const SCALES: [usize; 2] = [12, 13];

/// An input or output that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedPort {
    /// Its name.
    pub name: String,
    /// Its type in the original: `float[batch, 3, past, 64]`.
    pub before: String,
    /// Its type now.
    pub after: String,
}

/// A model with quantized caches.
#[derive(Debug)]
pub struct Quantized {
    /// The model.
    pub model: Model,
    /// The inputs, then the outputs that changed.
    pub ports: Vec<ChangedPort>,
    pub(super) wanted: CacheType,
    pub(super) caches: Caches,
    /// The types of pasts and presents before, and the scale of each.
    pub(super) before: Vec<Before>,
}

/// A cache before and the scale that it has now.
#[derive(Debug, Clone)]
pub(super) struct Before {
    pub value: ValueId,
    pub ty: Option<Type>,
    pub scale: ValueId,
}

impl Quantized {
    /// The outputs that changed.
    pub fn outputs(&self) -> impl Iterator<Item = &ChangedPort> {
        self.ports[self.ports.len() / 2..].iter()
    }
}

/// Keeps these caches in other numbers.
pub fn quantize(model: &Model, caches: &Caches, wanted: CacheType, scales: &Scales) -> Quantized {
    let mut model = model.clone();
    let (mut before, mut inputs, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    for (index, cache) in caches.nodes.iter().enumerate() {
        for part in 0..2 {
            let name = ["k_scale", "v_scale"][part];
            let tensor = scales.tensor(index, cache, part);
            let scale = model.graph.add_initializer(ScopeId::MAIN, &format!("{name}_{index}"), tensor);
            model.graph.set_input(cache.node, SCALES[part], Some(scale));
            debug_assert!(model.graph.node(cache.node).input(PAST[part]) == Some(cache.past[part]));
            for (value, ports) in [(cache.past[part], &mut inputs), (cache.present[part], &mut outputs)] {
                let ty = model.graph.value(value).ty.clone();
                let now = ty.as_ref().map(|ty| packed(ty, wanted));
                ports.push(ChangedPort {
                    name: model.graph.value(value).name.clone(),
                    before: ty.as_ref().map_or_else(|| "of no stated type".to_owned(), describe),
                    after: now.as_ref().map_or_else(|| wanted.elem().to_string(), describe),
                });
                model.graph.value_mut(value).ty = now;
                before.push(Before { value, ty, scale });
            }
        }
        let node = model.graph.node_mut(cache.node);
        let by = if wanted.by_channel { "PER_CHANNEL" } else { "PER_TENSOR" };
        node.set_attribute("k_quant_type", by);
        node.set_attribute("v_quant_type", by);
        node.set_attribute("kv_cache_bit_width", i64::from(wanted.bits));
    }
    let ports: Vec<ChangedPort> = inputs.into_iter().chain(outputs).collect();
    let lines: Vec<String> = ports.iter().map(|p| format!("{}: {} -> {}", p.name, p.before, p.after)).collect();
    model.metadata.retain(|(key, _)| key != METADATA);
    model.metadata.push((METADATA.to_owned(), lines.join("\n")));
    Quantized { model, ports, wanted, caches: caches.clone(), before }
}

/// The type of a cache in other numbers.
fn packed(ty: &Type, wanted: CacheType) -> Type {
    let mut ty = ty.clone();
    if let TypeKind::Tensor { elem, shape } = &mut ty.kind {
        *elem = Some(wanted.elem());
        if let Some(Dim::Known(size)) = shape.as_mut().and_then(|shape| shape.dims.last_mut()) {
            *size /= wanted.packed();
        }
    }
    ty
}

/// `float[batch,3,past,64]`.
fn describe(ty: &Type) -> String {
    let elem = ty.elem().map_or_else(|| "unknown".to_owned(), |elem| elem.to_string());
    let dims = ty.shape().map(|shape| shape.dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
    dims.map_or_else(|| elem.clone(), |dims| format!("{elem}[{dims}]"))
}
