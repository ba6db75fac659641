//! What a model goes through before and after passes.

use anyhow::Context as _;
use lathe_analysis::Facts;
use lathe_ir::Model;

/// Repairs what is untidy and checks what must hold. Returns warnings.
pub(crate) fn prepare(model: &mut Model) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    let mut moved = false;
    for (graph, _) in model.graphs_mut() {
        let before = graph.all_nodes();
        graph.sort().context("the model cannot be used")?;
        moved |= graph.all_nodes() != before;
    }
    if moved {
        warnings.push("nodes stood before what they need; they were put in order".to_owned());
    }
    let mut renamed = 0;
    for (graph, _) in model.graphs_mut() {
        renamed += graph.make_names_unique();
    }
    if renamed > 0 {
        warnings.push(format!("{renamed} values had names that were defined twice; they were renamed"));
    }
    if !model.training.is_empty() {
        model.training.clear();
        warnings.push("training information was dropped: it names values that passes may remove".to_owned());
    }
    model.check().context("the model cannot be used")?;
    Ok(warnings)
}

/// States the types of outputs that the file leaves open, where they can be inferred.
pub(super) fn state_outputs(model: &mut Model) {
    let open: Vec<_> = model.graph.main().outputs().to_vec();
    let open: Vec<_> = open
        .into_iter()
        .filter(|&v| model.graph.value(v).ty.as_ref().is_none_or(|t| t.elem().is_none() || t.shape().is_none()))
        .collect();
    if open.is_empty() {
        return;
    }
    let facts = Facts::infer(model);
    for value in open {
        if let Some(ty) = facts.ty(value) {
            model.graph.value_mut(value).ty = Some(ty);
        }
    }
}
