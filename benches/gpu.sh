#!/usr/bin/env bash
# Exact optimization, half precision, int8 and int4 weights, a budget of latency and planned samplers on a CUDA device: a
# trained residual network and a trained vision transformer at batch 64,
# a model of the shape of SmolLM2-135M with random weights (so for latency only), and 20 steps of a trained denoiser at
# batch 64.
#
#   gpu.sh pack FOLDER PROGRAM VIT.onnx SMOLLM2.onnx CALIB.npz DIT.onnx RESNET.onnx IMAGES.npz
#                                                          where the models are: gathers what is needed; IMAGES.npz calibrates
#                                                          vit and resnet (x, label)
#   gpu.sh run FOLDER                                      where the GPU is: optimizes, times, writes FOLDER/out/*
#
# The big weights do not travel: `run` makes random ones of the same size, with the standard library alone. ONNX Runtime
# with the CUDA provider must be there: ORT_DYLIB_PATH names its library, and LD_LIBRARY_PATH the folders of that
# library and of those of CUDA and cuDNN.
set -euo pipefail

case "${1:-}" in
pack)
  mkdir -p "$2"
  cp "$0" "$2/gpu.sh"
  strip -o "$2/optimize" "$3"
  xz -T0 -1 -f "$2/optimize"
  cp "$4" "$2/vit.onnx"
  cp "$5" "$2/smollm2.onnx"
  stat -c %s "$5.data" > "$2/smollm2.bytes"
  cp "$6" "$2/calib.npz"
  cp "$7" "$2/dit.onnx"
  cp "$8" "$2/resnet.onnx"
  cp "$9" "$2/images.npz"
  du -sh "$2" ;;
run)
  cd "$2"
  mkdir -p out
  [ -f optimize ] || { unxz -k optimize.xz && chmod +x optimize; }
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
  timed() { # name, model, result, shapes
    name=$1 one=$2 other=$3
    shift 3
    ./optimize bench "$one" "$other" --ep cuda "${@/#/--input-shape=}" --json > "out/$name.json" && cat "out/$name.json"
  }
  lossy() { # name, model, shape, options
    name=$1 model=$2 shape=$3
    shift 3
    ./optimize "$model" -o "$name.onnx" --overwrite --ep cuda --input-shape "$shape" --calib calib.npz --metric kl \
      --report "out/$name.report.json" "$@" 2>&1 | tee "out/$name.txt" || return 0
    timed "$name" "$model" "$name.onnx" "$shape"
  }
  scheduler() { # the denoiser predicts noise under linear betas
    echo '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": true}'
  }
  echo "== samplers of 20 steps, guidance 3, batch 64"
  scheduler > scheduler.json
  make() { # name, options
    name=$1
    shift
    ./optimize sampler dit.onnx -o "$name.onnx" --overwrite --scheduler scheduler.json --steps 20 --guidance 3 \
      --io uncond:label=10 --form unrolled -q "$@"
  }
  make full
  make planned --plan gate:at=12+forecast:every=2
  timed planned full.onnx planned.onnx noise:64,1,28,28 label:64
  echo "== a vision transformer, exact, batch 64"
  ./optimize vit.onnx -o vit_exact.onnx --overwrite --ep cuda --input-shape x:64,1,28,28 -q
  timed vit vit.onnx vit_exact.onnx x:64,1,28,28
  echo "== float16 and int8, batch 64: whole models in half precision, weights in codes, static int8 as TensorRT reads it"
  ./optimize smollm2.onnx -o smollm2.float16.onnx --overwrite --ep cuda --dtype float16 --no-verify -q
  timed smollm2.float16 smollm2.onnx smollm2.float16.onnx input_ids:8,256
  for name in resnet vit; do
    ./optimize $name.onnx -o $name.float16.onnx --overwrite --ep cuda --dtype float16 --calib images.npz --labels label \
      --report "out/$name.float16.report.json" -q && timed $name.float16 $name.onnx $name.float16.onnx x:64,1,28,28 || true
    ./optimize $name.onnx -o $name.int8.onnx --overwrite --ep cuda --size 0.27 --allow-slower --calib images.npz \
      --labels label --report "out/$name.int8.report.json" -q && timed $name.int8 $name.onnx $name.int8.onnx x:64,1,28,28 || true
    # The CUDA provider has no kernels for pairs: this is for TensorRT, timed where its provider is there.
    ./optimize $name.onnx -o $name.trt.onnx --overwrite --target tensorrt --set quantize-static.everywhere=true \
      --calib images.npz --labels label -q && ./optimize bench $name.onnx $name.trt.onnx --ep tensorrt \
      --input-shape x:64,1,28,28 --json > "out/$name.trt.json" && cat "out/$name.trt.json" || true
  done
  echo "== a language model, latency 0.7, 8 x 256"
  lossy smollm2 smollm2.onnx input_ids:8,256 --latency 0.7
  echo "== the same in half precision"
  lossy half smollm2.onnx input_ids:8,256 --size 0.52 --passes convert-floats
  [ ! -f half.onnx ] || lossy fewer half.onnx input_ids:8,256 --latency 0.8 ;;
*)
  sed -n '2,15p' "$0"
  exit 2 ;;
esac
