//! A GPU provider for real: the WebGPU plugin on a software Vulkan device, which `./test` puts into `target/vulkan`.
//!
//! Where there is none (`./test` says so) these tests say that they are left out.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

use lathe_ir::text;
use lathe_runtime::NpzWriter;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};
use tempfile::TempDir;

/// What is needed to see the software device, for a command.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
    // Another driver can be named: SwiftShader has no float16.
    if std::env::var_os("VK_ICD_FILENAMES").is_none() {
        command.env("VK_ICD_FILENAMES", vulkan().join("vk_swiftshader_icd.json")).env("LD_LIBRARY_PATH", vulkan());
    }
    command.env("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1").env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command
}

/// Where `./test` puts a driver in software.
fn vulkan() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/vulkan")
}

/// Whether there is a device.
fn has_device() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let output = program().args(["doctor", "--json"]).output().unwrap();
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let plugins = found["plugins"].as_array().cloned().unwrap_or_default();
        let webgpu = plugins.iter().find(|plugin| plugin["name"] == "webgpu");
        let devices = webgpu.is_some_and(|plugin| !plugin["devices"].as_array().unwrap().is_empty());
        if !devices {
            eprintln!("left out: no software Vulkan device for the WebGPU plugin; ./test says how it looks for one");
        }
        devices
    })
}

/// A folder in which the program runs.
struct Folder(TempDir);

impl Folder {
    /// `None` where there is no device.
    fn new() -> Option<Folder> {
        has_device().then(|| Folder(tempfile::tempdir().unwrap()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn model(&self, name: &str, graph: &str) {
        fs::write(self.path(name), text::parse(graph).unwrap().to_bytes()).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Output {
        program().current_dir(self.0.path()).args(arguments).output().unwrap()
    }

    /// The standard output of what has to succeed.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.says(&[arguments, &["--json"]].concat())).unwrap()
    }

    fn report(&self, arguments: &[&str]) -> Value {
        self.says(&[arguments, &["--report", "report.json"]].concat());
        serde_json::from_slice(&fs::read(self.path("report.json")).unwrap()).unwrap()
    }
}

/// Sizes are computed from those of the input as exporters do, which WebGPU has no kernels for; all that count are known.
const EXPORTED: &str = "<ir_version: 8, opset_import: [\"\" : 17]>
g (float[n,8,16] x) => (float[n,8,16] y) <
    int64[1] one = {1}, int64[1] four = {4}, int64 axis = {2}, int64[1] rest = {-1}, float[16,16] w = {WEIGHTS}
> {
    [sizes] s = Shape (x)
    [width] k = Gather (s, axis)
    [wide] w1 = Unsqueeze (k, zero)
    [part] q = Div (w1, four)
    [target] t = Concat <axis = 0> (rest, four, q)
    [split] h = Reshape (x, t)
    r = Relu (h)
    [join] j = Reshape (r, s)
    y = MatMul (j, w)
}";

fn exported() -> String {
    let weights: Vec<String> = (0..256).map(|i| format!("{:.3}", ((i * 37 % 101) as f32 - 50.0) / 100.0)).collect();
    EXPORTED.replace("WEIGHTS", &weights.join(", ")).replace("int64[1] one = {1}", "int64[1] zero = {0}")
}

#[test]
fn nodes_that_are_left_are_named_and_exact_passes_remove_them() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", &exported());
    let found = folder.json(&["inspect", "model.onnx", "--ep", "webgpu"]);
    let placement = &found["placement"];
    assert_eq!(placement["provider"], "WebGpuExecutionProvider");
    let left = placement["model"]["left"].as_array().unwrap();
    let why = "the provider has no kernel for these types";
    for op in ["Unsqueeze", "Div"] {
        let group = left.iter().find(|group| group["op"] == op).unwrap_or_else(|| panic!("{op}: {placement}"));
        assert_eq!((&group["reads"], &group["why"]), (&json!("int64"), &json!(why)), "{group}");
    }
    assert_eq!(placement["optimized"]["placed"]["left"], json!([]), "{placement}");
    assert_eq!(placement["fixed"], Value::Null);
    let text = folder.says(&["inspect", "model.onnx", "--ep", "webgpu"]);
    assert!(text.contains("after `optimize MODEL` it takes all "), "{text}");
}

/// Attention whose rows without a key are guarded as PyTorch's exporter does, with an operator that WebGPU lacks.
const GUARDED: &str = "<ir_version: 8, opset_import: [\"\" : 17]>
g (float[1,4,8] q, float[1,8,4] k, bool[1,4,4] mask) => (float[1,4,4] y) <float zero = {0.0}, float low = {-inf}> {
    [scores] s = MatMul (q, k)
    [bias] b = Where (mask, zero, low)
    [masked] m = Add (s, b)
    [softmax] p = Softmax <axis = -1> (m)
    [bad] n = IsNaN (p)
    [guard] y = Where (n, zero, p)
}";

#[test]
fn what_the_provider_has_no_kernel_for_is_written_otherwise() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", GUARDED);
    let placement = folder.json(&["inspect", "model.onnx", "--ep", "webgpu"])["placement"].clone();
    assert_eq!(placement["model"]["left"][0]["op"], "IsNaN", "{placement}");
    assert_eq!(placement["optimized"]["placed"]["left"], json!([]), "{placement}");
    // The proof masks a row throughout, so that the guard is needed.
    let report = folder.report(&["model.onnx", "-o", "out.onnx", "--ep", "webgpu"]);
    let ran = report["passes"].as_array().unwrap().iter().any(|pass| pass["name"] == "fit-provider");
    assert!(ran && report["verify"]["passed"] == true, "{report}");
    folder.says(&["verify", "model.onnx", "out.onnx", "--ep", "webgpu", "--against", "cpu"]);
}

#[test]
fn the_main_job_is_proven_there_and_agrees_with_the_cpu() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", &exported());
    let report = folder.report(&["model.onnx", "-o", "out.onnx", "--ep", "webgpu", "--target", "ort"]);
    assert_eq!(report["verify"]["passed"], true);
    let layers = folder.json(&["verify", "model.onnx", "out.onnx", "--ep", "webgpu", "--against", "cpu", "--layers"]);
    assert_eq!((&layers["passed"], &layers["layers"]["first"]), (&json!(true), &Value::Null), "{layers}");
    assert!(layers["runtime"].as_str().unwrap().ends_with("(webgpu against cpu)"), "{layers}");
    let timed = folder.json(&["bench", "model.onnx", "out.onnx", "--ep", "webgpu", "--seconds", "1"]);
    let side = &timed["after"];
    assert!(side["median_ms"].as_f64().unwrap() > 0.0 && side["placement"]["taken"].as_u64().unwrap() > 0, "{timed}");
    assert_eq!(side["placement"]["elsewhere"], json!([]), "{timed}");
    // A run returns before the device has finished: what is timed ends when the outputs are on the host.
    assert_eq!((&side["copies_in_run"], &side["copy_out_ms"]), (&json!(true), &Value::Null), "{timed}");
}

#[test]
fn a_budget_is_spent_with_statistics_from_there() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", &exported());
    let mut set = NpzWriter::create(&folder.path("set.npz")).unwrap();
    let values: Vec<f32> = (0..16 * 8 * 16).map(|i| ((i * 29 % 83) as f32 - 41.0) / 20.0).collect();
    set.add("x", &lathe_ir::Tensor::from_f32s(&[16, 8, 16], &values)).unwrap();
    set.finish().unwrap();
    let budget =
        ["model.onnx", "-o", "out.onnx", "--ep", "webgpu", "--calib", "set.npz", "--size", "0.8", "--opset", "21"];
    let report = folder.report(&budget);
    assert!(!report["plan"].is_null() && report["verify"]["passed"] == true, "{report}");
    let drop = report["verify"]["drop"].as_f64().unwrap();
    assert!(drop < 0.05, "{}", report["verify"]);
}

#[test]
fn int4_products_there_are_those_of_the_cpu() {
    let Some(folder) = Folder::new() else { return };
    let weights: Vec<String> =
        (0..128 * 128).map(|i| format!("{:.3}", ((i * 37 % 101) as f32 - 50.0) / 400.0)).collect();
    let graph = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n,4,128] x) => (float[n,4,128] y) <
        float[128,128] w = {WEIGHTS}, float[128,128] v = {WEIGHTS}
    > { a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, v) }";
    folder.model("model.onnx", &graph.replace("WEIGHTS", &weights.join(", ")));
    let mut set = NpzWriter::create(&folder.path("set.npz")).unwrap();
    let values: Vec<f32> = (0..16 * 4 * 128).map(|i| ((i * 29 % 83) as f32 - 41.0) / 20.0).collect();
    set.add("x", &lathe_ir::Tensor::from_f32s(&[16, 4, 128], &values)).unwrap();
    set.finish().unwrap();
    let budget =
        ["model.onnx", "-o", "out.onnx", "--ep", "webgpu", "--calib", "set.npz", "--size", "0.2", "--target", "ort"];
    let report = folder.report(&[&budget[..], &["--allow-slower"]].concat());
    assert_eq!(report["verify"]["passed"], true, "{report}");
    let operators = folder.json(&["inspect", "out.onnx"])["operators"].to_string();
    assert!(operators.contains("MatMulNBits"), "{operators}");
    // The CPU rounds what it multiplies to 8 bits too.
    folder.says(&["verify", "out.onnx", "--ep", "webgpu", "--against", "cpu", "--rtol", "2e-2"]);
}

/// The denoiser of `tests/sampler.rs`.
const DENOISER: &str = "<ir_version: 8, opset_import: [\"\" : 17]>
g (float[n,1,2,2] x, float[n] t) => (float[n,1,2,2] eps) <
    float[1] speed = {0.004}, int64[4] shape = {-1, 1, 1, 1}, float[2,2] w = {0.4, -0.3, 0.2, 0.5}
> {
    angle = Mul (t, speed)
    wave = Sin (angle)
    time = Reshape (wave, shape)
    p = MatMul (x, w)
    a = Tanh (p)
    m = Mul (a, time)
    eps = Add (x, m)
}";

#[test]
fn compiled_samplers_run_there_in_every_form() {
    let Some(folder) = Folder::new() else { return };
    folder.model("denoiser.onnx", DENOISER);
    let scheduler = json!({"_class_name": "DDIMScheduler", "clip_sample": false});
    fs::write(folder.path("scheduler.json"), scheduler.to_string()).unwrap();
    for form in ["unrolled", "loop", "adaptive"] {
        let out = format!("{form}.onnx");
        let options = ["sampler", "denoiser.onnx", "-o", &out, "--scheduler", "scheduler.json", "--steps", "8"];
        let said = folder.says(&[&options[..], &["--form", form, "--ep", "webgpu"]].concat());
        assert!(said.contains("verified against the denoiser run step by step"), "{said}");
    }
}

#[test]
fn half_precision_there_is_near_the_original_on_the_cpu() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", &exported());
    let output = folder.run(&["model.onnx", "-o", "out.onnx", "--dtype", "float16", "--ep", "webgpu"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // SwiftShader is such a device; VK_ICD_FILENAMES can name a driver that has the type.
    if said.contains("requires f16 but the device does not support it") {
        assert_eq!((output.status.code(), sentences(&said)), (Some(3), 1), "{said}");
        return assert!(!folder.path("out.onnx").exists());
    }
    assert!(output.status.success(), "{said}");
    folder.says(&["verify", "model.onnx", "out.onnx", "--ep", "webgpu", "--against", "cpu", "--rtol", "5e-3"]);
}

#[test]
fn a_device_that_is_lost_is_one_sentence_and_nothing_is_written() {
    let Some(folder) = Folder::new() else { return };
    folder.model("model.onnx", &exported());
    let shim = folder.path("liblost.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/lost_device.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let build =
        Command::new(rustc).args(["--edition", "2024", "--crate-type", "cdylib", "-o"]).args([&shim, &source]).status();
    assert!(build.unwrap().success());
    let driver = json!({"file_format_version": "1.0.0", "ICD": {"library_path": shim, "api_version": "1.0.5"}});
    fs::write(folder.path("icd.json"), driver.to_string()).unwrap();
    for after in ["0", "1"] {
        let mut command = program();
        command.env("VK_ICD_FILENAMES", folder.path("icd.json")).env("LD_LIBRARY_PATH", vulkan());
        command.env("REAL_DRIVER", vulkan().join("libvk_swiftshader.so")).env("LOST_AFTER", after);
        command.args(["model.onnx", "-o", "out.onnx", "--ep", "webgpu"]).current_dir(folder.0.path());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && sentences(&said) == 1, "{said}");
        assert!(said.contains("the device was lost during a run (ONNX Runtime "), "{said}");
        assert!(!folder.path("out.onnx").exists());
    }
}

/// Errors in what was said; a slow machine tells its progress too.
fn sentences(said: &str) -> usize {
    said.lines().filter(|line| line.starts_with("error: ")).count()
}

#[test]
fn what_the_device_cannot_do_is_one_sentence_and_nothing_is_written() {
    let Some(folder) = Folder::new() else { return };
    // 16 GiB in one value: more than a device of WebGPU holds.
    folder.model(
        "large.onnx",
        "<ir_version: 8, opset_import: [\"\" : 17]> g (float[1] x) => (float[1] y) <
            int64[2] sizes = {65536, 65536}, int64[2] axes = {0, 1}
        > { big = Expand (x, sizes)  more = Exp (big)  sum = ReduceSum <keepdims = 0> (more, axes)  z = Add (x, sum)  y = Exp (z) }",
    );
    let output = folder.run(&["large.onnx", "-o", "out.onnx", "--ep", "webgpu", "--device", "7"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("there is no device 7") && sentences(&said) == 1, "{said}");
    let output = folder.run(&["large.onnx", "-o", "out.onnx", "--ep", "webgpu", "--memory", "4GB"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(matches!(output.status.code(), Some(1 | 3)), "{said}");
    assert_eq!(sentences(&said), 1, "{said}");
    assert!(!folder.path("out.onnx").exists());
}
