"""From a PyTorch denoiser to a compiled sampler: export, compile the loop, compare with diffusers step by step.

    pip install ".[cpu]" torch onnx onnxscript diffusers
    python examples/denoiser.py

Needs: torch, onnx, onnxscript, diffusers, onnxruntime. The denoiser is a small U-Net with random weights: what is shown
is that the file computes what the loop in Python does.
"""

import argparse
from pathlib import Path

import diffusers
import onnx_lathe
import onnxruntime
import torch


class Denoiser(torch.nn.Module):
    """What one step runs: a latent and a time in, a prediction out."""

    def __init__(self, network: diffusers.UNet2DModel) -> None:
        """Wraps a network of diffusers."""
        super().__init__()
        self.network = network

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """``latent`` is [batch, 1, 16, 16], ``timestep`` is [batch]."""
        return self.network(latent, timestep, return_dict=False)[0]


def main() -> None:
    """Prints how far the sampler is from the loop, and how long each takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("sampler.onnx"))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    denoiser = Denoiser(network).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    example = (torch.randn(2, 1, 16, 16), torch.full((2,), 500))
    batch = torch.export.Dim("batch")
    shapes = {"latent": {0: batch}, "timestep": {0: batch}}
    program = torch.onnx.export(denoiser, example, dynamo=True, dynamic_shapes=shapes, verbose=False)

    result = onnx_lathe.sampler(program, args.output, scheduler=scheduler, steps=args.steps)
    print(result)

    noise = torch.randn(4, 1, 16, 16)
    scheduler.set_timesteps(args.steps)
    latent = noise
    with torch.no_grad():
        for time in scheduler.timesteps:
            latent = scheduler.step(denoiser(latent, time.expand(4)), time, latent).prev_sample
    session = onnxruntime.InferenceSession(args.output)
    sample = torch.from_numpy(session.run(None, {"noise": noise.numpy()})[0])
    error = ((sample - latent).norm() / latent.norm()).item()
    print(f"\nrelative error to diffusers after {args.steps} steps: {error:.1e}")
    assert error < 1e-4, "the sampler is not the loop"


if __name__ == "__main__":
    main()
