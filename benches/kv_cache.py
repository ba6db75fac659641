"""Does a decoder with a quantized cache write the same text? Greedy decoding beside the float cache, and perplexity.

    python benches/kv_cache.py smollm2.onnx calib.npz eval.npz WORK [--optimize PATH] [--steps 64] [--forms int8,int4,…]

`smollm2.onnx` is the zoo's model of a Llama shape, whose only input is input_ids. A decoder with caches is made of its
weights (WORK/decoder.onnx: input_ids, attention_mask, position_ids and past_key_values.N.key/value, attention spelled out as
exporters do), and of the sets the same with empty caches. `optimize --kv-cache` then writes every form, and both models decode
from prompts of the evaluation set, the second with its own caches. Prints of each form how many steps agree in every prompt
(the first step that does not is where they part), the largest relative error of the logits of a step, by how much the two
likeliest tokens differ where they part, and perplexity of windows that are read token by token behind a prefix, beside that
of the float cache.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HEADS, KEYS, SIZE, LAYERS, EPSILON, THETA = 9, 3, 64, 30, 1e-5, 100000.0
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Maker:
    """Nodes and constants of a graph, one after the other."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], {}, 0

    def constant(self, name, array):
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def ints(self, *values):
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def __getattr__(self, op):
        def node(*inputs, name=None, **attributes):
            self.count += 1
            made = name or f"{op}_{self.count}"
            self.nodes.append(helper.make_node(op, list(inputs), [made], **attributes))
            return made

        return node


def array(constant, path):
    """The numbers of a constant, mapped where they are in a file of their own."""
    place = {e.key: e.value for e in constant.external_data}
    if not place:
        return numpy_helper.to_array(constant)
    kind = helper.tensor_dtype_to_np_dtype(constant.data_type)
    return np.memmap(path.parent / place["location"], kind, "r", int(place.get("offset", 0)), tuple(constant.dims))


def weights(path):
    """The matrices and gains of the model without caches, in the order in which they are used."""
    model = onnx.load(path, load_external_data=False)
    known = {c.name: array(c, path) for c in model.graph.initializer}
    known |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in model.graph.node if n.op_type == "Constant"}
    table = known["lm.lm_head.weight"] if "lm.lm_head.weight" in known else known["lm.model.embed_tokens.weight"]
    matrices = [known[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in known]
    gains = {n: c for n, c in known.items() if n.endswith("norm.weight")}
    return table, [m for m in matrices if m.ndim == 2], gains


def norm(g, x, gain):
    mean = g.ReduceMean(g.Mul(x, x), g.ints(-1))
    root = g.Sqrt(g.Add(mean, g.constant("epsilon", np.float32(EPSILON))))
    return g.Mul(g.Div(x, root), gain)


def rotate(g, x, cos, sin):
    low = g.Slice(x, g.ints(0), g.ints(SIZE // 2), g.ints(-1))
    high = g.Slice(x, g.ints(SIZE // 2), g.ints(SIZE), g.ints(-1))
    return g.Add(g.Mul(x, cos), g.Mul(g.Concat(g.Neg(high), low, axis=-1), sin))


def attention(g, x, layer, matrices, shared):
    """One attention with its cache; heads that share keys have them repeated, as exporters write it."""
    q, k, v, o = (g.constant(f"w_{layer}_{i}", m) for i, m in enumerate(matrices))
    heads = lambda w, n: g.Transpose(g.Reshape(g.MatMul(x, w), g.ints(0, 0, n, SIZE)), perm=[0, 2, 1, 3])
    query = rotate(g, heads(q, HEADS), shared["cos"], shared["sin"])
    key = rotate(g, heads(k, KEYS), shared["cos"], shared["sin"])
    key = g.Concat(f"past_key_values.{layer}.key", key, name=f"present.{layer}.key", axis=2)
    value = g.Concat(f"past_key_values.{layer}.value", heads(v, KEYS), name=f"present.{layer}.value", axis=2)

    def repeated(kept):
        batch, length = g.Shape(kept, start=0, end=1), g.Shape(kept, start=2, end=3)
        groups = g.Concat(batch, g.ints(KEYS, HEADS // KEYS), length, g.ints(SIZE), axis=0)
        wide = g.Expand(g.Unsqueeze(kept, g.ints(2)), groups)
        return g.Reshape(wide, g.Concat(batch, g.ints(HEADS), length, g.ints(SIZE), axis=0))

    scores = g.MatMul(query, g.Transpose(repeated(key), perm=[0, 1, 3, 2]))
    scores = g.Add(g.Mul(scores, g.constant("scale", np.float32(SIZE**-0.5))), shared["mask"])
    made = g.MatMul(g.Softmax(scores, axis=-1), repeated(value))
    return g.MatMul(g.Reshape(g.Transpose(made, perm=[0, 2, 1, 3]), g.ints(0, 0, HEADS * SIZE)), o)


def shared_values(g):
    """Angles and the mask, which all layers read."""
    frequencies = g.constant("frequencies", (THETA ** (-np.arange(0, SIZE, 2) / SIZE)).astype(np.float32))
    position = g.Cast(g.Unsqueeze("position_ids", g.ints(1, 3)), to=FLOAT)
    angles = g.Mul(position, frequencies)
    angles = g.Concat(angles, angles, axis=-1)
    total = g.Shape("attention_mask", start=1, end=2)
    columns = g.Range(g.constant("zero", np.int64(0)), g.Squeeze(total, g.ints(0)), g.constant("one", np.int64(1)))
    seen = g.LessOrEqual(columns, g.Unsqueeze("position_ids", g.ints(1, 3)))
    kept = g.Cast(g.Unsqueeze("attention_mask", g.ints(1, 2)), to=TensorProto.BOOL)
    hidden = g.constant("hidden", np.float32(-1e9))
    return {
        "cos": g.Cos(angles),
        "sin": g.Sin(angles),
        "mask": g.Where(g.And(seen, kept), g.constant("nothing", np.float32(0)), hidden),
    }


def decoder(source, path):
    """The model with caches, in optimum's names."""
    table, matrices, gains = weights(source)
    g = Maker()
    gain = lambda name: g.constant(name, next(c for n, c in gains.items() if n.endswith(name)))
    x = g.Gather(g.constant("table", table), "input_ids")
    shared = shared_values(g)
    for layer in range(LAYERS):
        own, feed = matrices[layer * 7 : layer * 7 + 4], matrices[layer * 7 + 4 : layer * 7 + 7]
        normed = norm(g, x, gain(f"layers.{layer}.input_layernorm.weight"))
        x = g.Add(x, attention(g, normed, layer, own, shared))
        normed = norm(g, x, gain(f"layers.{layer}.post_attention_layernorm.weight"))
        gate, up, down = (g.constant(f"f_{layer}_{i}", m) for i, m in enumerate(feed))
        gated = g.MatMul(normed, gate)
        x = g.Add(x, g.MatMul(g.Mul(g.Mul(gated, g.Sigmoid(gated)), g.MatMul(normed, up)), down))
    g.MatMul(norm(g, x, gain("model.norm.weight")), g.constant("head", table.T.copy()), name="logits")
    info = helper.make_tensor_value_info
    both = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    inputs = [info("input_ids", INT64, ["batch", "length"]), info("attention_mask", INT64, ["batch", "past + length"])]
    inputs.append(info("position_ids", INT64, ["batch", "length"]))
    inputs += [info(f"past_key_values.{n}", FLOAT, ["batch", KEYS, "past", SIZE]) for n in both]
    outputs = [info("logits", FLOAT, ["batch", "length", len(table)])]
    outputs += [info(f"present.{n}", FLOAT, ["batch", KEYS, "past + length", SIZE]) for n in both]
    graph = helper.make_graph(g.nodes, "decoder", inputs, outputs, list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=path.name + ".data")


def samples(source, path, count, length):
    """A set for the decoder: the same tokens with empty caches, some of which are read from the middle on."""
    tokens = np.load(source)["input_ids"][:count, :length].astype(np.int64)
    rows = len(tokens)
    arrays = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.repeat(np.arange(tokens.shape[1])[None], rows, 0),
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            arrays[f"past_key_values.{layer}.{part}"] = np.zeros((rows, KEYS, 0, SIZE), np.float32)
    np.savez(path, **arrays)


class Decoder:
    """A session with its caches, in whatever type they have."""

    def __init__(self, path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past")]
        self.bytes_a_token = sum(self.cache(i, 1, 1).nbytes for i in self.past)

    def cache(self, value, batch, positions):
        kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
        return np.zeros((batch, value.shape[1], positions, value.shape[3]), kinds[value.type])

    def start(self, batch):
        self.caches = {i.name: self.cache(i, batch, 0) for i in self.past}
        self.length = 0

    def step(self, tokens):
        """The logits of the last token."""
        batch, many = tokens.shape
        places = np.repeat(np.arange(self.length, self.length + many)[None], batch, 0)
        self.length += many
        given = {"input_ids": tokens, "attention_mask": np.ones((batch, self.length), np.int64), "position_ids": places}
        names = [i.name for i in self.session.get_inputs()]
        feed = {n: v for n, v in given.items() if n in names}
        logits, *present = self.session.run(None, {**feed, **self.caches})
        self.caches = dict(zip(self.caches, present))
        return logits[:, -1]


def greedy(pair, prompts, steps):
    """Each decodes its own tokens. Per prompt: steps that agree, the margin of the float model's choice where they part."""
    results, worst = [], 0.0
    for prompt in prompts:
        tokens = [prompt[None], prompt[None]]
        for model in pair:
            model.start(1)
        agreed, margin = steps, None
        for step in range(steps):
            a, b = (model.step(t)[0] for model, t in zip(pair, tokens))
            worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(a)))
            if a.argmax() != b.argmax():
                top = np.sort(a)
                agreed, margin = step, float(top[-1] - a[b.argmax()])
                break
            tokens = [np.array([[x.argmax()]]) for x in (a, b)]
        results.append((agreed, margin))
    return results, worst


def perplexity(model, windows, prefix):
    """Of the tokens behind a prefix, read one at a time, so that everything passes through the cache."""
    loss, count = 0.0, 0
    model.start(len(windows))
    logits = model.step(windows[:, :prefix])
    for at in range(prefix, windows.shape[1]):
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, windows[:, at : at + 1], 1)[:, 0]
        loss -= float((chosen - np.log(np.exp(shifted).sum(-1))).sum())
        count += len(windows)
        logits = model.step(windows[:, at : at + 1])
    return float(np.exp(loss / count))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("calib", type=pathlib.Path)
    parser.add_argument("eval", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--optimize", default="optimize")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--forms", default="int8,int8:tensor,int4,int4:tensor")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    source, calib = given.work / "decoder.onnx", given.work / "decoder.calib.npz"
    if not source.exists():
        decoder(given.model, source)
    samples(given.calib, calib, 32, 128)
    tokens = np.load(given.eval)["input_ids"].astype(np.int64)
    prompts, windows = tokens[: given.prompts, :32], tokens[8:16, :128]
    reference = Decoder(source)
    base = perplexity(reference, windows, 32)
    print(f"float: {reference.bytes_a_token} bytes a token, perplexity {base:.4f}")
    for form in given.forms.split(","):
        path = given.work / f"{form.replace(':', '_')}.onnx"
        command = [given.optimize, source, "-o", path, "--overwrite", "--target", "ort", "--kv-cache", form, "--calib", calib]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            print(f"{form}: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
            continue
        made = Decoder(path)
        results, worst = greedy((reference, made), prompts, given.steps)
        agreed = " ".join(str(n) for n, _ in results)
        margins = " ".join(f"{m:.3f}" for _, m in results if m is not None) or "none part"
        ratio = perplexity(made, windows, 32) / base
        print(f"{form}: {made.bytes_a_token} bytes a token, steps that agree {agreed}; margins {margins}; "
              f"logits differ by {worst:.1e} at most; perplexity {ratio:.4f} ×", flush=True)


if __name__ == "__main__":
    sys.exit(main())
