#!/usr/bin/env bash
# Train by torchrun, on one node or on many. Copy and change it as you like.
#
#   launch/torchrun.sh configs/digits.yaml [key.path=value ...]         one node; a process a GPU, without GPUs two
#   NNODES=2 RDZV_ENDPOINT=node1 launch/torchrun.sh configs/digits.yaml     the same line on each of two nodes
#   NNODES=1:4 RDZV_ENDPOINT=node1 launch/torchrun.sh configs/digits.yaml   elastic: goes on while one to four nodes come and go
#                                                                       (all but node1; launch/elastic.sh survives its loss as well)
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, else 2)
#   RDZV_ENDPOINT    host[:port] of the node that all others meet at; RDZV_ID tells jobs apart, and gives the port if none is named
#   MAX_RESTARTS     restarts of the processes after a failure (default: 0; with elastic nodes 3)
#   RDZV_CONF        more for the rendezvous (default: last_call_timeout=10, how long a round waits for further nodes)
#
# Watch: RUN/logs, RUN/status.json (RUN is printed at the start). Stop: Ctrl-C, SIGTERM or SIGUSR1 to this process, or touch RUN/STOP;
# it saves first. Go on: the same line again. Train longer: the same line with trainer.duration=40ep.
set -euo pipefail

python=${PYTHON:-$(command -v python || command -v python3)}
# The first argument is a config, unless it is an override; without any, the built-in default is trained.
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

# torchrun reads PET_* as its flags' defaults, and a version that lacks a flag ignores its variable. By default it dies of SIGUSR1
# and leaves its processes behind, and kills them 30 s after it has passed SIGTERM on, however long a checkpoint takes.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}

NNODES=${NNODES:-1}
if [ "$NNODES" = 1 ]; then
    # torchrun waits five minutes where the machine's own name can't be resolved (some laptops and containers).
    export PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-127.0.0.1}
    flags=(--standalone --max-restarts="${MAX_RESTARTS:-0}")
else
    : "${RDZV_ENDPOINT:?set it to host[:port] of one of the nodes, the same on all of them}"
    RDZV_ID=${RDZV_ID:-dist_train}
    # The port follows from the job's name, so that two jobs on one node don't meet each other.
    if [[ $RDZV_ENDPOINT != *:* ]]; then
        RDZV_ENDPOINT=$RDZV_ENDPOINT:$((20000 + $(printf '%s' "$RDZV_ID" | cksum | cut -d' ' -f1) % 12000))
    fi
    restarts=0
    if [[ $NNODES == *:* ]]; then
        restarts=3
        # In torch 2.15, the newest so far, a node that joins later waits for an address that nobody publishes again: after 60 s all die.
        # Without the shared store it works; where that is cured, this does no harm.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    fi
    flags=(--nnodes="$NNODES" --max-restarts="${MAX_RESTARTS:-$restarts}" --rdzv-backend=c10d --rdzv-id="$RDZV_ID"
        --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-conf="${RDZV_CONF:-last_call_timeout=10}")
fi

# exec: signals to this script, from a terminal, a container or systemd, reach torchrun itself.
exec "$python" -m torch.distributed.run --nproc-per-node="$NPROC_PER_NODE" "${flags[@]}" -m dist_train.main "$@"
