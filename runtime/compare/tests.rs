use super::*;

fn one(name: &str, tensor: Tensor) -> Vec<(String, Datum)> {
    vec![(name.to_owned(), tensor.into())]
}

fn floats(values: &[f32]) -> Vec<(String, Datum)> {
    one("y", Tensor::from_f32s(&[values.len()], values))
}

fn faults(a: &[(String, Datum)], b: &[(String, Datum)], claim: Claim) -> Vec<String> {
    compare(a, b, claim).faults.iter().map(ToString::to_string).collect()
}

const EQUIVALENT: Claim = Claim::Equivalent { rtol: None };

#[test]
fn negative_zero_breaks_identity_only() {
    let (a, b) = (floats(&[0.0, 1.0]), floats(&[-0.0, 1.0]));
    assert_eq!(compare(&a, &b, Claim::Identical).faults.len(), 1);
    assert!(compare(&a, &b, EQUIVALENT).faults.is_empty());
}

#[test]
fn any_nan_is_like_any_other() {
    let (a, b) = (floats(&[f32::NAN, 1.0]), floats(&[-f32::NAN, 1.0]));
    assert!(compare(&a, &b, Claim::Identical).faults.is_empty());
}

#[test]
fn an_infinity_must_stay_where_it_is() {
    let (a, b) = (floats(&[f32::INFINITY, 1.0]), floats(&[f32::MAX, 1.0]));
    let result = compare(&a, &b, EQUIVALENT);
    assert_eq!(
        faults(&a, &b, EQUIVALENT),
        ["output `y`: 1 elements are NaN or infinite in only one of the two, first inf and 3.4028234663852886e38 at 0"]
    );
    assert_eq!(result.outputs[0].max_abs, f64::INFINITY);
    assert!(compare(&a, &a, Claim::Identical).faults.is_empty());
}

#[test]
fn relative_error_is_measured_over_the_whole_output() {
    let result = compare(&floats(&[3.0, 4.0]), &floats(&[3.0, 4.5]), EQUIVALENT);
    let error = &result.outputs[0];
    assert!((error.rel_l2 - 0.1).abs() < 1e-12 && (error.max_abs - 0.5).abs() < 1e-12);
    assert_eq!(error.top1, Some(1.0));
    assert_eq!(result.faults[0].to_string(), "output `y`: the relative L2 error is 1.000e-1, the limit 1.0e-4");
    let loose = Claim::Equivalent { rtol: Some(0.2) };
    assert!(compare(&floats(&[3.0, 4.0]), &floats(&[3.0, 4.5]), loose).faults.is_empty());
}

#[test]
fn whole_numbers_and_strings_are_exact_under_any_claim() {
    let (a, b) = (one("y", Tensor::int64s(&[1, 2])), one("y", Tensor::int64s(&[1, 3])));
    assert_eq!(faults(&a, &b, EQUIVALENT), ["output `y`: 1 of 2 elements differ, by at most 1"]);
    let text = |s: &'static str| one("y", Tensor::strings(vec![1], vec![s.into()]).unwrap());
    assert_eq!(faults(&text("a"), &text("b"), EQUIVALENT), ["output `y`: 1 of 1 strings differ"]);
}

#[test]
fn sequences_are_compared_member_by_member() {
    let sequence = |v: f32| {
        let members = vec![Tensor::from_f32s(&[1], &[1.0]).into(), Tensor::from_f32s(&[1], &[v]).into()];
        vec![("y".to_owned(), Datum::Sequence(members))]
    };
    assert!(compare(&sequence(2.0), &sequence(2.0), Claim::Identical).faults.is_empty());
    let found = faults(&sequence(2.0), &sequence(3.0), Claim::Identical);
    assert_eq!(found, ["output `y`: member 1: 1 of 1 elements have other bits, at most 1.000e0 apart"]);
}

#[test]
fn shapes_and_names_must_agree() {
    let (a, b) = (floats(&[1.0]), floats(&[1.0, 2.0]));
    assert_eq!(faults(&a, &b, EQUIVALENT), ["output `y`: expected float[1], found float[2]"]);
    let renamed = one("z", Tensor::from_f32s(&[1], &[1.0]));
    assert_eq!(faults(&a, &renamed, EQUIVALENT), ["expected the output `y`, found `z`"]);
}

#[test]
fn small_numbers_are_compared_with_their_own_size() {
    let error = |a: &Tensor, b: &Tensor| {
        let found = compare(&one("y", a.clone()), &one("y", b.clone()), EQUIVALENT);
        assert_eq!(found.too_far(), ["y"]);
        found.outputs[0].rel_l2
    };
    let doubles = |values: &[f64]| Tensor::from_f64s(DataType::Double, &[values.len()], values).unwrap();
    let singles = |values: &[f32]| Tensor::from_f32s(&[values.len()], values);
    assert!((error(&singles(&[1e-8, 0.0]), &singles(&[-3e-8, 0.0])) - 4.0).abs() < 1e-6);
    assert_eq!(error(&singles(&[0.0, 0.0]), &singles(&[0.0, 6e-8])), f64::INFINITY);
    assert_eq!(error(&doubles(&[1e-30]), &doubles(&[0.0])), 1.0);
    assert!((error(&doubles(&[1e-200]), &doubles(&[3e-200])) - 2.0).abs() < 1e-12);
    assert!((error(&doubles(&[1e200]), &doubles(&[3e200])) - 2.0).abs() < 1e-12);
}

#[test]
fn an_excuse_takes_a_fault_away_and_is_kept() {
    let mut found = compare(&floats(&[1.0, 0.0]), &floats(&[2.0, 0.0]), EQUIVALENT);
    found.excuse("y", Excuse::Rounding { error: 0.5, noise: 0.25 });
    assert!(found.holds());
    // The error is still told, and the excuse that uses most of what is allowed.
    let mut worse = compare(&floats(&[1.0, 0.0]), &floats(&[3.0, 0.0]), EQUIVALENT);
    let excuse = Excuse::Rounding { error: 1.0, noise: 0.25 };
    worse.excuse("y", excuse);
    found.merge(worse);
    found.merge(compare(&floats(&[1.0]), &floats(&[1.0]), EQUIVALENT));
    let worst = found.worst().unwrap();
    assert_eq!((worst.rel_l2, worst.excuse), (2.0, Some(excuse)));
    let text = serde_json::to_string(&found).unwrap();
    assert_eq!(serde_json::from_str::<Comparison>(&text).unwrap(), found);
}

#[test]
fn the_worst_output_is_measured_by_its_own_bound() {
    let half = |v: f64| Tensor::from_f64s(DataType::Float16, &[1], &[v]).unwrap();
    let pair =
        |v: f64, w: f32| vec![("h".to_owned(), half(v).into()), ("f".to_owned(), Tensor::from_f32s(&[1], &[w]).into())];
    let found = compare(&pair(1.0, 1.0), &pair(1.001, 1.00009), EQUIVALENT);
    let worst = found.worst().unwrap();
    assert_eq!((worst.name.as_str(), worst.limit), ("f", Some(1e-4)));
    let found = compare(&pair(1.0, 1.0), &pair(1.001, 1.00001), EQUIVALENT);
    assert_eq!(found.worst().map(|o| (o.name.as_str(), o.limit)), Some(("h", Some(2e-3))));
}

#[test]
fn of_unsteady_outputs_only_the_form_is_compared() {
    let unsteady = |shape: bool| Unsteadies::from([("y".to_owned(), Unsteady { reason: "so".to_owned(), shape })]);
    let form = |a: &[f32], b: &[f32], shape: bool| {
        compare_steady(&floats(a), &floats(b), EQUIVALENT, &unsteady(shape)).holds()
    };
    assert!(form(&[1.0], &[2.0], false) && form(&[1.0], &[2.0, 3.0], true));
    assert!(!form(&[1.0], &[2.0, 3.0], false));
    let other = compare_steady(&floats(&[1.0]), &one("y", Tensor::int64s(&[1])), EQUIVALENT, &unsteady(true));
    assert_eq!(other.describe_faults(), "output `y`: expected float[1], found int64[1]");
    assert!(compare_steady(&floats(&[1.0]), &floats(&[2.0]), EQUIVALENT, &unsteady(false)).worst().is_none());
}

#[test]
fn large_whole_numbers_are_told_apart() {
    let (a, b) = (one("y", Tensor::int64s(&[i64::MAX])), one("y", Tensor::int64s(&[i64::MAX - 1])));
    assert_eq!(faults(&a, &b, EQUIVALENT), ["output `y`: 1 of 1 elements differ, by at most 1"]);
}

#[test]
fn infinite_errors_survive_json() {
    let result = compare(&floats(&[f32::INFINITY]), &floats(&[1.0]), EQUIVALENT);
    let text = serde_json::to_string(&result).unwrap();
    assert_eq!(serde_json::from_str::<Comparison>(&text).unwrap(), result);
}

#[test]
fn samples_are_joined_by_the_worst_of_each() {
    let mut all = compare(&floats(&[1.0, 2.0]), &floats(&[1.0, 2.0]), EQUIVALENT);
    all.merge(compare(&floats(&[1.0, 2.0]), &floats(&[2.0, 1.0]), EQUIVALENT));
    assert_eq!((all.outputs[0].top1, all.outputs[0].max_abs, all.outputs[0].rows), (Some(0.5), 1.0, 2));
    assert_eq!(all.faults.len(), 1);
}
