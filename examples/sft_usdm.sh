#!/usr/bin/env bash
# Spoken-dialog fine-tuning of all weights: a model that knows speech units in, one that answers speech out.
#
#   bash examples/sft_usdm.sh
#       The demo, on the CPU: takes the newest demo of examples/pretrain_usdm.sh (runs/demo*; PRETRAINED=DIR names
#       another one; without any it is run first), fine-tunes its model on its dialogs on 4 ranks (TP2 x PP2),
#       evaluates, exports, verifies, and lets the model answer dialogs that it has never seen. Fails if it gets more
#       than 10 % of what they say wrong. OUT (default runs/sft) is never overwritten: a second call writes runs/sft-2.
#
#   CHECKPOINT=… DATA=… VALID_DATA=… OUT=… bash examples/sft_usdm.sh
#       One machine of 8 GPUs, with the original's hyperparameters; the same command again resumes.
#         CHECKPOINT  a pre-training run (examples/pretrain_usdm.sh), or a converted model, made by
#                     tools/convert_hf_checkpoint.py import --hf-path naver-ai/USTM
#         DATA        prefix of a token store with a loss mask, made by tools/preprocess_data.py dialog or sft,
#                     or a blend: "0.7 A 0.3 B"
#         VALID_DATA  the same for evaluation (optional): loss and accuracy by kind of token
#         OUT         the run: checkpoints, metrics.jsonl, tensorboard/, exit.json
#         TP=2 PP=2   tensor and pipeline parallel sizes        RECIPE=usdm  or corrected
#         EPOCHS=1    passes over DATA                          GLOBAL_BATCH_SIZE=64  dialogs a step: the
#                     original's are 2 x 4 a process
#         EXTRA_ARGS  further flags, e.g. "--keep-best --eval-interval epoch"
#
#   NNODES=4 GPUS_PER_NODE=8 NODE_RANK=… MASTER_ADDR=… MASTER_PORT=… CHECKPOINT=… … bash examples/sft_usdm.sh
#       Several machines: the same command on every node, all paths on a shared file system. Nothing is
#       installed then: the environment must be ready on every node.
#
# The exit code is the run's own: 0 done, 2 wrong input, 3 preempted after saving, 1 a fault.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/sft.sh

sft_export() {
    run python tools/convert_hf_checkpoint.py export --load "$out/run" --hf-path "$out/model"
    run python tools/convert_hf_checkpoint.py verify --hf-path "$out/model" --load "$out/run" \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
}

if sft_wants_demo "$@"; then
    sft_demo runs/sft --train-iters 1000 --global-batch-size 4 --micro-batch-size 2 --lr 3e-3
else
    sft_cluster
fi
