//! What a path holds: one archive, a folder of archives, a folder of arrays, or test data sets.

use super::{
    SetSpec,
    error::SetError,
    fit::{Array, Shard, tensor},
    store::Stored,
};
use crate::inputs::required_inputs;
use lathe_ir::Graph;
use std::path::{Path, PathBuf};

/// The shards at `path`: every file of samples, or every test data set, fitted to the inputs of `graph`.
pub(super) fn shards(spec: &SetSpec, graph: &Graph) -> Result<Vec<Shard>, SetError> {
    let path = spec.path.as_path();
    let read = |source| SetError::Read { path: path.to_owned(), source };
    let kind = |found: &str| SetError::Kind { path: path.to_owned(), found: found.to_owned() };
    let fit = |path: &Path, arrays: Vec<Stored>| {
        Shard::fit(path, arrays.into_iter().map(Array::Stored).collect(), spec, graph, false)
    };
    if !std::fs::metadata(path).map_err(read)?.is_dir() {
        return match extension(path).as_deref() {
            Some("npz") => Ok(vec![fit(path, Stored::npz(path)?)?]),
            Some("npy") => Ok(vec![fit(path, vec![single(path, spec, graph)?])?]),
            Some("pkl" | "pickle" | "pt" | "pth") => Err(kind("pickled, which is never loaded")),
            Some(other) => Err(kind(&format!("a .{other} file"))),
            None => Err(kind("a file without an extension")),
        };
    }
    let entries = listing(path)?;
    let of = |wanted: &str| -> Vec<&PathBuf> {
        entries.iter().filter(|p| extension(p).as_deref() == Some(wanted) && !p.is_dir()).collect()
    };
    let (npz, npy, pb) = (of("npz"), of("npy"), of("pb"));
    let sets: Vec<&PathBuf> = entries.iter().filter(|p| p.is_dir() && is_test_set(p)).collect();
    match (npz.is_empty(), npy.is_empty(), pb.is_empty(), sets.is_empty()) {
        (false, true, true, true) => npz.into_iter().map(|p| fit(p, Stored::npz(p)?)).collect(),
        (true, false, true, true) => {
            let arrays = npy.into_iter().map(|p| Stored::npy(p)).collect::<Result<_, _>>()?;
            Ok(vec![fit(path, arrays)?])
        }
        (true, true, false, true) => Ok(vec![test_set(path, spec, graph)?]),
        (true, true, true, false) => sets.into_iter().map(|p| test_set(p, spec, graph)).collect(),
        (true, true, true, true) => Err(kind("a folder with none of these")),
        _ => Err(kind("a folder that mixes several of these")),
    }
}

/// A `.npy` file by itself can only be the one input that the model has, whatever it is called.
fn single(path: &Path, spec: &SetSpec, graph: &Graph) -> Result<Stored, SetError> {
    let mut stored = Stored::npy(path)?;
    let mut inputs = required_inputs(graph);
    if let (Some(input), None, None) = (inputs.next(), inputs.next(), &spec.labels) {
        stored.name = graph.value(input).name.clone();
    }
    Ok(stored)
}

fn extension(path: &Path) -> Option<String> {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase())
}

fn is_test_set(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("test_data_set_"))
}

/// What is in a folder, `x_2` before `x_10`.
fn listing(path: &Path) -> Result<Vec<PathBuf>, SetError> {
    let read = |source| SetError::Read { path: path.to_owned(), source };
    let entries = std::fs::read_dir(path).map_err(read)?;
    let mut entries = entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(read)?;
    entries.sort_by_cached_key(|p| {
        let name = p.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (text, number) = name.split_at(name.len() - digits);
        (text.to_owned(), number.trim_start_matches('0').len(), number.to_owned(), p.clone())
    });
    Ok(entries)
}

/// `input_0.pb` and on are the inputs of the model in order, unless they bear its names.
fn test_set(path: &Path, spec: &SetSpec, graph: &Graph) -> Result<Shard, SetError> {
    let inputs: Vec<&str> = graph.main().inputs().iter().map(|&v| graph.value(v).name.as_str()).collect();
    let required: Vec<&str> = required_inputs(graph).map(|v| graph.value(v).name.as_str()).collect();
    let mut arrays = Vec::new();
    for file in listing(path)? {
        let stem = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let Some(index) = stem.strip_prefix("input_").and_then(|n| n.parse::<usize>().ok()) else { continue };
        let (named, tensor) = tensor(&file)?;
        let by_place = required.get(index).map(|n| (*n).to_owned());
        let name = if inputs.contains(&named.as_str()) { named } else { by_place.unwrap_or(stem) };
        arrays.push(Array::Tensor { path: file, name, dtype: tensor.dtype(), shape: tensor.dims().to_vec() });
    }
    Shard::fit(path, arrays, spec, graph, true)
}
