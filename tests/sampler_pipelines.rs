//! `optimize sampler FOLDER`: whole pipelines with known answers, and folders that are refused with a sentence.
//!
//! The denoisers predict something that does not depend on the latent. DDIM on two levels of known signal then gives
//! `(noise - 0.8 m) / 0.6`, and a flow `noise - v`, so that every pixel is known in closed form.

#![allow(clippy::unwrap_used)]

use lathe_ir::{Model, Tensor, text};
use lathe_testkit::evaluator;
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};
use tempfile::TempDir;

/// What a token stands for: rows of one number, 0.1 times the id.
const TABLE: &str = "float[5,3] table = {0, 0, 0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4}";

/// A latent of two channels to two channels of pixels.
const DECODER: &str = "<ir_version: 8, opset_import: [\"\" : 18]>
g (float[batch,2,height,width] latent_sample) => (float[batch,2,height,width] sample) <float[1] half = {0.5}> {
    sample = Mul (latent_sample, half)
}";

struct Pipe(TempDir);

impl Pipe {
    fn new(class: &str, parts: &[&str]) -> Pipe {
        let pipe = Pipe(tempfile::tempdir().unwrap());
        fs::create_dir_all(pipe.path("pipe/scheduler")).unwrap();
        let mut index = json!({"_class_name": class, "_diffusers_version": "0.42.1", "safety_checker": [null, null]});
        for part in [&["vae", "scheduler", "tokenizer"], parts].concat() {
            index[part] = json!(["diffusers", "Part"]);
        }
        pipe.index(&index);
        pipe.scheduler(json!({
            "_class_name": "DDIMScheduler", "num_train_timesteps": 2, "trained_betas": [1e-9, 0.64], "clip_sample": false,
            "timestep_spacing": "leading"
        }));
        let vae =
            json!({"scaling_factor": 0.5, "shift_factor": 0.25, "block_out_channels": [1, 1], "latent_channels": 2});
        pipe.part("vae_decoder", DECODER, vae);
        pipe
    }

    fn index(&self, index: &Value) {
        fs::write(self.path("pipe/model_index.json"), index.to_string()).unwrap();
    }

    fn scheduler(&self, config: Value) {
        fs::write(self.path("pipe/scheduler/scheduler_config.json"), config.to_string()).unwrap();
    }

    fn part(&self, name: &str, graph: &str, config: Value) {
        fs::create_dir_all(self.path("pipe").join(name)).unwrap();
        let model = text::parse(graph).unwrap_or_else(|e| panic!("{name}: {e}"));
        fs::write(self.path("pipe").join(name).join("model.onnx"), model.to_bytes()).unwrap();
        fs::write(self.path("pipe").join(name).join("config.json"), config.to_string()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
        command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).env_remove("RUST_BACKTRACE");
        command.current_dir(self.0.path()).args(["sampler", "pipe", "-o", "out.onnx", "--steps", "2"]);
        command.args(options).output().unwrap()
    }

    fn succeeds(&self, options: &[&str]) -> Value {
        let output = self.run(&[&["--report", "report.json"], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&fs::read(self.path("report.json")).unwrap()).unwrap();
        assert!(report["verify"]["passed"].as_bool().unwrap());
        report
    }

    fn refused(&self, options: &[&str], code: i32, sentence: &str) {
        let output = self.run(options);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(sentence), "{said}");
        assert!(!self.path("out.onnx").exists());
    }

    /// Runs what was written. Its only output holds `expected`.
    fn gives(&self, inputs: &[(&str, Tensor)], dims: &[usize], expected: &dyn Fn(usize) -> f64) {
        let model = Model::read(&self.path("out.onnx")).unwrap().model;
        model.check().unwrap();
        let inputs: Vec<(String, Tensor)> = inputs.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        let outputs = evaluator().run(&model, &inputs).unwrap();
        let found = &outputs[0].1;
        assert_eq!((outputs.len(), found.dims()), (1, dims));
        for (k, value) in found.to_f64s().unwrap().iter().enumerate() {
            assert!((value - expected(k)).abs() < 1e-5, "{k}: {value}, expected {}", expected(k));
        }
    }
}

/// What the decoder and the processor make of a number of the latent.
fn pixel(latent: f64) -> f64 {
    ((latent / 0.5 + 0.25) * 0.5 * 0.5 + 0.5).clamp(0.0, 1.0)
}

/// What DDIM on the two levels makes of noise and a prediction that is always the same.
fn ddim(noise: f64, m: f64) -> f64 {
    (noise - 0.8 * m) / 0.6
}

fn guided(uncond: f64, cond: f64) -> f64 {
    uncond + 3.0 * (cond - uncond)
}

fn noise(dims: &[usize]) -> (Tensor, Vec<f64>) {
    let values: Vec<f32> = (0..dims.iter().product::<usize>()).map(|k| 0.03 * (k as f32 - 8.0)).collect();
    (Tensor::from_f32s(dims, &values), values.into_iter().map(f64::from).collect())
}

fn ids(rows: &[[i64; 2]]) -> Tensor {
    Tensor::from_i64s(&[rows.len(), 2], rows.as_flattened())
}

/// CLIP in the small: the last state is the row of each id.
fn clip() -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : 15]>
        g (int64[batch,tokens] input_ids) => (float[batch,tokens,3] last_hidden_state, float[batch,3] pooler_output) <
            {TABLE}
        > {{
            last_hidden_state = Gather (table, input_ids)
            pooler_output = ReduceMean <axes = [1], keepdims = 0> (last_hidden_state)
        }}"
    )
}

/// The same with the states of two layers, each twice the one before, and what is projected: ten times the mean.
fn clip_with_states() -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>
        g (int64[batch,tokens] input_ids) => (float[batch,3] text_embeds, float[batch,tokens,3] last_hidden_state,
            float[batch,tokens,3] \"hidden_states.0\", float[batch,tokens,3] \"hidden_states.1\",
            float[batch,tokens,3] \"hidden_states.2\"
        ) <{TABLE}, float[1] two = {{2}}, float[1] ten = {{10}}> {{
            \"hidden_states.0\" = Gather (table, input_ids)
            \"hidden_states.1\" = Mul (\"hidden_states.0\", two)
            \"hidden_states.2\" = Mul (\"hidden_states.1\", two)
            last_hidden_state = Neg (\"hidden_states.2\")
            mean = ReduceMean <axes = [1], keepdims = 0> (\"hidden_states.0\")
            text_embeds = Mul (mean, ten)
        }}"
    )
}

/// A denoiser of images: `given` are its conditions, and `body` computes `m` from them, which has one number per sample.
fn denoiser(given: &str, body: &str) -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : 17]>
        g (float[batch,2,height,width] sample, int64[] timestep, {given}) => (float[batch,2,height,width] out_sample) <
            int64[4] shape = {{-1, 1, 1, 1}}, float[1] zero = {{0}}, float[1] small = {{0.001}}
        > {{
            {body}
            level = Reshape (m, shape)
            none = Mul (sample, zero)
            time = Cast <to = 1> (timestep)
            still = Mul (time, zero)
            moved = Add (none, still)
            out_sample = Add (moved, level)
        }}"
    )
}

fn stable_diffusion() -> Pipe {
    let pipe = Pipe::new("StableDiffusionPipeline", &["unet", "text_encoder"]);
    pipe.part("text_encoder", &clip(), json!({}));
    let body = "m = ReduceMean <axes = [1, 2], keepdims = 0> (encoder_hidden_states)";
    pipe.part("unet", &denoiser("float[batch,tokens,3] encoder_hidden_states", body), json!({"sample_size": 4}));
    pipe
}

#[test]
fn stable_diffusion_is_one_model_of_ids_and_noise() {
    let pipe = stable_diffusion();
    let (noise, numbers) = noise(&[2, 2, 2, 2]);
    // Means of the ids are 1 and 3.5 with the text, 2 and 0.5 without.
    let inputs = [
        ("input_ids", ids(&[[0, 2], [4, 3]])),
        ("negative_input_ids", ids(&[[4, 0], [1, 0]])),
        ("noise", noise.clone()),
    ];
    let m = [guided(0.2, 0.1), guided(0.05, 0.35)];
    for form in ["unrolled", "loop"] {
        let report = pipe.succeeds(&["--guidance", "3", "--form", form]);
        pipe.gives(&inputs, &[2, 2, 2, 2], &|k| pixel(ddim(numbers[k], m[k / 8])));
        let names: Vec<&str> =
            report["parts"].as_array().unwrap().iter().map(|p| p["path"].as_str().unwrap()).collect();
        assert_eq!(names, ["pipe/unet/model.onnx", "pipe/text_encoder/model.onnx", "pipe/vae_decoder/model.onnx"]);
        assert_eq!((&report["input"]["path"], &report["output"]["form"]), (&json!("pipe"), &json!(form)));
    }
    // The same command gives the same bytes.
    let first = fs::read(pipe.path("out.onnx")).unwrap();
    pipe.succeeds(&["--guidance", "3", "--form", "loop"]);
    assert_eq!(fs::read(pipe.path("out.onnx")).unwrap(), first);
    // The image comes first, whatever else there is. A prediction that never changes gives the rule nothing to decide by, so
    // the result is not run.
    assert!(pipe.run(&["--guidance", "3", "--form", "adaptive", "--no-verify"]).status.success());
    let adaptive = Model::read(&pipe.path("out.onnx")).unwrap().model;
    let outputs = adaptive.graph.main().outputs().iter().map(|&v| adaptive.graph.value(v).name.as_str());
    assert_eq!(outputs.collect::<Vec<_>>(), ["image", "computed"]);
    // Without guidance, of one size, and where the scale is an input.
    pipe.succeeds(&["--size", "4x4"]);
    pipe.gives(&[inputs[0].clone(), inputs[2].clone()], &[2, 2, 2, 2], &|k| {
        pixel(ddim(numbers[k], [0.1, 0.35][k / 8]))
    });
    pipe.succeeds(&["--guidance", "input"]);
    let scale = [("guidance", Tensor::from_f32s(&[], &[3.0]))];
    pipe.gives(&[&inputs[..], &scale].concat(), &[2, 2, 2, 2], &|k| pixel(ddim(numbers[k], m[k / 8])));
}

#[test]
fn what_is_not_wanted_may_be_a_constant() {
    let pipe = stable_diffusion();
    let (noise, numbers) = noise(&[2, 2, 2, 2]);
    let inputs = [("input_ids", ids(&[[0, 2], [4, 3]])), ("noise", noise)];
    pipe.succeeds(&["--guidance", "3", "--negative", "zeros"]);
    pipe.gives(&inputs, &[2, 2, 2, 2], &|k| pixel(ddim(numbers[k], guided(0.0, [0.1, 0.35][k / 8]))));
    fs::write(pipe.path("negative.json"), r#"{"input_ids": [[4, 0]]}"#).unwrap();
    pipe.succeeds(&["--guidance", "3", "--negative", "negative.json"]);
    pipe.gives(&inputs, &[2, 2, 2, 2], &|k| pixel(ddim(numbers[k], guided(0.2, [0.1, 0.35][k / 8]))));
    fs::write(pipe.path("negative.json"), r#"{"ids": [4, 0]}"#).unwrap();
    fs::remove_file(pipe.path("out.onnx")).unwrap();
    let file = ["--guidance", "3", "--negative", "negative.json"];
    pipe.refused(&file, 2, "--negative has no list of whole numbers `input_ids`");
    pipe.refused(&["--guidance", "3", "--negative", "empty"], 2, "expected `input`, `zeros` or a .json file");
    pipe.refused(&["--negative", "zeros"], 2, "--negative is about the unconditional pass");
}

#[test]
fn a_larger_model_has_text_embeds_sizes_and_zeros_for_no_text() {
    let pipe = Pipe::new("StableDiffusionXLPipeline", &["unet", "text_encoder", "text_encoder_2"]);
    let mut index: Value = serde_json::from_slice(&fs::read(pipe.path("pipe/model_index.json")).unwrap()).unwrap();
    index["force_zeros_for_empty_prompt"] = json!(true);
    pipe.index(&index);
    for part in ["text_encoder", "text_encoder_2"] {
        pipe.part(part, &clip_with_states(), json!({}));
    }
    let given = "float[batch,tokens,6] encoder_hidden_states, float[batch,3] text_embeds, float[batch,6] time_ids";
    let body = "a = ReduceMean <axes = [1, 2], keepdims = 0> (encoder_hidden_states)
        b = ReduceMean <axes = [1], keepdims = 0> (text_embeds)
        c = ReduceSum <keepdims = 0> (time_ids, one)
        d = Mul (c, small)
        ab = Add (a, b)
        m = Add (ab, d)";
    let graph = denoiser(given, body).replace("int64[4] shape", "int64[1] one = {1}, int64[4] shape");
    pipe.part("unet", &graph, json!({"sample_size": 4}));
    pipe.succeeds(&["--guidance", "3"]);
    let (noise, numbers) = noise(&[1, 2, 2, 4]);
    let inputs = [("input_ids", ids(&[[0, 2]])), ("input_ids_2", ids(&[[4, 3]])), ("noise", noise.clone())];
    // The state before the last is twice the first. 4 by 8 pixels stand in the sizes twice.
    let sizes = 0.001 * 24.0;
    let cond = (0.2 + 0.7) / 2.0 + 3.5 + sizes;
    pipe.gives(&inputs, &[1, 2, 2, 4], &|k| pixel(ddim(numbers[k], guided(sizes, cond))));
    pipe.succeeds(&["--guidance", "3", "--negative", "input"]);
    let negative = [("negative_input_ids", ids(&[[0, 0]])), ("negative_input_ids_2", ids(&[[1, 1]]))];
    let uncond = 0.1 + 1.0 + sizes;
    let all = [&inputs[..], &negative].concat();
    pipe.gives(&all, &[1, 2, 2, 4], &|k| pixel(ddim(numbers[k], guided(uncond, cond))));
}

/// T5 in the small: as CLIP, but wider, and what does not count is nothing.
fn t5(width: usize, masked: bool) -> String {
    let rows: Vec<String> = (0..5 * width).map(|k| format!("{}", 0.1 * (k / width) as f64)).collect();
    let (given, kept) = match masked {
        true => (", int64[batch,tokens] attention_mask", "Mul (rows, column)"),
        false => ("", "Identity (rows)"),
    };
    let column = if masked { "mask = Cast <to = 1> (attention_mask)\n column = Unsqueeze (mask, two)" } else { "" };
    format!(
        "<ir_version: 8, opset_import: [\"\" : 18]>
        g (int64[batch,tokens] input_ids{given}) => (float[batch,tokens,{width}] last_hidden_state) <
            float[5,{width}] table = {{{}}}, int64[1] two = {{2}}
        > {{
            rows = Gather (table, input_ids)
            {column}
            last_hidden_state = {kept}
        }}",
        rows.join(", ")
    )
}

fn flow(settings: Value) -> Value {
    let mut config = json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000});
    config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    config
}

#[test]
fn three_encoders_are_joined_along_both_axes() {
    let encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"];
    let pipe = Pipe::new("StableDiffusion3Pipeline", &[&["transformer"], &encoders[..]].concat());
    pipe.scheduler(flow(json!({})));
    for part in &encoders[..2] {
        pipe.part(part, &clip_with_states(), json!({}));
    }
    pipe.part("text_encoder_3", &t5(8, false), json!({}));
    // The mean over three tokens of eight features, and of the six pooled ones a weighted one.
    let body = "m = ReduceMean <axes = [1, 2], keepdims = 0> (encoder_hidden_states)
        pooled = MatMul (pooled_projections, weights)
        n = Squeeze (pooled, one)
        both = Add (m, n)";
    let graph = denoiser("float[batch,words,8] encoder_hidden_states, float[batch,6] pooled_projections", body)
        .replace("sample,", "hidden_states,")
        .replace("(sample", "(hidden_states")
        .replace("int64[] timestep", "float[batch] timestep")
        .replace("Cast <to = 1> (timestep)", "Reshape (timestep, shape)")
        .replace("Reshape (m, shape)", "Reshape (both, shape)")
        .replace("int64[4] shape", "int64[1] one = {1}, float[6,1] weights = {0.1, 0, 0, 0, 0.01, 0}, int64[4] shape");
    pipe.part("transformer", &graph, json!({"sample_size": 4, "patch_size": 2}));
    pipe.succeeds(&["--guidance", "3"]);
    let (noise, numbers) = noise(&[1, 2, 2, 2]);
    let long = Tensor::from_i64s(&[1, 1], &[4]);
    let inputs = [
        ("input_ids", ids(&[[0, 2]])),
        ("input_ids_2", ids(&[[4, 3]])),
        ("input_ids_3", long.clone()),
        ("negative_input_ids", ids(&[[0, 0]])),
        ("negative_input_ids_2", ids(&[[0, 0]])),
        ("negative_input_ids_3", long),
        ("noise", noise),
    ];
    let third = 8.0 * 0.4;
    let cond = (2.0 * 3.0 * 0.2 + 2.0 * 3.0 * 0.7 + third) / 24.0 + 0.1 * 1.0 + 0.01 * 3.5;
    pipe.gives(&inputs, &[1, 2, 2, 2], &|k| pixel(numbers[k] - guided(third / 24.0, cond)));
}

/// Velocities of FLUX in the small: the place of the patch, the number in it, the scale of guidance, and the text.
const FLUX: &str = "<ir_version: 8, opset_import: [\"\" : 18]>
g (float[batch,patches,8] hidden_states, float[batch,tokens,3] encoder_hidden_states, float[batch,3] pooled_projections,
    float[batch] timestep, float[patches,3] img_ids, float[tokens,3] txt_ids, float[batch] guidance
) => (float[batch,patches,8] velocity) <
    float[3,1] weights = {0, 0.1, 0.01}, float[8] inside = {0, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007},
    int64[3] shape = {-1, 1, 1}, int64[2] axes = {1, 2}, int64[1] one = {1}, float[1] zero = {0}
> {
    place = MatMul (img_ids, weights)
    scale = Reshape (guidance, shape)
    time = Reshape (timestep, shape)
    still = Mul (time, zero)
    texts = ReduceMean (encoder_hidden_states, axes)
    nowhere = ReduceSum <keepdims = 0> (txt_ids)
    pool = ReduceMean (pooled_projections, one)
    pools = Reshape (pool, shape)
    none = Mul (hidden_states, zero)
    a = Add (none, place)
    b = Add (a, inside)
    c = Add (b, scale)
    d = Add (c, texts)
    e = Add (d, pools)
    f = Add (e, nowhere)
    velocity = Add (f, still)
}";

#[test]
fn patches_have_places_and_the_denoiser_is_told_the_scale() {
    let pipe = Pipe::new("FluxPipeline", &["transformer", "text_encoder", "text_encoder_2"]);
    pipe.scheduler(flow(json!({"use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 1.15})));
    pipe.part("text_encoder", &clip(), json!({}));
    pipe.part("text_encoder_2", &t5(3, false), json!({}));
    pipe.part("transformer", FLUX, json!({"in_channels": 8, "patch_size": 1}));
    pipe.succeeds(&["--guidance", "0.5", "--size", "8x12"]);
    let (noise, numbers) = noise(&[1, 2, 4, 6]);
    let inputs = [("input_ids", ids(&[[0, 2]])), ("input_ids_2", ids(&[[4, 3]])), ("noise", noise)];
    let velocity = |k: usize| {
        let (channel, row, column) = (k / 24, k / 6 % 4, k % 6);
        let inside = 4 * channel + 2 * (row % 2) + column % 2;
        0.1 * (row / 2) as f64 + 0.01 * (column / 2) as f64 + 0.001 * inside as f64 + 0.5 + 0.35 + 0.1
    };
    pipe.gives(&inputs, &[1, 2, 4, 6], &|k| pixel(numbers[k] - velocity(k)));
    pipe.succeeds(&["--guidance", "input", "--size", "8x12"]);
    let scale = [("guidance_scale", Tensor::from_f32s(&[], &[0.25]))];
    let inputs = [&inputs[..], &scale].concat();
    pipe.gives(&inputs, &[1, 2, 4, 6], &|k| pixel(numbers[k] - velocity(k) + 0.25));
    fs::remove_file(pipe.path("out.onnx")).unwrap();
    pipe.refused(
        &["--size", "8x12"],
        2,
        "`transformer` is told the scale of guidance as `guidance`; --guidance says it",
    );
    pipe.refused(&["--guidance", "1", "--size", "8x10"], 2, "--size is 8x10, expected multiples of 4");
}

#[test]
fn masks_go_to_encoder_and_denoiser_and_a_variance_is_left_out() {
    let pipe = Pipe::new("PixArtAlphaPipeline", &["transformer", "text_encoder"]);
    pipe.part("text_encoder", &t5(3, true), json!({}));
    let graph = "<ir_version: 8, opset_import: [\"\" : 18]>
        g (float[batch,2,height,width] hidden_states, float[batch,tokens,3] encoder_hidden_states, int64[batch] timestep,
            float[batch,tokens] encoder_attention_mask, float[batch,2] resolution, float[batch,1] aspect_ratio
        ) => (float[batch,4,height,width] out_sample) <
            int64[4] shape = {-1, 1, 1, 1}, int64[2] axes = {1, 2}, int64[1] one = {1}, float[1] zero = {0},
            float[2,1] weights = {0.01, 0.001}, float[1] seven = {7}
        > {
            sums = ReduceSum <keepdims = 0> (encoder_hidden_states, axes)
            counts = ReduceSum <keepdims = 0> (encoder_attention_mask, one)
            text = Div (sums, counts)
            size = MatMul (resolution, weights)
            shape_of = Add (size, aspect_ratio)
            sizes = Squeeze (shape_of, one)
            m = Add (text, sizes)
            level = Reshape (m, shape)
            none = Mul (hidden_states, zero)
            mean = Add (none, level)
            time = Cast <to = 1> (timestep)
            times = Reshape (time, shape)
            still = Mul (times, zero)
            still_mean = Add (mean, still)
            variance = Add (still_mean, seven)
            out_sample = Concat <axis = 1> (still_mean, variance)
        }";
    // Exporters may leave the channels open, which the configuration then says.
    let open = graph.replacen(
        "float[batch,2,height,width] hidden_states",
        "float[batch,channels,height,width] hidden_states",
        1,
    );
    pipe.part("transformer", &open, json!({"sample_size": 4, "patch_size": 2, "in_channels": 2}));
    pipe.succeeds(&["--guidance", "3"]);
    let (noise, numbers) = noise(&[1, 2, 4, 2]);
    let inputs = [
        ("input_ids", ids(&[[1, 4]])),
        ("attention_mask", ids(&[[1, 0]])),
        ("negative_input_ids", ids(&[[2, 3]])),
        ("negative_attention_mask", ids(&[[1, 1]])),
        ("noise", noise),
    ];
    let sizes = 0.01 * 8.0 + 0.001 * 4.0 + 2.0;
    let m = guided(3.0 * 0.5 / 2.0 + sizes, 3.0 * 0.1 + sizes);
    pipe.gives(&inputs, &[1, 2, 4, 2], &|k| pixel(ddim(numbers[k], m)));
}

/// A denoiser of videos whose prediction is another one in each of three frames; `latent` says where frames are.
fn video(latent: &str, frames: &str) -> String {
    format!(
        "<ir_version: 8, opset_import: [\"\" : 18]>
        g (float[batch,{latent}] hidden_states, float[batch,tokens,3] encoder_hidden_states, int64[batch] timestep
        ) => (float[batch,{latent}] out_sample) <
            float[{frames}] frames = {{0.1, 0.2, 0.3}}, int64[5] shape = {{-1, 1, 1, 1, 1}}, int64[2] axes = {{1, 2}},
            float[1] zero = {{0}}
        > {{
            text = ReduceMean <keepdims = 0> (encoder_hidden_states, axes)
            level = Reshape (text, shape)
            none = Mul (hidden_states, zero)
            a = Add (none, level)
            b = Add (a, frames)
            time = Cast <to = 1> (timestep)
            times = Reshape (time, shape)
            still = Mul (times, zero)
            out_sample = Add (b, still)
        }}"
    )
}

#[test]
fn videos_have_frames_before_channels() {
    let decoder = DECODER.replace("batch,2,height,width", "batch,2,frames,height,width");
    let pipe = Pipe::new("CogVideoXPipeline", &["transformer", "text_encoder"]);
    pipe.part("text_encoder", &t5(3, false), json!({}));
    pipe.part("transformer", &video("3,2,2,2", "3,1,1,1"), json!({}));
    let vae = json!({"scaling_factor": 0.5, "shift_factor": null, "block_out_channels": [1, 1], "latent_channels": 2});
    pipe.part("vae_decoder", &decoder, vae);
    pipe.succeeds(&["--guidance", "3"]);
    let (given, numbers) = noise(&[1, 3, 2, 2, 2]);
    let inputs = [("input_ids", ids(&[[1, 3]])), ("negative_input_ids", ids(&[[0, 2]])), ("noise", given)];
    let m = |frame: usize| guided(0.1, 0.2) + 0.1 * (frame + 1) as f64;
    pipe.gives(&inputs, &[1, 3, 2, 2, 2], &|k| pixel(ddim(numbers[k], m(k / 8)) - 0.125));
    fs::remove_file(pipe.path("out.onnx")).unwrap();
    pipe.refused(
        &["--guidance", "3", "--frames", "5"],
        2,
        "`transformer` takes latents of 3 frames, and --frames asks for 2",
    );
    pipe.refused(&["--guidance", "3", "--frames", "6"], 2, "--frames is 6, expected one more than a multiple of 4");

    let pipe = Pipe::new("WanPipeline", &["transformer", "text_encoder"]);
    pipe.part("text_encoder", &t5(3, true), json!({}));
    pipe.part("transformer", &video("2,3,2,2", "1,3,1,1"), json!({}));
    let vae = json!({"latents_mean": [0.1, 0.2], "latents_std": [2.0, 3.0], "scale_factor_spatial": 2, "z_dim": 2});
    pipe.part("vae_decoder", &decoder, vae);
    pipe.succeeds(&["--guidance", "3"]);
    let (given, numbers) = noise(&[1, 2, 3, 2, 2]);
    let masks = [("attention_mask", ids(&[[1, 0]])), ("negative_attention_mask", ids(&[[1, 1]]))];
    let inputs = [&[inputs[0].clone(), inputs[1].clone(), ("noise", given)][..], &masks].concat();
    // Of the second id nothing is left.
    let m = |frame: usize| guided(0.1, 0.05) + 0.1 * (frame + 1) as f64;
    pipe.gives(&inputs, &[1, 3, 2, 2, 2], &|k| {
        let (frame, channel, place) = (k / 8, k / 4 % 2, k % 4);
        let latent = ddim(numbers[channel * 12 + frame * 4 + place], m(frame));
        let latent = [latent * 2.0 + 0.1, latent * 3.0 + 0.2][channel];
        (latent * 0.5 * 0.5 + 0.5).clamp(0.0, 1.0)
    });
}

#[test]
fn types_of_parts_are_brought_together() {
    let pipe = stable_diffusion();
    // A float16 encoder of 32-bit ids, and a function that two parts have under one name.
    let half = clip().replace("float[", "float16[").replace("int64[batch,tokens]", "int32[batch,tokens]");
    pipe.part("text_encoder", &half, json!({}));
    pipe.succeeds(&["--guidance", "3"]);
    let model = Model::read(&pipe.path("out.onnx")).unwrap().model;
    let weights: Vec<String> = model
        .graph
        .initializers(lathe_ir::ScopeId::MAIN)
        .filter_map(|v| {
            let tensor = model.graph.constant(v)?;
            (tensor.len() == 15).then(|| tensor.dtype().to_string())
        })
        .collect();
    assert_eq!(weights, ["float16"]);
    let (noise, numbers) = noise(&[1, 2, 2, 2]);
    let words = |a: i32, b: i32| {
        let bytes: Vec<u8> = [a, b].into_iter().flat_map(i32::to_le_bytes).collect();
        Tensor::new(lathe_ir::DataType::Int32, vec![1, 2], bytes).unwrap()
    };
    let inputs = [("input_ids", words(0, 4)), ("negative_input_ids", words(0, 0)), ("noise", noise)];
    let model_ids = inputs.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect::<Vec<_>>();
    let found = evaluator().run(&model, &model_ids).unwrap()[0].1.to_f64s().unwrap();
    for (k, value) in found.iter().enumerate() {
        // 0.4 in float16 is 0.39990234.
        assert!((value - pixel(ddim(numbers[k], guided(0.0, 0.199951)))).abs() < 1e-4, "{k}: {value}");
    }
}

#[test]
fn functions_of_the_same_name_stay_apart_and_weights_are_there_once() {
    let pipe = stable_diffusion();
    let function = |body: &str| format!("<domain: \"own\", opset_import: [\"\" : 18]> twist (x) => (y) {{ {body} }}");
    let import = |graph: &str| graph.replace("[\"\" : 18]", "[\"\" : 18, \"own\" : 1]");
    let decoder = import(DECODER)
        .replace("sample = Mul (latent_sample, half)", "a = own.twist (latent_sample)\n sample = Mul (a, half)");
    let vae = json!({"scaling_factor": 0.5, "shift_factor": 0.25, "block_out_channels": [1, 1], "latent_channels": 2});
    pipe.part("vae_decoder", &format!("{decoder}\n{}", function("y = Neg (x)")), vae);
    let encoder = import(&t5(3, false)).replace("Identity (rows)", "own.twist (rows)");
    pipe.part("text_encoder", &format!("{encoder}\n{}", function("y = Abs (x)")), json!({}));
    pipe.succeeds(&["--guidance", "3"]);
    let (noise, numbers) = noise(&[1, 2, 2, 2]);
    let inputs = [("input_ids", ids(&[[1, 1]])), ("negative_input_ids", ids(&[[0, 0]])), ("noise", noise)];
    pipe.gives(&inputs, &[1, 2, 2, 2], &|k| {
        let latent = ddim(numbers[k], guided(0.0, 0.1)) / 0.5 + 0.25;
        (-latent * 0.5 * 0.5 + 0.5).clamp(0.0, 1.0)
    });
}

#[test]
fn a_picture_shows_what_the_decoder_makes() {
    let pipe = stable_diffusion();
    let decoder = DECODER.replace(
        "sample = Mul (latent_sample, half)",
        "a = Mul (latent_sample, half)\n b = Slice (a, zero, one, one)\n sample = Concat <axis = 1> (a, b)",
    );
    let decoder = decoder
        .replace("<float[1] half", "<int64[1] zero = {0}, int64[1] one = {1}, float[1] half")
        .replace("float[batch,2,height,width] sample", "float[batch,3,height,width] sample");
    let vae = json!({"scaling_factor": 0.5, "block_out_channels": [1, 1]});
    pipe.part("vae_decoder", &decoder, vae);
    pipe.succeeds(&["--guidance", "3", "--preview", "grid.png"]);
    let mut reader =
        png::Decoder::new(std::io::BufReader::new(fs::File::open(pipe.path("grid.png")).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    // Images of 4 by 4 are enlarged to 96 by 96; the halves are two columns of four.
    let (width, height) = (info.width as usize, info.height as usize);
    assert_eq!((info.color_type, width, height), (png::ColorType::Rgb, 2 * 196 + 16, 4 * 96 + 3 * 4));
    let half = |from: usize| -> Vec<u8> {
        pixels.chunks(3 * width).flat_map(|row| row[3 * from..3 * (from + 196)].to_vec()).collect()
    };
    let [left, right] = [half(0), half(196 + 16)];
    assert_eq!(left, right);
    assert!(left.iter().collect::<std::collections::BTreeSet<_>>().len() > 20);
}

#[test]
fn the_loop_alone_is_the_sampler_of_the_denoiser() {
    let pipe = stable_diffusion();
    let report = pipe.succeeds(&["--guidance", "3", "--only", "loop"]);
    let inputs = report["output"]["inputs"].to_string();
    assert!(inputs.contains("encoder_hidden_states_uncond float") && !inputs.contains("input_ids"), "{inputs}");
    assert!(report["parts"].is_null());
    let alone = fs::read(pipe.path("out.onnx")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimize"));
    command.env("ORT_DYLIB_PATH", &lathe_testkit::engine().library().path).current_dir(pipe.0.path());
    command.args(["sampler", "pipe/unet/model.onnx", "-o", "alone.onnx", "--steps", "2", "--guidance", "3"]);
    command.args(["--scheduler", "pipe/scheduler/scheduler_config.json", "--io", "uncond:encoder_hidden_states=input"]);
    assert!(command.output().unwrap().status.success());
    assert_eq!(fs::read(pipe.path("alone.onnx")).unwrap(), alone);
}

#[test]
fn folders_that_cannot_be_compiled_are_refused_by_name() {
    let pipe = stable_diffusion();
    let index: Value = serde_json::from_slice(&fs::read(pipe.path("pipe/model_index.json")).unwrap()).unwrap();
    let with = |field: &str, value: Value| {
        let mut index = index.clone();
        index[field] = value;
        pipe.index(&index);
    };
    with("_class_name", json!("KandinskyPipeline"));
    pipe.refused(&[], 1, "pipelines of class `KandinskyPipeline` are not built, those of StableDiffusionPipeline");
    with("controlnet", json!(["diffusers", "ControlNetModel"]));
    pipe.refused(&[], 1, "`pipe` has `controlnet` of class `ControlNetModel`, which is not built");
    with("_class_name", json!(null));
    pipe.refused(&[], 1, "names no class as `_class_name`");
    with("_class_name", json!("ORTStableDiffusionPipeline"));
    fs::rename(pipe.path("pipe/vae_decoder/model.onnx"), pipe.path("kept.onnx")).unwrap();
    fs::write(pipe.path("pipe/vae_decoder/diffusion_pytorch_model.safetensors"), "").unwrap();
    let sentence = "`pipe` has no `vae_decoder/model.onnx`, which pipelines of class `ORTStableDiffusionPipeline` need; \
                    there are weights of PyTorch";
    pipe.refused(&[], 1, sentence);
    fs::rename(pipe.path("kept.onnx"), pipe.path("pipe/vae_decoder/model.onnx")).unwrap();
    fs::write(pipe.path("pipe/vae_decoder/config.json"), "{}").unwrap();
    pipe.refused(&[], 1, "`vae_decoder/config.json` does not say `scaling_factor`");
    fs::write(pipe.path("pipe/vae_decoder/config.json"), r#"{"scaling_factor": 0.5, "block_out_channels": [1, 1]}"#)
        .unwrap();
    pipe.refused(&["--size", "3x4"], 2, "--size is 3x4, expected multiples of 2");
    pipe.refused(&["--size", "large"], 2, "expected height and width in pixels, as 512x768");
    pipe.refused(&["--frames", "5"], 2, "--frames is about videos, and StableDiffusionPipeline makes images");
    // Another width, an input that nothing gives, a part that takes more than ids.
    let wide = denoiser(
        "float[batch,tokens,4] encoder_hidden_states",
        "m = ReduceMean <axes = [1, 2], keepdims = 0> (encoder_hidden_states)",
    );
    pipe.part("unet", &wide, json!({"sample_size": 4}));
    pipe.refused(
        &[],
        1,
        "the text encoders give `encoder_hidden_states` of shape [?, ?, 3], and the denoiser takes [batch, tokens, 4]",
    );
    let more = wide.replace(
        "tokens,4] encoder_hidden_states",
        "tokens,3] encoder_hidden_states, float[batch,2,height,width] control",
    );
    let more = more.replace("Mul (sample, zero)", "Mul (control, zero)");
    pipe.part("unet", &more, json!({"sample_size": 4}));
    pipe.refused(
        &[],
        1,
        "`unet` takes `control`, which pipelines of class `StableDiffusionPipeline` do not give it here",
    );
    let four = DECODER.replacen("batch,2,", "batch,4,", 1).replacen("batch,2,", "batch,4,", 1);
    let vae = json!({"scaling_factor": 0.5, "block_out_channels": [1, 1]});
    pipe.part("unet", &wide.replace("tokens,4", "tokens,3"), json!({"sample_size": 4}));
    pipe.part("vae_decoder", &four, vae.clone());
    let channels = "`vae_decoder` takes `latent_sample` of shape [batch, 4, height, width], and is given [?, 2, ?, ?]";
    pipe.refused(&[], 1, channels);
    pipe.part("vae_decoder", DECODER, vae);
    let positions = clip().replacen("input_ids)", "input_ids, int64[batch,tokens] position_ids)", 1);
    pipe.part("text_encoder", &positions, json!({}));
    pipe.refused(&[], 1, "`text_encoder` takes `position_ids`, which pipelines of this class do not give");
    fs::remove_dir_all(pipe.path("pipe/scheduler")).unwrap();
    pipe.refused(&[], 1, "`pipe` has no `scheduler/scheduler_config.json`; --scheduler gives one");
    fs::remove_file(pipe.path("pipe/model_index.json")).unwrap();
    pipe.refused(&[], 1, "`pipe` is a folder and no pipeline of diffusers");
}
