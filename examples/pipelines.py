"""Tiny pipelines of diffusers as one ONNX model each, beside the pipelines themselves.

    pip install torch diffusers==0.42.1 transformers onnx onnxscript onnxruntime==1.32.0 numpy
    cargo build --release
    python examples/pipelines.py target/release/optimize [--only flux]

Eight pipelines with random weights are made of the classes of diffusers and exported part by part into folders as Optimum lays
them out: `model_index.json`, `text_encoder/model.onnx`, `unet/model.onnx`, `vae_decoder/model.onnx`, a `config.json` beside
each, `scheduler/scheduler_config.json`. `optimize sampler FOLDER` makes one model of each, token ids and noise in, pixels
out. It runs in ONNX Runtime, and the pipeline of diffusers on the same ids and noise; the script prints the largest
difference of a pixel (pixels are from 0 to 1) and the sizes of the files, and fails where a pixel differs by more than 1e-3,
where a file is more than 5 % larger than its parts, or where a second run gives other bytes.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import diffusers
import numpy as np
import onnxruntime as ort
import torch
import transformers

LIMIT, GROWTH, STEPS, BATCH, TOKENS, VOCABULARY = 1e-3, 1.05, 6, 2, 8, 99
PROMPTS = ["a red bicycle", "two boats on a lake"]
NEGATIVE = ["blurry", "low quality"]
BATCHED = {0: "batch"}
IDS = {0: "batch", 1: "tokens"}
IMAGE = {0: "batch", 2: "height", 3: "width"}


class Tokenizer:
    """Gives each text ids that only depend on it, padded with zeros."""

    model_max_length, added_tokens_encoder = TOKENS, {}

    def tokenize(self, text):
        return text.split()

    def __call__(self, texts, max_length=None, **_):
        texts = [texts] if isinstance(texts, str) else texts
        length = max_length or TOKENS
        ids, mask = np.zeros((len(texts), length), np.int64), np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            count = min(length, 1 + len(text.split()))
            numbers = np.random.default_rng(len(text)).integers(3, VOCABULARY - 1, count)
            numbers[-1] = VOCABULARY - 1
            ids[row, :count], mask[row, :count] = numbers, 1
        return transformers.BatchEncoding({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})


class Part(torch.nn.Module):
    """A part that takes and gives tensors by position."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def spelled_out(self, x):
    """What a norm does in operators that every exporter knows."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.eps or 1e-6)) * self.weight


def squeezed(self, axis, plain=torch.Tensor.squeeze):
    """What a squeeze does that may do nothing, decided while tracing: a branch for it is nothing a runtime loads."""
    return plain(self, axis) if self.shape[axis] == 1 else self


torch.nn.RMSNorm.forward, torch.Tensor.squeeze = spelled_out, squeezed


def export(folder, name, model, call, inputs, outputs, axes):
    """Writes `folder/name/model.onnx` with its configuration. `inputs` are pairs of name and example."""
    place = folder / name
    place.mkdir(parents=True)
    names = [input_name for input_name, _ in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Part(model, call).eval(), tuple(value for _, value in inputs), str(place / "model.onnx"),
            input_names=names, output_names=outputs, dynamic_axes=axes, opset_version=18, dynamo=False,
        )
    config = dict(model.config) if not hasattr(model.config, "to_dict") else model.config.to_dict()
    (place / "config.json").write_text(json.dumps(config, default=str))


def clip(kind=transformers.CLIPTextModel, width=32):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS, projection_dim=width, bos_token_id=0, eos_token_id=VOCABULARY - 1, hidden_act="gelu",
    )
    return kind(config).eval()


def t5(width=32):
    config = transformers.T5Config(
        d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2, vocab_size=VOCABULARY, relative_attention_num_buckets=8,
    )
    return transformers.T5EncoderModel(config).eval()


def vae(channels=4, **settings):
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, **settings,
    ).eval()


def export_clip(folder, name, model):
    """CLIP as Optimum writes it: the last state and the pooled one; of a projection, its embedding first."""
    projected = isinstance(model, transformers.CLIPTextModelWithProjection)
    states = model.config.num_hidden_layers + 1
    first = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]

    def call(model, ids):
        found = model(ids, output_hidden_states=True)
        return (*(found[name] for name in first), *found.hidden_states)

    outputs = first + [f"hidden_states.{k}" for k in range(states)]
    ids = torch.ones(2, TOKENS, dtype=torch.int64)
    export(folder, name, model, call, [("input_ids", ids)], outputs, {"input_ids": IDS})


def export_t5(folder, name, model, masked):
    ids = torch.ones(2, TOKENS, dtype=torch.int64)
    inputs = [("input_ids", ids)] + ([("attention_mask", ids)] if masked else [])
    call = lambda model, ids, mask=None: model(ids, attention_mask=mask)[0]
    export(folder, name, model, call, inputs, ["last_hidden_state"], {name: IDS for name, _ in inputs})


def export_vae(folder, model, channels, axes=IMAGE, shape=(8, 8)):
    call = lambda model, latent: model.decode(latent, return_dict=False)[0]
    inputs = [("latent_sample", torch.randn(2, channels, *shape))]
    export(folder, "vae_decoder", model, call, inputs, ["sample"], {"latent_sample": axes})


def lively(model):
    """Random weights give predictions near nothing; a larger last layer lets steps matter."""
    last = [p for name, p in model.named_parameters() if "proj_out" in name or "conv_out" in name]
    for parameter in last:
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def stable_diffusion(folder):
    text, decoder = clip(), vae()
    unet = lively(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    ))
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    export_clip(folder, "text_encoder", text)
    call = lambda model, x, t, states: model(x, t, states, return_dict=False)[0]
    inputs = [("sample", torch.randn(2, 4, 16, 16)), ("timestep", torch.tensor(7)),
              ("encoder_hidden_states", torch.randn(2, TOKENS, 32))]
    axes = {"sample": IMAGE, "encoder_hidden_states": IDS}
    export(folder, "unet", unet, call, inputs, ["out_sample"], axes)
    export_vae(folder, decoder, 4)
    pipe = diffusers.StableDiffusionPipeline(
        vae=decoder, text_encoder=text, tokenizer=Tokenizer(), unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    return pipe, (4, 16, 16), dict(guidance_scale=4.0, negative_prompt=NEGATIVE), ["--guidance", "4"]


def stable_diffusion_xl(folder):
    text, second, decoder = clip(), clip(transformers.CLIPTextModelWithProjection), vae()
    unet = lively(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    ))
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    export_clip(folder, "text_encoder", text)
    export_clip(folder, "text_encoder_2", second)

    def call(model, x, t, states, embeds, ids):
        return model(x, t, states, added_cond_kwargs={"text_embeds": embeds, "time_ids": ids}, return_dict=False)[0]

    inputs = [("sample", torch.randn(2, 4, 16, 16)), ("timestep", torch.tensor(7.0)),
              ("encoder_hidden_states", torch.randn(2, TOKENS, 64)), ("text_embeds", torch.randn(2, 32)),
              ("time_ids", torch.randn(2, 6))]
    axes = {"sample": IMAGE, "encoder_hidden_states": IDS, "text_embeds": BATCHED, "time_ids": BATCHED}
    export(folder, "unet", unet, call, inputs, ["out_sample"], axes)
    export_vae(folder, decoder, 4)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=decoder, text_encoder=text, text_encoder_2=second, tokenizer=Tokenizer(), tokenizer_2=Tokenizer(), unet=unet,
        scheduler=scheduler, add_watermarker=False,
    )
    return pipe, (4, 16, 16), dict(guidance_scale=4.0), ["--guidance", "4"]


def stable_diffusion_3(folder):
    texts = [clip(transformers.CLIPTextModelWithProjection) for _ in range(2)]
    # T5 is as wide as the denoiser's text, which the others are padded to.
    third, decoder = t5(80), vae(8, shift_factor=0.0609, scaling_factor=1.5305)
    transformer = lively(diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=64, out_channels=8, pos_embed_max_size=16,
    ))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    export_clip(folder, "text_encoder", texts[0])
    export_clip(folder, "text_encoder_2", texts[1])
    export_t5(folder, "text_encoder_3", third, False)
    call = lambda model, x, states, pooled, t: model(x, states, pooled, t, return_dict=False)[0]
    inputs = [("hidden_states", torch.randn(2, 8, 16, 16)), ("encoder_hidden_states", torch.randn(2, 2 * TOKENS, 80)),
              ("pooled_projections", torch.randn(2, 64)), ("timestep", torch.ones(2))]
    axes = {"hidden_states": BATCHED, "encoder_hidden_states": IDS, "pooled_projections": BATCHED, "timestep": BATCHED}
    export(folder, "transformer", transformer, call, inputs, ["out_hidden_states"], axes)
    export_vae(folder, decoder, 8)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=decoder, text_encoder=texts[0], tokenizer=Tokenizer(),
        text_encoder_2=texts[1], tokenizer_2=Tokenizer(), text_encoder_3=third, tokenizer_3=Tokenizer(),
    )
    call = dict(guidance_scale=4.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS)
    return pipe, (8, 16, 16), call, ["--guidance", "4"]


def flux(folder):
    text, second, decoder = clip(), t5(), vae(4, shift_factor=0.1159, scaling_factor=0.3611)
    transformer = lively(diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    export_clip(folder, "text_encoder", text)
    export_t5(folder, "text_encoder_2", second, False)

    def call(model, x, states, pooled, t, image, words, guidance):
        return model(x, states, pooled, t, image, words, guidance, return_dict=False)[0]

    inputs = [("hidden_states", torch.randn(2, 64, 16)), ("encoder_hidden_states", torch.randn(2, TOKENS, 32)),
              ("pooled_projections", torch.randn(2, 32)), ("timestep", torch.ones(2)), ("img_ids", torch.randn(64, 3)),
              ("txt_ids", torch.zeros(TOKENS, 3)), ("guidance", torch.ones(2))]
    # Tracing fixes how many patches and tokens there are.
    axes = {name: BATCHED for name, _ in inputs if not name.endswith("_ids")}
    export(folder, "transformer", transformer, call, inputs, ["out_hidden_states"], axes)
    export_vae(folder, decoder, 4)
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler, vae=decoder, text_encoder=text, tokenizer=Tokenizer(), text_encoder_2=second,
        tokenizer_2=Tokenizer(), transformer=transformer,
    )
    call = dict(guidance_scale=3.5, max_sequence_length=TOKENS, height=32, width=32)
    return pipe, (4, 16, 16), call, ["--guidance", "3.5", "--size", "32x32"]


def pixart(folder):
    text, decoder = t5(), vae()
    transformer = lively(diffusers.PixArtTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, caption_channels=32, cross_attention_dim=24, use_additional_conditions=False,
    ))
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=False)
    export_t5(folder, "text_encoder", text, True)

    def call(model, x, states, t, mask):
        added = {"resolution": None, "aspect_ratio": None}
        return model(x, states, t, added, encoder_attention_mask=mask, return_dict=False)[0]

    inputs = [("hidden_states", torch.randn(2, 4, 16, 16)), ("encoder_hidden_states", torch.randn(2, TOKENS, 32)),
              ("timestep", torch.ones(2, dtype=torch.int64)), ("encoder_attention_mask", torch.ones(2, TOKENS, dtype=torch.int64))]
    axes = {"hidden_states": BATCHED, "encoder_hidden_states": IDS, "timestep": BATCHED, "encoder_attention_mask": IDS}
    export(folder, "transformer", transformer, call, inputs, ["out_sample"], axes)
    export_vae(folder, decoder, 4)
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=Tokenizer(), text_encoder=text, vae=decoder, transformer=transformer, scheduler=scheduler
    )
    call = dict(guidance_scale=4.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS, use_resolution_binning=False,
                clean_caption=False)
    return pipe, (4, 16, 16), call, ["--guidance", "4"]


def cogvideox(folder):
    text = t5()
    decoder = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4, sample_height=32, sample_width=32,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()
    transformer = lively(diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=32,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=TOKENS,
    ))
    scheduler = diffusers.CogVideoXDDIMScheduler()
    export_t5(folder, "text_encoder", text, False)
    call = lambda model, x, states, t: model(x, states, t, return_dict=False)[0]
    inputs = [("hidden_states", torch.randn(2, 3, 4, 4, 4)), ("encoder_hidden_states", torch.randn(2, TOKENS, 32)),
              ("timestep", torch.ones(2, dtype=torch.int64))]
    axes = {"hidden_states": BATCHED, "encoder_hidden_states": BATCHED, "timestep": BATCHED}
    export(folder, "transformer", transformer, call, inputs, ["out_sample"], axes)
    export_vae(folder, decoder, 4, BATCHED, (3, 4, 4))
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=Tokenizer(), text_encoder=text, vae=decoder, transformer=transformer, scheduler=scheduler
    )
    call = dict(guidance_scale=4.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS, num_frames=9, height=32, width=32)
    return pipe, (3, 4, 4, 4), call, ["--guidance", "4"]


def wan(folder):
    text = t5()
    decoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    for module in decoder.modules():
        # Twice as large, the nearest is the exact nearest, which the exporter does not know.
        module.mode = "nearest" if isinstance(module, torch.nn.Upsample) else getattr(module, "mode", None)
    transformer = lively(diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ))
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    export_t5(folder, "text_encoder", text, True)
    call = lambda model, x, t, states: model(x, t, states, return_dict=False)[0]
    inputs = [("hidden_states", torch.randn(2, 16, 3, 4, 4)), ("timestep", torch.ones(2, dtype=torch.int64)),
              ("encoder_hidden_states", torch.randn(2, TOKENS, 32))]
    export(folder, "transformer", transformer, call, inputs, ["out_sample"], {name: BATCHED for name, _ in inputs})
    export_vae(folder, decoder, 16, BATCHED, (3, 4, 4))
    pipe = diffusers.WanPipeline(
        tokenizer=Tokenizer(), text_encoder=text, vae=decoder, transformer=transformer, scheduler=scheduler
    )
    call = dict(guidance_scale=4.0, negative_prompt=NEGATIVE, max_sequence_length=TOKENS, num_frames=9, height=32, width=32)
    # Tracing fixes the batch.
    return pipe, (16, 3, 4, 4), call, ["--guidance", "4", "--guidance-passes", "separate"]


def latent_consistency(folder):
    """Stable Diffusion whose denoiser is told the scale of guidance."""
    text, decoder = clip(), vae()
    unet = lively(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, time_cond_proj_dim=64,
    ))
    # One step adds no noise, which a pipeline draws by itself.
    scheduler = diffusers.LCMScheduler()
    export_clip(folder, "text_encoder", text)
    call = lambda model, x, t, states, scale: model(x, t, states, timestep_cond=scale, return_dict=False)[0]
    inputs = [("sample", torch.randn(2, 4, 16, 16)), ("timestep", torch.tensor(7)),
              ("encoder_hidden_states", torch.randn(2, TOKENS, 32)), ("timestep_cond", torch.randn(2, 64))]
    axes = {"sample": IMAGE, "encoder_hidden_states": IDS, "timestep_cond": BATCHED}
    export(folder, "unet", unet, call, inputs, ["out_sample"], axes)
    export_vae(folder, decoder, 4)
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=decoder, text_encoder=text, tokenizer=Tokenizer(), unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    return pipe, (4, 16, 16), dict(guidance_scale=4.0, num_inference_steps=1), ["--guidance", "4", "--steps", "1"]


PIPELINES = {
    "sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux, "pixart": pixart,
    "cogvideox": cogvideox, "wan": wan, "lcm": latent_consistency,
}


def describe(folder, pipe):
    """`model_index.json` as diffusers writes it, and the scheduler's file."""
    index = {"_class_name": type(pipe).__name__, "_diffusers_version": diffusers.__version__}
    for name, part in pipe.components.items():
        index[name] = [None, None] if part is None else ["diffusers", type(part).__name__]
    settings = {k: v for k, v in pipe.config.items() if isinstance(v, bool)}
    (folder / "model_index.json").write_text(json.dumps({**index, **settings}, indent=2))
    pipe.scheduler.save_pretrained(str(folder / "scheduler"))


def inputs_of(session, noise):
    """Ids, masks and noise by the names of the model's inputs."""
    given = {}
    positive, negative = Tokenizer()(PROMPTS), Tokenizer()(NEGATIVE)
    for name in (value.name for value in session.get_inputs()):
        texts = negative if name.startswith("negative") else positive
        if name == "noise":
            given[name] = noise.numpy()
        else:
            given[name] = texts["attention_mask" if "mask" in name else "input_ids"].numpy()
    return given


def packed_like(pipe, noise):
    """The noise as the pipeline takes it."""
    if isinstance(pipe, diffusers.FluxPipeline):
        return pipe._pack_latents(noise, *noise.shape)
    return noise


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("optimize", nargs="?", help="the program; without it folders are made only")
    arguments.add_argument("--only", choices=PIPELINES)
    arguments.add_argument("--keep", type=pathlib.Path, help="a folder for what is made")
    arguments.add_argument("--form", default="loop")
    chosen = arguments.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.keep or pathlib.Path(scratch)
        print(f"{'pipeline':<11}{'pixels differ by':>18}{'parts':>12}{'model':>12}{'change':>9}")
        for name, make in PIPELINES.items():
            if chosen.only not in (None, name):
                continue
            torch.manual_seed(0)
            folder = root / name
            with torch.no_grad():
                pipe, shape, call, options = make(folder)
            describe(folder, pipe)
            pipe.set_progress_bar_config(disable=True)
            noise = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                call = {"num_inference_steps": STEPS, **call}
                expected = pipe(PROMPTS, latents=packed_like(pipe, noise), output_type="pt", **call)[0]
            expected = np.asarray(expected)
            np.save(folder / "noise.npy", noise.numpy()), np.save(folder / "expected.npy", expected)
            (folder / "options.json").write_text(json.dumps(options))
            if chosen.optimize is None:
                continue
            files = []
            for take in ("first", "second"):
                out = root / f"{name}.{take}.onnx"
                steps = [] if "--steps" in options else ["--steps", str(STEPS)]
                command = [chosen.optimize, "sampler", str(folder), "-o", str(out), "--form", chosen.form, "-q", *steps, *options]
                subprocess.run(command, check=True)
                files.append(out.read_bytes())
            session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
            found = session.run(None, inputs_of(session, noise))[0]
            difference = float(np.abs(found - expected).max())
            parts = sum(path.stat().st_size for path in folder.glob("*/model.onnx*"))
            change = len(files[0]) / parts
            wrong = difference > LIMIT or change > GROWTH or files[0] != files[1] or not np.ptp(expected) > 0.1
            failed |= wrong
            print(f"{name:<11}{difference:>18.1e}{parts:>12}{len(files[0]):>12}{change - 1:>+9.1%}{'  FAILS' if wrong else ''}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
