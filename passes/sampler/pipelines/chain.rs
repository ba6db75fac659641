//! Models one after the other as one model.

use super::merge;
use crate::{
    Pass, PassContext,
    exact::{DropDead, DropIdentities, ShareInitializers},
    sampler::{Error, network::drop_inputs},
};
use lathe_analysis::Facts;
use lathe_ir::{DataType, Dim, Model, Node, ScopeId, Shape, Type, ValueId};
use std::collections::BTreeMap;

/// A model of a chain.
pub struct Link<'a> {
    /// What names of its values begin with.
    pub name: &'a str,
    /// What it is called in a sentence: `the decoder`.
    pub what: &'a str,
    /// The model.
    pub model: &'a Model,
}

/// What a stage gave: the value, its type and what is known of its sizes.
struct Available {
    value: ValueId,
    from: String,
    elem: DataType,
    dims: Option<Vec<Option<i64>>>,
}

/// One model of several: each takes what those before it give under the same name. What none of them gives is an input, and
/// `wanted` are the outputs, those that there are, in this order. Constants that several have are there once.
///
/// Fails where the sizes of what one gives are not those that another takes.
pub fn chain(links: &[Link], wanted: &[&str]) -> Result<Model, Error> {
    let mut out = merge::empty("pipeline");
    let mut available: BTreeMap<String, Available> = BTreeMap::new();
    let mut inputs: BTreeMap<String, ValueId> = BTreeMap::new();
    let mut outputs: Vec<(String, Type)> = Vec::new();
    // Inputs come first: their names are those of the stages, whatever else needs one.
    for Link { model, .. } in links {
        let graph = &model.graph;
        for &input in graph.main().inputs() {
            let value = graph.value(input);
            let given = outputs.iter().any(|(name, _)| *name == value.name) && !inputs.contains_key(&value.name);
            if !given && !inputs.contains_key(&value.name) {
                let new = out.graph.add_value(value.name.clone(), value.ty.clone());
                out.graph.add_input(ScopeId::MAIN, new);
                inputs.insert(value.name.clone(), new);
            }
        }
        outputs.extend(graph.main().outputs().iter().map(|&v| {
            let value = graph.value(v);
            (value.name.clone(), value.ty.clone().unwrap_or_else(|| Type::unshaped(DataType::Float)))
        }));
    }
    for Link { name, what, model } in links {
        let fragment = merge::absorb(&mut out, model, name)?;
        let graph = &model.graph;
        let facts = Facts::infer(model);
        let mut arguments = Vec::new();
        for &input in graph.main().inputs() {
            let wanted = graph.value(input);
            let argument = match available.get(&wanted.name) {
                None => inputs[&wanted.name],
                Some(found) => {
                    let shape = wanted.ty.as_ref().and_then(Type::shape);
                    fits(found, &wanted.name, shape, what)?;
                    let elem = wanted.ty.as_ref().and_then(Type::elem).unwrap_or(found.elem);
                    match elem == found.elem {
                        true => found.value,
                        false => {
                            out.graph.append(ScopeId::MAIN, Node::new("Cast").with("to", elem), &[found.value], "cast")
                        }
                    }
                }
            };
            arguments.push(Some(argument));
        }
        let known = BTreeMap::new();
        let prefix = format!("{name}.");
        let pasted = out.graph.paste(&fragment, ScopeId::MAIN, &arguments, &known, &prefix);
        for (&old, new) in graph.main().outputs().iter().zip(pasted.outputs) {
            let Some(value) = new else { continue };
            let elem = facts.elem(old).unwrap_or(DataType::Float);
            let dims = facts.shape(old).map(|shape| shape.iter().map(|d| d.as_known()).collect());
            let one = Available { value, from: (*what).to_owned(), elem, dims };
            available.insert(graph.value(old).name.clone(), one);
        }
    }
    for name in wanted {
        let given = outputs.iter().find(|(known, _)| known == name);
        let Some(((_, ty), found)) = given.zip(available.get(*name)) else { continue };
        let value = out.graph.append(ScopeId::MAIN, Node::new("Identity"), &[found.value], name);
        out.graph.value_mut(value).ty = Some(ty.clone());
        out.graph.add_output(ScopeId::MAIN, value);
    }
    tidy(&mut out)?;
    Ok(out)
}

/// Fails where the sizes of what is given cannot be those of what is taken.
fn fits(found: &Available, name: &str, wanted: Option<&Shape>, what: &str) -> Result<(), Error> {
    let (Some(dims), Some(wanted)) = (&found.dims, wanted) else { return Ok(()) };
    let same = |(given, wanted): (&Option<i64>, &Dim)| given.zip(wanted.known()).is_none_or(|(a, b)| a == b);
    if dims.len() == wanted.dims.len() && dims.iter().zip(&wanted.dims).all(same) {
        return Ok(());
    }
    let given: Vec<String> = dims.iter().map(|d| d.map_or("?".to_owned(), |d| d.to_string())).collect();
    let takes: Vec<String> = wanted.dims.iter().map(ToString::to_string).collect();
    let (from, given, takes) = (&found.from, given.join(", "), takes.join(", "));
    Err(Error::Pipeline(format!("{from} give `{name}` of shape [{given}], and {what} takes [{takes}]")))
}

/// Shares constants and drops what nothing needs.
fn tidy(model: &mut Model) -> Result<(), Error> {
    let wrong = |e: &dyn std::fmt::Display| Error::Pipeline(e.to_string());
    model.graph.sort().map_err(|e| wrong(&e))?;
    for pass in [&ShareInitializers as &dyn Pass, &DropIdentities, &DropDead] {
        pass.apply(model, &PassContext::default()).map_err(|e| wrong(&e))?;
    }
    drop_inputs(model);
    model.graph.sort().map_err(|e| wrong(&e))?;
    model.graph.make_names_unique();
    let checked = model.check();
    checked.map_err(|e| {
        Error::Pipeline(format!("the pipeline is not a valid model; this is a fault of this program: {e}"))
    })
}
