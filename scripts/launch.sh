#!/usr/bin/env bash
# One node's part of a training run, for the scripts in examples/:
#
#   source scripts/launch.sh
#   launch_unset NAME …         a line for each of these variables that is not set, and for what more nodes need
#   launch_training FLAG …      `usdm-megatron FLAG …` on this node's GPUs; returns the run's own exit code
#   launch_new_directory DIR    makes DIR, or DIR-2, DIR-3 … if it is there, and prints which
#   step, run, die              how the examples speak: a heading, a command that is shown first, the end with code 2
#
# Read: NNODES (1), GPUS_PER_NODE (8), NODE_RANK (SLURM_NODEID, 0), MASTER_ADDR, MASTER_PORT (29500), OUT, PYTHON,
#       LAUNCHER=torchrun  one launcher a node, which starts its ranks; or
#                srun      this shell, in an allocation, starts all of them: a Slurm task a rank
#       DRY_RUN=1          print the command that would start the ranks, and stop
#       and of the check of all machines before a run of several (docs/launchers.md):
#       HEALTH_CHECK=0     leave it out
#       MIN_FREE_GIB=200   free space asked for where OUT is: two checkpoints of a 7B model
#       MIN_BUS_GBS        all-reduce bandwidth, GB/s, below which the nodes are refused
#       DEVICE=cuda        what ranks must run on; cpu for a rehearsal

step() { printf '\n== %s\n' "$*"; }
run() {
    printf '$ %s\n' "$*"
    "$@"
}
die() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

launch_new_directory() {
    local directory="$1" number=2
    while [ -e "$directory" ]; do
        directory="$1-$number"
        number=$((number + 1))
    done
    mkdir -p "$directory"
    printf '%s\n' "$directory"
}

launch_unset() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || printf '%s is not set; the head of %s says what it is\n' "$name" "$0"
    done
    if [ "${NNODES:-1}" -gt 1 ] && [ "${LAUNCHER:-torchrun}" = torchrun ]; then
        [ -n "${MASTER_ADDR:-}" ] || printf 'MASTER_ADDR is not set; it is the host name of node 0\n'
        [ -n "${NODE_RANK:-${SLURM_NODEID:-}}" ] || printf 'NODE_RANK is not set; it is 0 to %d\n' $((NNODES - 1))
    fi
}

# launch_ranks PORT: sets `ranks`, the command that starts an interpreter on this node's GPUs, or on all of them
launch_ranks() {
    local nnodes="${NNODES:-1}" gpus="${GPUS_PER_NODE:-8}"
    case "${LAUNCHER:-torchrun}" in
        torchrun)
            ranks=("${PYTHON:-python}" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$gpus"
                --node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}" --master-addr "${MASTER_ADDR:-127.0.0.1}"
                --master-port "$1")
            ;;
        srun)
            # No torchrun, which ends its ranks 30 s after SIGTERM: a checkpoint may take longer. The first
            # rank that fails ends the step.
            ranks=(env MASTER_PORT="$1" srun --nodes "$nnodes" --ntasks "$((nnodes * gpus))"
                --ntasks-per-node "$gpus" --kill-on-bad-exit=1 "${PYTHON:-python}")
            ;;
        *)
            printf 'error: LAUNCHER is %s; it must be torchrun or srun\n' "$LAUNCHER" >&2
            return 2
            ;;
    esac
}

# launch_wait COMMAND …: runs it and returns its code; a signal to stop goes on to it
launch_wait() {
    local launcher="" code signalled=""
    # bash would wait for the child before it told it
    trap 'signalled=1; [ -z "$launcher" ] || kill -TERM "$launcher" 2>/dev/null || true' TERM INT
    "$@" &
    launcher=$!
    [ -z "$signalled" ] || kill -TERM "$launcher" 2>/dev/null || true
    # A signal ends `wait` with a code of its own. The child's is kept for the next one, even if it ended before.
    while true; do
        signalled=""
        code=0
        wait "$launcher" || code=$?
        [ -n "$signalled" ] || break
    done
    trap - TERM INT
    return "$code"
}

launch_training() {
    local nnodes="${NNODES:-1}" port="${MASTER_PORT:-29500}" marker code=0 ranks=()
    local node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}"
    [ "${LAUNCHER:-torchrun}" = torchrun ] || node_rank=0 # one shell starts all
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # order of compute and TP traffic
    launch_ranks "$port" || return
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${ranks[@]}" -m usdm_megatron.cli "$@"
        printf '\n'
        return
    fi

    # A slow GPU, or a path that one node does not see, costs a minute here, and the run there.
    if [ "$nnodes" -gt 1 ] && [ "${HEALTH_CHECK:-1}" != 0 ]; then
        mkdir -p "$OUT"
        launch_ranks $((port + 1)) # a port of its own: no rank of the run may meet one of the check
        launch_wait "${ranks[@]}" -m usdm_megatron.cli inspect env --check --path "$OUT" --device "${DEVICE:-cuda}" \
            --min-free-gib "${MIN_FREE_GIB:-200}" ${MIN_BUS_GBS:+--min-bus-gbs "$MIN_BUS_GBS"} || return
        launch_ranks "$port"
    fi
    ranks+=(-m usdm_megatron.cli "$@")

    # Wrong input ends here with one clear message and code 2, before any rank meets another. On one node:
    # the check reads every byte of the checkpoint.
    if [ "$node_rank" -eq 0 ]; then
        launch_wait "${PYTHON:-python}" -m usdm_megatron.cli "$@" --dry-run \
            --world-size $((nnodes * ${GPUS_PER_NODE:-8})) || return
    fi

    marker="$(mktemp)"
    printf '$ %s … -m usdm_megatron.cli %s\n' "${LAUNCHER:-torchrun}" "$*"
    launch_wait "${ranks[@]}" || code=$?
    if [ "$code" -ne 0 ] && [ "$OUT/exit.json" -nt "$marker" ]; then
        local own
        own="$(sed -n -E 's/.*"code": *([0-9]+).*/\1/p' "$OUT/exit.json" | head -n 1)"
        [ "${own:-0}" -eq 0 ] || code="$own" # a failure of torchrun itself stays one
    fi
    rm -f "$marker"
    return "$code"
}
