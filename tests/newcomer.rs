//! What README says is done, command by command, by `tests/newcomer.sh`, in a folder with the files that README speaks of.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Noise, fixture, repository};
use lathe_ir::{Model, Tensor, text};
use lathe_runtime::NpzWriter;
use lathe_testkit::evaluator;
use serde_json::json;
use std::{fs, path::Path, process::Command};

/// A classifier of ten classes.
fn classifier() -> Model {
    let mut noise = Noise(7);
    let graph = format!(
        "<ir_version: 10, opset_import: [\"\" : 21]> g (float[n,64] x) => (float[n,10] logits) <
            float[64,256] a = {{{}}}, float[256,256] b = {{{}}}, float[256,10] c = {{{}}}
        > {{ xa = MatMul (x, a)  ra = Relu (xa)  xb = MatMul (ra, b)  rb = Relu (xb)  logits = MatMul (rb, c) }}",
        noise.list(64 * 256, 0.3),
        noise.list(256 * 256, 0.15),
        noise.list(256 * 10, 0.15),
    );
    text::parse(&graph).unwrap()
}

/// Samples, with the classes that the model gives them if a model is given.
fn write_set(model: Option<&Model>, path: &Path, count: usize, seed: u64) {
    let x = Tensor::from_f32s(&[count, 64], &Noise(seed).numbers(count * 64, 2.0));
    let mut set = NpzWriter::create(path).unwrap();
    set.add("x", &x).unwrap();
    if let Some(model) = model {
        let logits = evaluator().run(model, &[("x".to_owned(), x)]).unwrap()[0].1.to_f64s().unwrap();
        let class = |row: &[f64]| (0..10).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i64;
        let labels: Vec<i64> = logits.chunks(10).map(class).collect();
        set.add("label", &Tensor::from_i64s(&[count], &labels)).unwrap();
    }
    set.finish().unwrap();
}

/// A folder as diffusers lays it out, with parts that are tiny.
fn write_pipeline(folder: &Path) {
    let part = |name: &str, graph: &str, config: serde_json::Value| {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("model.onnx"), text::parse(graph).unwrap().to_bytes()).unwrap();
        fs::write(folder.join(name).join("config.json"), config.to_string()).unwrap();
    };
    part(
        "text_encoder",
        "<ir_version: 8, opset_import: [\"\" : 15]>
        g (int64[batch,tokens] input_ids) => (float[batch,tokens,3] last_hidden_state, float[batch,3] pooler_output) <
            float[5,3] table = {0, 0, 0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4}
        > {
            last_hidden_state = Gather (table, input_ids)
            pooler_output = ReduceMean <axes = [1], keepdims = 0> (last_hidden_state)
        }",
        json!({}),
    );
    part(
        "unet",
        "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[batch,2,height,width] sample, int64[] timestep, float[batch,tokens,3] encoder_hidden_states)
            => (float[batch,2,height,width] out_sample)
        <int64[4] shape = {-1, 1, 1, 1}, float[1] small = {0.001}> {
            m = ReduceMean <axes = [1, 2], keepdims = 0> (encoder_hidden_states)
            level = Reshape (m, shape)
            time = Cast <to = 1> (timestep)
            scaled = Mul (time, small)
            bent = Tanh (sample)
            moved = Mul (bent, scaled)
            out_sample = Add (moved, level)
        }",
        json!({"sample_size": 4}),
    );
    part(
        "vae_decoder",
        "<ir_version: 8, opset_import: [\"\" : 18]>
        g (float[batch,2,height,width] latent_sample) => (float[batch,2,height,width] sample) <float[1] half = {0.5}> {
            sample = Mul (latent_sample, half)
        }",
        json!({"scaling_factor": 0.5, "block_out_channels": [1, 1], "latent_channels": 2}),
    );
    let mut index = json!({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"});
    for part in ["vae", "scheduler", "tokenizer", "unet", "text_encoder"] {
        index[part] = json!(["diffusers", "Part"]);
    }
    fs::write(folder.join("model_index.json"), index.to_string()).unwrap();
    fs::create_dir_all(folder.join("scheduler")).unwrap();
    let scheduler = json!({"_class_name": "DDIMScheduler", "clip_sample": false});
    fs::write(folder.join("scheduler/scheduler_config.json"), scheduler.to_string()).unwrap();
}

#[cfg(unix)]
#[test]
fn commands_of_the_readme_run_as_they_stand() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let model = classifier();
    for name in ["model.onnx", "resnet.onnx"] {
        fs::write(path(name), model.to_bytes()).unwrap();
    }
    fs::copy(fixture("dit.onnx"), path("dit.onnx")).unwrap();
    write_set(None, &path("calib.npz"), 256, 1);
    write_set(Some(&model), &path("labelled.npz"), 256, 1);
    write_set(Some(&model), &path("test.npz"), 256, 2);
    let scheduler = json!({"_class_name": "DDIMScheduler", "clip_sample": false});
    fs::write(path("scheduler_config.json"), scheduler.to_string()).unwrap();
    write_pipeline(&path("FOLDER"));
    fs::create_dir(path("programs")).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_optimize"), path("programs/optimize")).unwrap();

    let mut command = Command::new("bash");
    command.arg(repository("tests/newcomer.sh")).arg(repository("README.md")).current_dir(folder.path());
    let programs = format!("{}:{}", path("programs").display(), std::env::var("PATH").unwrap());
    command.env("PATH", programs).env("XDG_DATA_HOME", path("data")).env_remove("RUST_BACKTRACE");
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
}
