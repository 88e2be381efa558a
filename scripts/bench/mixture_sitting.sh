#!/usr/bin/env bash
# Mixtures and hybrids in one sitting, ours and the peer's side by side: on one GPU one after another (about 25 minutes),
# on two of one host side by side (about 15). Results lie below RESULTS/mixture and RESULTS/others, logs beside them.
#   scripts/bench/mixture_sitting.sh TOKENIZER WORK PEERS RESULTS
# WORK is best a folder in memory: 61 GB of checkpoint, which is deleted before the others' 67 GB where there is one GPU.
# PEERS: see user_line.py.
set -euo pipefail
tokenizer=$1 work=$2 peers=$3 results=$4
bench=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$bench/../..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results/mixture" "$results/others"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

lines() { # of the group $1, the cases that follow
  local group=$1
  shift
  python3 "$bench/user_line.py" --tokenizer "$tokenizer" --work "$work" --peers "$peers" \
    --results "$results/$group" --limit 300 --seconds 3000 --only "$@"
}

mixture() { # 30 billion weights, a card of 24 GB and the peer
  lines mixture 30b_a3b_4x2048-24gb
  lines mixture 30b_a3b_4x2048-r8-unsloth
  lines mixture 30b_a3b_mixed 30b_a3b_packed
}

others() { # plan and measured of other shapes, learning, and what the tests hold
  lines others 12_layers qwen3_5
  lines others gpt_oss
  python3 "$bench/experts_curve.py" --tokenizer "$tokenizer" --work "$work/curve" --steps 60 --results "$results/others"
  python3 -m pytest -q -n 8 -p no:cacheprovider -m gpu "$bench/../../tests/gpu" # one by one they take half an hour
}

if [[ $(nvidia-smi -L | wc -l) -gt 1 ]]; then
  CUDA_VISIBLE_DEVICES=1 others >"$results/others/lines.log" 2>&1 &
  CUDA_VISIBLE_DEVICES=0 mixture >"$results/mixture/lines.log" 2>&1 &
  wait
else
  mixture >"$results/mixture/lines.log" 2>&1 || true # its log says why; the others are measured all the same
  rm -rf "$work/30b_a3b"
  others >"$results/others/lines.log" 2>&1 || true
fi
grep -h "tokens/s\|passed\|failed" "$results"/*/lines.log
