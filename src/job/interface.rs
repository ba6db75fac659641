//! What a caller gives and takes, changed before anything else: sizes of open dimensions, outputs, names.

use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_analysis::Facts;
use lathe_ir::{Dim, Graph, Model, Origin, ScopeId, Type, TypeKind, ValueId};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// How inputs and outputs of a result differ from those of the model. The result is compared with the model changed
/// in the same way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Sizes of open dimensions: a dimension is its name, or `INPUT[AXIS]`.
    pub sizes: Vec<(String, usize)>,
    /// The outputs in order, which may be values inside the model; none leaves them as they are.
    pub outputs: Vec<String>,
    /// New names of inputs and outputs: old, new.
    pub names: Vec<(String, String)>,
}

/// What a change of a model's interface leaves to run results beside it.
#[derive(Default)]
pub(super) struct Changed {
    /// The model with the same outputs and names, and sizes where a set has them; `None` where the file has them.
    pub reference: Option<Reference>,
    /// The sizes that its open dimensions take, by name.
    pub sizes: Vec<(String, usize)>,
}

/// A model on disk with another interface than the file it was read from; its weights are links to that.
pub(super) struct Reference {
    path: PathBuf,
    _folder: TempDir,
}

impl Reference {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Interface {
    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty() && self.outputs.is_empty() && self.names.is_empty()
    }

    /// Changes a model that was read from `file`. What it is compared with has the same outputs and names. Its sizes stay
    /// open where inputs are made up: what a branch that is never taken would make of them keeps runtimes from loading some
    /// models. On a set (`on_set`) it takes as many samples at a time as the result.
    pub(super) fn change(&self, model: &mut Model, file: &Path, on_set: bool) -> Result<Changed, Failure> {
        if self.is_empty() {
            return Ok(Changed::default());
        }
        self.choose_outputs(model)?;
        self.rename(model)?;
        let (sizes, named) = self.name_sizes(&mut model.graph)?;
        model.check().context("the model cannot have these inputs and outputs")?;
        let mut reference = None;
        let open = (!on_set).then(|| model.clone());
        for (name, size) in &sizes {
            fix(&mut model.graph, name, *size as i64);
        }
        if !sizes.is_empty() {
            state_sizes(model);
        }
        let differs = named || !self.outputs.is_empty() || !self.names.is_empty() || (on_set && !sizes.is_empty());
        if differs {
            let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
            let path = folder.path().join(file.file_name().unwrap_or_else(|| "model.onnx".as_ref()));
            open.as_ref().unwrap_or(model).write_linked(&path)?;
            reference = Some(Reference { path, _folder: folder });
        }
        Ok(Changed { reference, sizes })
    }

    /// The sizes by names of dimensions, and whether one without a name was given one.
    fn name_sizes(&self, graph: &mut Graph) -> Result<(Vec<(String, usize)>, bool), Failure> {
        let (mut sizes, mut named) = (Vec::new(), false);
        for (dimension, size) in &self.sizes {
            if *size == 0 {
                return Err(wrong(format!("--fix-dim {dimension}=0: a size is at least 1")));
            }
            let open = self.open(graph, dimension)?;
            let name = match open {
                OpenDim::Named(name) => name,
                OpenDim::Known(known) if known == *size as i64 => continue,
                OpenDim::Known(known) => {
                    return Err(wrong(format!("--fix-dim {dimension}={size}: it is {known} already")));
                }
                OpenDim::Unnamed(input, axis) => {
                    let dims = graph.value_mut(input).ty.as_mut().and_then(dims_of);
                    if let Some(dim) = dims.and_then(|dims| dims.get_mut(axis)) {
                        *dim = Dim::Symbol(dimension.clone());
                    }
                    named = true;
                    dimension.clone()
                }
            };
            if sizes.iter().any(|(other, _)| *other == name) {
                return Err(wrong(format!("--fix-dim gives `{dimension}` two sizes")));
            }
            sizes.push((name, *size));
        }
        Ok((sizes, named))
    }

    /// The dimension of an input that goes by this name, or stands at this place.
    fn open(&self, graph: &Graph, dimension: &str) -> Result<OpenDim, Failure> {
        let inputs = graph.main().inputs();
        let shape = |id: ValueId| graph.value(id).ty.as_ref().and_then(|ty| ty.shape());
        let mut dims = inputs.iter().filter_map(|&id| shape(id)).flat_map(|shape| &shape.dims);
        if dims.any(|dim| dim.name() == Some(dimension)) {
            return Ok(OpenDim::Named(dimension.to_owned()));
        }
        let place = dimension.strip_suffix(']').and_then(|text| text.rsplit_once('['));
        let place = place.and_then(|(input, axis)| {
            let id = inputs.iter().copied().find(|&v| graph.value(v).name == input)?;
            let axis = axis.parse::<usize>().ok()?;
            let dim = shape(id)?.dims.get(axis)?;
            Some(match (dim.known(), dim.name()) {
                (Some(known), _) => OpenDim::Known(known),
                (None, Some(name)) => OpenDim::Named(name.to_owned()),
                (None, None) => OpenDim::Unnamed(id, axis),
            })
        });
        place.ok_or_else(|| no_such(graph, dimension))
    }

    /// Makes these values the outputs, and no others.
    fn choose_outputs(&self, model: &mut Model) -> Result<(), Failure> {
        if self.outputs.is_empty() {
            return Ok(());
        }
        let graph = &model.graph;
        let mut chosen = Vec::new();
        for name in &self.outputs {
            let value = graph.find_value(name).filter(|&v| graph.scope_of(v) == Some(ScopeId::MAIN));
            let value = value.ok_or_else(|| {
                let all = graph.main().outputs().iter().map(|&v| graph.value(v).name.as_str());
                wrong(format!("--outputs: the model has no value `{name}`; its outputs are {}", listed(all)))
            })?;
            if !matches!(graph.value(value).origin(), Origin::Node(..)) {
                return Err(wrong(format!("--outputs: `{name}` is given to the model, not computed")));
            }
            if chosen.contains(&value) {
                return Err(wrong(format!("--outputs names `{name}` twice")));
            }
            chosen.push(value);
        }
        let facts = Facts::infer(model);
        let graph = &mut model.graph;
        for &value in &chosen {
            if graph.value(value).ty.is_none() {
                let ty = facts.ty(value);
                let name = graph.value(value).name.clone();
                let ty = ty.ok_or_else(|| Failure::Error(anyhow!("nothing is known of the type of `{name}`")))?;
                graph.value_mut(value).ty = Some(ty);
            }
        }
        for index in (0..graph.main().outputs().len()).rev() {
            graph.remove_output(ScopeId::MAIN, index);
        }
        chosen.into_iter().for_each(|value| graph.add_output(ScopeId::MAIN, value));
        Ok(())
    }

    /// Gives inputs and outputs other names.
    fn rename(&self, model: &mut Model) -> Result<(), Failure> {
        let graph = &mut model.graph;
        let mut renamed: Vec<(ValueId, &String)> = Vec::new();
        for (old, new) in &self.names {
            let main = graph.main();
            let value = main.inputs().iter().chain(main.outputs()).copied().find(|&v| graph.value(v).name == *old);
            let value = value.ok_or_else(|| {
                let all = main.inputs().iter().chain(main.outputs()).map(|&v| graph.value(v).name.as_str());
                wrong(format!("--rename: the model has no input or output `{old}`; it has {}", listed(all)))
            })?;
            if new.is_empty() || renamed.iter().any(|(other, name)| *other == value || *name == new) {
                return Err(wrong(format!("--rename {old}={new}: a name is empty or stands there twice")));
            }
            renamed.push((value, new));
        }
        // Names may change places; what stands inside the model gives way.
        for (value, new) in &renamed {
            let Some(holder) = graph.find_value(new).filter(|holder| holder != value) else { continue };
            let main = graph.main();
            let is_kept = main.inputs().iter().chain(main.outputs()).any(|&v| v == holder)
                && !renamed.iter().any(|(other, _)| *other == holder);
            if is_kept {
                return Err(wrong(format!("--rename: another input or output is called `{new}`")));
            }
            let fresh = graph.fresh_name(new);
            graph.rename(holder, fresh);
        }
        for (value, new) in renamed {
            graph.rename(value, new);
        }
        Ok(())
    }
}

fn wrong(message: String) -> Failure {
    Failure::Usage(message)
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// A dimension of an input.
enum OpenDim {
    Named(String),
    /// The input and the axis of one without a name.
    Unnamed(ValueId, usize),
    Known(i64),
}

/// Gives a dimension a size wherever its name stands.
fn fix(graph: &mut Graph, name: &str, size: i64) {
    let is_open = |dim: &Dim| dim.name() == Some(name);
    let has = |&id: &ValueId| {
        let shape = graph.value(id).ty.as_ref().and_then(|ty| ty.shape());
        shape.is_some_and(|shape| shape.dims.iter().any(is_open))
    };
    let stated: Vec<ValueId> = values(graph).into_iter().filter(has).collect();
    for id in stated {
        let dims = graph.value_mut(id).ty.as_mut().and_then(dims_of);
        dims.into_iter().flatten().filter(|dim| is_open(dim)).for_each(|dim| *dim = Dim::Known(size));
    }
}

/// States sizes of outputs that follow from those of the inputs.
pub(super) fn state_sizes(model: &mut Model) {
    let facts = Facts::infer(model);
    for output in model.graph.main().outputs().to_vec() {
        let open = |ty: &Type| ty.shape().is_none_or(|shape| shape.sizes().is_none());
        if model.graph.value(output).ty.as_ref().is_none_or(open)
            && let Some(ty) = facts.ty(output)
        {
            model.graph.value_mut(output).ty = Some(ty);
        }
    }
}

/// All values that something gives, subgraphs included.
fn values(graph: &Graph) -> BTreeSet<ValueId> {
    let nodes = graph.all_nodes().into_iter().flat_map(|id| graph.node(id).outputs().iter().flatten().copied());
    let inputs = graph.scopes().into_iter().flat_map(|scope| graph.scope(scope).inputs().iter().copied());
    nodes.chain(inputs).collect()
}

/// The dimensions that a type of tensors states.
fn dims_of(ty: &mut Type) -> Option<&mut Vec<Dim>> {
    match &mut ty.kind {
        TypeKind::Tensor { shape: Some(shape), .. } => Some(&mut shape.dims),
        _ => None,
    }
}

fn no_such(graph: &Graph, dimension: &str) -> Failure {
    let mut open = BTreeSet::new();
    for &input in graph.main().inputs() {
        let value = graph.value(input);
        let shape = value.ty.as_ref().and_then(|ty| ty.shape());
        for (axis, dim) in shape.iter().flat_map(|shape| &shape.dims).enumerate() {
            match dim {
                Dim::Unknown => drop(open.insert(format!("{}[{axis}]", value.name))),
                dim => open.extend(dim.name().map(str::to_owned)),
            }
        }
    }
    wrong(match open.is_empty() {
        true => format!("--fix-dim: no dimension of the inputs is open, so `{dimension}` cannot be fixed"),
        false => format!(
            "--fix-dim: no input has an open dimension `{dimension}`; there are {}",
            listed(open.iter().map(String::as_str))
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lathe_ir::text;

    const SOURCE: &str = "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[batch, seq, 4] x, float[?, 4] b) => (float[batch, seq, 4] y, float[batch, total] z) {
            h = Add (x, x) y = Relu (h) s = ReduceSum <keepdims = 0> (x) z = Identity (w) w = ReduceMax <axes = [2], keepdims = 0> (h) }";

    fn shapes(model: &Model) -> Vec<String> {
        let main = model.graph.main();
        let all = main.inputs().iter().chain(main.outputs());
        let shown = all.map(|&v| {
            let value = model.graph.value(v);
            let dims: Vec<String> =
                value.ty.as_ref().unwrap().shape().unwrap().dims.iter().map(ToString::to_string).collect();
            format!("{}[{}]", value.name, dims.join(","))
        });
        shown.collect()
    }

    fn changed(interface: &Interface) -> Result<Vec<String>, String> {
        let mut model = text::parse(SOURCE).unwrap();
        model.graph.sort().unwrap();
        interface
            .change(&mut model, Path::new("a/m.onnx"), false)
            .map(|_| shapes(&model))
            .map_err(|error| error.to_string())
    }

    fn sizes(sizes: &[(&str, usize)]) -> Interface {
        let sizes = sizes.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect();
        Interface { sizes, ..Interface::default() }
    }

    #[test]
    fn sizes_go_wherever_a_name_stands_and_outputs_follow() {
        let all = changed(&sizes(&[("batch", 2), ("x[1]", 8), ("b[0]", 3)])).unwrap();
        assert_eq!(all, ["x[2,8,4]", "b[3,4]", "y[2,8,4]", "z[2,8]"]);
        let one = changed(&sizes(&[("seq", 8), ("x[2]", 4)])).unwrap();
        assert_eq!(one, ["x[batch,8,4]", "b[?,4]", "y[batch,8,4]", "z[batch,8]"]);
        let fault = |given: &[(&str, usize)]| changed(&sizes(given)).unwrap_err();
        assert_eq!(
            fault(&[("n", 1)]),
            "--fix-dim: no input has an open dimension `n`; there are `b[0]`, `batch`, `seq`"
        );
        assert_eq!(fault(&[("x[2]", 5)]), "--fix-dim x[2]=5: it is 4 already");
        assert_eq!(fault(&[("batch", 0)]), "--fix-dim batch=0: a size is at least 1");
        assert_eq!(fault(&[("batch", 1), ("batch", 2)]), "--fix-dim gives `batch` two sizes");
        assert!(fault(&[("x[7]", 1)]).contains("no input has an open dimension `x[7]`"));
    }

    #[test]
    fn outputs_are_any_values_that_are_computed() {
        let outputs = |names: &[&str]| {
            let outputs = names.iter().map(|name| (*name).to_owned()).collect();
            changed(&Interface { outputs, ..Interface::default() })
        };
        assert_eq!(outputs(&["h", "y"]).unwrap(), ["x[batch,seq,4]", "b[?,4]", "h[batch,seq,4]", "y[batch,seq,4]"]);
        let fault = |names: &[&str]| outputs(names).unwrap_err();
        assert_eq!(fault(&["q"]), "--outputs: the model has no value `q`; its outputs are `y`, `z`");
        assert_eq!(fault(&["x"]), "--outputs: `x` is given to the model, not computed");
        assert_eq!(fault(&["y", "y"]), "--outputs names `y` twice");
    }

    #[test]
    fn names_may_change_places_and_what_is_inside_gives_way() {
        let rename = |names: &[(&str, &str)]| {
            let names = names.iter().map(|(old, new)| ((*old).to_owned(), (*new).to_owned())).collect();
            changed(&Interface { names, ..Interface::default() })
        };
        let names = |found: Result<Vec<String>, String>| -> Vec<String> {
            found.unwrap().iter().map(|shown| shown.split('[').next().unwrap().to_owned()).collect()
        };
        assert_eq!(names(rename(&[("x", "b"), ("b", "x")])), ["b", "x", "y", "z"]);
        assert_eq!(names(rename(&[("y", "h")])), ["x", "b", "h", "z"]);
        assert_eq!(rename(&[("y", "z")]).unwrap_err(), "--rename: another input or output is called `z`");
        assert_eq!(
            rename(&[("y", "a"), ("x", "a")]).unwrap_err(),
            "--rename x=a: a name is empty or stands there twice"
        );
        assert!(rename(&[("h", "a")]).unwrap_err().contains("no input or output `h`; it has `x`, `b`, `y`, `z`"));
    }
}
