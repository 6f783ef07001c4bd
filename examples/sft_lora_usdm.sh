#!/usr/bin/env bash
# Spoken-dialog fine-tuning with LoRA: adapters over a frozen model that knows speech units.
#
#   CHECKPOINT=… DATA=… VALID_DATA=… OUT=… bash examples/sft_lora_usdm.sh
#       One machine of 8 GPUs, with the original's hyperparameters; the same command again resumes.
#         CHECKPOINT  a pre-training run (examples/pretrain_usdm.sh), or a converted model, made by
#                     tools/convert_hf_checkpoint.py import --hf-path naver-ai/USTM
#         DATA        prefix of a token store with a loss mask, made by tools/preprocess_data.py dialog or sft,
#                     or a blend: "0.7 A 0.3 B"
#         VALID_DATA  the same for evaluation (optional): loss and accuracy by kind of token
#         OUT         the run: checkpoints of the adapter, metrics.jsonl, tensorboard/, exit.json. It needs
#                     CHECKPOINT, its base, for as long as it is resumed or exported
#         TP=2 PP=2   tensor and pipeline parallel sizes        RECIPE=usdm  or corrected
#         EPOCHS=1    passes over DATA                          GLOBAL_BATCH_SIZE=64  dialogs a step: the
#                     original's are 2 x 4 a process
#         LORA_R=8 LORA_ALPHA=16 LORA_DROPOUT=0.1 LORA_TARGETS="q_proj v_proj"  the adapters
#         EXTRA_ARGS  further flags, e.g. "--keep-best --train-new-embeddings"
#       Then tools/convert_hf_checkpoint.py export --load OUT --hf-path … with --adapter-only for a PEFT
#       directory, or --merge-lora for a plain model.
#
#   NNODES=4 GPUS_PER_NODE=8 NODE_RANK=… MASTER_ADDR=… MASTER_PORT=… CHECKPOINT=… … bash examples/sft_lora_usdm.sh
#       Several machines: the same command on every node, all paths on a shared file system. Nothing is
#       installed then: the environment must be ready on every node.
#
# The exit code is the run's own: 0 done, 2 wrong input, 3 preempted after saving, 1 a fault.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

die() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

[ "$#" -eq 0 ] || die "no arguments are expected ($*); the run is set by variables, see the head of $0"
problems=()
while IFS= read -r problem; do
    problems+=("$problem")
done < <(launch_unset CHECKPOINT DATA OUT)
[ "${#problems[@]}" -eq 0 ] || die "${problems[@]}"
# A blend is words; a prefix with a space in it is one. Both are left to the trainer to judge.
data=("$DATA")
[ -e "$DATA.idx" ] || read -r -a data <<<"$DATA"
read -r -a targets <<<"${LORA_TARGETS:-q_proj v_proj}"
# A restart needs the base too.
if [ ! -e "$CHECKPOINT/latest_checkpointed_iteration.txt" ]; then
    problems+=("there is no checkpoint at CHECKPOINT=$CHECKPOINT; pre-train one, or make it, once, with
    python tools/convert_hf_checkpoint.py import --hf-path naver-ai/USTM --save $CHECKPOINT --dtype bf16")
fi
for name in DATA VALID_DATA; do
    case "${!name:-}" in
        "" | *" "*) ;;
        *) [ -e "${!name}.idx" ] || problems+=("there is no token store at $name=${!name}; make it, once, with
    python tools/preprocess_data.py sft --input train.txt --output-prefix ${!name}
  from the original's lines, or from dialogs of your own with
    python tools/preprocess_data.py dialog --input dialogs.jsonl --tokenizer TOKENIZER --output-prefix ${!name}") ;;
    esac
done
[ "${#problems[@]}" -eq 0 ] || die "${problems[@]}"

if [ "${NNODES:-1}" -eq 1 ]; then
    source scripts/setup.sh demo
fi
train=(
    sft --recipe "${RECIPE:-usdm}" --lora
    --lora-r "${LORA_R:-8}" --lora-alpha "${LORA_ALPHA:-16}" --lora-dropout "${LORA_DROPOUT:-0.1}"
    --lora-target-modules "${targets[@]}"
    --tensor-model-parallel-size "${TP:-2}" --pipeline-model-parallel-size "${PP:-2}"
    --overlap-grad-reduce --overlap-param-gather
    --train-data-path "${data[@]}" ${VALID_DATA:+--valid-data-path "$VALID_DATA"}
    --seq-length 8192 --global-batch-size "${GLOBAL_BATCH_SIZE:-64}" --micro-batch-size 2
    --num-train-epochs "${EPOCHS:-1}" --shuffle
    --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.01
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --bf16 --seed 42
    --log-interval 50 --eval-interval 1000 --save-interval 1000 --save-total-limit 2
    --load "$OUT" --save "$OUT" --pretrained-checkpoint "$CHECKPOINT" --tensorboard-dir "$OUT/tensorboard"
)
[ "${TP:-2}" -eq 1 ] || train+=(--sequence-parallel)
# shellcheck disable=SC2206  # EXTRA_ARGS is a list of words
train+=(${EXTRA_ARGS:-})
launch_training "${train[@]}"
