#!/usr/bin/env bash
# Test on the GPUs of one machine or more: tools/dist_test.sh CONFIG CKPT GPUS [ARGUMENTS]
# NNODES, NODE_RANK, MASTER_ADDR and PORT describe a job of several machines.
set -euo pipefail

usage='usage: tools/dist_test.sh CONFIG CKPT GPUS [ARGUMENTS]'
config=${1:?$usage}
checkpoint=${2:?$usage}
gpus=${3:?$usage}
python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
