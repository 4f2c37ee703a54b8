#!/usr/bin/env bash
# Train by `accelerate launch`, on one node or on many. Copy and change it as you like.
#
#   launch/accelerate.sh configs/digits.yaml [key.path=value ...]
#   ACCELERATE_CONFIG=launch/accelerate/bf16.yaml launch/accelerate.sh configs/digits.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/accelerate.sh ...       on node1; on the other node the same with NODE_RANK=1
#
#   ACCELERATE_CONFIG  what `accelerate config` wrote, or one of launch/accelerate/ (default: its ddp.yaml, or multi_node.yaml)
#   NPROC_PER_NODE     processes on each node, the same on all (default: the GPUs here, else 2)
#   MASTER_PORT        default 29500
#
# From accelerate's config the engine takes the number of processes, where they meet, mixed_precision (where trainer.precision is `auto`)
# and use_cpu. The rest of the training is in the YAML of dist_train. Watch, stop and go on: as with torchrun.sh.
set -euo pipefail

python=${PYTHON:-$(command -v python || command -v python3)}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]]; then set -- --config "$@"; fi

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
fi
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
if [ "$gpus" = 0 ]; then # beside GPUs one thread is best, and distributed.threads=auto; on the CPU torchrun would make it one as well
    cpus=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    threads=$((cpus / NPROC_PER_NODE))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

# accelerate starts torchrun, which reads these: see torchrun.sh.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}

NNODES=${NNODES:-1}
flags=(--num_processes="$((NNODES * NPROC_PER_NODE))" --num_machines="$NNODES") # num_processes is the total, over all nodes
file=ddp.yaml
if [ "$NNODES" -gt 1 ]; then
    : "${NODE_RANK:?set it to 0 on the node MASTER_ADDR, to 1, 2, ... on the others}" "${MASTER_ADDR:?the name or address of the first node}"
    flags+=(--machine_rank="$NODE_RANK" --main_process_ip="$MASTER_ADDR" --main_process_port="${MASTER_PORT:-29500}")
    file=multi_node.yaml
fi
exec "$python" -m accelerate.commands.launch --config_file="${ACCELERATE_CONFIG:-$here/accelerate/$file}" "${flags[@]}" \
    -m dist_train.main "$@"
