//! What a model needs of another one whose graph it takes over: operator sets and functions.

use crate::sampler::Error;
use lathe_ir::{Fragment, Graph, Model, ScopeId};

/// A model that others are put into.
pub(super) fn empty(name: &str) -> Model {
    Model { ir_version: 8, producer_name: "onnx-lathe".to_owned(), graph: Graph::new(name), ..Model::default() }
}

/// Takes over the operator sets and functions of a model, and returns its main graph to be pasted.
///
/// Fails where both use different versions of an operator set.
pub(super) fn absorb(out: &mut Model, model: &Model, name: &str) -> Result<Fragment, Error> {
    out.ir_version = out.ir_version.max(model.ir_version);
    for (domain, version) in &model.opsets {
        match out.opset_of(domain) {
            None => out.opsets.push((domain.clone(), *version)),
            Some(known) if known == *version => {}
            Some(known) => {
                let message =
                    format!("`{name}` uses version {version} of the operators `{domain}`, and another part {known}");
                return Err(Error::Pipeline(message));
            }
        }
    }
    let taken = |f: &lathe_ir::Function| out.function(&f.domain, &f.name, &f.overload).is_some();
    if !model.functions.iter().any(taken) {
        out.functions.extend(model.functions.iter().cloned());
        return Ok(model.graph.fragment(ScopeId::MAIN));
    }
    // Functions of the same name may do something else, so those that come later get names of their own.
    let mut model = model.clone();
    let renamed: Vec<(String, String)> = model.functions.iter().map(|f| (f.domain.clone(), f.name.clone())).collect();
    let new_name = |old: &str| format!("{name}.{old}");
    let rename = |graph: &mut Graph| {
        for id in graph.all_nodes() {
            let node = graph.node_mut(id);
            if renamed.iter().any(|(domain, name)| *domain == node.domain && *name == node.op_type) {
                node.op_type = new_name(&node.op_type);
            }
        }
    };
    rename(&mut model.graph);
    for function in &mut model.functions {
        rename(&mut function.graph);
        function.name = new_name(&function.name);
    }
    let fragment = model.graph.fragment(ScopeId::MAIN);
    out.functions.extend(model.functions);
    Ok(fragment)
}
