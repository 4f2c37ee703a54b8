#!/usr/bin/env bash
# Train on hosts that come and go, including cases in which torchrun alone ends: the rendezvous host crashes, a host is cut off from the
# network, agents give up. Run the same command on each host, at any time; it starts and restarts torchrun.sh. Copy and change it as you like.
#
#   launch/elastic.sh configs/digits.yaml [key.path=value ...]
#
#   NNODES        minimum and maximum number of hosts (default 1:100)
#   NPROC_PER_NODE, RDZV_CONF, RDZV_ID     as in torchrun.sh
#   HOST          the name or address at which the others reach this host (default: its hostname)
#   MAX_CRASHES   gives up after this many starts in a row without a new checkpoint (default 3); a config error ends it at once
#   MEETINGS      the rendezvous directory, shared by all hosts (default RUN/.meetings; required if run.dir is a URL)
#
# Rendezvous happens in rounds: the file MEETINGS/N has the host and port of round N. A new host joins the newest round. When torchrun ends
# before the run does, the next round starts on a live host, with a new store.
#
# Monitor: RUN/status.json, RUN/attempts.jsonl. Stop: touch RUN/STOP; it saves first. A signal to this script (Ctrl-C, SIGTERM, SIGUSR1)
# removes this host: the run is saved, and the others continue. Resume, or train longer: as with torchrun.sh.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
HOST=${HOST:-$(hostname)}
# No restarts by torchrun itself: it would retry config errors, and wait for hosts that are gone.
export NNODES=${NNODES:-1:100} RDZV_ID=${RDZV_ID:-dist_train} MAX_CRASHES=${MAX_CRASHES:-3} MAX_RESTARTS=0
lost=30 # seconds of silence after which a round is over

say() { printf '%s %s: %s\n' "$(date '+%F %T')" "$HOST" "$*"; }

if [ $# -gt 0 ] && [[ $1 != *=* && $1 != -* ]]; then set -- --config "$@"; fi
RUN=$("$python" -m dist_train.main config --get run.path "$@") || exit
if [[ $RUN == *://* ]]; then : "${MEETINGS:?run.dir is a URL: set it to a directory that all hosts share}"; fi
MEETINGS=${MEETINGS:-$RUN/.meetings}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$MEETINGS" || exit
export RUN scratch

newest() { find "$MEETINGS" -name '[1-9]*' -printf '%f\n' | sort -n | tail -n 1 | grep . || echo 0; }
place() { cat "$MEETINGS/$1"; }
here_is() { [[ $(place "$1") == "$HOST":* ]]; }
answers() { # whether its host and port accept connections
    local at
    at=$(place "$1")
    timeout 3 bash -c "exec 3<>'/dev/tcp/${at%:*}/${at##*:}'" 2>/dev/null
}
lives() { [ -n "$(find "$MEETINGS/$1" -newermt "-${2:-$lost} seconds")" ]; } # whether any host is in that round
make_round() { # one host wins: a hard link to a complete file appears atomically
    local mine="$MEETINGS/.$HOST.$$" at
    at=$HOST:$((20000 + ($(printf '%s' "$RDZV_ID" | cksum | cut -d' ' -f1) + $1) % 12000))
    echo "$at" >"$mine" && ln "$mine" "$MEETINGS/$1" 2>/dev/null && say "round $1 is at $at"
    rm -f "$mine"
}

# look: prints the number of starts so far. look BEFORE RC: prints `WORD explanation`, from the run's own records, since torchrun's exit
# code is 1 in nearly every case.
look() {
    "$python" - "$@" <<'PYTHON'
import glob, json, os, sys
import fsspec

def read(name):
    try:
        with fsspec.open(os.environ["RUN"].rstrip("/") + "/" + name) as file:
            return file.read().decode()
    except FileNotFoundError:
        return ""

ledger = [json.loads(line) for line in read("attempts.jsonl").splitlines() if line.endswith("}")]  # a kill may have truncated the last one
starts = [line for line in ledger if line["event"] == "start"]
if len(sys.argv) == 1:
    sys.exit(print(len(starts)))
before, rc = int(sys.argv[1]), int(sys.argv[2])
status = json.loads(read("status.json") or "{}")
state, step = status.get("state"), status.get("step")
ends = {line["attempt"]: line for line in ledger if line["event"] == "end"}
messages = [json.load(open(name))["message"]["message"] for name in glob.glob(os.environ["scratch"] + "/log/**/error.json", recursive=True)]
if any(not text.startswith("dist_train: ") for text in messages):  # the prefix of crash summaries
    print("config: another start would find the same error; see above")
elif state == "completed" and (rc == 0 or len(starts) > before):
    print(f"done: completed at step {step}")
elif len(starts) == before:
    print(f"idle: training didn't begin (exit {rc})")
elif state == "preempted" and ends[starts[-1]["attempt"]]["cause"].startswith("file"):
    print(f"rest: stopped on request at step {step}")
else:
    # Starts in a row from the same checkpoint, without those that were stopped on request.
    crashes = 0
    for line in reversed(starts):
        if line["resumed_from"] != starts[-1]["resumed_from"]:
            break
        crashes += ends.get(line["attempt"], {}).get("state") != "preempted"
    verb = "again" if crashes <= int(os.environ["MAX_CRASHES"]) else "stop"
    print(f"{verb}: {state} at step {step} ({status['error']}); {crashes} crash(es) since the checkpoint at step {starts[-1]['resumed_from']}")
PYTHON
}

leaving=0
trap 'leaving=1' INT TERM HUP USR1

train_in() { # trains in round N until torchrun ends; tells it to save and end when a newer round has begun or this host leaves
    local round=$1 torchrun heard deadline=''
    shift
    rm -rf "$scratch/log"
    PET_LOG_DIR=$scratch/log RDZV_ENDPOINT=$(place "$round") "$here/torchrun.sh" "$@" </dev/null &
    torchrun=$!
    heard=$SECONDS
    while kill -0 "$torchrun" 2>/dev/null; do
        touch -c "$MEETINGS/$round"
        if here_is "$round" || answers "$round"; then heard=$SECONDS; fi
        # Cut off from the network, torchrun waits for its store forever and ignores signals. Its processes die with it.
        if [ $((SECONDS - heard)) -gt "$lost" ] || [ "$SECONDS" -gt "${deadline:-$SECONDS}" ]; then
            say "round $round: killing torchrun, which doesn't end by itself"
            kill -KILL "$torchrun"
        elif [ -z "$deadline" ] && { [ "$leaving" = 1 ] || [ "$(newest)" -gt "$round" ]; }; then
            say "leaving round $round$([ "$leaving" = 1 ] || echo " for round $(newest)")"
            deadline=$((SECONDS + ${PET_SHUTDOWN_TIMEOUT:-300}))
            kill -TERM "$torchrun"
        fi
        sleep 2 &
        wait $! # returns early on a signal
    done
    wait "$torchrun"
    rc=$?
}

over=0 idle=0 # the newest round that is over for this host; how many rounds in a row had no training
n=$(newest)
if [ "$n" != 0 ] && here_is "$n"; then over=$n; fi # from an earlier start of this script
while [ "$leaving" = 0 ]; do
    n=$(newest)
    if [ "$n" -le "$over" ]; then
        # The host of the last round goes first if it is alive. If the others took long to find out that the round is over, that host
        # is the one that is cut off: it must not become the host of the next round.
        if [ "$n" != 0 ] && here_is "$n"; then
            since=$SECONDS
            while lives "$n" 5 && [ $((SECONDS - since)) -lt $((lost + 15)) ]; do sleep 1; done
            [ $((SECONDS - since)) -lt $((lost / 2)) ] || sleep 10
        elif [ "$n" != 0 ]; then
            sleep 8
        fi
        [ "$(newest)" -gt "$over" ] || make_round $((over + 1))
    elif here_is "$n" || answers "$n"; then
        before=$(look)
        train_in "$n" "$@"
        verdict=$(look "$before" "$rc")
        say "round $n: $verdict"
        case $verdict in
        done:*) exit 0 ;;
        rest:*) exit 75 ;;
        config:*) exit 2 ;;
        again:*) idle=0 ;;
        idle:*) idle=$((idle + 1)) ;;
        *) exit 1 ;;
        esac
        [ "$idle" -le "$MAX_CRASHES" ] || exit 1
        over=$n
    elif lives "$n"; then
        sleep 2 # its host has just started, or this one is cut off
    else
        over=$n
    fi
done
exit 75
