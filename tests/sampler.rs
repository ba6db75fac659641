//! `optimize sampler` as a program: written and verified, or refused with a sentence and nothing written.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, Tensor, text};
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};
use tempfile::TempDir;

/// A denoiser of an old operator set with a condition that 2 stands for the absence of.
const DENOISER: &str = "<ir_version: 8, opset_import: [\"\" : 15]>
g (float[n,1,2,2] x, float[n] t, int64[n] label) => (float[n,1,2,2] eps) <
    float[3,1] table = {0.3, -0.2, 0.1}, float[1] speed = {0.004}, int64[4] shape = {-1, 1, 1, 1},
    float[2,2] w = {0.4, -0.3, 0.2, 0.5}
> {
    angle = Mul (t, speed)
    wave = Sin (angle)
    time = Reshape (wave, shape)
    row = Gather (table, label)
    cond = Reshape (row, shape)
    mix = Add (time, cond)
    p = MatMul (x, w)
    a = Tanh (p)
    m = Mul (a, mix)
    eps = Add (x, m)
}";

struct Folder(TempDir);

impl Folder {
    fn new(scheduler: Value) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        fs::write(folder.path("denoiser.onnx"), text::parse(DENOISER).unwrap().to_bytes()).unwrap();
        fs::write(folder.path("scheduler.json"), scheduler.to_string()).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.current_dir(self.0.path()).args(["sampler", "denoiser.onnx", "-o", "out.onnx"]);
        command.args(["--scheduler", "scheduler.json"]).args(options).output().unwrap()
    }

    fn succeeds(&self, options: &[&str]) -> (String, Value) {
        let output = self.run(&[&["--report", "report.json"], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report = serde_json::from_slice(&fs::read(self.path("report.json")).unwrap()).unwrap();
        (String::from_utf8(output.stdout).unwrap(), report)
    }

    fn refused(&self, options: &[&str], code: i32, sentence: &str) {
        let output = self.run(options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(sentence), "{said}");
        assert!(!self.path("out.onnx").exists());
    }
}

fn ddim() -> Value {
    json!({"_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", "clip_sample": false, "skip_type": 1})
}

#[test]
fn a_sampler_is_written_verified_and_reported() {
    let folder = Folder::new(ddim());
    let options = ["--steps", "6", "--guidance", "2.5", "--io", "uncond:label=2", "--save-plan", "plan.json"];
    let (said, report) = folder.succeeds(&options);
    assert!(said.contains("latent x, time t, condition label (2 without condition), predicts eps"), "{said}");
    assert!(said.contains("verified against the denoiser run step by step on ONNX Runtime"), "{said}");
    assert_eq!((&report["solver"], &report["output"]["form"]), (&json!("ddim"), &json!("unrolled")));
    assert_eq!(report["output"]["evaluations"], 12);
    assert_eq!(report["output"]["inputs"], json!(["noise float[n, 1, 2, 2]", "label int64[n]"]));
    assert!(report["verify"]["passed"].as_bool().unwrap() && report["verify"]["after"].as_f64().unwrap() < 1e-5);
    assert!(report["warnings"].to_string().contains("`skip_type` is not known"));
    Model::read(&folder.path("out.onnx")).unwrap().model.check().unwrap();
    // The plan that was saved gives the same model again.
    let first = fs::read(folder.path("out.onnx")).unwrap();
    folder.succeeds(&["--plan", "plan.json", "--guidance", "2.5", "--io", "uncond:label=2"]);
    assert_eq!(fs::read(folder.path("out.onnx")).unwrap(), first);
}

#[test]
fn every_form_passes_its_comparison() {
    let folder = Folder::new(ddim());
    for form in ["unrolled", "loop", "adaptive"] {
        let (_, report) =
            folder.succeeds(&["--steps", "8", "--form", form, "--guidance", "input", "--io", "uncond:label=input"]);
        assert_eq!(report["output"]["form"], form);
        let inputs = report["output"]["inputs"].to_string();
        assert!(inputs.contains("label_uncond int64[n]") && inputs.contains("guidance float[]"), "{inputs}");
    }
    let (_, report) = folder.succeeds(&["--grid", "900,500,100", "--eta", "1"]);
    assert!(report["output"]["inputs"].to_string().contains("step_noise float[2, n, 1, 2, 2]"));
}

/// Width, height and bytes of a grey picture.
fn picture(path: &std::path::Path) -> (usize, usize, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(info.color_type, png::ColorType::Grayscale);
    (info.width as usize, info.height as usize, pixels)
}

/// The halves of a picture of images that are enlarged to 96 pixels.
fn halves((width, height, pixels): &(usize, usize, Vec<u8>)) -> [Vec<u8>; 2] {
    assert_eq!((*width, *height), (2 * (2 * 96 + 4) + 16, 4 * 96 + 3 * 4));
    [0, 196 + 16].map(|from| pixels.chunks(*width).flat_map(|row| row[from..from + 196].to_vec()).collect())
}

#[test]
fn a_picture_shows_the_denoiser_beside_the_sampler() {
    let folder = Folder::new(ddim());
    let guided = ["--steps", "6", "--guidance", "2.5", "--io", "uncond:label=2", "--preview", "grid.png"];
    folder.succeeds(&guided);
    let [left, right] = halves(&picture(&folder.path("grid.png")));
    assert_eq!(left, right);
    // Labels are taken in turn without the one for none, so neighbours differ; and so do samples of equal labels.
    let images: Vec<[u8; 2]> = (0..4).map(|row| [left[row * 100 * 196], left[row * 100 * 196 + 100]]).collect();
    assert!(images.iter().flatten().collect::<std::collections::BTreeSet<_>>().len() > 4, "{images:?}");
    // A solver that adds noise, a loop, a scale that is an input.
    folder.succeeds(&["--steps", "4", "--eta", "1", "--form", "loop", "--preview", "grid.png"]);
    let [left, right] = halves(&picture(&folder.path("grid.png")));
    assert_eq!(left, right);
    let options = ["--guidance", "input", "--io", "uncond:label=input", "--preview", "grid.png"];
    folder.succeeds(&[&options[..], &["--steps", "6", "--plan", "forecast:every=6,first=1,order=0"]].concat());
    let [left, right] = halves(&picture(&folder.path("grid.png")));
    assert_ne!(left, right);
    // A search aims at many steps and is drawn beside them.
    folder.succeeds(&["--search", "1", "--evaluations", "3", "--pairs", "1", "--preview", "grid.png"]);
    let [left, right] = halves(&picture(&folder.path("grid.png")));
    assert_ne!(left, right);
}

#[test]
fn what_is_no_image_has_no_picture() {
    let folder = Folder::new(ddim());
    folder.refused(&["--steps", "4", "--preview", "grid.jpg"], 2, "`grid.jpg` does not end in .png");
    let vector = "g (float[n,4] x, float[n] t) => (float[n,4] eps) { eps = Identity (x) }";
    fs::write(folder.path("denoiser.onnx"), text::parse(vector).unwrap().to_bytes()).unwrap();
    folder.refused(&["--steps", "4", "--preview", "grid.png"], 2, "the shape of `x` is [n, 4], expected [n, c, h, w]");
    assert!(!folder.path("grid.png").exists());
}

#[test]
fn refusals_say_why_and_write_nothing() {
    let folder = Folder::new(ddim());
    folder.refused(&["--steps", "4", "--guidance", "3"], 2, "uncond:NAME=VALUE");
    folder.refused(&["--steps", "4", "--guidance", "much"], 2, "expected a number or `input`");
    folder.refused(&["--steps", "0"], 2, "expected 1 to 1000");
    folder.refused(&["--grid", "10,20"], 2, "expected a smaller one");
    folder.refused(&[], 2, "--steps");
    folder.refused(&["--steps", "4", "--threshold", "0.1"], 2, "about --form adaptive");
    folder.refused(&["--steps", "4", "--tokens", "64"], 2, "`use_dynamic_shifting` is off");
    folder.refused(&["--steps", "4", "--explicit-sigmas"], 2, "explicit sigmas are for solver flow-euler");
    folder.refused(&["--steps", "4", "--io", "latent=y"], 2, "the denoiser has no input `y`");
    let plan = json!({"grid": [900, 100], "solver": "euler", "cfg": [0, 0]});
    fs::write(folder.path("plan.json"), plan.to_string()).unwrap();
    folder.refused(&["--plan", "plan.json"], 2, "the plan is for solver euler");
    let plan = json!({"grid": [900, 100], "solver": "ddim", "cfg": [0, 0],
        "steps": {"1": [{"cut": "nothing", "kind": "reuse", "ref": 0}]}});
    fs::write(folder.path("plan.json"), plan.to_string()).unwrap();
    folder.refused(&["--plan", "plan.json"], 2, "no node of the denoiser computes `nothing`");
    let random =
        "g (float[n,1,2,2] x, float[n] t) => (float[n,1,2,2] eps) { z = RandomNormalLike (x) eps = Add (x, z) }";
    fs::write(folder.path("denoiser.onnx"), text::parse(random).unwrap().to_bytes()).unwrap();
    folder.refused(&["--steps", "4"], 3, "the sampler does not do what the denoiser does step by step");
    let repaint = Folder::new(json!({"_class_name": "RePaintScheduler"}));
    repaint.refused(&["--steps", "4"], 2, "`RePaintScheduler`: it jumps back in time, and wants a mask");
    repaint.succeeds(&["--steps", "4", "--solver", "dpmpp"]);
    let pndm = Folder::new(json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true}));
    pndm.refused(&["--grid", "900,100"], 2, "solver pndm makes its own timesteps");
    pndm.refused(&["--search", "4"], 2, "solver pndm makes its own timesteps, and --search looks for others");
    pndm.refused(&["--steps", "4", "--form", "adaptive"], 2, "the adaptive form cannot leave out");
    pndm.refused(&["--steps", "4", "--io", "predicts=clean"], 2, "the clean sample with solver pndm");
    let heun = Folder::new(json!({"_class_name": "HeunDiscreteScheduler"}));
    heun.refused(&["--search", "4"], 2, "solver heun evaluates the network twice a step");
}

#[test]
fn steps_of_several_evaluations_are_rows_of_a_plan() {
    let heun = Folder::new(json!({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "scaled_linear"}));
    let (said, report) = heun.succeeds(&["--steps", "5", "--save-plan", "plan.json"]);
    assert!(said.contains("5 steps of heun in 9 rows, 9 evaluations at most"), "{said}");
    assert_eq!((&report["steps"], &report["output"]["evaluations"]), (&json!(5), &json!(9)));
    let first = fs::read(heun.path("out.onnx")).unwrap();
    heun.succeeds(&["--plan", "plan.json"]);
    assert_eq!(fs::read(heun.path("out.onnx")).unwrap(), first);
    // A grid gives the timesteps of steps; the plan has second evaluations between them.
    let (_, report) = heun.succeeds(&["--grid", "900,500.5,100", "--save-plan", "plan.json"]);
    assert_eq!(report["plan"]["grid"], json!([900.0, 500.5, 500.5, 100.0, 100.0]));
    let first = fs::read(heun.path("out.onnx")).unwrap();
    heun.succeeds(&["--plan", "plan.json"]);
    assert_eq!(fs::read(heun.path("out.onnx")).unwrap(), first);
    // Runge-Kutta steps first, and a last step that would end where it begins.
    let pndm = Folder::new(json!({"_class_name": "PNDMScheduler"}));
    let (said, _) = pndm.succeeds(&["--steps", "8", "--save-plan", "plan.json"]);
    assert!(said.contains("8 steps of pndm in 16 rows"), "{said}");
    let first = fs::read(pndm.path("out.onnx")).unwrap();
    pndm.succeeds(&["--plan", "plan.json"]);
    assert_eq!(fs::read(pndm.path("out.onnx")).unwrap(), first);
    for (class, evaluations) in [("PNDMScheduler", 6), ("IPNDMScheduler", 4), ("EDMEulerScheduler", 5)] {
        let folder = Folder::new(json!({"_class_name": class, "skip_prk_steps": true, "steps_offset": 1}));
        let (_, report) = folder.succeeds(&["--steps", "5", "--save-plan", "plan.json"]);
        assert_eq!(report["output"]["evaluations"], evaluations, "{class}");
        let first = fs::read(folder.path("out.onnx")).unwrap();
        folder.succeeds(&["--plan", "plan.json"]);
        assert_eq!(fs::read(folder.path("out.onnx")).unwrap(), first, "{class}");
    }
}

#[test]
fn files_are_read_as_python_writes_them() {
    let folder = Folder::new(ddim());
    let saved = include_str!("../fixtures/schedulers/DPMSolverMultistepScheduler.json");
    assert!(saved.contains("-Infinity"));
    fs::write(folder.path("scheduler.json"), saved).unwrap();
    let (_, report) = folder.succeeds(&["--steps", "4", "--form", "loop"]);
    assert_eq!((&report["solver"], &report["warnings"]), (&json!("dpmpp"), &json!([])));
    fs::remove_file(folder.path("out.onnx")).unwrap();
    fs::write(folder.path("scheduler.json"), "{\"_class_name\": NaN,\n}").unwrap();
    folder.refused(&["--steps", "4"], 1, "line 2 column 1");
}

#[test]
fn whole_times_are_told_where_steps_have_fractions() {
    let folder = Folder::new(json!({"_class_name": "HeunDiscreteScheduler"}));
    let whole = DENOISER
        .replace("float[n] t,", "int64[n] t,")
        .replace("angle = Mul (t, speed)", "f = Cast <to = 1> (t) angle = Mul (f, speed)");
    fs::write(folder.path("denoiser.onnx"), text::parse(&whole).unwrap().to_bytes()).unwrap();
    let (_, report) = folder.succeeds(&["--steps", "5"]);
    let warned = report["warnings"].to_string();
    assert!(warned.contains("`t` takes whole numbers, and 6 of 9 times have fractions, which are rounded"), "{warned}");
}

/// A head as policies of flows have: a state, what was seen before with its mask, and a velocity that does not depend on the
/// chunk. Its time goes from 1 to 0.
const HEAD: &str = "<ir_version: 8, opset_import: [\"\" : 18]>
g (float[n,4,3] x_t, float[n] time, float[n,2] state, float[n,s,2] prefix, bool[n,s] pad_mask) => (float[n,4,3] v) <
    float[1] zero = {0}, float[2,2] w = {0.3, 0.1, -0.2, 0.4}, int64[1] one = {1}, int64[1] two = {2},
    int64[3] shape = {-1, 1, 1}
> {
    seen = MatMul (prefix, w)
    kept = Cast <to = 1> (pad_mask)
    column = Unsqueeze (kept, two)
    masked = Mul (seen, column)
    sums = ReduceSum <keepdims = 0> (masked, one)
    both = Add (sums, state)
    level = ReduceSum <keepdims = 0> (both, one)
    row = Reshape (level, shape)
    t = Reshape (time, shape)
    moved = Add (row, t)
    none = Mul (x_t, zero)
    v = Add (none, moved)
}";

#[test]
fn a_policy_gives_actions_in_their_own_units() {
    let folder = Folder::new(json!({"_class_name": "FlowMatchEulerDiscreteScheduler"}));
    fs::write(folder.path("denoiser.onnx"), text::parse(HEAD).unwrap().to_bytes()).unwrap();
    let statistics = json!({"action": {"mean": [1.0, 2.0], "std": [10.0, 100.0], "steps": 3}});
    fs::write(folder.path("stats.json"), statistics.to_string()).unwrap();
    let flow = ["--steps", "2", "--explicit-sigmas", "--io", "time-value=sigma", "--actions", "stats.json"];
    for form in ["unrolled", "loop"] {
        let (_, report) = folder.succeeds(&[&flow[..], &["--form", form]].concat());
        assert_eq!(report["output"]["outputs"][0].as_str().unwrap().split(' ').next(), Some("actions"));
        assert!(report["verify"]["passed"].as_bool().unwrap());
        let model = Model::read(&folder.path("out.onnx")).unwrap().model;
        model.check().unwrap();
        // What was seen before is worked on once.
        let products = model.graph.all_nodes().into_iter().filter(|&id| model.graph.node(id).is("MatMul")).count();
        assert_eq!(products, 1);
        let noise: Vec<f32> = (0..12).map(|k| 0.1 * k as f32).collect();
        let inputs = [
            ("noise", Tensor::from_f32s(&[1, 4, 3], &noise)),
            ("state", Tensor::from_f32s(&[1, 2], &[0.5, 0.25])),
            ("prefix", Tensor::from_f32s(&[1, 2, 2], &[1.0, 2.0, 30.0, 40.0])),
            ("pad_mask", Tensor::from_bools(&[1, 2], &[true, false])),
        ];
        let inputs = inputs.map(|(name, tensor)| (name.to_owned(), tensor));
        let found = lathe_testkit::evaluator().run(&model, &inputs).unwrap().remove(0).1;
        assert_eq!(found.dims(), [1, 3, 2]);
        // Of the state and the first row 0.75 + (0.3 - 0.4) + (0.1 + 0.8); of the times 1 and 0.5 half their sum.
        let velocity = 0.75 - 0.1 + 0.9 + 0.75;
        for (k, value) in found.to_f64s().unwrap().iter().enumerate() {
            let (step, number) = (k / 2, k % 2);
            let expected =
                (f64::from(noise[3 * step + number]) - velocity) * [10.0, 100.0][number] + [1.0, 2.0][number];
            assert!((value - expected).abs() < 1e-3, "{k}: {value}, expected {expected}");
        }
    }
    fs::remove_file(folder.path("out.onnx")).unwrap();
    fs::write(folder.path("stats.json"), json!({"mean": vec![0.0; 4], "std": vec![1.0; 4]}).to_string()).unwrap();
    folder.refused(&flow, 2, "a step of the sample has 3 numbers, and the statistics of actions 4");
    let images = Folder::new(ddim());
    fs::write(images.path("stats.json"), json!({"mean": [0.0], "std": [1.0]}).to_string()).unwrap();
    let options = ["--steps", "2", "--actions", "stats.json"];
    images.refused(&options, 2, "actions are read off samples of three axes, and this one is [n, 1, 2, 2]");
}
