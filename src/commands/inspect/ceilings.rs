//! What lossy methods could save at the very most. None of them is bounded by error here: a ceiling says where to look.

use super::anatomy::{Anatomy, Weight};
use lathe_analysis::{Unit, UnitId, UnitKind};
use lathe_ir::ValueId;

/// The most that one method could save.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub(super) struct Ceiling {
    /// The method.
    pub method: &'static str,
    /// Where it could act.
    pub sites: String,
    /// The share of the bytes of all constants that would go; `null` where it saves none.
    pub weight_bytes_share: Option<f64>,
    /// The share of the FLOPs that would go; `null` where it saves none.
    pub flops_share: Option<f64>,
    /// What the figure supposes.
    pub supposing: &'static str,
}

/// Says what a method could save; `None` where it has nothing to act on.
type Provider = fn(&Anatomy) -> Option<Ceiling>;

/// One entry for each method.
const PROVIDERS: &[Provider] =
    &[int8_weights, int4_weights, low_rank, drop_units, replace_convolutions, reduce_tokens, sampler];

/// The ceilings of all methods that could act on a model.
pub(super) fn ceilings(anatomy: &Anatomy) -> Vec<Ceiling> {
    PROVIDERS.iter().filter_map(|provider| provider(anatomy)).collect()
}

/// Weights below this many elements are not worth the nodes around them.
const SMALLEST_WEIGHT: usize = 1024;
const LINEAR: &[&str] = &["MatMul", "Gemm"];

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn quantized(
    anatomy: &Anatomy,
    operators: &[&str],
    bits: f64,
    method: &'static str,
    supposing: &'static str,
) -> Option<Ceiling> {
    let weights: Vec<Weight> =
        anatomy.weights(operators).into_iter().filter(|w| w.tensor.len() >= SMALLEST_WEIGHT).collect();
    let saved = |w: &Weight| (w.tensor.byte_len() as f64 - w.tensor.len() as f64 * bits / 8.0).max(0.0);
    let saved: f64 = weights.iter().map(saved).sum();
    (saved > 0.0).then(|| Ceiling {
        method,
        sites: counted(weights.len(), "weight"),
        weight_bytes_share: Some(anatomy.share_of_bytes(saved)),
        flops_share: None,
        supposing,
    })
}

fn int8_weights(anatomy: &Anatomy) -> Option<Ceiling> {
    let operators = ["MatMul", "Gemm", "Gather", "Conv", "ConvTranspose"];
    quantized(anatomy, &operators, 8.0, "int8 weights", "8 bits a weight, scales not counted")
}

fn int4_weights(anatomy: &Anatomy) -> Option<Ceiling> {
    let operators = ["MatMul", "Gemm", "Gather"];
    quantized(anatomy, &operators, 4.5, "int4 weights", "blocks of 32 with 16 bits of scale")
}

fn low_rank(anatomy: &Anatomy) -> Option<Ceiling> {
    let weights = anatomy.weights(LINEAR);
    let large = |w: &&Weight| w.tensor.dims().len() == 2 && w.tensor.dims().iter().all(|&size| size >= 32);
    let weights: Vec<&Weight> = weights.iter().filter(large).collect();
    let bytes: f64 = weights.iter().map(|w| w.tensor.byte_len() as f64).sum();
    (!weights.is_empty()).then(|| Ceiling {
        method: "low-rank layers",
        sites: counted(weights.len(), "matrix").replace("matrixs", "matrices"),
        weight_bytes_share: Some(anatomy.share_of_bytes(bytes)),
        flops_share: Some(anatomy.share_of_flops(weights.iter().map(|w| w.flops).sum())),
        supposing: "all linear layers of at least 32 × 32; rank r keeps r(m + n) / mn of an m × n matrix",
    })
}

fn drop_units(anatomy: &Anatomy) -> Option<Ceiling> {
    let free = |unit: &Unit| unit.barrier.is_none() && unit.kind != UnitKind::Nested;
    let ids: Vec<UnitId> = anatomy.units.iter().filter(|(_, unit)| free(unit)).map(|(id, _)| id).collect();
    let flops = ids.iter().map(|id| anatomy.of_unit[id.index()].flops).sum();
    let bytes: u64 = ids.iter().map(|id| anatomy.of_unit[id.index()].weight_bytes).sum();
    (!ids.is_empty()).then(|| Ceiling {
        method: "dropped units",
        sites: counted(ids.len(), "residual unit"),
        weight_bytes_share: Some(anatomy.share_of_bytes(bytes as f64)),
        flops_share: Some(anatomy.share_of_flops(flops)),
        supposing: "every unit whose skip is not projected; usually a tenth to a quarter of them can go",
    })
}

fn replace_convolutions(anatomy: &Anatomy) -> Option<Ceiling> {
    let weights = anatomy.weights(&["Conv"]);
    let spatial = |w: &&Weight| w.tensor.dims().len() > 2 && w.tensor.dims()[2..].iter().any(|&k| k > 1);
    let spatial: Vec<&Weight> = weights.iter().filter(spatial).collect();
    let bytes: f64 = spatial.iter().map(|w| w.tensor.byte_len() as f64).sum();
    (!spatial.is_empty()).then(|| Ceiling {
        method: "spatial substitution",
        sites: counted(spatial.len(), "kernel"),
        weight_bytes_share: Some(anatomy.share_of_bytes(bytes)),
        flops_share: Some(anatomy.share_of_flops(spatial.iter().map(|w| w.flops).sum())),
        supposing: "kernels larger than 1 × 1 give way to shifts or pooling",
    })
}

fn reduce_tokens(anatomy: &Anatomy) -> Option<Ceiling> {
    let units = &anatomy.units;
    let tokens = |v: ValueId| anatomy.facts.ndim(v) == Some(3);
    let of_tokens = |chain: &&Vec<_>| {
        chain.iter().any(|&id| units.get(id).kind == UnitKind::Attention && tokens(units.get(id).stream_in))
    };
    let chains: Vec<_> = units.chains().iter().filter(of_tokens).collect();
    let ids: Vec<_> = chains.into_iter().flatten().filter(|&&id| units.get(id).parent.is_none()).collect();
    (!ids.is_empty()).then(|| Ceiling {
        method: "fewer tokens",
        sites: counted(ids.len(), "unit"),
        weight_bytes_share: None,
        flops_share: Some(anatomy.share_of_flops(ids.iter().map(|id| anatomy.of_unit[id.index()].flops).sum())),
        supposing: "all work that grows with the number of tokens; attention's part grows with its square",
    })
}

/// A denoiser: an output of the shape of an input, with a time beside it.
fn sampler(anatomy: &Anatomy) -> Option<Ceiling> {
    let (graph, facts) = (anatomy.graph(), anatomy.facts);
    let name = |v: ValueId| graph.value(v).name.as_str();
    let outputs = graph.main().outputs();
    let inputs: Vec<ValueId> =
        graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_none()).collect();
    let spatial = |v: ValueId| facts.ndim(v).is_some_and(|n| n >= 3);
    let latent = inputs.iter().copied().find(|&v| spatial(v) && outputs.iter().any(|&o| facts.same_shape(o, v)))?;
    let says_time = |v: ValueId| {
        let lower = name(v).to_ascii_lowercase();
        lower == "t" || ["time", "sigma", "noise_level"].iter().any(|part| lower.contains(part))
    };
    let time = inputs.iter().copied().find(|&v| facts.ndim(v).is_some_and(|n| n <= 1) && says_time(v))?;
    let others: Vec<&str> = inputs.iter().filter(|&&v| v != latent && v != time).map(|&v| name(v)).collect();
    let conditions = if others.is_empty() { String::new() } else { format!(", condition {}", others.join(", ")) };
    Some(Ceiling {
        method: "diffusion sampler",
        sites: format!("latent {}, time {}{conditions}", name(latent), name(time)),
        weight_bytes_share: None,
        flops_share: None,
        supposing: "work falls in proportion to the steps that are left out",
    })
}
