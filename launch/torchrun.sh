#!/usr/bin/env bash
# Train with torchrun, on one node or many. Copy and change it as you like.
#
#   launch/torchrun.sh configs/digits.yaml [key.path=value ...]         one node; one process per GPU, or two without GPUs
#   NNODES=2 RDZV_ENDPOINT=node1 launch/torchrun.sh configs/digits.yaml     the same command on each of two nodes
#   NNODES=1:4 RDZV_ENDPOINT=node1 launch/torchrun.sh configs/digits.yaml   elastic: keeps training while one to four nodes come and go
#                                                                       (except node1; launch/elastic.sh survives its loss as well)
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, else 2)
#   RDZV_ENDPOINT    host[:port] of the rendezvous node; RDZV_ID identifies the job, and determines the port if none is given
#   MAX_RESTARTS     restarts of the processes after a failure (default: 0; with elastic nodes 3)
#   RDZV_CONF        further rendezvous settings (default: last_call_timeout=10, how long a round waits for more nodes)
#
# Monitor: RUN/logs, RUN/status.json (RUN is printed at startup). Stop: Ctrl-C, SIGTERM or SIGUSR1 to this process, or touch RUN/STOP;
# it saves first. Resume: the same command again. Train longer: the same command with trainer.duration=40ep.
set -euo pipefail

python=${PYTHON:-$(command -v python || command -v python3)}
# The first argument is a config, unless it is an override; without arguments, the built-in default is trained.
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

# torchrun reads PET_* as the defaults of its flags; a version without a flag ignores the variable. By default SIGUSR1 kills torchrun and
# orphans its processes, and it kills them 30 s after forwarding SIGTERM, however long a checkpoint takes.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}

NNODES=${NNODES:-1}
if [ "$NNODES" = 1 ]; then
    # torchrun waits five minutes if the machine's own hostname can't be resolved (some laptops and containers).
    export PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-127.0.0.1}
    flags=(--standalone --max-restarts="${MAX_RESTARTS:-0}")
else
    : "${RDZV_ENDPOINT:?set it to host[:port] of one of the nodes, the same on all of them}"
    RDZV_ID=${RDZV_ID:-dist_train}
    # The port is derived from the job's ID, so that two jobs on one node don't join each other's rendezvous.
    if [[ $RDZV_ENDPOINT != *:* ]]; then
        RDZV_ENDPOINT=$RDZV_ENDPOINT:$((20000 + $(printf '%s' "$RDZV_ID" | cksum | cut -d' ' -f1) % 12000))
    fi
    restarts=0
    if [[ $NNODES == *:* ]]; then
        restarts=3
        # Up to torch 2.15, the newest so far, a node that joins later waits for an address that is published only once: after 60 s all
        # nodes fail. It works without the shared store; once that is fixed, this setting is harmless.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    fi
    flags=(--nnodes="$NNODES" --max-restarts="${MAX_RESTARTS:-$restarts}" --rdzv-backend=c10d --rdzv-id="$RDZV_ID"
        --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-conf="${RDZV_CONF:-last_call_timeout=10}")
fi

# exec: signals to this script, from a terminal, a container or systemd, reach torchrun itself.
exec "$python" -m torch.distributed.run --nproc-per-node="$NPROC_PER_NODE" "${flags[@]}" -m dist_train.main "$@"
