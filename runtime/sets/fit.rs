//! Joins the arrays of one file or folder to the inputs of a model, or says what does not fit.

use super::{SetSpec, error::SetError, store::Stored};
use crate::inputs::required_inputs;
use lathe_ir::{DataType, Dim, Graph, Shape, Tensor, TypeKind, ValueId};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// An array of a set before it is known what it is for.
#[derive(Debug, Clone)]
pub(super) enum Array {
    /// In a `.npy` file or a `.npz` archive.
    Stored(Stored),
    /// In a `.pb` file, which is read again for every run.
    Tensor { path: PathBuf, name: String, dtype: DataType, shape: Vec<usize> },
}

impl Array {
    pub(super) fn name(&self) -> &str {
        match self {
            Array::Stored(stored) => &stored.name,
            Array::Tensor { name, .. } => name,
        }
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Array::Stored(stored) => &stored.path,
            Array::Tensor { path, .. } => path,
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Array::Stored(stored) => &stored.header.shape,
            Array::Tensor { shape, .. } => shape,
        }
    }

    fn is(&self, dtype: DataType) -> bool {
        match self {
            Array::Stored(stored) => stored.header.elements.is(dtype),
            Array::Tensor { dtype: found, .. } => *found == dtype,
        }
    }

    fn describe(&self) -> String {
        match self {
            Array::Stored(stored) => stored.header.elements.describe(),
            Array::Tensor { dtype, .. } => dtype.to_string(),
        }
    }
}

/// How the first axis of an array is divided among runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Division {
    /// So many rows make one run.
    Several(usize),
    /// Each row is a whole input, without the first axis.
    Single,
    /// The array is the input of the only run.
    Whole,
    /// The array, of no axes, is the input of every run.
    Same,
}

/// One array and the input it feeds.
#[derive(Debug, Clone)]
pub(super) struct InputColumn {
    pub(super) input: String,
    pub(super) dtype: DataType,
    pub(super) array: Array,
    pub(super) rows: Division,
}

/// The arrays of one file or folder, as runs of a model.
#[derive(Debug, Clone)]
pub(super) struct Shard {
    pub(super) columns: Vec<InputColumn>,
    pub(super) labels: Option<InputColumn>,
    /// The smallest runs there are.
    pub(super) units: usize,
    /// Samples in each of them.
    pub(super) samples: usize,
    /// Whether several units can be run as one.
    pub(super) joins: bool,
}

/// What is known of an input.
struct Input<'a> {
    name: &'a str,
    dtype: DataType,
    shape: Option<&'a Shape>,
}

fn input(graph: &Graph, id: ValueId) -> Result<Input<'_>, SetError> {
    let value = graph.value(id);
    let no = |found| SetError::Input { input: value.name.clone(), found };
    match value.ty.as_ref().map(|t| &t.kind) {
        Some(TypeKind::Tensor { elem: Some(dtype), shape }) => {
            Ok(Input { name: &value.name, dtype: *dtype, shape: shape.as_ref() })
        }
        Some(TypeKind::Sequence(_)) => Err(no("a sequence")),
        Some(TypeKind::Optional(_)) => Err(no("an optional value")),
        Some(TypeKind::Map { .. }) => Err(no("a map")),
        Some(TypeKind::SparseTensor { .. }) => Err(no("a sparse tensor")),
        _ => Err(no("of no stated type")),
    }
}

/// `[batch,3,224,224]`.
fn shape_text(shape: Option<&Shape>) -> String {
    let dims = shape.map(|s| s.dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
    dims.map_or_else(|| "any shape".to_owned(), |dims| format!("[{dims}]"))
}

/// `` `a`, `b` ``, or `none`.
fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.map(|n| format!("`{n}`")).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn known(dim: &Dim) -> Option<usize> {
    dim.known().and_then(|size| usize::try_from(size).ok())
}

impl Shard {
    /// Fits `arrays`, found in `path`, to the inputs of `graph`.
    pub(super) fn fit(
        path: &Path,
        arrays: Vec<Array>,
        spec: &SetSpec,
        graph: &Graph,
        whole: bool,
    ) -> Result<Shard, SetError> {
        let (labels, unread) = (spec.labels.as_deref(), spec.unread.as_deref());
        let all = || list(arrays.iter().map(Array::name));
        if let Some(labels) = labels
            && !arrays.iter().any(|a| a.name() == labels)
        {
            return Err(SetError::Labels { path: path.to_owned(), labels: labels.to_owned(), found: all() });
        }
        let mut columns = Vec::new();
        let mut sizes = BTreeMap::new();
        for &id in graph.main().inputs() {
            let name = graph.value(id).name.as_str();
            let Some(array) = arrays.iter().find(|a| a.name() == name) else {
                if graph.value(id).initializer().is_some() {
                    continue;
                }
                let input = input(graph, id)?;
                let expected =
                    format!("{}{}", input.dtype, input.shape.map(|s| shape_text(Some(s))).unwrap_or_default());
                let (path, input) = (path.to_owned(), name.to_owned());
                return Err(SetError::Missing { path, input, expected, found: all() });
            };
            columns.push(column(array, &input(graph, id)?, whole, &mut sizes)?);
        }
        for array in &arrays {
            let name = array.name();
            if labels != Some(name) && unread != Some(name) && !columns.iter().any(|c| c.input == name) {
                let expected = list(required_inputs(graph).map(|v| graph.value(v).name.as_str()));
                return Err(SetError::Extra { path: array.path().to_owned(), array: name.to_owned(), expected });
            }
        }
        let labels = arrays.iter().find(|a| labels == Some(a.name()));
        Shard::divide(columns, labels)
    }

    /// Finds how many runs the rows make, and how many rows of each array go into one.
    fn divide(mut columns: Vec<InputColumn>, labels: Option<&Array>) -> Result<Shard, SetError> {
        for column in &columns {
            // Axes other than the first may be empty: a model can start from an empty cache.
            let empty = match column.rows {
                Division::Whole | Division::Same => false,
                _ => column.array.shape().first() == Some(&0),
            };
            if empty {
                let (path, array) = (column.array.path().to_owned(), column.array.name().to_owned());
                return Err(SetError::Empty { path, array, found: column.array.shape().to_vec() });
            }
        }
        let count = |c: &InputColumn| c.array.shape().first().copied().unwrap_or(1);
        let wrong = |c: &InputColumn, expected: String| SetError::Count {
            path: c.array.path().to_owned(),
            array: c.array.name().to_owned(),
            expected,
            found: count(c),
        };
        // `Several(0)` stands for rows that the model leaves open.
        let runs = |c: &InputColumn| match c.rows {
            Division::Whole => Some(1),
            Division::Single => Some(count(c)),
            Division::Same | Division::Several(0) => None,
            Division::Several(rows) => Some(count(c) / rows),
        };
        for column in &columns {
            if let Division::Several(rows @ 1..) = column.rows
                && count(column) % rows != 0
            {
                return Err(wrong(column, format!("a multiple of {rows}, which the model takes at a time")));
            }
        }
        let leader = columns.iter().find(|c| runs(c).is_some());
        let open = columns.iter().find(|c| matches!(c.rows, Division::Several(0)));
        let joins = leader.is_none() && open.is_some();
        let (leading, units) = match (leader, open) {
            (Some(c), _) => (c.array.name().to_owned(), runs(c).unwrap_or(1)),
            (None, Some(c)) => (c.array.name().to_owned(), count(c)),
            (None, None) => (String::new(), 1),
        };
        for column in &mut columns {
            let found = count(column);
            match runs(column) {
                Some(own) if own != units => {
                    let rows = found / own.max(1) * units;
                    return Err(wrong(column, format!("{rows} as in `{leading}`")));
                }
                Some(_) => {}
                None if column.rows == Division::Same => {}
                None if joins && found != units => return Err(wrong(column, format!("{units} as in `{leading}`"))),
                None if found % units != 0 => {
                    return Err(wrong(column, format!("a multiple of {units}, as in `{leading}`")));
                }
                None => column.rows = Division::Several(found / units),
            }
        }
        let samples = columns.iter().find_map(|c| match c.rows {
            Division::Several(rows) => Some(rows),
            Division::Whole | Division::Single | Division::Same => None,
        });
        let samples = samples.unwrap_or(1);
        let labels = labels.map(|array| labels_column(array, units, samples)).transpose()?;
        Ok(Shard { columns, labels, units, samples, joins })
    }
}

/// Checks type and shape of one array; a size that the model only names must be the same for every array that has it.
fn column(
    array: &Array,
    input: &Input<'_>,
    whole: bool,
    sizes: &mut BTreeMap<String, (usize, String)>,
) -> Result<InputColumn, SetError> {
    let (path, name) = (array.path().to_owned(), array.name().to_owned());
    if !array.is(input.dtype) {
        return Err(SetError::Type { path, array: name, expected: input.dtype, found: array.describe() });
    }
    let found = array.shape();
    let rows = match input.shape {
        _ if whole => Division::Whole,
        None if found.is_empty() => Division::Same,
        None => Division::Several(0),
        Some(shape) if found.len() == shape.dims.len() + 1 => Division::Single,
        Some(shape) if found.len() == shape.dims.len() => match shape.dims.first() {
            None => Division::Same,
            // A model that takes no rows is run on none, once.
            Some(dim) if known(dim) == Some(0) => Division::Whole,
            Some(dim) => Division::Several(known(dim).unwrap_or(0)),
        },
        Some(_) => {
            return Err(SetError::Ndim { path, array: name, expected: shape_text(input.shape), found: found.to_vec() });
        }
    };
    let shape = input.shape.map(|s| s.dims.as_slice()).unwrap_or_default();
    if whole && input.shape.is_some() && shape.len() != found.len() {
        let (expected, found) = (shape_text(input.shape), found.to_vec());
        return Err(SetError::Shape { path, array: name, expected, found, because: String::new() });
    }
    let inner = match rows {
        Division::Single => 1,
        _ => 0,
    };
    for (axis, dim) in shape.iter().enumerate() {
        if axis == 0 && matches!(rows, Division::Several(_)) {
            continue;
        }
        let size = found[axis + inner];
        let wrong = |because: String| SetError::Shape {
            path: path.clone(),
            array: name.clone(),
            expected: shape_text(input.shape),
            found: found.to_vec(),
            because,
        };
        match dim.name() {
            Some(symbol) if !symbol.is_empty() && symbol != "?" => {
                let (expected, other) = sizes.entry(symbol.to_owned()).or_insert((size, name.clone()));
                if *expected != size {
                    return Err(wrong(format!(" where `{symbol}` is {expected} as in `{other}`, found {size}")));
                }
            }
            _ if known(dim).is_some_and(|expected| expected != size) => return Err(wrong(String::new())),
            _ => {}
        }
    }
    Ok(InputColumn { input: input.name.to_owned(), dtype: input.dtype, array: array.clone(), rows })
}

fn labels_column(array: &Array, units: usize, samples: usize) -> Result<InputColumn, SetError> {
    let (path, name) = (array.path().to_owned(), array.name().to_owned());
    let dtype = match array {
        Array::Stored(stored) => match stored.header.elements {
            super::npy::Elements::Plain { dtype, .. } => Some(dtype),
            _ => None,
        },
        Array::Tensor { dtype, .. } => Some(*dtype),
    };
    let Some(dtype) = dtype.filter(|d| d.is_integer() || *d == DataType::Bool) else {
        return Err(SetError::LabelType { path, array: name, found: array.describe() });
    };
    let Some(&found) = array.shape().first() else {
        let expected = format!("{} (one for each sample)", units.saturating_mul(samples));
        return Err(SetError::Count { path, array: name, expected, found: 1 });
    };
    let rows = match array {
        Array::Tensor { .. } => Division::Whole,
        Array::Stored(_) if found == units.saturating_mul(samples) => Division::Several(samples),
        Array::Stored(_) if found == units => Division::Several(1),
        Array::Stored(_) => {
            let expected = format!("{}, one for each sample", units.saturating_mul(samples));
            return Err(SetError::Count { path, array: name, expected, found });
        }
    };
    Ok(InputColumn { input: name, dtype, array: array.clone(), rows })
}

/// Reads the tensor of a `.pb` file.
pub(super) fn tensor(path: &Path) -> Result<(String, Tensor), SetError> {
    Tensor::read(path).map_err(|source| SetError::Tensor { path: path.to_owned(), source })
}
