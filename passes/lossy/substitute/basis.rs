//! What needs no parameters: copies, pools, shifts and averages; and the pieces that are made of them and a map.

use super::{
    MOST_FEATURES,
    fit::Fit,
    places::{Layout, Place},
};
use crate::lossy::factors::numbers;
use lathe_ir::{Graph, Node, ScopeId, Tensor, ValueId};

/// The operator set from which on the axes of averages are an input.
const AXES_ARE_INPUTS: i64 = 18;

/// What is made of what a place reads, feature by feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    /// As it is; every so many pixels of it where the window steps.
    Identity,
    /// The average of the window.
    Average,
    /// The maximum of the window.
    Max,
    /// Every channel as one place of the window shows it: the one that its weights are largest at.
    Shift,
    /// The average token.
    Mean,
    /// The average of the neighbours on a square grid of tokens.
    Grid,
}

impl Base {
    fn name(self) -> &'static str {
        match self {
            Base::Identity => "identity",
            Base::Average => "average pool",
            Base::Max => "max pool",
            Base::Shift => "shift",
            Base::Mean => "mean token",
            Base::Grid => "grid average",
        }
    }
}

/// How bases become what a place gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A pointwise layer on every base.
    Layer,
    /// A factor and a constant per channel.
    Factors,
    /// A factor and a constant per channel that go into the pointwise layer after the place.
    Folded,
}

impl Form {
    /// The forms that are tried for bases of a place.
    pub fn of(place: &Place, bases: &[Base]) -> Vec<Form> {
        let mut forms = vec![Form::Layer];
        let one = bases.len() == 1 && matches!(place.layout, Layout::Image(_));
        match &place.second {
            Some(second) if one && second.inputs == place.inputs => forms.push(Form::Folded),
            None if one && place.inputs == place.outputs => forms.push(Form::Factors),
            _ => {}
        }
        forms
    }
}

/// What a choice is called: `average pool + identity, one layer`.
pub(super) fn name(bases: &[Base], form: Form) -> String {
    let names: Vec<&str> = bases.iter().map(|base| base.name()).collect();
    let form = match form {
        Form::Layer => "one layer",
        Form::Factors => "scaled",
        Form::Folded => "scaled in the next layer",
    };
    format!("{}, {form}", names.join(" + "))
}

/// What a place could be made of.
pub(super) fn bases(place: &Place) -> Vec<Base> {
    let mut all = vec![Base::Identity];
    match &place.layout {
        Layout::Image(window) => {
            all.extend([Base::Average, Base::Max]);
            let centre = |offset: &Vec<i64>| offset.iter().all(|&o| o == 0);
            all.extend(Some(Base::Shift).filter(|_| !window.shifts.iter().all(centre)));
        }
        Layout::Tokens(tokens) => {
            all.extend(tokens.is_some().then_some(Base::Mean));
            all.extend(tokens.is_some_and(|t| t.grid.is_some()).then_some(Base::Grid));
        }
    }
    all.truncate((MOST_FEATURES / place.inputs.max(1)).max(1));
    all
}

/// The sets of bases that are tried.
pub(super) fn combinations(all: &[Base]) -> Vec<Vec<Base>> {
    let wanted: [&[Base]; 9] = [
        &[Base::Identity],
        &[Base::Average],
        &[Base::Max],
        &[Base::Shift],
        &[Base::Identity, Base::Average],
        &[Base::Identity, Base::Average, Base::Max],
        &[Base::Identity, Base::Mean],
        &[Base::Identity, Base::Grid],
        &[Base::Identity, Base::Mean, Base::Grid],
    ];
    wanted.iter().filter(|bases| bases.iter().all(|base| all.contains(base))).map(|bases| bases.to_vec()).collect()
}

/// All bases of a place beside each other, added to a graph that holds what it reads.
pub(super) fn beside(graph: &mut Graph, place: &Place) -> ValueId {
    let all = bases(place);
    let made: Vec<ValueId> = all
        .iter()
        .map(|&base| {
            let value = emit(graph, place, base, place.reads);
            if base != Base::Mean {
                return value;
            }
            let shape = append(graph, Node::new("Shape"), &[place.reads]);
            append(graph, Node::new("Expand"), &[value, shape])
        })
        .collect();
    match made.as_slice() {
        [one] => *one,
        several => append(graph, Node::new("Concat").with("axis", place.axis()), several),
    }
}

/// The graph that gives what a place gave, from one input.
pub(super) fn fragment(from: &Graph, place: &Place, bases: &[Base], fit: &Fit, form: Form) -> Graph {
    let mut graph = Graph::new("piece");
    let input = graph.add_value(from.value(place.reads).name.clone(), None);
    graph.add_input(ScopeId::MAIN, input);
    let bias: Vec<f32> = fit.bias.iter().map(|&x| x as f32).collect();
    let mut sum: Option<ValueId> = None;
    for (at, &base) in bases.iter().enumerate() {
        let steps = match &place.layout {
            // A layer takes every so many pixels itself.
            Layout::Image(window) if base == Base::Identity => window.strides.clone(),
            _ => Vec::new(),
        };
        let made = if base == Base::Identity { input } else { emit(&mut graph, place, base, input) };
        let part = fit.matrix.as_ref().subrows(at * place.inputs, place.inputs);
        let product = match &place.layout {
            Layout::Image(window) => {
                let ones = vec![1; window.kernel.len()];
                let (dims, weights) = match form {
                    Form::Factors => ([place.outputs, 1], (0..place.outputs).map(|i| part[(i, i)] as f32).collect()),
                    _ => ([place.outputs, place.inputs], numbers(part.transpose())),
                };
                let dims: Vec<usize> = dims.into_iter().chain(ones).collect();
                let mut node = Node::new("Conv").with("kernel_shape", vec![1i64; window.kernel.len()]);
                if form == Form::Factors {
                    node = node.with("group", place.outputs as i64);
                }
                if steps.iter().any(|&s| s != 1) {
                    node = node.with("strides", steps);
                }
                let mut inputs = vec![made, constant(&mut graph, Tensor::from_f32s(&dims, &weights))];
                if sum.is_none() {
                    inputs.push(constant(&mut graph, Tensor::from_f32s(&[place.outputs], &bias)));
                }
                append(&mut graph, node, &inputs)
            }
            Layout::Tokens(_) => {
                let weights = Tensor::from_f32s(&[place.inputs, place.outputs], &numbers(part));
                let weights = constant(&mut graph, weights);
                let product = append(&mut graph, Node::new("MatMul"), &[made, weights]);
                if sum.is_some() {
                    product
                } else {
                    let bias = constant(&mut graph, Tensor::from_f32s(&[place.outputs], &bias));
                    append(&mut graph, Node::new("Add"), &[product, bias])
                }
            }
        };
        sum = Some(match sum {
            Some(sum) => append(&mut graph, Node::new("Add"), &[sum, product]),
            None => product,
        });
    }
    graph.add_output(ScopeId::MAIN, sum.expect("there is a base at least"));
    graph
}

fn append(graph: &mut Graph, node: Node, inputs: &[ValueId]) -> ValueId {
    graph.append(ScopeId::MAIN, node, inputs, "substitute")
}

fn constant(graph: &mut Graph, tensor: Tensor) -> ValueId {
    let name = graph.fresh_name("substitute");
    graph.add_initializer(ScopeId::MAIN, &name, tensor)
}

/// Makes a base of a value.
fn emit(graph: &mut Graph, place: &Place, base: Base, x: ValueId) -> ValueId {
    match &place.layout {
        Layout::Image(window) => {
            let plain = window.strides.iter().all(|&s| s == 1);
            let pool = |op: &str| {
                let node = Node::new(op).with("kernel_shape", window.kernel.clone()).with("pads", window.pads());
                if plain { node } else { node.with("strides", window.strides.clone()) }
            };
            match base {
                Base::Average => append(graph, pool("AveragePool").with("count_include_pad", 1i64), &[x]),
                Base::Max => append(graph, pool("MaxPool"), &[x]),
                Base::Shift => {
                    let first = &window.shifts[0];
                    if plain && window.shifts.iter().all(|shift| shift == first) {
                        // Cut away on the side that is moved to, and filled with zeros on the other.
                        let before = first.iter().map(|o| -o);
                        let pads: Vec<i64> =
                            [0, 0].into_iter().chain(before).chain([0, 0]).chain(first.iter().copied()).collect();
                        let pads = constant(graph, Tensor::int64s(&pads));
                        return append(graph, Node::new("Pad"), &[x, pads]);
                    }
                    let size: i64 = window.kernel.iter().product();
                    let mut weights = vec![0f32; place.inputs * size as usize];
                    for (channel, shift) in window.shifts.iter().enumerate() {
                        let at = shift.iter().zip(&window.kernel).fold(0, |at, (o, k)| at * k + o + (k - 1) / 2);
                        weights[channel * size as usize + at as usize] = 1.0;
                    }
                    let kernel = window.kernel.iter().map(|&k| k as usize);
                    let dims: Vec<usize> = [place.inputs, 1].into_iter().chain(kernel).collect();
                    let weights = constant(graph, Tensor::from_f32s(&dims, &weights));
                    let mut node = Node::new("Conv").with("group", place.inputs as i64).with("pads", window.pads());
                    if !plain {
                        node = node.with("strides", window.strides.clone());
                    }
                    append(graph, node, &[x, weights])
                }
                _ if plain => x,
                _ => {
                    let ones = vec![1i64; window.kernel.len()];
                    let node = Node::new("MaxPool").with("kernel_shape", ones).with("strides", window.strides.clone());
                    append(graph, node, &[x])
                }
            }
        }
        Layout::Tokens(tokens) => match (base, tokens.and_then(|t| t.grid)) {
            (Base::Mean, _) => {
                let mean = Node::new("ReduceMean").with("keepdims", 1i64);
                if place.opset < AXES_ARE_INPUTS {
                    return append(graph, mean.with("axes", vec![1i64]), &[x]);
                }
                let axis = constant(graph, Tensor::int64s(&[1]));
                append(graph, mean, &[x, axis])
            }
            (Base::Grid, Some(grid)) => {
                let mut ints = |numbers: &[i64]| constant(graph, Tensor::int64s(numbers));
                let [zero, front, end, axis] = [0, grid.front as i64, i64::MAX, 1].map(|n| ints(&[n]));
                let square = ints(&[0, place.inputs as i64, grid.side as i64, grid.side as i64]);
                let flat = ints(&[0, place.inputs as i64, -1]);
                let turn = || Node::new("Transpose").with("perm", vec![0i64, 2, 1]);
                let rest = append(graph, Node::new("Slice"), &[x, front, end, axis]);
                let turned = append(graph, turn(), &[rest]);
                let image = append(graph, Node::new("Reshape"), &[turned, square]);
                let pool = Node::new("AveragePool").with("kernel_shape", vec![3i64; 2]).with("pads", vec![1i64; 4]);
                let pooled = append(graph, pool, &[image]);
                let row = append(graph, Node::new("Reshape"), &[pooled, flat]);
                let row = append(graph, turn(), &[row]);
                if grid.front == 0 {
                    return row;
                }
                let first = append(graph, Node::new("Slice"), &[x, zero, front, axis]);
                append(graph, Node::new("Concat").with("axis", 1i64), &[first, row])
            }
            _ => x,
        },
    }
}
