"""Sets of Fashion-MNIST test images for the other scripts of this folder.

    python benches/fashion.py DATA OUT

DATA holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (the Debian package dataset-fashion-mnist). Writes
OUT/calib.npz, the first 512 images, and OUT/eval.npz, the last 4,096, both with their labels: no image is in both.
"""

import gzip
import pathlib
import sys

import numpy as np


def load(data):
    """All test images as `x` in [-1, 1], and their labels."""
    with gzip.open(pathlib.Path(data) / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(pathlib.Path(data) / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return pixels.astype(np.float32) / 127.5 - 1, labels


def write(data, out):
    images, labels = load(data)
    out = pathlib.Path(out)
    for name, part in [("calib.npz", slice(0, 512)), ("eval.npz", slice(-4096, None))]:
        np.savez(out / name, x=images[part], label=labels[part])


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2])
