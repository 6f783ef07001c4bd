#!/usr/bin/env bash
# The cluster run on hosts that ssh reaches: torchrun on each, started from here.
#
#   HOSTS="node0 node1 …" CHECKPOINT=… DATA=… VALID_DATA=… OUT=… bash examples/cluster/torchrun.sh [--dry-run]
#       The variables of examples/pretrain_usdm.sh, which runs on every host, in this directory: a path that
#       all hosts share. The first host is where the ranks meet.
#         EXAMPLE=examples/sft_usdm.sh   another task
#         PYTHON=/path/python            the environment's, on the shared file system
#       With --dry-run the command of each host is printed, and nothing is started.
#
# The exit code is that of the first host that fails (0 done, 2 wrong input, 3 preempted after saving, 1 a fault);
# the others are stopped then. SIGTERM and Ctrl-C go to all hosts: the run saves and ends with 3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

case "${1:-}" in
    "" | --dry-run) ;;
    *) die "$1 is no argument of this script; the run is set by variables, see its head" ;;
esac
read -r -a hosts <<<"${HOSTS:-}"
[ "${#hosts[@]}" -gt 0 ] || die "HOSTS is not set; it is the names of the hosts, the first of them where the ranks meet"
[ -n "${OUT:-}" ] || die "OUT is not set; it is the run's directory, on a file system that all hosts share"

# ssh gives a command no environment of ours: what the example reads is named on its command line.
passed=(NNODES="${#hosts[@]}" MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}")
for name in GPUS_PER_NODE MASTER_PORT CHECKPOINT DATA VALID_DATA OUT TP PP VPP RECIPE EPOCHS GLOBAL_BATCH_SIZE \
    LORA_R LORA_ALPHA LORA_DROPOUT LORA_TARGETS EXTRA_ARGS PYTHON DRY_RUN \
    HEALTH_CHECK DEVICE MIN_FREE_GIB MIN_BUS_GBS; do
    [ -z "${!name:-}" ] || passed+=("$name=${!name}")
done
while IFS= read -r name; do
    passed+=("$name=${!name}")
done < <(compgen -e | grep -E '^(NCCL|NVTE|TORCH_NCCL)_' || true)

pid_file() { printf '%s/.launcher-%d.pid' "$OUT" "$1"; }

command_of() { # of host number $1, quoted for its shell
    printf 'cd %q && mkdir -p %q && echo $$ >%q && exec env NODE_RANK=%d' "$PWD" "$OUT" "$(pid_file "$1")" "$1"
    printf ' %q' "${passed[@]}"
    printf ' bash %q' "${EXAMPLE:-examples/pretrain_usdm.sh}"
}

if [ "${1:-}" = --dry-run ]; then
    for rank in "${!hosts[@]}"; do
        printf '%s: %s\n' "${hosts[rank]}" "$(command_of "$rank")"
    done
    exit
fi

declare -A rank_of=() # by the process of its ssh
for rank in "${!hosts[@]}"; do
    ssh -o BatchMode=yes "${hosts[rank]}" "$(command_of "$rank")" </dev/null &
    rank_of[$!]="$rank"
done

stop() { # an ssh that is killed does not tell its command
    local rank
    for rank in "${rank_of[@]}"; do
        # shellcheck disable=SC2029  # the path is expanded here, the process there
        ssh -o BatchMode=yes "${hosts[rank]}" "kill -TERM \$(cat $(printf %q "$(pid_file "$rank")"))" </dev/null || true
    done
}
trap stop TERM INT

code=0
while [ "${#rank_of[@]}" -gt 0 ]; do
    one=0
    wait -n -p ended "${!rank_of[@]}" || one=$?
    [ -n "${ended:-}" ] || continue # a signal, not an end
    unset "rank_of[$ended]"
    if [ "$one" -ne 0 ] && [ "$code" -eq 0 ]; then
        code="$one"
        stop
    fi
done
exit "$code"
