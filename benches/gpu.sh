#!/usr/bin/env bash
# Exact optimization and latency on a CUDA device: a trained vision transformer at batch 64, and a model of the shape of
# SmolLM2-135M at 8 x 256 with random weights (so for latency only).
#
#   gpu.sh pack FOLDER PROGRAM VIT.onnx SMOLLM2.onnx   where the models are: gathers what the other machine needs
#   gpu.sh run FOLDER                                  where the GPU is: optimizes, times, writes FOLDER/out/*.json
#
# The big weights do not travel: `run` makes random ones of the same size, with the standard library alone. ONNX Runtime
# with the CUDA provider must be there: ORT_DYLIB_PATH names its library, and LD_LIBRARY_PATH the folders of that
# library and of those of CUDA and cuDNN.
set -euo pipefail

case "${1:-}" in
pack)
  mkdir -p "$2"
  cp "$0" "$2/gpu.sh"
  cp "$3" "$2/optimize"
  cp "$4" "$2/vit.onnx"
  cp "$5" "$2/smollm2.onnx"
  stat -c %s "$5.data" > "$2/smollm2.bytes"
  du -sh "$2" ;;
run)
  cd "$2"
  mkdir -p out
  if [ ! -f smollm2.onnx.data ]; then
    python3 - "$(cat smollm2.bytes)" <<'PY'
import os, sys

left = int(sys.argv[1])
# A float whose last byte is 0x3c or 0xbc is between 2^-7 and 2^-5 in size, never zero or NaN.
small = bytes(0x3C | (byte & 0x80) for byte in range(256))
with open("smollm2.onnx.data", "wb") as file:
    while left:
        part = bytearray(os.urandom(min(left, 1 << 24)))
        part[3::4] = bytes(part[3::4]).translate(small)
        file.write(part)
        left -= len(part)
PY
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee out/machine.csv
  nproc
  ./optimize doctor | tee out/doctor.txt
  measure() { # name, model, shape
    ./optimize "$2" -o "out/$1.onnx" --ep cuda --input-shape "$3" --report "out/$1.report.json"
    ./optimize bench "$2" "out/$1.onnx" --ep cuda --input-shape "$3" --json > "out/$1.latency.json"
    ./optimize bench "$2" "out/$1.onnx" --ep cuda --input-shape "$3" --profile | tee "out/$1.txt"
    rm -f "out/$1.onnx" "out/$1.onnx.data"
  }
  measure vit vit.onnx x:64,1,28,28
  measure smollm2 smollm2.onnx input_ids:8,256 ;;
*)
  sed -n '2,10p' "$0"
  exit 2 ;;
esac
