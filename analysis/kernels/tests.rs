//! One line per behaviour: a node, its inputs and what comes out.

use super::*;
use lathe_ir::{DataType, Node, Tensor};

fn f(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_f32s(dims, values)
}

fn i(dims: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_i64s(dims, values)
}

fn b(values: &[bool]) -> Tensor {
    Tensor::from_bools(&[values.len()], values)
}

fn op(name: &str) -> Node {
    Node::new(name)
}

fn run_at(opset: i64, node: &Node, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let inputs: Vec<Option<&Tensor>> = inputs.iter().map(|&t| Some(t)).collect();
    evaluate(node, opset, &inputs, 1 << 20)
}

fn run(node: &Node, inputs: &[&Tensor]) -> Result<Tensor> {
    Ok(run_at(18, node, inputs)?.remove(0))
}

#[test]
fn computes_what_is_certain() {
    let six = f(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
    let cases: &[(Node, &[&Tensor], Tensor)] = &[
        (op("Reshape"), &[&six, &i(&[2], &[0, -1])], six.clone()),
        (op("Reshape"), &[&six, &i(&[1], &[-1])], f(&[6], &[1., 2., 3., 4., 5., 6.])),
        (op("Transpose"), &[&six], f(&[3, 2], &[1., 4., 2., 5., 3., 6.])),
        (op("Flatten").with("axis", 0), &[&six], f(&[1, 6], &[1., 2., 3., 4., 5., 6.])),
        (op("Unsqueeze"), &[&f(&[2], &[1., 2.]), &i(&[2], &[-1, 0])], f(&[1, 2, 1], &[1., 2.])),
        (
            op("Concat").with("axis", -1),
            &[&f(&[2, 1], &[0., 9.]), &f(&[2, 2], &[1., 2., 3., 4.])],
            f(&[2, 3], &[0., 1., 2., 9., 3., 4.]),
        ),
        (
            op("Slice"),
            &[&i(&[5], &[0, 1, 2, 3, 4]), &i(&[1], &[-1]), &i(&[1], &[i64::MIN]), &i(&[1], &[0]), &i(&[1], &[-2])],
            i(&[3], &[4, 2, 0]),
        ),
        (
            op("Slice"),
            &[&i(&[3], &[0, 1, 2]), &i(&[1], &[-9]), &i(&[1], &[-9]), &i(&[1], &[0]), &i(&[1], &[-1])],
            i(&[1], &[0]),
        ),
        (op("Slice"), &[&i(&[5], &[0, 1, 2, 3, 4]), &i(&[1], &[3]), &i(&[1], &[1])], i(&[0], &[])),
        (op("Gather").with("axis", 1), &[&six, &i(&[], &[-1])], f(&[2], &[3., 6.])),
        (op("Expand"), &[&i(&[2, 1], &[7, 8]), &i(&[1], &[2])], i(&[2, 2], &[7, 7, 8, 8])),
        (op("Tile"), &[&i(&[2], &[7, 8]), &i(&[1], &[2])], i(&[4], &[7, 8, 7, 8])),
        (op("Pad").with("mode", "reflect"), &[&i(&[3], &[1, 2, 3]), &i(&[2], &[2, 1])], i(&[6], &[3, 2, 1, 2, 3, 2])),
        (op("Pad"), &[&i(&[3], &[1, 2, 3]), &i(&[2], &[-1, 1]), &i(&[], &[9])], i(&[3], &[2, 3, 9])),
        (op("ConstantOfShape"), &[&i(&[1], &[2])], f(&[2], &[0., 0.])),
        (op("Shape").with("start", -1), &[&six], i(&[1], &[3])),
        (op("Range"), &[&i(&[], &[5]), &i(&[], &[0]), &i(&[], &[-2])], i(&[3], &[5, 3, 1])),
        (op("NonZero"), &[&b(&[true, false, true])], i(&[1, 2], &[0, 2])),
        (op("ScatterND"), &[&i(&[3], &[1, 2, 3]), &i(&[1, 1], &[-1]), &i(&[1], &[9])], i(&[3], &[1, 2, 9])),
        (op("Div"), &[&i(&[2], &[-7, 7]), &i(&[], &[2])], i(&[2], &[-3, 3])),
        (op("Mod"), &[&i(&[2], &[-7, 7]), &i(&[], &[3])], i(&[2], &[2, 1])),
        (op("Mod").with("fmod", 1), &[&i(&[2], &[-7, 7]), &i(&[], &[3])], i(&[2], &[-1, 1])),
        (op("Add"), &[&i(&[], &[i64::MAX]), &i(&[], &[1])], i(&[], &[i64::MIN])),
        (op("Round"), &[&f(&[3], &[0.5, 1.5, -2.5])], f(&[3], &[0., 2., -2.])),
        (op("Pow"), &[&f(&[2], &[3., 0.1]), &f(&[], &[2.])], f(&[2], &[9., 0.1 * 0.1])),
        (op("Clip"), &[&f(&[3], &[-1., 0.5, 9.]), &f(&[], &[0.]), &f(&[], &[1.])], f(&[3], &[0., 0.5, 1.])),
        (op("Cast").with("to", DataType::Int64), &[&f(&[3], &[-1.9, 1.9, 3e9])], i(&[3], &[-1, 1, 3_000_000_000])),
        (
            op("CumSum").with("exclusive", 1).with("reverse", 1),
            &[&i(&[3], &[1, 2, 3]), &i(&[], &[0])],
            i(&[3], &[5, 3, 0]),
        ),
        (op("ReduceSum").with("keepdims", 0), &[&six, &i(&[1], &[0])], f(&[3], &[5., 7., 9.])),
        (op("ReduceMax").with("axes", vec![1]), &[&six], f(&[2, 1], &[3., 6.])),
        (op("ArgMax").with("axis", 1), &[&i(&[1, 3], &[4, 9, 9])], i(&[1, 1], &[1])),
        (op("ArgMax").with("axis", 1).with("select_last_index", 1), &[&i(&[1, 3], &[4, 9, 9])], i(&[1, 1], &[2])),
        (op("Where"), &[&b(&[true, false]), &i(&[], &[1]), &i(&[2], &[8, 9])], i(&[2], &[1, 9])),
        (op("OneHot"), &[&i(&[2], &[1, -1]), &i(&[], &[3]), &i(&[2], &[0, 1])], i(&[2, 3], &[0, 1, 0, 0, 0, 1])),
        (op("Trilu").with("upper", 0), &[&i(&[2, 2], &[1, 2, 3, 4])], i(&[2, 2], &[1, 0, 3, 4])),
    ];
    for (node, inputs, expected) in cases {
        let opset = if node.ints("axes").is_some() { 13 } else { 18 };
        let found = run_at(opset, node, inputs).map(|mut all| all.remove(0));
        assert_eq!(found.as_ref(), Ok(expected), "{} {:?}", node.op_type, node.attributes);
    }
}

#[test]
fn declines_what_is_not_certain() {
    use Unsupported::*;
    let x = f(&[2], &[0.1, 0.2]);
    let nan = f(&[1], &[f32::NAN]);
    let (zero, minus_zero) = (f(&[1], &[0.0]), f(&[1], &[-0.0]));
    let cases: &[(Node, &[&Tensor], Unsupported)] = &[
        (op("Softmax"), &[&x], Operator),
        (op("Add").in_domain("com.example"), &[&x, &x], Operator),
        (op("Add").with("axis", 1), &[&x, &x], Form),
        (op("ReduceSum"), &[&x], NotExact),
        (op("Pow"), &[&x, &f(&[], &[0.5])], NotExact),
        (op("Div"), &[&i(&[], &[1]), &i(&[], &[0])], NotExact),
        (op("Max"), &[&x, &nan], NotExact),
        (op("Max"), &[&zero, &minus_zero], NotExact),
        (op("Where"), &[&b(&[true]), &minus_zero, &zero], NotExact),
        (op("Where"), &[&b(&[true]), &zero, &minus_zero], NotExact),
        (op("Clip"), &[&f(&[1], &[f32::INFINITY]), &f(&[], &[0.0])], NotExact),
        (
            op("Slice"),
            &[&i(&[3], &[1, 2, 3]), &i(&[1], &[2]), &i(&[1], &[i64::MAX]), &i(&[1], &[0]), &i(&[1], &[-1])],
            NotExact,
        ),
        (op("ReduceSum"), &[&i(&[2], &[i64::MAX, 1])], NotExact),
        (op("ReduceProd"), &[&i(&[3], &[1 << 40, 1 << 40, 0])], NotExact),
        (op("Sqrt"), &[&f(&[1], &[-1.0])], NotExact),
        (op("Cast").with("to", DataType::Int32), &[&f(&[1], &[3e9])], NotExact),
        (op("Cast").with("to", DataType::Float8E5M2), &[&x], Type),
        (op("Gather"), &[&x, &i(&[1], &[2])], Invalid),
        (op("Expand"), &[&x, &i(&[1], &[3])], Invalid),
        (op("Reshape"), &[&x, &i(&[2], &[-1, 0])], Invalid),
        (op("Reshape"), &[&x, &i(&[1], &[3])], Invalid),
        (op("ConstantOfShape"), &[&i(&[2], &[1 << 40, 1 << 40])], TooLarge { bytes: usize::MAX }),
        (op("ConstantOfShape"), &[&i(&[1], &[1 << 20])], TooLarge { bytes: 4 << 20 }),
        (op("Tile"), &[&x, &i(&[1], &[i64::MAX])], TooLarge { bytes: usize::MAX }),
        (op("ScatterND"), &[&i(&[2], &[1, 2]), &i(&[2, 1], &[0, 0]), &i(&[2], &[8, 9])], NotExact),
    ];
    for (node, inputs, expected) in cases {
        assert_eq!(run(node, inputs).as_ref(), Err(expected), "{} {:?}", node.op_type, node.attributes);
    }
}

#[test]
fn declines_attributes_of_a_caller() {
    let mut node = op("Concat");
    node.set_attribute("axis", AttributeValue::Reference { name: "axis".to_owned(), kind: 2 });
    assert_eq!(run(&node, &[&i(&[1], &[1])]), Err(Unsupported::Form));
}

#[test]
fn follows_the_opset() {
    let x = i(&[1, 2], &[1, 2]);
    let by_attribute = op("Squeeze").with("axes", vec![0]);
    assert_eq!(run_at(11, &by_attribute, &[&x]).unwrap(), [i(&[2], &[1, 2])]);
    assert_eq!(run_at(13, &by_attribute, &[&x]), Err(Unsupported::Form));
    assert_eq!(run_at(11, &op("Squeeze"), &[&x, &i(&[1], &[0])]), Err(Unsupported::Form));
    assert_eq!(run_at(0, &op("Squeeze"), &[&x]), Err(Unsupported::Form));
    assert_eq!(run_at(NEWEST_OPSET + 1, &op("Squeeze"), &[&x]), Err(Unsupported::Form));
    // Without broadcasting, equal shapes still add.
    assert_eq!(run_at(6, &op("Add"), &[&x, &x]).unwrap(), [i(&[1, 2], &[2, 4])]);
    assert_eq!(run_at(6, &op("Add"), &[&x, &i(&[], &[1])]), Err(Unsupported::Form));
}

#[test]
fn splits_unevenly_since_version_18() {
    let x = i(&[5], &[0, 1, 2, 3, 4]);
    let parts = run_at(18, &op("Split").with("num_outputs", 2), &[&x]).unwrap();
    assert_eq!(parts, [i(&[3], &[0, 1, 2]), i(&[2], &[3, 4])]);
    let parts = run_at(11, &op("Split").with("split", vec![1, 4]), &[&x]).unwrap();
    assert_eq!(parts, [i(&[1], &[0]), i(&[4], &[1, 2, 3, 4])]);
}

#[test]
fn top_k_prefers_the_lower_index() {
    let found = run_at(18, &op("TopK"), &[&i(&[4], &[5, 9, 5, 9]), &i(&[1], &[3])]).unwrap();
    assert_eq!(found, [i(&[3], &[9, 9, 5]), i(&[3], &[1, 3, 0])]);
}

#[test]
fn moves_every_element_type() {
    for dtype in (1..=28).filter_map(DataType::from_code) {
        let tensor = |dims: &[usize], cells: &[u8]| match dtype {
            DataType::String => {
                let strings = cells.iter().map(|c| c.to_string().into()).collect();
                Tensor::strings(dims.to_vec(), strings).unwrap()
            }
            _ if dtype.bits() >= 8 => {
                let bytes: Vec<u8> = cells.iter().flat_map(|&c| vec![c; dtype.bits() / 8]).collect();
                Tensor::new(dtype, dims.to_vec(), bytes).unwrap()
            }
            _ => Tensor::new(dtype, dims.to_vec(), elements::pack(cells, dtype.bits())).unwrap(),
        };
        let x = tensor(&[1, 3], &[1, 2, 3]);
        assert_eq!(transpose(&x, &[1, 0]).unwrap(), tensor(&[3, 1], &[1, 2, 3]), "{dtype}");
        assert_eq!(concat(&[&x, &x], 0).unwrap(), tensor(&[2, 3], &[1, 2, 3, 1, 2, 3]), "{dtype}");
        assert_eq!(take(&x, 1, &[2, 0]).unwrap(), tensor(&[1, 2], &[3, 1]), "{dtype}");
    }
}

#[test]
fn applies_by_name() {
    assert_eq!(apply("Mul", &[&f(&[2], &[1., 2.]), &f(&[], &[3.])]).unwrap(), f(&[2], &[3., 6.]));
    assert_eq!(cast(&f(&[1], &[1.5]), DataType::Float16).unwrap().to_f64s().unwrap(), [1.5]);
}
