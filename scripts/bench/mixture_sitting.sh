#!/usr/bin/env bash
# Mixtures and hybrids on two GPUs of one host in one sitting, ours and the peer's side by side (about 20 minutes, 61 GB
# of checkpoints). Results lie below RESULTS/0 and RESULTS/1 for the first GPU and the second, logs beside them.
#   scripts/bench/mixture_sitting.sh TOKENIZER WORK PEERS RESULTS
# WORK is best a folder in memory. PEERS: see user_line.py.
set -euo pipefail
tokenizer=$1 work=$2 peers=$3 results=$4
bench=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$bench/../..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results/0" "$results/1"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

lines() { # of the GPU $1, the cases that follow
  local gpu=$1
  shift
  CUDA_VISIBLE_DEVICES=$gpu python3 "$bench/user_line.py" --tokenizer "$tokenizer" --work "$work" --peers "$peers" \
    --results "$results/$gpu" --limit 300 --seconds "${seconds:-3000}" --only "$@"
}

seconds=0 lines 0 30b_a3b_4x2048 >"$results/0/base.log" 2>&1 # writes the checkpoint, and begins no case
(
  lines 1 30b_a3b_4x2048-r8-unsloth
  lines 1 12_layers qwen3_5 gpt_oss
  CUDA_VISIBLE_DEVICES=1 python3 "$bench/experts_curve.py" --tokenizer "$tokenizer" --work "$work/curve" --steps 60 \
    --results "$results/1"
) >"$results/1/lines.log" 2>&1 &
(
  lines 0 30b_a3b_4x2048-24gb
  lines 0 30b_a3b_packed
  lines 0 30b_a3b_4x2048-whole
  CUDA_VISIBLE_DEVICES=0 python3 -m pytest -q -p no:cacheprovider -m gpu "$bench/../../tests/gpu"
) >"$results/0/lines.log" 2>&1 &
wait
grep -h "tokens/s\|passed\|failed" "$results"/*/lines.log
