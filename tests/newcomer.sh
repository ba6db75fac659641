#!/usr/bin/env bash
# Does what README says, command by command as it stands, in the folder that it is run in: the first run and the four jobs.
#
#   newcomer.sh README.md
#
# `optimize` is on the path, and the folder has the files that README speaks of: model.onnx, dit.onnx, resnet.onnx, calib.npz, labelled.npz,
# test.npz, scheduler_config.json and FOLDER. What needs a build is left out, and so is what needs a device. A command that asks
# for a share of the time may be refused: how fast two models are depends on the machine; it must say so in one sentence.
set -euo pipefail

readme=${1:?README.md}
count=0
while read -r command; do
  code=0
  # As it stands: a comment at its end is one for the shell too.
  bash -c "$command" > said.txt 2>&1 || code=$?
  case "$code: $command" in
  0:*) ;;
  3:*--latency*) grep -q '^error: ' said.txt ;;
  *)
    echo "exit code $code: $command" >&2
    cat said.txt >&2
    exit 1 ;;
  esac
  echo "$code $command"
  count=$((count + 1))
done < <(grep -E '^    optimize ' "$readme" | grep -v -- '--ep ' | sed 's/^ *//')
[ "$count" -ge 8 ] || { echo "only $count commands were found in $readme" >&2; exit 1; }
