//! Seeded random inputs that a model accepts: of the stated types and shapes, with one size per dimension name, indices
//! inside the tables they index, and masks that look like masks.

mod sizes;
mod values;
mod work;

pub(crate) use sizes::edge_sizes;
pub use sizes::{Sizes, Style, sizes_to_try};
pub(crate) use work::{Estimate, RunWork};

use self::{
    sizes::is_image,
    values::{Recipe, word},
};
use crate::roles::{self, Role};
use lathe_analysis::Random;
use lathe_ir::{DataType, Dim, Graph, Model, Shape, Tensor, TypeKind, ValueId, element_count};
use serde::{Deserialize, Serialize};

/// No input is made larger than this many elements: past it a size was guessed wrong.
const LARGEST: usize = 1 << 28;

/// Why no inputs can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// The input is not a tensor.
    #[error("input `{input}` is {found}, and only tensors can be made up; give data for it (--calib)")]
    NotATensor {
        /// The input.
        input: String,
        /// What the model says it is.
        found: &'static str,
    },
    /// Values of this type cannot be made.
    #[error("input `{input}` has elements of type {dtype}, which cannot be made up; give data for it (--calib)")]
    Type {
        /// The input.
        input: String,
        /// Its element type.
        dtype: DataType,
    },
    /// The input would not fit in memory.
    #[error(
        "input `{input}` of shape {dims:?} is too large to be made up; give its shape (--input-shape) or data for it (--calib)"
    )]
    TooLarge {
        /// The input.
        input: String,
        /// Its shape.
        dims: Vec<usize>,
    },
    /// A stated shape contradicts the model.
    #[error("input `{input}` is given the shape {given:?}, but the model says {expected}")]
    Shape {
        /// The input.
        input: String,
        /// The user's shape.
        given: Vec<usize>,
        /// The model's.
        expected: String,
    },
    /// A stated shape is for an input that is not there.
    #[error("the model has no input `{input}`; it has {available}")]
    NoSuchInput {
        /// The name given.
        input: String,
        /// The names there are.
        available: String,
    },
}

/// What the user says about inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputSpec {
    /// The seed of all values.
    pub seed: u64,
    /// Shapes by input name, as `--input-shape` gives them.
    pub shapes: Vec<(String, Vec<usize>)>,
    /// Sizes of open dimensions by name, as `--fix-dim` gives them.
    pub sizes: Vec<(String, usize)>,
}

/// The inputs that must be given: those without a default.
pub fn required_inputs(graph: &Graph) -> impl Iterator<Item = ValueId> + '_ {
    graph.main().inputs().iter().copied().filter(|&v| graph.value(v).initializer().is_none())
}

/// How a dimension is called: its symbol, or its place in shapes of this rank. Unnamed dimensions at the same place are
/// taken to be equal, which they are in most exports (`[?, ?]` ids beside a `[?, ?]` mask).
fn key(dim: &Dim, axis: usize, ndim: usize) -> Option<String> {
    match (dim.known(), dim.name()) {
        (Some(size), _) if size >= 0 => None,
        (_, Some(name)) if !name.is_empty() && name != "?" => Some(name.to_owned()),
        _ => Some(format!("?{axis}/{ndim}")),
    }
}

/// One set of inputs for a model.
pub fn generate(model: &Model, spec: &InputSpec, sizes: &Sizes) -> Result<Vec<(String, Tensor)>, InputError> {
    let graph = &model.graph;
    check_names(graph, spec)?;
    required_inputs(graph)
        .map(|value| Ok((graph.value(value).name.clone(), make(graph, value, spec, sizes)?)))
        .collect()
}

/// How many entries the table has in which an input looks up one class per sample; `None` for any other input.
pub fn classes(model: &Model, input: &str) -> Option<usize> {
    let graph = &model.graph;
    let id = graph.find_value(input)?;
    let ty = graph.value(id).ty.as_ref()?;
    let single = ty.shape()?.dims.iter().skip(1).all(|d| d.known() == Some(1));
    if !single || !ty.elem()?.is_integer() || ty.shape()?.dims.is_empty() {
        return None;
    }
    let known = |shape: &Shape, axis: usize| usize::try_from(shape.dims.get(axis)?.known()?).ok();
    match roles::role_of(graph, id, &known) {
        Role::Index { bound } if bound > 1 => Some(bound),
        _ => None,
    }
}

fn check_names(graph: &Graph, spec: &InputSpec) -> Result<(), InputError> {
    let names: Vec<&str> = graph.main().inputs().iter().map(|&v| graph.value(v).name.as_str()).collect();
    match spec.shapes.iter().find(|(name, _)| !names.contains(&name.as_str())) {
        None => Ok(()),
        Some((input, _)) => {
            let available = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
            Err(InputError::NoSuchInput { input: input.clone(), available })
        }
    }
}

fn make(graph: &Graph, id: ValueId, spec: &InputSpec, sizes: &Sizes) -> Result<Tensor, InputError> {
    let value = graph.value(id);
    let input = value.name.clone();
    let not_a_tensor = |found| InputError::NotATensor { input: input.clone(), found };
    let (elem, shape) = match value.ty.as_ref().map(|t| &t.kind) {
        Some(TypeKind::Tensor { elem, shape }) => (*elem, shape.as_ref()),
        Some(TypeKind::SparseTensor { .. }) => return Err(not_a_tensor("a sparse tensor")),
        Some(TypeKind::Sequence(_)) => return Err(not_a_tensor("a sequence")),
        Some(TypeKind::Optional(_)) => return Err(not_a_tensor("an optional value")),
        Some(TypeKind::Map { .. }) => return Err(not_a_tensor("a map")),
        Some(TypeKind::Opaque { .. } | TypeKind::Unstated) | None => return Err(not_a_tensor("of no stated type")),
    };
    let dtype = elem.ok_or_else(|| not_a_tensor("a tensor of no stated type"))?;
    let dims = shape_for(graph, id, shape, spec, sizes)?;
    let count = element_count(&dims).filter(|&n| n <= LARGEST);
    let count = count.ok_or_else(|| InputError::TooLarge { input: input.clone(), dims: dims.clone() })?;
    let mut random = Random::named(spec.seed, &input);
    if dtype == DataType::String {
        let strings = (0..count).map(|_| word(&mut random)).collect();
        return Ok(Tensor::strings(dims, strings).expect("one string per element was made"));
    }
    let size_of = |shape: &Shape, axis: usize| -> Option<usize> {
        let dim = shape.dims.get(axis)?;
        match dim.known() {
            Some(size) => usize::try_from(size).ok(),
            None => sizes.of(&key(dim, axis, shape.dims.len())?),
        }
    };
    let role = roles::role_of(graph, id, &size_of);
    let name = input.to_ascii_lowercase();
    let row = dims.last().copied().unwrap_or(1).max(1);
    let image = shape.is_some_and(is_image) || name.contains("image") || name.contains("pixel");
    let mut values: Vec<f64> = Vec::with_capacity(count);
    let recipe = Recipe {
        role,
        style: sizes.style,
        image,
        mask: is_mask(graph, id, sizes.masked),
        masked: sizes.masked,
        ends: (sizes.style == Style::Ends && roles::stays_whole(graph, id)).then(|| random.index(4)),
        row,
        longest: sizes.longest(),
        float: dtype.is_float(),
    };
    while values.len() < count {
        recipe.fill_row(&name, dtype, &mut random, &mut values);
    }
    values.truncate(count);
    Tensor::from_f64s(dtype, &dims, &values).ok_or(InputError::Type { input, dtype })
}

/// Whether an input says by ones and zeros what is to be looked at: by its name, or because attention reads it so. Whole
/// numbers that attention reads may be something else; `any` takes them for masks too.
fn is_mask(graph: &Graph, id: ValueId, any: bool) -> bool {
    let value = graph.value(id);
    let Some(elem) = value.ty.as_ref().and_then(|ty| ty.elem()) else { return false };
    let whole = elem.is_integer();
    (whole || elem == DataType::Bool)
        && (value.name.to_ascii_lowercase().contains("mask") || ((any || !whole) && roles::masks_scores(graph, id)))
}

/// Whether any input may be a mask.
pub(crate) fn has_mask(model: &Model) -> bool {
    required_inputs(&model.graph).any(|id| is_mask(&model.graph, id, true))
}

/// Whether whole numbers of any input are never rounded.
pub(crate) fn has_whole(model: &Model) -> bool {
    let graph = &model.graph;
    required_inputs(graph).any(|id| {
        let elem = graph.value(id).ty.as_ref().and_then(|ty| ty.elem());
        elem.is_some_and(DataType::is_integer) && !is_mask(graph, id, false) && roles::stays_whole(graph, id)
    })
}

/// The shape of one input under `sizes`.
fn shape_for(
    graph: &Graph,
    id: ValueId,
    shape: Option<&Shape>,
    spec: &InputSpec,
    sizes: &Sizes,
) -> Result<Vec<usize>, InputError> {
    let input = &graph.value(id).name;
    let pinned = roles::pinned(graph, id, shape.map(|s| s.dims.len()));
    let pin =
        |axis: usize| pinned.as_ref().and_then(|p| p.sizes.iter().find(|(a, _)| *a == axis)).map(|(_, size)| *size);
    if let Some((_, given)) = spec.shapes.iter().find(|(name, _)| name == input) {
        let fits = |shape: &Shape| {
            let pairs = || shape.dims.iter().zip(given);
            shape.dims.len() == given.len()
                && pairs().all(|(dim, &size)| dim.known().is_none_or(|known| known < 0 || known as usize == size))
        };
        if shape.is_none_or(fits) {
            return Ok(given.clone());
        }
        let expected = shape.map(|s| s.dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        let expected = format!("[{}]", expected.unwrap_or_default());
        return Err(InputError::Shape { input: input.clone(), given: given.clone(), expected });
    }
    let Some(shape) = shape else {
        let ndim = pinned.as_ref().map_or(2, |p| p.ndim);
        let spatial = |axis: usize| if ndim > 2 && axis >= 2 { sizes.rest.max(16) } else { sizes.rest };
        return Ok((0..ndim).map(|a| pin(a).unwrap_or(if a == 0 { sizes.first } else { spatial(a) })).collect());
    };
    let ndim = shape.dims.len();
    let size = |(axis, dim): (usize, &Dim)| match key(dim, axis, ndim) {
        None => dim.known().and_then(|size| usize::try_from(size).ok()).unwrap_or(0),
        Some(key) => match (dim, pin(axis)) {
            // A named dimension has one size everywhere; only an unnamed one can follow the constant it meets.
            (Dim::Symbol(_), _) | (_, None) => sizes.of(&key).unwrap_or(sizes.rest),
            (_, Some(size)) => size,
        },
    };
    Ok(shape.dims.iter().enumerate().map(size).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Build;
    use lathe_ir::{Node, Type};

    fn make(model: &Model, which: usize) -> Vec<(String, Tensor)> {
        let spec = InputSpec::default();
        generate(model, &spec, &sizes_to_try(model, &spec)[which]).unwrap()
    }

    fn ids_model() -> Model {
        let mut build = Build::new();
        let ids = build.input("input_ids", DataType::Int64, &["batch", "sequence"]);
        build.input("attention_mask", DataType::Int64, &["batch", "past_sequence_length + sequence"]);
        build.input("past_key", DataType::Float, &["batch", "2", "past_sequence_length", "4"]);
        let table = build.constant("table", Tensor::from_f32s(&[5, 1], &[0.0; 5]));
        let flat = build.constant("flat", Tensor::int64s(&[-1]));
        let rows = build.node(Node::new("Reshape"), &[ids, flat], "rows");
        let y = build.node(Node::new("Gather"), &[table, rows], "y");
        build.output(y, Type::unshaped(DataType::Float)).model()
    }

    #[test]
    fn ids_stay_inside_their_table() {
        let inputs = make(&ids_model(), 0);
        let ids = inputs[0].1.to_i64s().unwrap();
        assert!(ids.iter().all(|id| (0..5).contains(id)) && ids.iter().any(|&id| id > 1), "{ids:?}");
    }

    #[test]
    fn classes_are_one_per_sample() {
        let mut build = Build::new();
        let label = build.input("label", DataType::Int64, &["n"]);
        build.input("step", DataType::Int64, &["n"]);
        let none = build.constant("none", Tensor::int64s(&[4]));
        let both = build.node(Node::new("Concat").with("axis", 0), &[none, label], "both");
        let table = build.constant("table", Tensor::from_f32s(&[5, 1], &[0.0; 5]));
        let y = build.node(Node::new("Gather"), &[table, both], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        assert_eq!([classes(&model, "label"), classes(&model, "step"), classes(&model, "y")], [Some(5), None, None]);
        // Ids of words are no class.
        assert_eq!(classes(&ids_model(), "input_ids"), None);
    }

    #[test]
    fn one_name_has_one_size_and_sums_add_up() {
        let dims = |which: usize| make(&ids_model(), which).iter().map(|(_, t)| t.dims().to_vec()).collect::<Vec<_>>();
        assert_eq!(dims(0), [vec![1, 8], vec![1, 12], vec![1, 2, 4, 4]]);
        assert_eq!(dims(1), [vec![3, 5], vec![3, 12], vec![3, 2, 7, 4]]);
    }

    #[test]
    fn masks_are_padded_on_the_right() {
        let mask = make(&ids_model(), 1)[1].1.to_i64s().unwrap();
        for row in mask.chunks(12) {
            assert_eq!(row[0], 1);
            assert!(row.is_sorted_by(|a, b| a >= b) && row.iter().all(|&m| m == 0 || m == 1), "{row:?}");
        }
    }

    #[test]
    fn an_axis_that_meets_a_weight_takes_its_size() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["?", "?"]);
        let w = build.constant("w", Tensor::from_f32s(&[7, 2], &[0.0; 14]));
        let y = build.node(Node::new("MatMul"), &[x, w], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        assert_eq!(make(&model, 0)[0].1.dims(), [1, 7]);
    }

    #[test]
    fn whole_numbers_that_divide_are_not_zero() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Int64, &["64"]);
        let d = build.input("d", DataType::Int64, &["64"]);
        let y = build.node(Node::new("Div"), &[x, d], "y");
        let model = build.output(y, Type::unshaped(DataType::Int64)).model();
        assert!(make(&model, 0)[1].1.to_i64s().unwrap().iter().all(|&d| d > 0));
    }

    #[test]
    fn stated_shapes_win_and_are_checked() {
        let model = ids_model();
        let spec = |name: &str, dims: &[usize]| InputSpec {
            shapes: vec![(name.into(), dims.to_vec())],
            ..InputSpec::default()
        };
        let given = spec("input_ids", &[2, 9]);
        let inputs = generate(&model, &given, &sizes_to_try(&model, &given)[0]).unwrap();
        assert_eq!((inputs[0].1.dims(), inputs[2].1.dims()), (&[2, 9][..], &[2, 2, 4, 4][..]));
        let wrong = spec("past_key", &[1, 3, 4, 4]);
        let error = generate(&model, &wrong, &sizes_to_try(&model, &wrong)[0]).unwrap_err().to_string();
        assert!(error.contains("is given the shape [1, 3, 4, 4], but the model says [batch,2,"), "{error}");
        let unknown = spec("ids", &[1]);
        let error = generate(&model, &unknown, &sizes_to_try(&model, &unknown)[0]).unwrap_err().to_string();
        assert!(error.starts_with("the model has no input `ids`; it has `input_ids`"), "{error}");
    }

    #[test]
    fn the_same_seed_gives_the_same_inputs() {
        assert_eq!(make(&ids_model(), 0), make(&ids_model(), 0));
    }

    #[test]
    fn a_model_without_open_sizes_is_tried_once_per_style() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["2", "3"]);
        let y = build.node(Node::new("Relu"), &[x], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let styles: Vec<Style> = sizes_to_try(&model, &InputSpec::default()).iter().map(Sizes::style).collect();
        assert_eq!(styles, [Style::Usual, Style::Tame]);
    }

    #[test]
    fn a_row_is_masked_throughout_where_that_is_asked_for() {
        let model = ids_model();
        let spec = InputSpec::default();
        let sizes = sizes_to_try(&model, &spec)[1].with_masked_row();
        let mask = generate(&model, &spec, &sizes).unwrap()[1].1.to_i64s().unwrap();
        let rows: Vec<bool> = mask.chunks(12).map(|row| row.contains(&1)).collect();
        assert_eq!(rows, [false, true, true]);
        assert!(has_mask(&model));
    }

    #[test]
    fn a_bool_that_reaches_scores_is_a_mask() {
        let mut build = Build::new();
        let keep = build.input("keep", DataType::Bool, &["n", "8"]);
        let flag = build.input("flag", DataType::Bool, &["n", "8"]);
        let x = build.input("x", DataType::Float, &["n", "8"]);
        let low = build.constant("low", Tensor::from_f32s(&[], &[-1e9]));
        let scores = build.node(Node::new("Where"), &[keep, x, low], "scores");
        let y = build.node(Node::new("Softmax"), &[scores], "p");
        let z = build.node(Node::new("Where"), &[flag, y, x], "z");
        let model = build.output(z, Type::unshaped(DataType::Float)).model();
        assert_eq!([keep, flag, x].map(|input| is_mask(&model.graph, input, false)), [true, false, false]);
    }

    #[test]
    fn ends_are_given_to_whole_numbers_that_nothing_rounds() {
        let mut build = Build::new();
        let exact = build.input("exact", DataType::Int64, &["2", "2"]);
        let rounded = build.input("rounded", DataType::Int64, &["2", "2"]);
        let divided = build.input("divided", DataType::Int8, &["2", "2"]);
        let bytes = build.input("bytes", DataType::Uint8, &["2", "2"]);
        let y = build.node(Node::new("Clip"), &[exact], "y");
        let cast = build.node(Node::new("Cast").with("to", DataType::Float), &[rounded], "cast");
        build.node(Node::new("Div"), &[divided, divided], "quotient");
        build.node(Node::new("Cast").with("to", DataType::Int32), &[bytes], "longer");
        let model =
            build.output(y, Type::unshaped(DataType::Int64)).output(cast, Type::unshaped(DataType::Float)).model();
        let spec = InputSpec::default();
        let sizes = sizes_to_try(&model, &spec)[0].with_style(Style::Ends);
        let made: Vec<Vec<i64>> =
            generate(&model, &spec, &sizes).unwrap().iter().map(|(_, t)| t.to_i64s().unwrap()).collect();
        assert!(made[0].contains(&i64::MAX) && made[0].contains(&i64::MIN), "{made:?}");
        assert!(made[1..3].iter().flatten().all(|x| (-9..=9).contains(x)), "{made:?}");
        assert!(made[3].contains(&0) && made[3].contains(&255), "{made:?}");
        assert!(has_whole(&model));
    }

    #[test]
    fn special_values_are_those_of_the_type() {
        let input = |dtype: DataType| {
            let mut build = Build::new();
            let x = build.input("x", dtype, &["512"]);
            let y = build.node(Node::new("Identity"), &[x], "y");
            let model = build.output(y, Type::unshaped(dtype)).model();
            let spec = InputSpec::default();
            let sizes = sizes_to_try(&model, &spec)[0].with_style(Style::Special);
            generate(&model, &spec, &sizes).unwrap().remove(0).1
        };
        let i64s = input(DataType::Int64).to_i64s().unwrap();
        assert!([i64::MIN, i64::MAX, 0, -1].iter().all(|edge| i64s.contains(edge)));
        let u8s = input(DataType::Uint8).to_i64s().unwrap();
        assert!([0, 1, 255].iter().all(|edge| u8s.contains(edge)) && u8s.iter().all(|x| (0..256).contains(x)));
        let halves = input(DataType::Float16).to_f64s().unwrap();
        let has = |x: f64| halves.iter().any(|h| h.to_bits() == x.to_bits());
        assert!([-0.0, 0.0, f64::INFINITY, 65504.0, -65504.0, 2f64.powi(-24), 2f64.powi(-14)].iter().all(|&x| has(x)));
        assert!(halves.iter().any(|h| h.is_nan()));
        let doubles = input(DataType::Double).to_f64s().unwrap();
        assert!([f64::MAX, f64::MIN_POSITIVE, f64::from_bits(1)].iter().all(|x| doubles.contains(x)));
    }
}
