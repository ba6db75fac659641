"""What grouping the rows of experts is worth: two layers of Mixtral and of Qwen3-MoE as PyTorch exports them, at several numbers of tokens.

    python benches/experts.py OPTIMIZE [FOLDER] [--tokens 1,16,128] [--rounds 15]

Exports the models, with random weights, into FOLDER by both exporters of torch (`batched_mm`, the one form of experts that both
can write), simplifies each file with `group-experts` and without, and prints the CPU time of one thread of ONNX Runtime with its
optimizations on, interleaved, median, in ms. `exact passes` is the model with every exact pass but that one: what the pass itself
is worth. `error` is the largest relative L2 difference of the logits from those of the original over all numbers of tokens, and
`idle` how many experts of the first layer nobody picked. Needs torch, transformers, onnx, onnxscript and onnxruntime.
"""

import argparse
import pathlib
import statistics
import subprocess
import tempfile
import time

import numpy
import onnx
import onnxruntime

VOCABULARY = 512


def models():
    """Name, model, experts and picked experts of each."""
    import torch
    import transformers

    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    mixtral = transformers.MixtralConfig(**common, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)
    qwen = transformers.Qwen3MoeConfig(
        **common,
        intermediate_size=256,
        moe_intermediate_size=256,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )
    yield "Mixtral, 2 of 8 experts", transformers.MixtralForCausalLM(mixtral)
    yield "Qwen3-MoE, 4 of 32 experts", transformers.Qwen3MoeForCausalLM(qwen)


def export(model, dynamo, path):
    import torch

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    model.eval()
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(0, VOCABULARY, (2, 8))
    names = dict(input_names=["input_ids", "attention_mask"], output_names=["logits"])
    with torch.no_grad():
        if dynamo:
            axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
            shapes = {"input_ids": axes, "attention_mask": axes}
            how = dict(dynamo=True, opset_version=18, dynamic_shapes=shapes, external_data=False)
        else:
            axes = {0: "batch", 1: "seq"}
            how = dict(dynamo=False, opset_version=17, dynamic_axes={"input_ids": axes, "attention_mask": axes})
        torch.onnx.export(Logits(), (ids, torch.ones_like(ids)), str(path), **how, **names)


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(tokens):
    ids = numpy.random.default_rng(tokens).integers(0, VOCABULARY, (1, tokens))
    return {"input_ids": ids, "attention_mask": numpy.ones_like(ids)}


def idle(path, tokens):
    """How many experts nobody picks in the first layer, read from the router's TopK of the original."""
    model = onnx.load(path)
    top = next(node for node in model.graph.node if node.op_type == "TopK")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(top.output[1]))
    scores = onnx.helper.make_empty_tensor_value_info(top.input[0])
    model.graph.output.append(scores)
    asked = [top.output[1], top.input[0]]
    picked, scores = session_of(model).run(asked, feed(tokens))
    return scores.shape[-1] - len(numpy.unique(picked))


def session_of(model):
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        onnx.save(model, file.name)
        return session(file.name)


def measure(paths, tokens, rounds):
    """Median ms of CPU time of every file, and the largest relative difference from the first."""
    sessions, inputs = [session(path) for path in paths], feed(tokens)
    outputs = [each.run(None, inputs)[0] for each in sessions]
    seconds = [[] for _ in paths]
    for _ in range(rounds):
        for each, spent in zip(sessions, seconds):
            begin = time.process_time()
            each.run(None, inputs)
            spent.append(time.process_time() - begin)
    norm = numpy.linalg.norm(outputs[0])
    errors = [float(numpy.linalg.norm(output - outputs[0]) / norm) for output in outputs]
    return [1e3 * statistics.median(spent) for spent in seconds], errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("folder", nargs="?", type=pathlib.Path)
    parser.add_argument("--tokens", default="1,16,128")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    counts = [int(count) for count in args.tokens.split(",")]
    scratch = tempfile.TemporaryDirectory()
    folder = args.folder or pathlib.Path(scratch.name)
    folder.mkdir(parents=True, exist_ok=True)
    print("| model | exporter | tokens | idle | original | exact passes | grouped | of the original | of the exact passes | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, model in models():
        for dynamo in (True, False):
            stem = f"{name.split(',')[0]}-{'dynamo' if dynamo else 'torchscript'}"
            original = folder / f"{stem}.onnx"
            if not original.exists():
                export(model, dynamo, original)
            plain, grouped = folder / f"{stem}-plain.onnx", folder / f"{stem}-grouped.onnx"
            for out, more in ((plain, ["--skip", "group-experts"]), (grouped, [])):
                subprocess.run([args.optimize, original, "-o", out, "--overwrite", "-q", *more], check=True)
            for tokens in counts:
                (before, exact, after), errors = measure([original, plain, grouped], tokens, args.rounds)
                row = [name, "dynamo" if dynamo else "TorchScript", tokens, idle(original, tokens)]
                row += [f"{before:.2f}", f"{exact:.2f}", f"{after:.2f}", f"{before / after:.1f} ×", f"{exact / after:.1f} ×"]
                print("|", " | ".join(str(cell) for cell in [*row, f"{errors[2]:.1e}"]), "|", flush=True)


if __name__ == "__main__":
    main()
