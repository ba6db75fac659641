"""Does an optimized decoder write the same text, and how fast? Both models decode 32 tokens with their own caches.

    python benches/decode.py MODEL… [--optimize PATH] [--tokens 32] [--prompt 5] [--batch 2] [--args="--target ort"]

MODEL takes input_ids (or decoder_input_ids), and what it has of attention_mask, position_ids and cache_position, and
caches `past…key` and `past…value`, all of [batch, heads, positions, size], which it returns behind the logits in the same
order; caches of an encoder stay as they are. The next token is the likeliest one. Prints the largest difference of logits
relative to their size, whether all tokens agree, and milliseconds a token of both, in turns.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A session with its caches."""

    def __init__(self, path, batch):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.batch = batch
        self.tokens = next(n for n in self.inputs if n.endswith("input_ids"))
        caches = [n for n in self.inputs if n.startswith("past")]
        self.kept = {n: self.cache(n, None) for n in caches if "encoder" in n.replace("decoder", "")}
        self.caches = {n: self.cache(n, 0) for n in caches if n not in self.kept}
        self.length = 0

    def cache(self, name, positions):
        """Random values for the cache of an encoder, or a cache of `positions` positions."""
        value = self.inputs[name]
        shape = [self.batch if i == 0 else d if isinstance(d, int) else positions or 0 for i, d in enumerate(value.shape)]
        return np.random.default_rng(len(name)).normal(size=shape).astype(TYPES[value.type])

    def step(self, tokens):
        """The logits of the last token, with the caches one step further on."""
        many = tokens.shape[1]
        places = np.arange(self.length, self.length + many)
        self.length += many
        given = {
            self.tokens: tokens,
            "attention_mask": np.ones((self.batch, self.length)),
            "position_ids": np.repeat(places[None], self.batch, 0),
            "cache_position": places,
        }
        feed = {n: np.asarray(v).astype(TYPES[self.inputs[n].type]) for n, v in given.items() if n in self.inputs}
        start = time.perf_counter()
        logits, *present = self.session.run(None, {**feed, **self.caches, **self.kept})
        taken = time.perf_counter() - start
        self.caches = dict(zip(self.caches, present))
        return logits[:, -1], taken


def decode(given, path, result):
    """Both decode the same tokens, those of the original."""
    decoders = [Decoder(p, given.batch) for p in (path, result)]
    tokens = np.random.default_rng(1).integers(3, 100, (given.batch, given.prompt))
    worst, same, times = 0.0, True, ([], [])
    for _ in range(given.tokens):
        (a, ta), (b, tb) = (decoder.step(tokens) for decoder in decoders)
        worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30)))
        same &= bool((a.argmax(-1) == b.argmax(-1)).all())
        tokens = a.argmax(-1)[:, None]
        for list_, taken in zip(times, (ta, tb)):
            list_.append(taken * 1e3)
    return worst, same, [float(np.median(t[1:])) for t in times]


def main():
    """Optimizes each model and prints one line for it; the exit code is 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--optimize", default=os.environ.get("OPTIMIZE", "optimize"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--args", default="--target ort")
    given = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        for path in given.models:
            result = pathlib.Path(folder) / "result.onnx"
            command = [given.optimize, str(path), "-o", str(result), "--overwrite", "-q", *shlex.split(given.args)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{path.stem:28s} not optimized: {done.stderr.strip()[-200:]}")
                differ = True
                continue
            worst, same, (before, after) = decode(given, path, result)
            differ |= not same
            verdict = "same tokens" if same else "OTHER TOKENS"
            print(f"{path.stem:28s} {verdict}, logits within {worst:.1e}, {before:.3f} -> {after:.3f} ms a token", flush=True)
    sys.exit(differ)


if __name__ == "__main__":
    main()
