//! Samplers whose steps have several sizes, on a convolutional denoiser of open height and width in ONNX Runtime.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, ScopeId, Tensor, text};
use lathe_passes::sampler::{
    Error, Form, Guidance, Kind, Mode, Request, RoleOptions, Roles, Sampler, Scale, Scheduler, Sizes, StepPlan,
    Substitution, Table, Up, emit,
    methods::{Bottleneck, Forecast, bottleneck, every, forecast},
    sample,
};
use serde_json::{Value, json};

/// Numbers in the text form.
fn list(count: usize, seed: f32) -> String {
    let number = |k: usize| format!("{}", (k as f32 * 1.7 + seed).sin() * 0.3);
    (0..count).map(number).collect::<Vec<_>>().join(", ")
}

/// Two scales joined by a skip, an offset that grows with the row, a time and a condition. It takes even sizes only.
fn graph() -> String {
    format!(
        "g (float[n,2,h,w] x, float[n] t, int64[n] label) => (float[n,2,h,w] out) <
            float[3,1] table = {{0.3, -0.2, 0.1}}, float[1] speed = {{0.004}}, int64[4] column = {{-1, 1, 1, 1}},
            int64[4] rows = {{1, 1, -1, 1}}, int64 zero = {{0}}, int64 one = {{1}},
            float[4,2,3,3] w1 = {{{}}}, float[4,4,2,2] w2 = {{{}}}, float[2,4,3,3] w3 = {{{}}}
        > {{
            angle = Mul (t, speed)
            wave = Cos (angle)
            time = Reshape (wave, column)
            row = Gather (table, label)
            cond = Reshape (row, column)
            mix = Add (time, cond)
            size = Shape <start = 2, end = 3> (x)
            height = Squeeze (size)
            range = Range (zero, height, one)
            place = Cast <to = 1> (range)
            all = Cast <to = 1> (height)
            share = Div (place, all)
            offset = Reshape (share, rows)
            placed = Add (x, offset)
            fine = Conv <pads = [1, 1, 1, 1]> (placed, w1)
            gated = Mul (fine, mix)
            skip = Tanh (gated)
            coarse = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (skip)
            bent = Sin (coarse)
            grown = ConvTranspose <strides = [2, 2]> (bent, w2)
            joined = Add (skip, grown)
            out = Conv <pads = [1, 1, 1, 1]> (joined, w3)
        }}",
        list(72, 0.1),
        list(64, 0.5),
        list(72, 0.9)
    )
}

const SIDE: usize = 8;
const BATCH: usize = 2;

struct Bench {
    denoiser: Model,
    roles: Roles,
    table: Table,
    plan: StepPlan,
    guidance: Guidance,
    inputs: Vec<(String, Tensor)>,
}

fn noise(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|k| (k as f32 * 2.3 + seed).sin() * 1.4).collect()
}

impl Bench {
    fn new(class: &str, settings: Value, steps: usize, ends: &[usize], up: Up, guided: bool) -> Bench {
        let mut json = json!({ "_class_name": class });
        json.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let scheduler = Scheduler::parse(&json, None).unwrap().0;
        let request = Request::steps(steps);
        let table = Table::new(&scheduler, &request).unwrap();
        let mode = if guided { Mode::Guided } else { Mode::Conditional };
        let mut plan = StepPlan::plain("any", table.rows.iter().map(|r| r.time).collect(), mode);
        let sizes = vec![[SIDE, SIDE], [SIDE / 2, SIDE / 2], [SIDE, SIDE]];
        let options = Bottleneck { sizes, ends: ends.to_vec(), up };
        bottleneck(&mut plan, &scheduler, &request, &table, &options).unwrap();
        let table = Table::staged(&scheduler, &request, &plan.grid, plan.sizes.as_ref().unwrap()).unwrap();
        let denoiser = text::parse(&graph()).unwrap_or_else(|error| panic!("{error}"));
        denoiser.check().unwrap();
        let roles = Roles::infer(&denoiser, &RoleOptions::parse(&["uncond:label=2".to_owned()]).unwrap()).unwrap();
        let guidance = Guidance { scale: Scale::Constant(2.0), rescale: 0.0, batched: true };
        let (count, noises) = (BATCH * 2 * SIDE * SIDE, table.noises());
        let inputs = vec![
            ("noise".to_owned(), Tensor::from_f32s(&[BATCH, 2, SIDE, SIDE], &noise(count, 0.3))),
            ("step_noise".to_owned(), Tensor::from_f32s(&[noises, BATCH, 2, SIDE, SIDE], &noise(count * noises, 0.7))),
            ("label".to_owned(), Tensor::int64s(&[0, 1])),
        ];
        Bench { denoiser, roles, table, plan, guidance, inputs }
    }

    fn flow(steps: usize, ends: &[usize], up: Up) -> Bench {
        Bench::new("FlowMatchEulerDiscreteScheduler", json!({}), steps, ends, up, false)
    }

    fn sampler(&self) -> Sampler<'_> {
        let Bench { denoiser, roles, table, plan, guidance, .. } = self;
        Sampler { denoiser, roles, table, plan, guidance: *guidance }
    }

    fn emit(&self) -> Result<Model, Error> {
        emit(&self.sampler(), Form::Unrolled, lathe_testkit::evaluator())
    }

    fn run(&self, model: &Model) -> Tensor {
        let graph = &model.graph;
        let takes = |name: &str| graph.main().inputs().iter().any(|&v| graph.value(v).name == name);
        let inputs: Vec<_> = self.inputs.iter().filter(|(name, _)| takes(name)).cloned().collect();
        let run = lathe_testkit::evaluator().run(model, &inputs);
        run.unwrap_or_else(|e| panic!("{e}\n{}", text::print(model))).swap_remove(0).1
    }

    /// Compiles, runs, and expects what the loop gives.
    fn check(&self) -> (Model, Tensor) {
        let model = self.emit().unwrap_or_else(|error| panic!("{error}"));
        let found = self.run(&model);
        let expected =
            sample(&self.sampler(), &self.denoiser, &self.inputs, lathe_testkit::evaluator(), &|_| {}).unwrap();
        let error = relative(&found.to_f64s().unwrap(), &expected.sample.to_f64s().unwrap());
        assert!(error < 1e-5, "{error} for {:?}", self.table);
        (model, found)
    }

    /// What the denoiser says of a state at a time.
    fn predict(&self, x: &Grid, time: f64) -> Grid {
        let numbers: Vec<f32> = x.values.iter().map(|&v| v as f32).collect();
        let inputs = [
            ("x".to_owned(), Tensor::from_f32s(&[BATCH, 2, x.side, x.side], &numbers)),
            ("t".to_owned(), Tensor::from_f32s(&[BATCH], &[time as f32; BATCH])),
            ("label".to_owned(), Tensor::int64s(&[0, 1])),
        ];
        let out = lathe_testkit::evaluator().run(&self.denoiser, &inputs).unwrap().swap_remove(0).1;
        Grid { side: x.side, values: out.to_f64s().unwrap() }
    }

    /// The first noise, or that of the border that comes after so many others, at a side.
    fn noise(&self, border: Option<usize>, side: usize) -> Grid {
        let all = self.inputs[usize::from(border.is_some())].1.to_f64s().unwrap();
        let from = border.unwrap_or(0) * BATCH * 2 * SIDE * SIDE;
        let full = Grid { side: SIDE, values: all[from..from + BATCH * 2 * SIDE * SIDE].to_vec() };
        full.map(side, |plane, y, x| plane[y * SIDE + x])
    }
}

fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

fn count(model: &Model, op: &str) -> usize {
    let graph = &model.graph;
    graph.all_nodes().into_iter().filter(|&id| graph.node(id).op_type == op).count()
}

/// Square planes of samples and channels.
#[derive(Clone)]
struct Grid {
    side: usize,
    values: Vec<f64>,
}

impl Grid {
    /// Planes of another side, place by place.
    fn map(&self, side: usize, at: impl Fn(&[f64], usize, usize) -> f64) -> Grid {
        let planes = self.values.chunks(self.side * self.side);
        let values = planes.flat_map(|p| (0..side * side).map(|i| at(p, i / side, i % side)).collect::<Vec<_>>());
        Grid { side, values: values.collect() }
    }

    fn mean_of_four(&self) -> Grid {
        let side = self.side;
        self.map(side / 2, |p, y, x| {
            (p[2 * y * side + 2 * x]
                + p[2 * y * side + 2 * x + 1]
                + p[(2 * y + 1) * side + 2 * x]
                + p[(2 * y + 1) * side + 2 * x + 1])
                / 4.0
        })
    }

    fn repeated(&self) -> Grid {
        let side = self.side;
        self.map(2 * side, |p, y, x| p[y / 2 * side + x / 2])
    }

    /// Twice the side: each place is three quarters of the one it lies in and a quarter of the nearest other, by axis.
    fn linear(&self) -> Grid {
        let side = self.side;
        let other = |i: usize| if i.is_multiple_of(2) { (i / 2).saturating_sub(1) } else { (i / 2 + 1).min(side - 1) };
        self.map(2 * side, |p, y, x| {
            let row = |y: usize| 0.75 * p[y * side + x / 2] + 0.25 * p[y * side + other(x)];
            0.75 * row(y / 2) + 0.25 * row(other(y))
        })
    }

    /// `a·self + b·other`.
    fn plus(&self, a: f64, other: &Grid, b: f64) -> Grid {
        assert_eq!(self.side, other.side);
        let values = self.values.iter().zip(&other.values).map(|(x, y)| a * x + b * y).collect();
        Grid { side: self.side, values }
    }
}

#[test]
fn a_flow_is_what_a_plain_loop_makes_of_it() {
    for up in [Up::Linear, Up::Matched] {
        let bench = Bench::flow(7, &[2, 5, 7], up);
        let sigmas: Vec<f64> = bench.plan.grid.iter().map(|t| t / 1000.0).collect();
        let mut x = bench.noise(None, SIDE);
        for (step, &sigma) in sigmas.iter().enumerate() {
            let u = bench.predict(&x, bench.plan.grid[step]);
            let clean = x.plus(1.0, &u, -sigma);
            let next = sigmas.get(step + 1).copied().unwrap_or(0.0);
            x = match (step, up) {
                (1, _) => clean.mean_of_four().plus(1.0 - next, &bench.noise(Some(0), SIDE / 2), next),
                (4, Up::Linear) => clean.linear().plus(1.0 - next, &bench.noise(Some(1), SIDE), next),
                (4, _) => {
                    // The level before it grows is that from which twice the side makes the level of the next step.
                    let end = next / (2.0 - next);
                    let z = bench.noise(Some(1), SIDE);
                    let z = z.plus(1.0, &z.mean_of_four().repeated(), -1.0);
                    let grown = x.plus(1.0, &u, end - sigma).repeated();
                    let delta = 2.0 * end;
                    grown.plus(1.0 / (delta + 1.0 - end), &z, delta / (delta + 1.0 - end))
                }
                _ => x.plus(1.0, &u, next - sigma),
            };
        }
        let (_, found) = bench.check();
        let error = relative(&found.to_f64s().unwrap(), &x.values);
        assert!(error < 1e-5, "{up:?}: {error}");
    }
}

#[test]
fn a_multistep_solver_begins_anew_in_each_stage() {
    let settings = json!({"beta_schedule": "linear"});
    let bench = Bench::new("DPMSolverMultistepScheduler", settings, 9, &[3, 6, 9], Up::Nearest, false);
    let level = |step: usize| {
        let bar: f64 =
            (0..=bench.plan.grid[step] as usize).map(|k| 1.0 - (1e-4 + (0.02 - 1e-4) * k as f64 / 999.0)).product();
        (bar.sqrt(), (1.0 - bar).sqrt())
    };
    let mut x = bench.noise(None, SIDE);
    let mut before: Option<Grid> = None;
    for step in 0..9 {
        let (alpha, noise) = level(step);
        let eps = bench.predict(&x, bench.plan.grid[step]);
        let clean = x.plus(1.0 / alpha, &eps, -noise / alpha);
        if step == 8 {
            x = clean;
            break;
        }
        let (next_alpha, next_noise) = level(step + 1);
        x = match step {
            2 => clean.mean_of_four().plus(next_alpha, &bench.noise(Some(0), SIDE / 2), next_noise),
            5 => clean.repeated().plus(next_alpha, &bench.noise(Some(1), SIDE), next_noise),
            _ => {
                let lambda = |(a, s): (f64, f64)| (a / s).ln();
                let h = lambda(level(step + 1)) - lambda(level(step));
                let d = match before.filter(|_| ![0, 3, 6].contains(&step)) {
                    Some(before) => {
                        let r = (lambda(level(step)) - lambda(level(step - 1))) / h;
                        clean.plus(1.0 + 0.5 / r, &before, -0.5 / r)
                    }
                    None => clean.clone(),
                };
                x.plus(next_noise / noise, &d, -next_alpha * ((-h).exp() - 1.0))
            }
        };
        before = Some(clean);
    }
    let (_, found) = bench.check();
    let error = relative(&found.to_f64s().unwrap(), &x.values);
    assert!(error < 1e-5, "{error}");
}

#[test]
fn every_solver_and_every_growth_does_what_its_loop_does() {
    for (class, settings) in [
        ("DDIMScheduler", json!({"clip_sample": true})),
        ("DDPMScheduler", json!({"thresholding": true})),
        ("EulerDiscreteScheduler", json!({"prediction_type": "v_prediction"})),
        ("EulerAncestralDiscreteScheduler", json!({"timestep_spacing": "trailing"})),
        ("DPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver++", "solver_order": 2})),
        ("FlowMatchEulerDiscreteScheduler", json!({"shift": 3.0})),
    ] {
        for up in [Up::Nearest, Up::Linear, Up::Cubic, Up::Matched] {
            Bench::new(class, settings.clone(), 6, &[1, 4, 6], up, true).check();
        }
    }
}

#[test]
fn weights_are_there_once_and_sizes_are_worked_on_ahead() {
    let (model, _) = Bench::flow(6, &[1, 4, 6], Up::Linear).check();
    assert_eq!(
        (count(&model, "Range"), count(&model, "Shape"), count(&model, "Conv")),
        (0, 0, 12),
        "{}",
        text::print(&model)
    );
    let tensors: Vec<&Tensor> =
        model.graph.initializers(ScopeId::MAIN).filter_map(|v| model.graph.constant(v)).collect();
    let of = |dims: &[usize]| tensors.iter().filter(|t| t.dims() == dims).count();
    assert_eq!((of(&[4, 2, 3, 3]), of(&[2, 4, 3, 3])), (1, 1));
    // One column of offsets for each size.
    assert_eq!((of(&[1, 1, SIDE, 1]), of(&[1, 1, SIDE / 2, 1])), (1, 1));
    let shape = |v: lathe_ir::ValueId| model.graph.value(v).ty.as_ref().map(ToString::to_string);
    assert_eq!(shape(model.graph.main().inputs()[0]), shape(model.graph.main().outputs()[0]));
}

#[test]
fn a_network_that_grows_towards_the_sample_starts_from_a_part_of_the_noise() {
    let mut bench = Bench::flow(6, &[1, 4, 6], Up::Matched);
    let small = [SIDE / 2, SIDE / 2];
    bench.plan.sizes = Some(Sizes { steps: [[small; 3], [[SIDE, SIDE]; 3]].concat(), up: Up::Matched });
    let scheduler = Scheduler::parse(&json!({"_class_name": "FlowMatchEulerDiscreteScheduler"}), None).unwrap().0;
    bench.plan.grid = vec![1000.0, 800.0, 600.0, 550.0, 300.0, 100.0];
    let sizes = bench.plan.sizes.as_ref().unwrap();
    bench.table = Table::staged(&scheduler, &Request::steps(6), &bench.plan.grid, sizes).unwrap();
    let once = noise(BATCH * 2 * SIDE * SIDE, 0.7);
    bench.inputs[1].1 = Tensor::from_f32s(&[1, BATCH, 2, SIDE, SIDE], &once);
    bench.check();
    // A state without noise does not become one with much of it.
    let grid = [1000.0, 800.0, 100.0, 950.0, 300.0, 100.0];
    let error = Table::staged(&scheduler, &Request::steps(6), &grid, sizes).unwrap_err().to_string();
    assert!(error.contains("step 2 has too little noise"), "{error}");
}

#[test]
fn caches_live_inside_stages() {
    let mut bench = Bench::flow(9, &[3, 6, 9], Up::Linear);
    forecast(&mut bench.plan, &["skip".to_owned()], &every(2, 1, 9), Forecast::Taylor(1)).unwrap();
    // The first step of a stage is computed, whatever the interval says.
    assert_eq!(bench.plan.steps.keys().copied().collect::<Vec<_>>(), [1, 5, 7]);
    let (model, _) = bench.check();
    assert_eq!(count(&model, "Conv"), 2 * 9 - 3);
    bench.plan.steps.insert(3, vec![Substitution::new("skip", Kind::Reuse { from: 2 })]);
    let error = bench.emit().unwrap_err().to_string();
    assert!(error.contains("beyond a border where the size changes"), "{error}");
}

#[test]
fn what_cannot_have_several_sizes_is_refused() {
    let refused = |edit: &dyn Fn(&mut Bench), form: Form| {
        let mut bench = Bench::flow(4, &[1, 3, 4], Up::Linear);
        edit(&mut bench);
        emit(&bench.sampler(), form, lathe_testkit::evaluator()).unwrap_err().to_string()
    };
    let edit = |from: &'static str, to: &'static str| {
        move |bench: &mut Bench| {
            assert!(graph().contains(from));
            bench.denoiser = text::parse(&graph().replace(from, to)).unwrap();
        }
    };
    assert!(refused(&|_| {}, Form::Loop).contains("stand side by side"));
    assert!(
        refused(&edit("float[n,2,h,w] x", "float[n,2,8,8] x"), Form::Unrolled).contains("height and width are open")
    );
    let masked = |bench: &mut Bench| {
        edit("label) =>", "label, float[n,1,h,w] mask) =>")(bench);
        bench.roles = Roles::infer(&bench.denoiser, &RoleOptions::default()).unwrap();
    };
    assert!(refused(&masked, Form::Unrolled).contains("the condition `mask` has the height or width of the latent"));
    assert!(
        refused(&edit("float[n,2,h,w] x", "float[n,m,w] x"), Form::Unrolled).contains("need a latent [n, c, h, w]")
    );
    let short = |bench: &mut Bench| bench.plan.sizes.as_mut().unwrap().steps.truncate(2);
    assert!(refused(&short, Form::Unrolled).contains("4 timesteps and 2 sizes"));
}
