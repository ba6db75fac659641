//! Denoisers of three families through every method that fits them, in every form: found, cut, compiled, and compared with
//! the denoiser run step by step, which `optimize sampler` does itself.

#![allow(clippy::unwrap_used)]

mod common;

use common::fixture;
use serde_json::{Value, json};
use std::{fs, process::Command};

/// A denoiser, the class of its scheduler, how it is guided, and the methods that fit it.
struct Family {
    file: &'static str,
    scheduler: &'static str,
    guided: &'static [&'static str],
    methods: &'static [&'static str],
}

/// Every method leaves something out; where it decides by calibration it is told to.
const FAMILIES: [Family; 3] = [
    Family {
        file: "dit.onnx",
        scheduler: "DDIMScheduler",
        guided: &["--guidance", "2", "--io", "uncond:label=10"],
        methods: &[
            "arms:every=2",
            "stack:every=3,first=2,points=2",
            "delta:blocks=2,switch=4",
            "easy:threshold=1e9,warmup=2",
            "gate:at=4+easy:threshold=1e9,warmup=2,tail=2",
        ],
    },
    Family {
        file: "unet.onnx",
        scheduler: "EulerDiscreteScheduler",
        guided: &["--guidance", "2", "--io", "uncond:states=0"],
        methods: &[
            "deep:skip=1,every=3",
            "rehash:skip=0,threshold=-2,longest=2",
            "arms:every=2",
            "forecast:every=2,first=2",
            "easy:threshold=1e9,warmup=2",
            "gate:at=4+deep:every=2",
            "sada:agreement=0",
        ],
    },
    Family {
        file: "mmdit.onnx",
        scheduler: "FlowMatchEulerDiscreteScheduler",
        guided: &["--guidance", "2", "--io", "uncond:text=0", "--io", "uncond:pooled=input"],
        methods: &[
            "arms:every=2,first=2,order=1",
            "stack:every=2,first=2",
            "delta:blocks=1,switch=4",
            "forecast:every=3,first=3,points=3",
            "easy:threshold=1e9,warmup=3",
            "gate:at=5+stack:every=2",
        ],
    },
];

impl Family {
    /// The report of a run that succeeds, which compares the result with the denoiser.
    fn compile(&self, options: &[&str]) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"_class_name": self.scheduler, "num_train_timesteps": 1000});
        fs::write(folder.path().join("scheduler.json"), config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.current_dir(folder.path()).arg("sampler").arg(fixture(self.file)).args(["-o", "out.onnx", "-q"]);
        command.args(["--scheduler", "scheduler.json", "--report", "report.json"]).args(options);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{} {options:?}: {}", self.file, String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&fs::read(folder.path().join("report.json")).unwrap()).unwrap();
        assert!(report["verify"]["passed"].as_bool().unwrap(), "{} {options:?}", self.file);
        report
    }
}

fn nodes(report: &Value) -> u64 {
    report["output"]["nodes_total"].as_u64().unwrap()
}

#[test]
fn methods_leave_work_out_in_every_form() {
    for family in &FAMILIES {
        let steps = ["--steps", "8"];
        let plain = family.compile(&[family.guided, &steps, &["--form", "unrolled"]].concat());
        for methods in family.methods {
            for form in ["unrolled", "loop"] {
                let options = [family.guided, &steps, &["--form", form, "--plan", methods]].concat();
                let report = family.compile(&options);
                assert_eq!(report["output"]["form"], form);
                let entries = report["plan"]["steps"].as_object().unwrap();
                assert!(!entries.is_empty(), "{} {methods}", family.file);
                assert!(nodes(&report) < nodes(&plain), "{} {methods} {form}", family.file);
            }
        }
    }
}

#[test]
fn the_rule_decides_at_run_time_in_every_family() {
    for family in &FAMILIES {
        for guided in [&[][..], family.guided] {
            let rule = ["--steps", "10", "--form", "adaptive", "--threshold", "0.2", "--warmup", "3"];
            let report = family.compile(&[guided, &rule].concat());
            assert_eq!(report["output"]["form"], "adaptive");
            let outputs = report["output"]["outputs"].to_string();
            assert!(outputs.contains("computed bool[10]"), "{outputs}");
        }
    }
}

#[test]
fn what_a_family_does_not_have_is_said() {
    for (family, methods, sentence) in [
        (&FAMILIES[0], "deep:skip=0", "needs such a skip"),
        (&FAMILIES[2], "rehash:skip=3", "needs such a skip"),
        (&FAMILIES[2], "delta:blocks=9", "9 of 3 repeated blocks"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({"_class_name": family.scheduler, "num_train_timesteps": 1000});
        fs::write(folder.path().join("scheduler.json"), config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.current_dir(folder.path()).arg("sampler").arg(fixture(family.file)).args(["-o", "out.onnx"]);
        command.args(["--scheduler", "scheduler.json", "--steps", "8", "--plan", methods]);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(sentence), "{said}");
    }
}
