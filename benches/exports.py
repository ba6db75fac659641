"""Whether what people export becomes faster: mid-sized models with random weights, original against result, in turns.

    python benches/exports.py OPTIMIZE FOLDER [--models bert,vit] [--exporters dyn,leg] [--rounds 15] [--threads 1]
                              [--runs portable,ort] [--peer] [--without SkipLayerNormFusion]

Needs torch, torchvision, transformers, onnx and onnxruntime. Models of 4 layers of 256 are exported once into FOLDER by
PyTorch's default exporter (`dyn`) and by the legacy one (`leg`), optimized, and run with every optimization of ONNX Runtime
on, but for those named by --without. Larger ones run where --models names them: `bert768` (12 layers of 768),
`bert768_eager` (with attention written out and three inputs), `minilm` (6 of 384). Sessions take turns within a round and are
made anew every third round, since two
sessions of one model differ by where their memory lies. A row has the nodes of each (constants apart) and, for each run,
the ratio of the medians to the original's and its spread (half the distance of the quartiles of the rounds' ratios); the last
lines have the geometric means and every row that is slower beyond the spread. With --peer the result of
`onnxruntime.transformers.optimizer` for BERT takes its turns too, on the models named bert*.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy
import onnx
import onnxruntime

VOCABULARY = 1000

# Run only where they are named: they are large.
ALONE = ("bert768", "bert768_eager", "minilm")


def transformers_models():
    import torch
    import transformers as t

    def text(name, config, model, length=128, mask=True, segments=False, **call):
        def make():
            module = model(config)
            inputs = {"input_ids": torch.randint(3, VOCABULARY, (1, length))}
            if mask:
                inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
            if segments:
                inputs["token_type_ids"] = torch.zeros(1, length, dtype=torch.long)
            axes = {key: {0: "batch", 1: "sequence"} for key in inputs}
            return module, inputs, axes, lambda m, kwargs: m(**kwargs, **call)[0]

        return name, make

    def images(name, module, size=224, channels=3, key="pixel_values"):
        def make():
            inputs = {key: torch.randn(1, channels, size, size)}
            return module(), inputs, {key: {0: "batch"}}, lambda m, kwargs: first(m(**kwargs) if key != "x" else m(kwargs["x"]))

        return name, make

    def first(result):
        return result if isinstance(result, torch.Tensor) else result[0]

    def whisper():
        config = t.WhisperConfig(d_model=256, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=1024, decoder_layers=1)
        module = t.models.whisper.modeling_whisper.WhisperEncoder(config)
        inputs = {"input_features": torch.randn(1, config.num_mel_bins, 3000)}
        return module, inputs, {"input_features": {0: "batch"}}, lambda m, kwargs: m(**kwargs)[0]

    wide = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    text_wide = dict(wide, vocab_size=VOCABULARY)
    import torchvision as tv

    return dict(
        [
            text("bert", t.BertConfig(**text_wide), lambda c: t.BertModel(c, add_pooling_layer=False)),
            text("roberta", t.RobertaConfig(**text_wide), lambda c: t.RobertaModel(c, add_pooling_layer=False)),
            text("distilbert", t.DistilBertConfig(vocab_size=VOCABULARY, dim=256, n_layers=4, n_heads=4, hidden_dim=1024), t.DistilBertModel),
            text("gpt2", t.GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4, n_positions=512), t.GPT2LMHeadModel, use_cache=False),
            text("llama", t.LlamaConfig(**text_wide, num_key_value_heads=2), t.LlamaForCausalLM, use_cache=False),
            text("qwen3", t.Qwen3Config(**text_wide, num_key_value_heads=2, head_dim=64), t.Qwen3ForCausalLM, use_cache=False),
            text("t5", t.T5Config(vocab_size=VOCABULARY, d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4), t.T5EncoderModel),
            text("minilm", t.BertConfig(vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536), lambda c: t.BertModel(c)),
            text("bert768", t.BertConfig(vocab_size=VOCABULARY), lambda c: t.BertModel(c, add_pooling_layer=False)),
            text(
                "bert768_eager",
                t.BertConfig(vocab_size=VOCABULARY, attn_implementation="eager"),
                lambda c: t.BertModel(c, add_pooling_layer=False),
                segments=True,
            ),
            images("vit", lambda: t.ViTModel(t.ViTConfig(**wide), add_pooling_layer=False)),
            images("dinov2", lambda: t.Dinov2Model(t.Dinov2Config(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=224, patch_size=14))),
            ("whisper", whisper),
            images("swin", lambda: t.SwinModel(t.SwinConfig(embed_dim=48, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16]), add_pooling_layer=False)),
            images("convnext", lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1]))),
            images("resnet18", lambda: tv.models.resnet18(weights=None), key="x"),
            images("mobilenet_v3", lambda: tv.models.mobilenet_v3_small(weights=None), key="x"),
            images("efficientnet", lambda: tv.models.efficientnet_b0(weights=None), key="x"),
        ]
    )


def export(path, make, exporter):
    import torch

    torch.manual_seed(0)
    module, inputs, axes, call = make()
    module = module.eval()

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *tensors):
            return call(self.module, dict(zip(inputs, tensors)))

    flat = Flat().eval()
    names = dict(input_names=list(inputs), output_names=["output"])
    with torch.no_grad():
        if exporter == "leg":
            torch.onnx.export(flat, tuple(inputs.values()), path, dynamo=False, opset_version=17, dynamic_axes=axes, **names)
        else:
            shapes = {"tensors": tuple({axis: torch.export.Dim.DYNAMIC for axis in axes[key]} for key in inputs)}
            torch.onnx.export(flat, tuple(inputs.values()), path, dynamo=True, external_data=False, dynamic_shapes=shapes, **names)
    numpy.savez(path.with_suffix(".npz"), **{key: value.numpy() for key, value in inputs.items()})


def nodes(path):
    return sum(node.op_type != "Constant" for node in onnx.load(path, load_external_data=False).graph.node)


def session(path, threads, without=()):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    given = {"disabled_optimizers": list(without)} if without else {}
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], **given)


def measure(paths, inputs, rounds, threads, without=()):
    """The times of each model, in seconds, one per round; all take turns."""
    times = [[] for _ in paths]
    sessions = []
    for index in range(rounds):
        if index % 3 == 0:
            sessions = [session(path, threads, without) for path in paths]
            for one in sessions:
                one.run(None, {i.name: inputs[i.name] for i in one.get_inputs()})
        order = list(range(len(paths)))
        order = order[index % len(order) :] + order[: index % len(order)]
        for at in order:
            feeds = {i.name: inputs[i.name] for i in sessions[at].get_inputs()}
            count, start = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - start < 0.04:
                sessions[at].run(None, feeds)
                count += 1
            times[at].append((time.perf_counter() - start) / count)
    return times


def peer(path, out, name):
    from onnxruntime.transformers import optimizer

    heads, width = {"bert768": (12, 768), "bert768_eager": (12, 768), "minilm": (12, 384)}.get(name, (4, 256))
    optimizer.optimize_model(str(path), model_type="bert", num_heads=heads, hidden_size=width).save_model_to_file(str(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--models", default="")
    parser.add_argument("--exporters", default="dyn,leg")
    parser.add_argument("--runs", default="portable,ort")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--without", default="", help="optimizers of ONNX Runtime that are off in all sessions")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    makers = transformers_models()
    chosen = [name for name in args.models.split(",") if name] or [name for name in makers if name not in ALONE]
    runs = args.runs.split(",")
    ratios = {run: [] for run in runs}
    slower, failed = [], []
    for name in chosen:
        for exporter in args.exporters.split(","):
            label, path = f"{name}.{exporter}", args.folder / f"{name}.{exporter}.onnx"
            if not path.exists():
                # A process of its own: exporters keep what they allocate.
                if os.fork() == 0:
                    try:
                        sys.stdout = sys.stderr = open(path.with_suffix(".log"), "w")
                        export(path, makers[name], exporter)
                        os._exit(0)
                    except BaseException as error:
                        print(error)
                        path.unlink(missing_ok=True)
                        os._exit(1)
                os.wait()
            if not path.exists():
                failed.append(f"{label}: not exported")
                continue
            paths, labels = [path], ["original"]
            for run in runs:
                out = args.folder / f"{label}.{run}.out.onnx"
                command = [args.optimize, path, "-o", out, "--overwrite", "-q", "--target", run]
                done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
                if done.returncode:
                    failed.append(f"{label} {run}: {done.stderr.strip()[-200:]}")
                    continue
                paths.append(out)
                labels.append(run)
            if args.peer and name in ("bert", *ALONE):
                out = args.folder / f"{label}.peer.onnx"
                peer(path, out, name)
                paths.append(out)
                labels.append("peer")
            inputs = dict(numpy.load(path.with_suffix(".npz")))
            times = measure(paths, inputs, args.rounds, args.threads, [name for name in args.without.split(",") if name])
            row = [f"{label:20s} original {nodes(path):4d} nodes {numpy.median(times[0]) * 1e3:8.2f} ms"]
            for run, out, own in list(zip(labels, paths, times))[1:]:
                ratio = numpy.median(own) / numpy.median(times[0])
                each = numpy.array(own) / numpy.array(times[0])
                spread = (numpy.quantile(each, 0.75) - numpy.quantile(each, 0.25)) / 2
                row.append(f"{run} {nodes(out):4d} nodes {ratio:6.3f} ± {spread:.3f}")
                if run in ratios:
                    ratios[run].append(ratio)
                    if ratio > 1 + max(spread, 0.01):
                        slower.append(f"{label} {run} {ratio:.3f} ± {spread:.3f}")
            print("  ".join(row), flush=True)
    for run, all_ratios in ratios.items():
        if all_ratios:
            mean = math.exp(sum(map(math.log, all_ratios)) / len(all_ratios))
            print(f"{run}: geometric mean {mean:.3f} of the original's time over {len(all_ratios)} files")
    print("slower beyond the spread: " + ("; ".join(slower) or "none"))
    if failed:
        print("failed: " + "; ".join(failed))
    sys.exit(bool(slower or failed))


if __name__ == "__main__":
    main()
