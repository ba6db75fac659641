"""From a PyTorch module to a verified ONNX model: export, optimize within a budget, compare with the module.

    pip install ".[cpu]" torch onnx onnxscript
    python examples/torch_export.py

Needs: torch, onnx, onnxscript, onnxruntime, numpy.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx_lathe
import onnxruntime
import torch

CLASSES = 10


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of ten kinds of stripes, and which kind each is."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    angle = label.float() * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    phase = 6 * torch.rand((count, 1, 1), generator=generator)
    wave = torch.sin(8 * (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y) + phase)
    noise = torch.randn((count, 16, 16), generator=generator)
    return (wave + noise)[:, None], label


def trained() -> torch.nn.Module:
    """A small convolutional classifier."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, padding=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(), torch.nn.Linear(512, 256), torch.nn.ReLU(), torch.nn.Linear(256, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    x, label = images(4096, seed=1)
    for step in range(128):
        batch = slice(step % 32 * 128, step % 32 * 128 + 128)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x[batch]), label[batch]).backward()
        optimizer.step()
    return module.eval()


def main() -> None:
    """Prints the accuracy of the module and of the result; ends with an error if more is lost than was allowed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("classifier.onnx"))
    parser.add_argument("--size", type=float, default=0.35, help="share of the file to keep")
    parser.add_argument("--max-drop", type=float, default=0.01, help="the largest loss of accuracy")
    args = parser.parse_args()

    module = trained()
    x, _ = images(8, seed=2)
    shapes = {"input": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(module, (x,), dynamo=True, input_names=["image"], dynamic_shapes=shapes, verbose=False)

    # Calibration samples choose, held-out samples verify; the test set below sees neither.
    calib, calib_label = images(512, seed=3)
    held_out, held_out_label = images(1024, seed=4)
    result = onnx_lathe.optimize(
        program,
        calib={"image": calib.numpy(), "label": calib_label.numpy()},
        validate={"image": held_out.numpy(), "label": held_out_label.numpy()},
        labels="label",
        metric="accuracy",
        size=args.size,
        max_drop=args.max_drop,
    )
    print(result)
    result.model.save(args.output)

    test, label = images(4096, seed=5)
    with torch.no_grad():
        before = (module(test).argmax(1) == label).float().mean().item()
    session = onnxruntime.InferenceSession(args.output)
    logits = session.run(None, {"image": test.numpy()})[0]
    after = float((logits.argmax(1) == label.numpy()).mean())
    print(f"\naccuracy on {len(test)} test images: {before:.4f} in PyTorch, {after:.4f} optimized")
    print(f"file: {result.report['input']['file_bytes']:,} bytes before, {args.output.stat().st_size:,} after")
    assert np.isfinite(logits).all() and before - after <= 2 * args.max_drop, (
        "more was lost than on the held-out images"
    )


if __name__ == "__main__":
    main()
