//! A layer of four experts, of which every token has two; one expert gives nothing.

use super::*;
use crate::{PassContext, testing::model};
use lathe_analysis::{EvaluateError, Gram, Moments, Spread};
use lathe_ir::{Tensor, Type};

const TOKENS: usize = 24;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 11) % 23) as f32 / 8.0 - 1.375).collect()
}

fn list(numbers: &[f32]) -> String {
    numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", ")
}

/// `useless` is the expert whose second table is zero.
fn layer_of(useless: usize) -> Model {
    let mut down = numbers(16, 2);
    down[useless * 4..useless * 4 + 4].fill(0.0);
    let mut model = model(&format!(
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[T,2] x) => (float[T,2] y) <
            float[2,4] router = {{{}}}, int64[1] k = {{2}}, int64[1] one = {{1}}, int64[1] last = {{-1}},
            int64[3] wide = {{1, 2, 1}}, int64[3] rows = {{-1, 1, 2}}, int64[2] each = {{-1, 1}},
            int64[3] pairs = {{-1, 2, 2}}, float[4,2,2] up = {{{}}}, float[4,2,2] down = {{{}}}
        > {{
            scores = MatMul (x, router)
            p = Softmax <axis = -1> (scores)
            w, ids = TopK <axis = -1> (p, k)
            flat = Reshape (ids, last)
            alone = Unsqueeze (x, one)
            wider = Expand (alone, wide)
            row = Reshape (wider, rows)
            g1 = Gather <axis = 0> (up, flat)
            h = MatMul (row, g1)
            r = Relu (h)
            g2 = Gather <axis = 0> (down, flat)
            yr = MatMul (r, g2)
            yf = Squeeze (yr, one)
            wc = Reshape (w, each)
            yw = Mul (yf, wc)
            y3 = Reshape (yw, pairs)
            y = ReduceSum <keepdims = 0> (y3, one)
        }}",
        list(&numbers(8, 1)),
        list(&numbers(16, 3)),
        list(&down),
    ));
    let group = crate::exact::PASSES.iter().find(|pass| pass.info().name == "group-experts").unwrap();
    let outcome = group.apply(&mut model, &PassContext::default()).unwrap();
    assert_eq!(outcome.changes.len(), 1, "{:?}", outcome.refusals);
    model
}

fn run(model: &Model, gates: &[(String, f32)], tokens: usize) -> Vec<f64> {
    let mut inputs = vec![("x".to_owned(), Tensor::from_f32s(&[tokens, 2], &numbers(2 * tokens, 5)))];
    inputs.extend(gates.iter().map(|(name, number)| (name.clone(), Tensor::from_f32s(&[], &[*number]))));
    lathe_testkit::evaluator().run(model, &inputs).unwrap().remove(0).1.to_f64s().unwrap()
}

struct Runs(Model);

impl Calibrate for Runs {
    fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
        Ok(None)
    }

    fn moments(&self, _: &Rows) -> Result<Option<Moments>, EvaluateError> {
        Ok(None)
    }

    fn trials(&self, variant: &Model, gates: &[Vec<(String, f32)>]) -> Result<Vec<f64>, EvaluateError> {
        let whole = run(&self.0, &[], TOKENS);
        Ok(gates.iter().map(|gates| off(&whole, &run(variant, gates, TOKENS))).collect())
    }

    fn spreads_of(&self, model: &Model, rows: &[Rows]) -> Result<Vec<Option<Spread>>, EvaluateError> {
        let spread = |rows: &Rows| {
            let mut shown = model.clone();
            let value = shown.graph.find_value(&rows.value).unwrap();
            let copy = shown.graph.append(ScopeId::MAIN, Node::new("Identity"), &[value], "shown");
            shown.graph.value_mut(copy).ty = Some(Type::unshaped(DataType::Float));
            shown.graph.remove_output(ScopeId::MAIN, 0);
            shown.graph.add_output(ScopeId::MAIN, copy);
            let all: Vec<f32> = run(&shown, &[], TOKENS).into_iter().map(|x| x as f32).collect();
            let mut sums = vec![0.0; 3 * Spread::BINS];
            Spread::add(&mut sums, all.iter().copied());
            let (least, largest) =
                all.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &x| (a.min(x.into()), b.max(x.into())));
            Spread::new(least, largest, &sums)
        };
        Ok(rows.iter().map(spread).collect())
    }
}

fn off(whole: &[f64], found: &[f64]) -> f64 {
    whole.iter().zip(found).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / whole.iter().map(|a| a * a).sum::<f64>()
}

fn propose(model: &Model, quantity: Quantity) -> Proposal {
    let runs = Runs(model.clone());
    let cx = MethodContext::default().with_calibration(&runs).with_quantities(vec![quantity]);
    SkipExperts.propose(model, &cx).unwrap()
}

fn carry_out(model: &Model, skip: &Skip) -> Model {
    let mut changed = model.clone();
    layers(model)[0].apply(&mut changed, skip).unwrap();
    changed.check().unwrap();
    changed
}

/// What a layer gives if only some pairs are there, computed here from the pairs one by one.
fn expected(model: &Model, keep: impl Fn(usize, usize, f64) -> bool) -> Vec<f64> {
    let x = numbers(2 * TOKENS, 5);
    let get = |name: &str| model.graph.constant(model.graph.find_value(name).unwrap()).unwrap().to_f64s().unwrap();
    let router = get("router");
    let mut all = Vec::new();
    for token in 0..TOKENS {
        let x = [f64::from(x[2 * token]), f64::from(x[2 * token + 1])];
        let scores: Vec<f64> = (0..4).map(|e| x[0] * router[e] + x[1] * router[4 + e]).collect();
        let sum: f64 = scores.iter().map(|s| s.exp()).sum();
        let mut order: Vec<usize> = (0..4).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut y = [0.0; 2];
        for (slot, &expert) in order[..2].iter().enumerate() {
            let weight = scores[expert].exp() / sum;
            if !keep(slot, expert, weight) {
                continue;
            }
            let (up, down) = (get(&format!("up_expert_{expert}")), get(&format!("down_expert_{expert}")));
            let h: Vec<f64> = (0..2).map(|j| (x[0] * up[j] + x[1] * up[2 + j]).max(0.0)).collect();
            for (j, y) in y.iter_mut().enumerate() {
                *y += weight * (h[0] * down[j] + h[1] * down[2 + j]);
            }
        }
        all.extend(y);
    }
    all
}

fn near(found: &[f64], wanted: &[f64]) {
    let distance = off(wanted, found).sqrt();
    assert!(distance < 1e-5, "{distance}");
}

#[test]
fn nothing_skipped_is_the_layer_itself() {
    let model = layer_of(1);
    let whole = run(&model, &[], TOKENS);
    near(&whole, &expected(&model, |_, _, _| true));
    near(&run(&carry_out(&model, &Skip::Below(0.0)), &[], TOKENS), &whole);
    near(&run(&carry_out(&model, &Skip::Slots(2)), &[], TOKENS), &whole);
}

#[test]
fn pairs_that_are_left_out_add_nothing_and_the_others_stay() {
    let model = layer_of(1);
    let below = carry_out(&model, &Skip::Below(0.4));
    near(&run(&below, &[], TOKENS), &expected(&model, |_, _, weight| weight > 0.4));
    let first = carry_out(&model, &Skip::Slots(1));
    near(&run(&first, &[], TOKENS), &expected(&model, |slot, _, _| slot == 0));
    let fewer = carry_out(&model, &Skip::Experts(vec![0, 2]));
    near(&run(&fewer, &[], TOKENS), &expected(&model, |_, expert, _| expert == 1 || expert == 3));
    assert!(fewer.graph.find_value("up_expert_0").is_none_or(|v| fewer.graph.value(v).uses().is_empty()));
    // One token, and nobody served.
    assert_eq!(run(&below, &[], 1).len(), 2);
    assert!(run(&carry_out(&model, &Skip::Below(2.0)), &[], TOKENS).iter().all(|&y| y == 0.0));
}

#[test]
fn a_useless_expert_is_found_first() {
    for useless in 0..4 {
        let model = layer_of(useless);
        let proposal = propose(&model, Quantity::Flops);
        let [site] = proposal.sites.as_slice() else { panic!("{:?}", proposal.outcome) };
        let gone = |candidate: &&Candidate| *candidate.edit.of::<Skip>() == Skip::Experts(vec![useless]);
        let without = site.candidates.iter().find(gone).expect("the useless expert goes first");
        assert!(without.loss.measured().unwrap() < 1e-10);
        assert_eq!(without.cost.parameters, site.baseline.parameters * 3 / 4);
    }
}

#[test]
fn thresholds_lose_more_the_more_they_leave_out_and_say_what_is_left() {
    let model = layer_of(1);
    let proposal = propose(&model, Quantity::Latency);
    let site = &proposal.sites[0];
    let below: Vec<&Candidate> =
        site.candidates.iter().filter(|c| matches!(c.edit.of::<Skip>(), Skip::Below(_))).collect();
    assert!(below.len() > 3, "{below:?}");
    assert!(below.windows(2).all(|pair| pair[1].cost.flops_per_row <= pair[0].cost.flops_per_row), "{below:?}");
    for candidate in below {
        let Skip::Below(limit) = *candidate.edit.of::<Skip>() else { panic!() };
        let kept = std::cell::Cell::new(0usize);
        let wanted = expected(&model, |_, _, weight| {
            let stays = weight > f64::from(limit);
            kept.set(kept.get() + usize::from(stays));
            stays
        });
        let share = candidate.cost.flops_per_row as f64 / site.baseline.flops_per_row as f64;
        assert!((share - kept.get() as f64 / (2 * TOKENS) as f64).abs() < 0.01, "{}", candidate.label);
        let whole = run(&model, &[], TOKENS);
        assert!((candidate.loss.measured().unwrap() - off(&whole, &wanted)).abs() < 1e-6, "{}", candidate.label);
    }
}

#[test]
fn only_experts_that_go_save_bytes() {
    let proposal = propose(&layer_of(2), Quantity::Size);
    let all = &proposal.sites[0].candidates;
    assert!(!all.is_empty() && all.iter().all(|c| matches!(c.edit.of::<Skip>(), Skip::Experts(_))), "{all:?}");
}

#[test]
fn weights_of_experts_that_stay_have_fewer_rows() {
    let model = layer_of(0);
    let runs = Runs(model.clone());
    let cx = MethodContext::default().with_calibration(&runs).with_quantities(vec![Quantity::Flops]);
    let proposal = SkipExperts.propose(&model, &cx).unwrap();
    let site = &proposal.sites[0];
    let value = |name: &str| model.graph.find_value(name).unwrap();
    let half = site.candidates.iter().find(|c| *c.edit.of::<Skip>() == Skip::Slots(1)).unwrap();
    let effect = SkipExperts.effect_on_nested(&model, site, half, &cx).unwrap().unwrap();
    assert!((effect.rows[&value("up_expert_3")] - 0.5).abs() < 0.01);
    let without = site.candidates.iter().find(|c| *c.edit.of::<Skip>() == Skip::Experts(vec![0])).unwrap();
    let effect = SkipExperts.effect_on_nested(&model, site, without, &cx).unwrap().unwrap();
    assert!(!effect.rows.contains_key(&value("up_expert_0")) && effect.rows.contains_key(&value("up_expert_1")));
}
