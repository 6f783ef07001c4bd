#!/usr/bin/env bash
# Spoken-dialog fine-tuning with LoRA: adapters over a frozen model that knows speech units.
#
#   bash examples/sft_lora_usdm.sh
#       The demo, on the CPU, is that of examples/sft_usdm.sh with adapters instead of all weights; it exports them
#       twice, as a PEFT directory and merged into a plain model. OUT is runs/sft-lora by default.
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
source scripts/sft.sh

sft_export() { # the report compares both with the run
    run python tools/convert_hf_checkpoint.py export --load "$out/run" --hf-path "$out/adapter" --adapter-only \
        --base-model "$pretrained/exported"
    run python tools/convert_hf_checkpoint.py export --load "$out/run" --hf-path "$out/model" --merge-lora
}

if sft_wants_demo "$@"; then
    sft_demo runs/sft-lora --train-iters 1000 --global-batch-size 4 --micro-batch-size 2 --lr 3e-3 \
        --lora --lora-r 32 --lora-alpha 32 --lora-dropout 0 \
        --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
else
    read -r -a targets <<<"${LORA_TARGETS:-q_proj v_proj}"
    sft_cluster --lora --lora-r "${LORA_R:-8}" --lora-alpha "${LORA_ALPHA:-16}" \
        --lora-dropout "${LORA_DROPOUT:-0.1}" --lora-target-modules "${targets[@]}"
fi
