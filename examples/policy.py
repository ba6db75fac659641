"""The head of a policy that draws chunks of actions as one ONNX model, beside its loop in Python.

    pip install torch onnx onnxscript onnxruntime==1.32.0 numpy
    cargo build --release
    python examples/policy.py target/release/optimize [--keep FOLDER]

A head as those of π0 and SmolVLA, with random weights: four layers that see a chunk of 50 actions, the state of the robot, and
keys and values of what a language model saw before. Its flow goes from time 1 to 0 in ten steps. `optimize sampler` makes one
model of the loop, which gives actions in their own units; the script prints how far they are from those of the loop in Python,
and what it does to actions to compute attention and MLPs in every second step only.
"""

import argparse
import json
import math
import pathlib
import subprocess
import tempfile
import warnings

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

LAYERS, WIDTH, HEADS, SEEN, CHUNK, NUMBERS, ACTIONS, STEPS = 4, 128, 4, 48, 50, 32, 7, 10
INPUTS = ["x_t", "time", "state", "keys", "values", "pad_mask"]


class Layer(nn.Module):
    """Attention to the chunk and to what was seen before, and an MLP."""

    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, keys, values, bias):
        heads = lambda y: y.reshape(y.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        h = self.before(x)
        k = torch.cat([heads(keys), heads(self.key(h))], 2)
        v = torch.cat([heads(values), heads(self.value(h))], 2)
        scores = heads(self.query(h)) @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + bias
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Head(nn.Module):
    """What one step runs: a noisy chunk, the time, and what the policy saw; a velocity out."""

    def __init__(self):
        super().__init__()
        self.chunk, self.state, self.time = nn.Linear(NUMBERS, WIDTH), nn.Linear(NUMBERS, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NUMBERS)

    def forward(self, x_t, time, state, keys, values, pad_mask):
        periods = torch.exp(torch.linspace(math.log(4e-3), math.log(4.0), WIDTH // 2))
        angles = 2 * math.pi * time[:, None] / periods
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        x = self.chunk(x_t)
        x = nn.functional.silu(self.time(torch.cat([x, waves[:, None].expand_as(x)], -1)))
        x = torch.cat([self.state(state)[:, None], x], 1)
        bias = torch.where(pad_mask, 0.0, -1e4)[:, None, None, :]
        bias = torch.cat([bias, bias.new_zeros(bias.shape[0], 1, 1, CHUNK + 1)], -1)
        for index, layer in enumerate(self.layers):
            x = layer(x, keys[:, index], values[:, index], bias)
        return self.out(self.norm(x[:, 1:]))


def conditions(batch):
    """What a policy saw: the state, keys and values of each layer, and which of them count."""
    counts = torch.tensor([SEEN, 20, 33, 5])[:batch, None]
    seen = [torch.randn(batch, LAYERS, SEEN, WIDTH) for _ in range(2)]
    return [torch.randn(batch, NUMBERS), *seen, torch.arange(SEEN)[None] < counts]


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("optimize")
    arguments.add_argument("--keep", type=pathlib.Path, help="a folder for what is made")
    chosen = arguments.parse_args()
    program = str(pathlib.Path(chosen.optimize).resolve())
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = chosen.keep or pathlib.Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        head = Head().eval()
        head.out.weight *= 6
        example = (torch.randn(2, CHUNK, NUMBERS), torch.ones(2), *conditions(2))
        torch.onnx.export(
            head, example, str(root / "head.onnx"), input_names=INPUTS, output_names=["v"], opset_version=18,
            dynamic_axes={name: {0: "batch"} for name in INPUTS}, dynamo=False,
        )  # fmt: skip
        mean, deviation = np.linspace(-1, 1, ACTIONS), np.linspace(0.1, 2, ACTIONS)
        (root / "flow.json").write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
        (root / "stats.json").write_text(json.dumps({"action": {"mean": mean.tolist(), "std": deviation.tolist()}}))

        def run(*words):
            subprocess.run([program, *words], cwd=root, check=True)

        flow = ["--scheduler", "flow.json", "--steps", str(STEPS), "--explicit-sigmas", "--actions", "stats.json",
                "--io", "latent=x_t", "--io", "time-value=sigma"]  # fmt: skip
        run("sampler", "head.onnx", "-o", "policy.onnx", *flow)
        run("sampler", "head.onnx", "-o", "cached.onnx", *flow, "--plan", "arms:every=2", "-q")

        noise, saw = torch.randn(4, CHUNK, NUMBERS), conditions(4)
        x, time = noise, 1.0
        for _ in range(STEPS):
            x = x - head(x, torch.full((4,), time), *saw) / STEPS
            time -= 1 / STEPS
        expected = x[..., :ACTIONS].numpy() * deviation + mean
        session = ort.InferenceSession(str(root / "policy.onnx"), providers=["CPUExecutionProvider"])
        given = dict(zip(INPUTS[2:], (value.numpy() for value in saw)), noise=noise.numpy())
        found = session.run(None, given)[0]
        print(f"actions {found.shape} differ from the loop's by at most {np.abs(found - expected).max():.1e}")
        run("verify", "policy.onnx", "cached.onnx", "--seeds", "64", "--metric", "action-l2")


if __name__ == "__main__":
    main()
