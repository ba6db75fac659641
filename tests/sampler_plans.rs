//! Plans that `optimize sampler` finds by itself, on denoisers of three families: what is compiled does what the plan says.

#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new(scheduler: &str) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        let config = json!({"_class_name": scheduler, "num_train_timesteps": 1000});
        fs::write(folder.path("scheduler.json"), config.to_string()).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, denoiser: &str, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.current_dir(self.0.path()).arg("sampler").arg(fixture(denoiser)).args(["-o", "out.onnx"]);
        command.args(["--scheduler", "scheduler.json", "--save-plan", "plan.json", "--overwrite"]);
        command.args(options).output().unwrap()
    }

    /// The plan of a run that succeeds; what it compiled was compared with the denoiser run step by step.
    fn plan(&self, denoiser: &str, options: &[&str]) -> Value {
        let output = self.run(denoiser, options);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("verified against the denoiser"), "{said}");
        serde_json::from_slice(&fs::read(self.path("plan.json")).unwrap()).unwrap()
    }

    fn refused(&self, denoiser: &str, options: &[&str], sentence: &str) {
        let output = self.run(denoiser, options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(sentence), "{said}");
    }
}

const GUIDED: [&str; 4] = ["--guidance", "2", "--io", "uncond:label=10"];

#[test]
fn methods_by_name_are_compiled_and_verified() {
    let folder = Folder::new("DDIMScheduler");
    let steps = |plan: &Value| plan["steps"].as_object().map_or(0, serde_json::Map::len);
    for (methods, entries) in [
        ("gate:at=5", 0),
        ("delta:blocks=2,switch=4", 4),
        ("arms:every=2", 3),
        ("stack:every=2,first=2", 3),
        ("forecast:every=3,first=2", 4),
        ("forecast:every=3,first=3,points=3", 3),
        ("dual:most=0.2", 7),
        ("gate:at=5+delta:blocks=1,switch=0", 4),
    ] {
        let plan = folder.plan("dit.onnx", &[&GUIDED[..], &["--steps", "8", "--plan", methods]].concat());
        assert_eq!(steps(&plan), entries, "{methods}: {plan}");
        assert_eq!(plan["evidence"]["methods"], methods);
        let guided = plan["cfg"].as_array().unwrap().iter().filter(|mode| **mode == json!(1)).count();
        assert_eq!(guided, if methods.starts_with("gate") { 5 } else { 8 }, "{methods}");
    }
    // Calibrated ones decide by themselves; what they decide must be carried out all the same.
    for methods in ["gate:threshold=0.5", "linear-guidance:residual=10", "sada"] {
        folder.plan("dit.onnx", &[&GUIDED[..], &["--steps", "8", "--plan", methods]].concat());
    }
}

#[test]
fn skips_and_two_streams_are_cut() {
    let folder = Folder::new("DDIMScheduler");
    let plan = folder.plan("unet.onnx", &["--steps", "4", "--plan", "deep:every=2"]);
    assert_eq!(plan["steps"]["1"][0]["kind"], "reuse");
    let flow = Folder::new("FlowMatchEulerDiscreteScheduler");
    let plan = flow.plan("mmdit.onnx", &["--steps", "4", "--plan", "delta:blocks=1,switch=9"]);
    // One difference for each stream.
    assert_eq!(plan["steps"]["1"].as_array().unwrap().len(), 2);
    assert_eq!(plan["steps"]["1"][0]["kind"], "delta");
}

/// Two scales of a latent of open height and width; it takes even sizes only.
const OPEN: &str = "<ir_version: 8, opset_import: [\"\" : 18]>
g (float[n,1,h,w] sample, float[n] timestep) => (float[n,1,h,w] out) <
    float[1,1,3,3] kernel = {0.1, -0.2, 0.3, 0.2, 0.4, -0.1, 0.1, 0.2, -0.3}, float[1,1,2,2] up = {0.2, -0.1, 0.3, 0.1},
    float[1] speed = {0.004}, int64[4] column = {-1, 1, 1, 1}
> {
    angle = Mul (timestep, speed)
    wave = Cos (angle)
    time = Reshape (wave, column)
    fine = Conv <pads = [1, 1, 1, 1]> (sample, kernel)
    skip = Mul (fine, time)
    coarse = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (skip)
    bent = Tanh (coarse)
    grown = ConvTranspose <strides = [2, 2]> (bent, up)
    out = Add (skip, grown)
}";

#[test]
fn the_middle_is_gone_at_a_smaller_size() {
    let folder = Folder::new("FlowMatchEulerDiscreteScheduler");
    let open = folder.path("open.onnx");
    fs::write(&open, lathe_ir::text::parse(OPEN).unwrap().to_bytes()).unwrap();
    let open = open.to_str().unwrap();
    let sized = |plan| ["--steps", "7", "--input-shape", "sample:1,1,16,8", "--plan", plan];
    for (methods, entries) in
        [("bottleneck", 0), ("bottleneck:up=matched,ends=2/5/7", 0), ("bottleneck+forecast:every=2,first=1,order=0", 1)]
    {
        let plan = folder.plan(open, &sized(methods));
        assert_eq!(plan["evidence"]["methods"], methods);
        assert_eq!(plan["steps"].as_object().map_or(0, serde_json::Map::len), entries, "{plan}");
        let sizes = plan["sizes"]["steps"].as_array().unwrap();
        assert_eq!((&sizes[0], &sizes[4], &sizes[6]), (&json!([16, 8]), &json!([8, 4]), &json!([16, 8])));
    }
    // The plan that was saved says how large samples are, and gives the same model again.
    let first = fs::read(folder.path("out.onnx")).unwrap();
    folder.plan(open, &["--plan", "plan.json", "--preview", "grid.png"]);
    assert_eq!(fs::read(folder.path("out.onnx")).unwrap(), first);
    let wrong = ["--plan", "plan.json", "--input-shape", "sample:1,1,8,8"];
    folder.refused(open, &wrong, "the plan makes samples of 16×8");
    folder.refused(open, &["--plan", "plan.json", "--form", "loop"], "stand side by side");
    for (plan, sentence) in [
        ("bottleneck:sizes=1/0.125/1", "the denoiser rejects `sample` of the size 2×1: "),
        ("bottleneck:sizes=1/0.3/1", "0.3 of 16, expected a whole number up to 16"),
        ("bottleneck:sizes=1/0.5", "ends with 1, the size of the sample"),
        ("bottleneck:sizes=1/0.5/0.25/0.5/1", "its option ends for 5 stages of 7 steps"),
        ("bottleneck:ends=3/2/7", "expected as many ends"),
        ("bottleneck:up=fast", "expected nearest, linear, cubic or matched"),
        ("forecast+bottleneck", "comes first"),
        ("bottleneck+easy", "easy looks at steps of one size"),
        ("bottleneck+gate", "gate without its option at"),
    ] {
        folder.refused(open, &sized(plan), sentence);
    }
    folder.refused(open, &["--steps", "7", "--plan", "bottleneck"], "--input-shape sample:... says how large");
    folder.refused("dit.onnx", &["--steps", "7", "--plan", "bottleneck"], "height and width are open");
    let lcm = Folder::new("LCMScheduler");
    lcm.refused(open, &sized("bottleneck"), "not defined for solver lcm");
}

#[test]
fn a_search_goes_on_and_gives_the_same() {
    let folder = Folder::new("DDIMScheduler");
    let options = ["--search", "3", "--evaluations", "12", "--pairs", "2"];
    let plan = folder.plan("dit.onnx", &options);
    assert_eq!(plan["grid"].as_array().unwrap().len(), 3);
    let search = &plan["evidence"]["search"];
    assert!(search["score"].as_f64().unwrap() <= search["uniform"].as_f64().unwrap(), "{search}");
    let log = folder.path("out.onnx.search.jsonl");
    let whole = fs::read_to_string(&log).unwrap();
    assert_eq!(whole.lines().count(), 13);
    // Killed in the middle of a line.
    let half: String = whole.lines().take(6).map(|l| format!("{l}\n")).collect();
    fs::write(&log, format!("{half}{{\"candi")).unwrap();
    assert_eq!(folder.plan("dit.onnx", &options), plan);
    assert_eq!(fs::read_to_string(&log).unwrap(), whole);
    folder.refused(
        "dit.onnx",
        &["--search", "3", "--evaluations", "12", "--pairs", "2", "--seed", "9"],
        "another search",
    );
}

#[test]
fn the_planner_is_held_against_plain_steps_that_take_as_long() {
    let folder = Folder::new("DDIMScheduler");
    let options = ["--steps", "10", "--plan", "auto", "--latency", "0.6"];
    let output = folder.run("dit.onnx", &[&GUIDED[..], &options].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let plan: Value = serde_json::from_slice(&fs::read(folder.path("plan.json")).unwrap()).unwrap();
    let measured = &plan["evidence"]["measured"];
    let steps = plan["grid"].as_array().unwrap().len();
    match measured["kept"].as_str().unwrap() {
        "plan" => {
            assert_eq!(steps, 10);
            assert!(measured["gained_rmse"][0].as_f64().unwrap() > 0.0, "{plan}");
            assert!(measured["share"].as_f64().unwrap() < 0.62, "{plan}");
            assert!(measured["because"].is_null());
        }
        other => {
            assert_eq!((other, steps), ("plain", measured["grid_steps"].as_u64().unwrap() as usize));
            assert!(steps < 10 && plan["steps"].is_null(), "{plan}");
            let sentence = measured["because"].as_str().unwrap();
            assert!(said.contains(sentence) && said.contains("plain steps"), "{said}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = Folder::new("DDIMScheduler");
    for (options, sentence) in [
        (&["--steps", "4", "--plan", "magic"][..], "no method is called `magic`"),
        (&["--plan", "sada"], "for the steps of --steps"),
        (&["--steps", "8", "--plan", "auto"], "--plan auto needs --latency"),
        (&["--steps", "8", "--plan", "auto", "--latency", "2"], "between 0 and 1"),
        (&["--steps", "8", "--latency", "0.5"], "--latency goes with --plan auto"),
        (&["--steps", "8", "--reference", "f.onnx"], "--reference is for --search and --plan auto"),
        (&["--steps", "8", "--plan", "auto", "--latency", "0.5", "--reference", "f.onnx"], "--reference needs --real"),
        (&["--steps", "8", "--plan", "gate:at=2"], "no guidance to end"),
        (&["--steps", "8", "--plan", "deep"], "needs such a skip"),
        (&["--steps", "8", "--plan", "delta:blocks=9"], "9 of 4 repeated blocks"),
        (&["--search", "3", "--skip-layers", "2"], "expected 0 to 1"),
    ] {
        folder.refused("dit.onnx", options, sentence);
    }
}
