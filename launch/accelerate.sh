#!/usr/bin/env bash
# Train with `accelerate launch`, on one node or many. Copy and change it as you like.
#
#   launch/accelerate.sh configs/digits.yaml [key.path=value ...]
#   ACCELERATE_CONFIG=launch/accelerate/bf16.yaml launch/accelerate.sh configs/digits.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/accelerate.sh ...       on node1; the same with NODE_RANK=1 on the other node
#
#   ACCELERATE_CONFIG  a file written by `accelerate config`, or one of launch/accelerate/ (default: its ddp.yaml, or multi_node.yaml)
#   NPROC_PER_NODE     processes on each node, the same on all (default: the GPUs here, else 2)
#   MASTER_PORT        default 29500
#
# From accelerate's config, the engine uses the number of processes, the rendezvous address, mixed_precision (if trainer.precision is
# `auto`) and use_cpu. Everything else is in dist_train's YAML. Monitor, stop and resume: as with torchrun.sh.
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
if [ "$gpus" = 0 ]; then # with GPUs, one thread is best (distributed.threads=auto); on the CPU torchrun would set one as well
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
