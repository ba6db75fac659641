//! Compiled samplers beside the loops that they replace, on small denoisers in ONNX Runtime.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, ScopeId, Tensor, text};
use lathe_passes::sampler::{
    Adaptive, Condition, Form, Guidance, Kind, Mode, Pass, Ref, Request, RoleOptions, Roles, SOLVERS, Sampled, Sampler,
    Scale, Schedule, Scheduler, StepPlan, Steps, Substitution, Table, Uncond, emit, methods::easy, sample,
};
use serde_json::{Value, json};

/// The scheduler of a class with some settings.
fn scheduler(class: &str, settings: Value) -> Scheduler {
    let mut json = json!({ "_class_name": class });
    json.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    Scheduler::parse(&json, None).unwrap().0
}

/// Its table for this many steps.
fn table(class: &str, settings: Value, steps: usize) -> Table {
    Table::new(&scheduler(class, settings), &Request::steps(steps)).unwrap()
}

/// A denoiser with two blocks, a condition and a time; `n` samples of one channel of 2 by 2.
const TOY: &str = "g (float[n,1,2,2] x, float[n] t, int64[n] label) => (float[n,1,2,2] eps) <
    float[3,1] table = {0.3, -0.2, 0.1}, float[1] speed = {0.004}, int64[4] shape = {-1, 1, 1, 1},
    float[2,2] w1 = {0.4, -0.3, 0.2, 0.5}, float[2,2] w2 = {0.1, 0.6, -0.5, 0.2}
> {
    angle = Mul (t, speed)
    wave = Cos (angle)
    time = Reshape (wave, shape)
    [pick] row = Gather (table, label)
    cond = Reshape (row, shape)
    mix = Add (time, cond)
    p1 = MatMul (x, w1)
    a1 = Tanh (p1)
    m1 = Mul (a1, mix)
    h1 = Add (x, m1)
    p2 = MatMul (h1, w2)
    a2 = Tanh (p2)
    h2 = Add (h1, a2)
    eps = Mul (h2, time)
}";

fn model(graph: &str) -> Model {
    let model = text::parse(graph).unwrap_or_else(|error| panic!("{error}"));
    model.check().unwrap();
    model
}

struct Bench {
    denoiser: Model,
    roles: Roles,
    table: Table,
    plan: StepPlan,
    guidance: Guidance,
    inputs: Vec<(String, Tensor)>,
}

impl Bench {
    /// A denoiser and a table, guided if a scale is given.
    fn new(graph: &str, table: Table, guided: Option<f64>) -> Bench {
        let denoiser = model(graph);
        let said = if graph.contains("label") { vec!["uncond:label=2".to_owned()] } else { Vec::new() };
        let roles = Roles::infer(&denoiser, &RoleOptions::parse(&said).unwrap()).unwrap();
        let mode = if guided.is_some() { Mode::Guided } else { Mode::Conditional };
        let plan = StepPlan::plain("any", table.rows.iter().map(|r| r.time).collect(), mode);
        let guidance = Guidance { scale: Scale::Constant(guided.unwrap_or(1.0)), rescale: 0.0, batched: true };
        let noise =
            |count: usize, seed: f32| (0..count).map(|k| (k as f32 * 1.7 + seed).sin() * 1.4).collect::<Vec<_>>();
        let steps = table.noises();
        let inputs = vec![
            ("noise".to_owned(), Tensor::from_f32s(&[3, 1, 2, 2], &noise(12, 0.3))),
            ("step_noise".to_owned(), Tensor::from_f32s(&[steps, 3, 1, 2, 2], &noise(12 * steps, 0.7))),
            ("label".to_owned(), Tensor::int64s(&[0, 1, 1])),
            ("guidance".to_owned(), Tensor::from_f32s(&[], &[2.5])),
        ];
        Bench { denoiser, roles, table, plan, guidance, inputs }
    }

    fn sampler(&self) -> Sampler<'_> {
        let Bench { denoiser, roles, table, plan, guidance, .. } = self;
        Sampler { denoiser, roles, table, plan, guidance: *guidance }
    }

    fn emit(&self, form: Form) -> Model {
        emit(&self.sampler(), form, lathe_testkit::evaluator()).unwrap_or_else(|error| panic!("{error}"))
    }

    fn run(&self, model: &Model) -> Vec<(String, Tensor)> {
        let graph = &model.graph;
        let takes = |name: &str| graph.main().inputs().iter().any(|&v| graph.value(v).name == name);
        let inputs: Vec<_> = self.inputs.iter().filter(|(name, _)| takes(name)).cloned().collect();
        lathe_testkit::evaluator().run(model, &inputs).unwrap_or_else(|e| panic!("{e}\n{}", text::print(model)))
    }

    fn reference(&self) -> Sampled {
        sample(&self.sampler(), &self.denoiser, &self.inputs, lathe_testkit::evaluator(), &|_| {}).unwrap()
    }

    /// Compiles, runs, and expects what the loop gives.
    fn check(&self, form: Form) -> Model {
        let model = self.emit(form);
        let found = self.run(&model);
        let error = relative(&found[0].1, &self.reference().sample);
        assert!(error < 1e-5, "{form:?} of {:?}: {error}\n{}", self.table, text::print(&model));
        model
    }

    fn cut(mut self, step: usize, substitution: Substitution) -> Bench {
        self.plan.steps.entry(step).or_default().push(substitution);
        self
    }
}

fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (found.to_f64s().unwrap(), expected.to_f64s().unwrap());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    off / norm(&mut expected.iter().copied())
}

fn count(model: &Model, op: &str) -> usize {
    let graph = &model.graph;
    graph.all_nodes().into_iter().filter(|&id| graph.node(id).op_type == op).count()
}

fn ddim(steps: usize) -> Table {
    table("DDIMScheduler", json!({"clip_sample": false}), steps)
}

#[test]
fn every_solver_does_what_its_loop_does() {
    let cases: &[(&str, Value)] = &[
        ("DDIMScheduler", json!({})),
        (
            "DDIMScheduler",
            json!({"clip_sample": false, "prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing"}),
        ),
        ("DDIMScheduler", json!({"thresholding": true, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5})),
        ("DDPMScheduler", json!({})),
        ("DDPMScheduler", json!({"variance_type": "fixed_large", "prediction_type": "sample"})),
        ("EulerDiscreteScheduler", json!({})),
        ("EulerDiscreteScheduler", json!({"use_karras_sigmas": true, "prediction_type": "v_prediction"})),
        ("EulerAncestralDiscreteScheduler", json!({"timestep_spacing": "leading", "steps_offset": 1})),
        ("DPMSolverMultistepScheduler", json!({"thresholding": true})),
        ("DPMSolverMultistepScheduler", json!({"solver_order": 3, "use_karras_sigmas": true})),
        ("DPMSolverMultistepScheduler", json!({"solver_order": 3, "solver_type": "heun"})),
        ("DPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": true})),
        (
            "DPMSolverMultistepScheduler",
            json!({"use_flow_sigmas": true, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
        ),
        ("FlowMatchEulerDiscreteScheduler", json!({"shift": 3.0})),
        ("FlowMatchEulerDiscreteScheduler", json!({"stochastic_sampling": true})),
        ("LCMScheduler", json!({"clip_sample": true})),
        ("PNDMScheduler", json!({"skip_prk_steps": true, "steps_offset": 1})),
        ("PNDMScheduler", json!({"prediction_type": "v_prediction"})),
        ("HeunDiscreteScheduler", json!({"use_karras_sigmas": true})),
        ("HeunDiscreteScheduler", json!({"clip_sample": true, "prediction_type": "sample"})),
        ("KDPM2DiscreteScheduler", json!({"prediction_type": "v_prediction"})),
        ("KDPM2AncestralDiscreteScheduler", json!({"use_beta_sigmas": true})),
        ("DPMSolverSDEScheduler", json!({})),
        ("LMSDiscreteScheduler", json!({"timestep_spacing": "leading"})),
        (
            "DPMSolverMultistepScheduler",
            json!({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": true}),
        ),
        ("DPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"})),
        ("DPMSolverSinglestepScheduler", json!({"solver_order": 3, "solver_type": "heun"})),
        ("DPMSolverSinglestepScheduler", json!({"algorithm_type": "sde-dpmsolver++", "use_lu_lambdas": true})),
        ("UniPCMultistepScheduler", json!({"solver_order": 3, "thresholding": true})),
        (
            "UniPCMultistepScheduler",
            json!({"predict_x0": false, "final_sigmas_type": "sigma_min", "solver_type": "bh1"}),
        ),
        (
            "UniPCMultistepScheduler",
            json!({"use_flow_sigmas": true, "use_karras_sigmas": true, "prediction_type": "flow_prediction"}),
        ),
        ("DEISMultistepScheduler", json!({"solver_order": 3})),
        ("DEISMultistepScheduler", json!({"use_karras_sigmas": true, "thresholding": true})),
        ("SASolverScheduler", json!({})),
        (
            "SASolverScheduler",
            json!({"algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 4}),
        ),
        ("EDMEulerScheduler", json!({"prediction_type": "v_prediction"})),
        ("EDMDPMSolverMultistepScheduler", json!({"solver_order": 3, "thresholding": true})),
        ("EDMDPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver++"})),
        ("CosineDPMSolverMultistepScheduler", json!({})),
        ("FlowMatchHeunDiscreteScheduler", json!({"shift": 3.0})),
        ("LTXEulerAncestralRFScheduler", json!({"eta": 0.5})),
        ("FlowMatchLCMScheduler", json!({})),
        ("TCDScheduler", json!({})),
        ("CMStochasticIterativeScheduler", json!({})),
        ("SCMScheduler", json!({})),
        ("IPNDMScheduler", json!({})),
        ("CogVideoXDDIMScheduler", json!({})),
        (
            "CogVideoXDPMScheduler",
            json!({"prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "timestep_spacing": "trailing"}),
        ),
    ];
    let named = |class: &&str| cases.iter().any(|(known, _)| known == class);
    let missing: Vec<&str> = SOLVERS.iter().map(|solver| solver.info().class).filter(|class| !named(class)).collect();
    assert!(missing.is_empty(), "no case for {missing:?}");
    for (class, settings) in cases {
        let table = table(class, settings.clone(), 6);
        for guided in [None, Some(3.0)] {
            let bench = Bench::new(TOY, table.clone(), guided);
            bench.check(Form::Unrolled);
            bench.check(Form::Loop);
        }
    }
}

#[test]
fn second_evaluations_are_in_the_loop() {
    let loops = |class: &str, settings: Value, steps: usize, evaluated: usize| {
        let bench = Bench::new(TOY, table(class, settings, steps), None);
        let model = bench.check(Form::Loop);
        assert_eq!(count(&model, "Tanh"), 2 * evaluated, "{class}");
        count(&model, "Loop")
    };
    // Pairs of evaluations in the body, and the last step, which is one, behind it.
    for class in ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"] {
        assert_eq!(loops(class, json!({}), 8, 3), 1, "{class}");
    }
    // Three Runge-Kutta steps of four evaluations, then one at a time.
    assert_eq!(loops("PNDMScheduler", json!({}), 10, 5), 2);
    // The first step, its repetition, and the others.
    assert_eq!(loops("PNDMScheduler", json!({"skip_prk_steps": true}), 10, 3), 1);
    assert_eq!(loops("DPMSolverSinglestepScheduler", json!({"solver_order": 3}), 10, 4), 1);
}

#[test]
fn what_reaches_nothing_is_not_evaluated() {
    // The first output of IPNDM is multiplied by zero, wherever it goes; the last step of DEIS ends where it begins.
    let ipndm = Bench::new(TOY, table("IPNDMScheduler", json!({}), 5), None);
    assert_eq!(count(&ipndm.check(Form::Unrolled), "Tanh"), 2 * 4);
    let karras = json!({"use_karras_sigmas": true});
    let deis = Bench::new(TOY, table("DEISMultistepScheduler", karras, 5), None);
    assert_eq!(count(&deis.check(Form::Unrolled), "Tanh"), 2 * 4);
}

#[test]
fn solvers_with_several_evaluations_have_no_adaptive_form() {
    let mut bench = Bench::new(TOY, table("HeunDiscreteScheduler", json!({}), 8), None);
    bench.plan.adaptive = Some(Adaptive { threshold: 0.1, warmup: 2, tail: 1 });
    let refused = emit(&bench.sampler(), Form::Adaptive, lathe_testkit::evaluator()).unwrap_err();
    assert!(refused.to_string().contains("several times"), "{refused}");
}

/// A network that gives the clean sample of unscaled noise levels itself, as one of data of variance 0.25 with mean 0.
#[test]
fn networks_may_do_their_own_preconditioning() {
    const CLEAN: &str = "g (float[n,1,2,2] x, float[n] sigma) => (float[n,1,2,2] clean) <
        float[1] quarter = {0.25}, int64[4] shape = {-1, 1, 1, 1}
    > {
        square = Mul (sigma, sigma)
        all = Add (square, quarter)
        share = Div (quarter, all)
        factor = Reshape (share, shape)
        clean = Mul (x, factor)
    }";
    for class in ["EDMEulerScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler"] {
        let settings = json!({"clip_sample": false, "timestep_spacing": "trailing"});
        let s = scheduler(class, settings).preconditioned().unwrap();
        let table = Table::new(&s, &Request::steps(500)).unwrap();
        let mut bench = Bench::new(CLEAN, table, None);
        let said = ["time=sigma", "time-value=sigma", "predicts=clean"].map(str::to_owned);
        bench.roles = Roles::infer(&bench.denoiser, &RoleOptions::parse(&said).unwrap()).unwrap();
        bench.inputs.retain(|(name, _)| name == "noise");
        let found = bench.reference().sample.to_f64s().unwrap();
        let noise = bench.inputs[0].1.to_f64s().unwrap();
        // Noise of variance 1 becomes data of variance 0.25, but for the data's part in the first state.
        for (sample, noise) in found.iter().zip(&noise) {
            assert!((sample - 0.5 * noise).abs() < 0.03 * noise.abs(), "{class}: {sample} {noise}");
        }
    }
    assert!(scheduler("PNDMScheduler", json!({})).preconditioned().is_err());
    assert!(scheduler("FlowMatchEulerDiscreteScheduler", json!({})).preconditioned().is_err());
}

#[test]
fn passes_may_run_one_after_the_other_with_a_scale_that_is_an_input() {
    let mut bench = Bench::new(TOY, ddim(4), Some(3.0));
    bench.guidance = Guidance { scale: Scale::Input, rescale: 0.7, batched: false };
    bench.roles.conditions = vec![Condition { name: "label".to_owned(), uncond: Uncond::Input }];
    bench.inputs.push(("label_uncond".to_owned(), Tensor::int64s(&[2, 2, 0])));
    let model = bench.check(Form::Unrolled);
    let names: Vec<&str> = model.graph.main().inputs().iter().map(|&v| model.graph.value(v).name.as_str()).collect();
    assert_eq!(names, ["noise", "label", "label_uncond", "guidance"]);
    // What the passes have in common is computed once: the first block sees the condition late.
    assert_eq!(count(&model, "Tanh"), 4 * 3);
    bench.guidance.batched = true;
    assert_eq!(count(&bench.check(Form::Unrolled), "Tanh"), 4 * 2);
}

#[test]
fn time_is_worked_on_ahead_and_conditions_once() {
    let model = Bench::new(TOY, ddim(6), None).check(Form::Unrolled);
    assert_eq!((count(&model, "Cos"), count(&model, "Gather"), count(&model, "Tanh")), (0, 1, 12));
    // Weights are there once, and nothing of the time remains but a number for each step.
    let looped = Bench::new(TOY, ddim(6), None).check(Form::Loop);
    assert_eq!((count(&looped, "Loop"), count(&looped, "Tanh")), (1, 2));
    let bytes = |model: &Model| {
        model
            .graph
            .initializers(ScopeId::MAIN)
            .filter(|&v| model.graph.constant(v).is_some_and(|t| t.dims() == [2, 2]))
            .count()
    };
    assert_eq!((bytes(&model), bytes(&looped)), (2, 2));
}

#[test]
fn a_time_that_must_be_as_long_as_the_batch_is_made_so() {
    let graph = "g (float[n,2] x, float[n] t) => (float[n,2] eps) <int64[2] column = {-1, 1}, float[3,2] w = {0.1, 0.2, -0.3, 0.4, 0.0002, -0.0001}> {
        c = Reshape (t, column)
        all = Concat <axis = 1> (x, c)
        p = MatMul (all, w)
        eps = Tanh (p)
    }";
    let mut bench = Bench::new(graph, ddim(4), None);
    let shaped = |name: &str| (name.to_owned(), Tensor::from_f32s(&[3, 2], &[0.4, -1.0, 0.3, 2.0, -0.7, 0.1]));
    bench.inputs = vec![shaped("noise")];
    assert_eq!(count(&bench.check(Form::Unrolled), "Expand"), 4);
    bench.check(Form::Loop);
}

#[test]
fn a_time_that_is_joined_to_the_latent_is_as_long_as_the_batch() {
    let graph = "g (float[n,4] x, float[n] t) => (float[n,4] eps) <
        int64[1] one = {1}, float[1] speed = {0.004}, float[5,4] w = {
            0.1, 0.2, -0.3, 0.4, 0.5, -0.6, 0.7, 0.8, -0.9, 0.1, 0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.8, 0.9, 0.1, -0.2
        }
    > {
        slow = Mul (t, speed)
        column = Unsqueeze (slow, one)
        both = Concat <axis = -1> (x, column)
        h = MatMul (both, w)
        a = Tanh (h)
        eps = Add (a, x)
    }";
    // A sum with the latent has the batch's size even where the join would not have it.
    let mut bench = Bench::new(graph, ddim(3), None);
    bench.inputs = vec![("noise".to_owned(), Tensor::from_f32s(&[3, 4], &[0.3; 12]))];
    for form in [Form::Unrolled, Form::Loop] {
        assert!(count(&bench.check(form), "Expand") > 0);
    }
}

#[test]
fn substitutions_leave_out_what_they_replace() {
    let sub = |kind: Kind| Substitution::new("h2", kind);
    let tanhs = |kind: Kind| {
        let bench = Bench::new(TOY, ddim(5), Some(2.0)).cut(3, sub(kind));
        bench.check(Form::Loop);
        count(&bench.check(Form::Unrolled), "Tanh")
    };
    assert_eq!(tanhs(Kind::Reuse { from: 2 }), 8);
    assert_eq!(tanhs(Kind::Scale { from: 1, factor: 0.9 }), 8);
    assert_eq!(tanhs(Kind::Taylor { order: 1, refs: vec![2, 1] }), 8);
    assert_eq!(tanhs(Kind::Taylor { order: 2, refs: vec![2, 1, 0] }), 8);
    assert_eq!(tanhs(Kind::Lagrange { refs: vec![0, 2, 1] }), 8);
    // What a block adds is kept; the block before it still runs.
    assert_eq!(tanhs(Kind::Delta { input: "h1".to_owned(), from: 2 }), 9);
    // A sum that holds the step itself computes it.
    let own = Kind::Affine { refs: vec![Ref::from(3), Ref::from(2)], coefs: vec![1.3, -0.3] };
    assert_eq!(tanhs(own), 10);
}

#[test]
fn sums_hold_any_tensor() {
    let tanhs = |refs: Vec<Ref>, coefs: Vec<f64>| {
        let sum = Substitution::new("eps", Kind::Affine { refs, coefs });
        let bench = Bench::new(TOY, ddim(5), Some(2.0)).cut(3, sum);
        bench.check(Form::Loop);
        count(&bench.check(Form::Unrolled), "Tanh")
    };
    // The latent costs nothing, at this step or an earlier one.
    assert_eq!(tanhs(vec![Ref::of("x", 3), Ref::of("x", 1), Ref::from(2)], vec![0.5, -0.2, 0.9]), 8);
    assert_eq!(tanhs(vec![Ref::of("x", 3)], vec![0.5]), 8);
    // A tensor inside is computed with what it needs, and nothing behind it.
    assert_eq!(tanhs(vec![Ref::of("h1", 3), Ref::from(1), Ref::of("h1", 2)], vec![0.4, 0.3, 0.2]), 9);
    assert_eq!(tanhs(vec![Ref::from(3), Ref::of("x", 3)], vec![0.7, 0.1]), 10);
    // Every step the same, one back: a loop that carries the latent.
    let mut bench = Bench::new(TOY, ddim(9), None);
    for step in (2..9).step_by(2) {
        let refs = vec![Ref::of("x", step), Ref::of("x", step - 1), Ref::from(step - 1)];
        let sum = Kind::Affine { refs, coefs: vec![1.0, -1.0, 1.0] };
        bench.plan.steps.insert(step, vec![Substitution::new("eps", sum)]);
    }
    assert_eq!(count(&bench.check(Form::Loop), "Loop"), 1);
    assert_eq!(count(&bench.check(Form::Unrolled), "Tanh"), 2 * 5);
}

#[test]
fn the_rule_run_ahead_gives_what_it_gives_at_run_time() {
    for class in
        ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
    {
        for guided in [None, Some(2.0)] {
            let mut bench = Bench::new(TOY, table(class, json!({}), 10), guided);
            bench.plan.adaptive = Some(Adaptive { threshold: f64::INFINITY, warmup: 4, tail: 2 });
            let decided = bench.reference();
            bench.plan.adaptive = None;
            easy(&mut bench.plan, &bench.table, "x", "eps", &decided.computed).unwrap();
            assert_eq!(bench.plan.steps.len(), 4);
            assert!(relative(&bench.reference().sample, &decided.sample) < 1e-5, "{class}");
            bench.check(Form::Loop);
            assert_eq!(count(&bench.check(Form::Unrolled), "Tanh"), 2 * 6, "{class}");
        }
    }
}

#[test]
fn passes_have_substitutions_of_their_own() {
    let cond = |step: usize| Ref { pass: Some(Pass::Cond), ..Ref::from(step) };
    let uncond = Kind::Affine { refs: vec![cond(2), cond(1), Ref::from(1)], coefs: vec![0.8, -0.6, 0.7] };
    let estimate = Substitution { cut: "eps".to_owned(), pass: Some(Pass::Uncond), kind: uncond };
    let mut bench = Bench::new(TOY, ddim(5), Some(2.0)).cut(2, estimate);
    bench.plan.cfg[3] = Mode::Conditional;
    bench.plan.cfg[4] = Mode::Scaled(1.5);
    let reused = Substitution::new("h1", Kind::Reuse { from: 2 });
    let model = bench.check(Form::Unrolled);
    // Batches of both, or both in turns where one leaves something for the other, and the conditional pass alone.
    assert_eq!(count(&model, "Tanh"), 10);
    // A cache that was kept for both passes serves one of them later.
    let mut gated = Bench::new(TOY, ddim(5), Some(2.0)).cut(3, reused);
    gated.plan.cfg[3] = Mode::Conditional;
    assert_eq!(count(&gated.check(Form::Unrolled), "Tanh"), 9);
}

#[test]
fn periodic_plans_become_loops() {
    let mut bench = Bench::new(TOY, ddim(12), Some(2.0));
    for step in (2..12).filter(|s| s % 2 == 1) {
        let refs = vec![step - 1, step - 3];
        bench.plan.steps.insert(step, vec![Substitution::new("h2", Kind::Taylor { order: 1, refs })]);
    }
    let unrolled = bench.check(Form::Unrolled);
    let looped = bench.check(Form::Loop);
    assert_eq!(count(&unrolled, "Tanh"), 2 * 7);
    assert_eq!(count(&looped, "Loop"), 1);
    assert!(count(&looped, "Tanh") <= 6, "{}", count(&looped, "Tanh"));
    // A later step that asks for one inside a loop keeps the last iteration.
    let late = Bench::new(TOY, ddim(8), None).cut(7, Substitution::new("h2", Kind::Reuse { from: 6 }));
    late.check(Form::Loop);
}

#[test]
fn the_adaptive_form_follows_the_rule() {
    for class in
        ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
    {
        for guided in [None, Some(2.0)] {
            let mut bench = Bench::new(TOY, table(class, json!({}), 12), guided);
            let mut computed = |threshold: f64| {
                bench.plan.adaptive = Some(Adaptive { threshold, warmup: 3, tail: 1 });
                let model = bench.check(Form::Adaptive);
                let found = bench.run(&model);
                let decisions: Vec<bool> = found[1].1.to_i64s().unwrap().iter().map(|&c| c != 0).collect();
                assert_eq!(decisions, bench.reference().computed);
                decisions.iter().filter(|&&c| c).count()
            };
            assert_eq!(computed(0.0), 12);
            assert_eq!(computed(f64::INFINITY), 4);
            let some = computed(0.4);
            assert!((4..=12).contains(&some), "{class}: {some}");
        }
    }
}

#[test]
fn half_precision_networks_are_updated_in_single() {
    let graph = TOY.replace("float[", "float16[").replace("float16[n] t", "float[n] t");
    let graph = graph.replace("angle = Mul (t, speed)", "th = Cast <to = 10> (t) angle = Mul (th, speed)");
    let bench = Bench::new(&graph, ddim(4), Some(2.0));
    let error = relative(&bench.run(&bench.emit(Form::Unrolled))[0].1, &bench.reference().sample);
    assert!(error < 5e-3, "{error}");
}

#[test]
fn a_variance_is_cut_off() {
    let graph = "g (float[n,1,2,2] x, int64 t) => (float[n,2,2,2] both) {
        a = Tanh (x)
        both = Concat <axis = 1> (a, x)
    }";
    Bench::new(graph, ddim(3), None).check(Form::Unrolled);
}

#[test]
fn what_cannot_be_compiled_is_refused() {
    let refused = |edit: &dyn Fn(&mut Bench), form: Form| {
        let mut bench = Bench::new(TOY, ddim(3), Some(2.0));
        edit(&mut bench);
        emit(&bench.sampler(), form, lathe_testkit::evaluator()).unwrap_err().to_string()
    };
    let same = |bench: &mut Bench| bench.roles.conditions[0].uncond = Uncond::Same;
    assert!(refused(&same, Form::Unrolled).contains("uncond:NAME=VALUE"));
    assert!(refused(&|bench| bench.table = ddim(4), Form::Unrolled).contains("3 steps and the solver 4"));
    assert!(refused(&|_| {}, Form::Adaptive).contains("go together"));
    assert!(refused(&|bench| bench.denoiser.opsets[0].1 = 17, Form::Unrolled).contains("operator set 17"));
    let cut = |name: &'static str| {
        move |bench: &mut Bench| {
            bench.plan.steps.insert(1, vec![Substitution::new(name, Kind::Reuse { from: 0 })]);
        }
    };
    assert!(refused(&cut("nothing"), Form::Unrolled).contains("no node of the denoiser computes `nothing`"));
    let cycle = Substitution::new("h1", Kind::Delta { input: "h2".to_owned(), from: 0 });
    let cycle = |bench: &mut Bench| _ = bench.plan.steps.insert(1, vec![cycle.clone()]);
    assert!(refused(&cycle, Form::Unrolled).contains("cannot take what is computed from it"));
}

/// Data N(1/2, 1/4) per coordinate as a flow: the exact path ends in `1/2 + 1/2·noise`.
#[test]
fn euler_converges_with_first_order_to_the_closed_form() {
    let graph = "g (float[n,4] x, float[n] t) => (float[n,4] u) <float thousand = {1000}, float one = {1}, float mean = {0.5}, float variance = {0.25}, int64[2] column = {-1, 1}> {
        s1 = Div (t, thousand)
        s = Reshape (s1, column)
        a = Sub (one, s)
        aa = Mul (a, a)
        ss = Mul (s, s)
        av = Mul (a, variance)
        aav = Mul (aa, variance)
        total = Add (aav, ss)
        gain = Div (av, total)
        am = Mul (a, mean)
        off = Sub (x, am)
        shift = Mul (gain, off)
        expected = Add (mean, shift)
        left = Sub (x, expected)
        u = Div (left, s)
    }";
    let noise = [1.0, -0.6, 0.3, 1.5];
    let error = |steps: usize| {
        let request = Request { explicit_sigmas: true, ..Request::steps(steps) };
        let table = Table::new(&scheduler("FlowMatchEulerDiscreteScheduler", json!({})), &request).unwrap();
        let mut bench = Bench::new(graph, table, None);
        bench.inputs = vec![("noise".to_owned(), Tensor::from_f32s(&[1, 4], &noise))];
        let found = bench.run(&bench.emit(Form::Loop))[0].1.to_f64s().unwrap();
        found.iter().zip(noise).map(|(x, z)| (x - 0.5 - 0.5 * f64::from(z)).abs()).sum::<f64>()
    };
    let (coarse, fine) = (error(10), error(100));
    assert!((8.5..11.5).contains(&(coarse / fine)), "{coarse} {fine}");
}

/// The same data under the linear schedule, predicted as noise: DDIM converges with first order, 2M with second.
#[test]
fn multistep_converges_with_second_order_to_the_closed_form() {
    let s: Scheduler = scheduler("DPMSolverMultistepScheduler", json!({}));
    let schedule = Schedule::new(&s);
    let bars: Vec<String> = (0..1000).map(|t| format!("{:e}", schedule.alpha(t))).collect();
    let graph = format!(
        "g (float[n,4] x, int64[n] t) => (float[n,4] e) <float[1000] bars = {{{}}}, float one = {{1}}, float mean = {{0.5}}, float variance = {{0.25}}, int64[2] column = {{-1, 1}}> {{
            b1 = Gather (bars, t)
            b = Reshape (b1, column)
            a = Sqrt (b)
            ss = Sub (one, b)
            s = Sqrt (ss)
            bv = Mul (b, variance)
            total = Add (bv, ss)
            am = Mul (a, mean)
            off = Sub (x, am)
            scaled = Mul (s, off)
            e = Div (scaled, total)
        }}",
        bars.join(", ")
    );
    let noise = [1.0, -0.6, 0.3, 1.5];
    let bar = schedule.alpha(999);
    let sigma = ((1.0 - bar) / bar).sqrt();
    let error = |order: usize, steps: usize| {
        let settings = json!({"solver_order": order, "lower_order_final": false});
        let s = scheduler("DPMSolverMultistepScheduler", settings);
        // Evenly in the logarithm of the noise level, as far as whole timesteps go.
        let (high, low) = (schedule.sigma_at(999.0), schedule.sigma_at(0.0));
        let mut times: Vec<f64> = (0..steps)
            .map(|k| schedule.time_of(high * (low / high).powf(k as f64 / (steps - 1) as f64)).round())
            .collect();
        times.dedup();
        let request = Request { steps: Steps::Times(times), ..Request::steps(1) };
        let mut bench = Bench::new(&graph, Table::new(&s, &request).unwrap(), None);
        bench.inputs = vec![("noise".to_owned(), Tensor::from_f32s(&[1, 4], &noise))];
        let found = bench.run(&bench.emit(Form::Unrolled))[0].1.to_f64s().unwrap();
        let exact = |z: f64| 0.5 + (z / bar.sqrt() - 0.5) * (0.25 / (0.25 + sigma * sigma)).sqrt();
        found.iter().zip(noise).map(|(x, z)| (x - exact(f64::from(z))).abs()).sum::<f64>()
    };
    let slope = |order: usize| (error(order, 20) / error(order, 80)).log2() / 2.0;
    let (first, second) = (slope(1), slope(2));
    assert!((0.8..1.3).contains(&first) && second > 1.6, "{first} {second}");
}
