//! The `ai.onnx.ml` domain.

use super::node::{Cx, Dims, Out, ValueType, known};
use crate::dim::DimExpr;
use lathe_ir::{AttributeValue, DataType};

/// The outputs of an operator of `ai.onnx.ml`.
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    let float = Some(DataType::Float);
    Some(match cx.node.op_type.as_str() {
        "Binarizer" | "Imputer" => vec![Out::of_type(&cx.ty(0))],
        "Normalizer" | "Scaler" => vec![Out::tensor(float, cx.dims(0))],
        "ArrayFeatureExtractor" => {
            let count = cx.shape(1).and_then(crate::dim::product);
            let dims = match cx.shape(0) {
                Some([_]) => Some(vec![known(1), count]),
                Some([lead @ .., _]) => Some(lead.iter().cloned().map(Some).chain([count]).collect()),
                _ => None,
            };
            vec![Out::tensor(cx.elem(0), dims)]
        }
        "CategoryMapper" => {
            let elem = match cx.elem(0)? {
                DataType::String => DataType::Int64,
                _ => DataType::String,
            };
            vec![Out::tensor(Some(elem), cx.dims(0))]
        }
        "LabelEncoder" => vec![Out::tensor(label_type(cx), cx.dims(0))],
        "LinearRegressor" => vec![Out::tensor(float, rows(cx, known(cx.int("targets", 1)?)))],
        "SVMRegressor" => vec![Out::tensor(float, rows(cx, known(1)))],
        "TreeEnsembleRegressor" => vec![Out::tensor(float, rows(cx, cx.maybe_int("n_targets")?.map(DimExpr::from)))],
        "TreeEnsemble" => vec![Out::tensor(cx.elem(0), rows(cx, cx.maybe_int("n_targets")?.map(DimExpr::from)))],
        "LinearClassifier" | "SVMClassifier" | "TreeEnsembleClassifier" => {
            let strings = ["classlabels_strings"]
                .iter()
                .any(|n| matches!(cx.attribute(n), Ok(Some(AttributeValue::Strings(s))) if !s.is_empty()));
            let label = if strings { DataType::String } else { DataType::Int64 };
            let dims = rows(cx, None).map(|dims| dims[..1].to_vec());
            vec![Out::tensor(Some(label), dims), Out::tensor(float, rows(cx, None))]
        }
        "OneHotEncoder" => {
            let count = match (cx.ints("cats_int64s")?, cx.attribute("cats_strings").ok()?) {
                (Some(cats), _) => i64::try_from(cats.len()).ok(),
                (None, Some(AttributeValue::Strings(cats))) => i64::try_from(cats.len()).ok(),
                _ => None,
            };
            let dims = cx.dims(0).map(|mut dims| {
                dims.push(count.map(DimExpr::from));
                dims
            });
            vec![Out::tensor(float, dims)]
        }
        "FeatureVectorizer" => {
            let width = cx.ints("inputdimensions")?.and_then(|all| all.iter().try_fold(0i64, |a, &b| a.checked_add(b)));
            vec![Out::tensor(float, rows(cx, width.map(DimExpr::from)))]
        }
        "ZipMap" => {
            let strings = matches!(cx.attribute("classlabels_strings"), Ok(Some(AttributeValue::Strings(_))));
            let key = if strings { DataType::String } else { DataType::Int64 };
            let value = Box::new(ValueType::Tensor { elem: float, dims: Some(Vec::new()) });
            vec![Out::sequence(ValueType::Map { key, value })]
        }
        _ => return None,
    })
}

/// One row per row of the input.
fn rows(cx: &Cx, columns: Option<DimExpr>) -> Option<Dims> {
    match cx.shape(0)? {
        [_] => Some(vec![None, columns]),
        [rows, _] => Some(vec![Some(rows.clone()), columns]),
        _ => Some(vec![None, columns]),
    }
}

fn label_type(cx: &Cx) -> Option<DataType> {
    let given = |name: &str| matches!(cx.attribute(name), Ok(Some(_)));
    if let Ok(Some(AttributeValue::Tensor(values))) = cx.attribute("values_tensor") {
        return Some(values.dtype());
    }
    if given("values_floats") {
        return Some(DataType::Float);
    }
    if given("values_int64s") {
        return Some(DataType::Int64);
    }
    if given("values_strings") {
        return Some(DataType::String);
    }
    // Version 1 maps between strings and whole numbers.
    match cx.elem(0)? {
        DataType::String if given("classes_strings") => Some(DataType::Int64),
        DataType::Int64 if given("classes_strings") => Some(DataType::String),
        _ => None,
    }
}
