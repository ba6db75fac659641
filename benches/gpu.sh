#!/usr/bin/env bash
# Exact optimization, half precision, int8 and int4 weights, a budget of latency and planned samplers on a GPU: a trained
# residual network and a trained vision transformer, a model of the shape of SmolLM2-135M with random weights (so for
# latency only), and 20 steps of a trained denoiser. Ends with a table in Markdown, FOLDER/out/table.md.
#
#   gpu.sh pack FOLDER PROGRAM VIT.onnx SMOLLM2.onnx CALIB.npz DIT.onnx RESNET.onnx IMAGES.npz
#                                                          where the models are: gathers what is needed; CALIB.npz has tokens,
#                                                          IMAGES.npz calibrates vit and resnet (x, label)
#   gpu.sh run FOLDER                                      where the GPU is: optimizes, times, writes FOLDER/out/*
#
# The big weights do not travel: `run` makes random ones of the same size, with the standard library alone. ONNX Runtime
# with the provider must be there: ORT_DYLIB_PATH names its library, and LD_LIBRARY_PATH the folders of that library and of
# those of CUDA and cuDNN. EP names another provider (webgpu), BATCH the images at a time (64), TOKENS the batch and length
# of the language model (8,256), LATENCY its budget (0.7), TIMED the seconds in which a pair is timed (10).
set -euo pipefail

ep=${EP:-cuda} batch=${BATCH:-64} tokens=${TOKENS:-8,256} latency=${LATENCY:-0.7} seconds=${TIMED:-10}

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
  rm -rf out
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
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null | tee out/machine.csv || true
  ./optimize doctor | tee out/doctor.txt
  # made NAME MODEL SHAPE... -- OPTIONS: one row of the table, of what `optimize MODEL OPTIONS` makes on the provider.
  made() {
    local name=$1 model=$2 shapes=()
    shift 2
    while [ "$1" != -- ]; do shapes+=("--input-shape=$1"); shift; done
    shift
    rm -f "$name.onnx"
    if ./optimize "$model" -o "$name.onnx" --overwrite --ep "$ep" --report "out/$name.report.json" -q "$@" 2> "out/$name.said"; then
      timed "$name" "$model" "$name.onnx" "${shapes[@]}"
    fi
  }
  timed() { # name, model, result, options
    local name=$1 one=$2 other=$3
    shift 3
    ./optimize bench "$one" "$other" --ep "$ep" --seconds "$seconds" "$@" --json > "out/$name.json" 2>> "out/$name.said" || true
    echo "$name: done after $SECONDS s"
  }
  images=(--calib images.npz --labels label)
  for name in resnet vit; do
    made $name.exact $name.onnx x:$batch,1,28,28 --
    made $name.float16 $name.onnx x:$batch,1,28,28 -- --dtype float16 "${images[@]}"
    made $name.int8 $name.onnx x:$batch,1,28,28 -- --size 0.27 --allow-slower "${images[@]}"
  done
  made vit.int4 vit.onnx x:$batch,1,28,28 -- --size 0.17 --target ort --allow-slower "${images[@]}"
  # The CUDA provider has no kernels for pairs of QuantizeLinear and DequantizeLinear: TensorRT's is timed where it is there.
  if grep -q -i '^ *tensorrt' out/doctor.txt; then
    for name in resnet vit; do
      ep=tensorrt made $name.tensorrt $name.onnx x:$batch,1,28,28 -- \
        --target tensorrt --set quantize-static.everywhere=true "${images[@]}"
    done
  fi
  made smollm2.float16 smollm2.onnx input_ids:$tokens -- --dtype float16 --no-verify
  made smollm2.fewer smollm2.onnx input_ids:$tokens -- --latency "$latency" --input-shape input_ids:$tokens --calib calib.npz \
    --metric kl
  # The denoiser predicts noise under linear betas.
  echo '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": true}' > scheduler.json
  sampler() { # name, options
    local name=$1
    shift
    ./optimize sampler dit.onnx -o "$name.onnx" --overwrite --scheduler scheduler.json --steps 20 --guidance 3 \
      --io uncond:label=10 --form unrolled --ep "$ep" -q "$@" 2> "out/$name.said"
  }
  if sampler sampler.full && sampler sampler.planned --plan gate:at=12+forecast:every=2; then
    timed sampler.planned sampler.full.onnx sampler.planned.onnx --input-shape noise:$batch,1,28,28 --input-shape label:$batch
  fi
  python3 - <<'PY' | tee out/table.md
import glob, json, os


def read(path):
    try:
        return json.load(open(path))
    except (OSError, ValueError):
        return None


def memory(side):
    return "–" if side["peak_rss_bytes"] is None else f"{side['peak_rss_bytes'] / 2**20:.0f}"


def left(side):
    placed = side["placement"]
    return "–" if placed is None else str(len(placed["elsewhere"]))


def size(path):
    return sum(os.path.getsize(file) for file in glob.glob(path) + glob.glob(path + ".data"))


print("| result | before, ms | after, ms | ratio | bytes | host memory, MiB | nodes elsewhere | beside the original |")
print("|---|---|---|---|---|---|---|---|")
for said in sorted(glob.glob("out/*.said"), key=os.path.getmtime):
    name = os.path.basename(said)[: -len(".said")]
    timed, report = read(f"out/{name}.json"), read(f"out/{name}.report.json")
    if timed is None:
        lines = [line for line in open(said) if line.startswith("error")]
        if name != "sampler.full" or lines:
            print(f"| {name} | {lines[-1].strip() if lines else 'no result'} |")
        continue
    one, two = timed["before"], timed["after"]
    verify = (report or {}).get("verify")
    found = f"{verify['metric']}: {verify['drop'] or 0:.2g} lost, {verify['set']}" if verify else "not compared"
    print(
        f"| {name} | {timed['before_ms']:.2f} | {timed['after_ms']:.2f} | {timed['ratio']:.2f} ± {timed['ratio'] * timed['spread']:.2f}"
        f" | {size(two['path']) / size(one['path']):.2f} | {memory(one)} → {memory(two)} | {left(one)} → {left(two)} | {found} |"
    )
PY
  ;;
*)
  sed -n '2,17p' "$0"
  exit 2 ;;
esac
