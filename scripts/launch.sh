#!/usr/bin/env bash
# One node's part of a training run, for the scripts in examples/:
#
#   source scripts/launch.sh
#   launch_unset NAME …         a line for each of these variables that is not set, and for what more nodes need
#   launch_training FLAG …      `usdm-megatron FLAG …` on this node's GPUs; returns the run's own exit code
#
# Read: NNODES (1), GPUS_PER_NODE (8), NODE_RANK (SLURM_NODEID, 0), MASTER_ADDR, MASTER_PORT (29500), OUT, PYTHON.

launch_unset() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || printf '%s is not set; the head of %s says what it is\n' "$name" "$0"
    done
    if [ "${NNODES:-1}" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || printf 'MASTER_ADDR is not set; it is the host name of node 0\n'
        [ -n "${NODE_RANK:-${SLURM_NODEID:-}}" ] || printf 'NODE_RANK is not set; it is 0 to %d\n' $((NNODES - 1))
    fi
}

launch_training() {
    local python="${PYTHON:-python}" nnodes="${NNODES:-1}" gpus="${GPUS_PER_NODE:-8}"
    local node_rank="${NODE_RANK:-${SLURM_NODEID:-0}}" marker launcher code=0
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # order of compute and TP traffic

    # Wrong input ends here with one clear message and code 2, before any rank meets another. On one node:
    # the check reads every byte of the checkpoint.
    if [ "$node_rank" -eq 0 ]; then
        "$python" -m usdm_megatron.cli "$@" --dry-run --world-size $((nnodes * gpus)) || return
    fi

    marker="$(mktemp)"
    printf '$ torchrun … -m usdm_megatron.cli %s\n' "$*"
    "$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$gpus" \
        --node-rank "$node_rank" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
        -m usdm_megatron.cli "$@" &
    launcher=$!
    # shellcheck disable=SC2064  # the id of this launcher, now
    trap "kill -TERM $launcher 2>/dev/null || true" TERM INT # bash would wait for the child before it told it
    while kill -0 "$launcher" 2>/dev/null; do
        code=0
        wait "$launcher" || code=$?
    done
    trap - TERM INT
    if [ "$code" -ne 0 ] && [ "$OUT/exit.json" -nt "$marker" ]; then
        local own
        own="$(sed -n -E 's/.*"code": *([0-9]+).*/\1/p' "$OUT/exit.json" | head -n 1)"
        [ "${own:-0}" -eq 0 ] || code="$own" # a failure of torchrun itself stays one
    fi
    rm -f "$marker"
    return "$code"
}
