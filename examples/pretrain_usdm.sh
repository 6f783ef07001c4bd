#!/usr/bin/env bash
# Speech-text pre-training: a Hugging Face Mistral in, a Hugging Face Mistral that knows speech units out.
#
#   bash examples/pretrain_usdm.sh
#       The demo, on the CPU: sets up what is missing, builds a small model and corpus, converts,
#       preprocesses, trains on 4 ranks (TP2 x PP2), resumes once, evaluates, exports, verifies.
#       OUT (default runs/demo) is never overwritten: a second call writes runs/demo-2.
#
#   NNODES=64 GPUS_PER_NODE=8 NODE_RANK=… MASTER_ADDR=… MASTER_PORT=… \
#   CHECKPOINT=… DATA=… VALID_DATA=… OUT=… bash examples/pretrain_usdm.sh
#       The cluster run with the original's hyperparameters; the same command on every node, and again
#       to resume. All paths are on a shared file system.
#         CHECKPOINT  made by tools/convert_hf_checkpoint.py import
#         DATA        prefix of a token store, made by tools/preprocess_data.py cache, or a blend: "0.7 A 0.3 B"
#         VALID_DATA  the same for evaluation (optional)
#         OUT         the run: checkpoints, metrics.jsonl, tensorboard/, exit.json
#         TP=2 PP=2   tensor and pipeline parallel sizes        RECIPE=usdm  or corrected
#         VPP=8       chunks a pipeline rank holds, each of as many layers; 1: none
#         EXTRA_ARGS  further flags, e.g. "--recompute-granularity selective --recompute-modules mlp"
#       NNODES=1 is one machine with GPUs. With more it installs nothing: the environment must be ready
#       on every node. The exit code is the run's own (0 done, 2 wrong input, 3 preempted after saving,
#       1 a fault), which torchrun alone would turn into 1.
#
#   Slurm: one task a node, and #SBATCH --signal=TERM@120 to save before the time limit:
#       srun --ntasks-per-node=1 env NNODES=$SLURM_NNODES GPUS_PER_NODE=8 MASTER_ADDR=… CHECKPOINT=… DATA=… OUT=… \
#           bash examples/pretrain_usdm.sh
#   (NODE_RANK is SLURM_NODEID there.) Or one task a GPU and no torchrun, which would end a run 30 s after
#   SIGTERM: `srun --ntasks-per-node=8 usdm-megatron pretrain …` takes its ranks from Slurm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch.sh

started=$SECONDS

# ---------------------------------------------------------------------------------------------------- demo

demo() {
    local out
    out="$(launch_new_directory "${OUT:-runs/demo}")"

    step "1/7 set-up"
    source scripts/setup.sh demo
    printf 'python: %s, output: %s\n' "$PYTHON" "$out"
    export CUDA_VISIBLE_DEVICES="" # the demo is the CPU's, so that it prints the same figures everywhere
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

    step "2/7 build a small Mistral (random weights) and a corpus: utterances with word times, dialogs"
    run python -m usdm_megatron.demo.build --output-dir "$out"

    step "3/7 convert: Hugging Face → checkpoint, with the 10,003 speech tokens"
    run python tools/convert_hf_checkpoint.py import --hf-path "$out/model" --save "$out/checkpoint" \
        --extend-vocab usdm

    step "4/7 preprocess: utterances → packed token stores; dialogs → stores for fine-tuning"
    # shellcheck disable=SC2054  # the comma is the value's
    local preprocess=(--tokenizer "$out/model" --seq-length 128 --split 0.95,0.05)
    run python tools/preprocess_data.py speech-text --manifest "$out/corpus/speech.jsonl" --epochs 2 \
        "${preprocess[@]}" --output-prefix "$out/data"
    run python tools/preprocess_data.py dialog --input "$out/corpus/dialogs.jsonl" \
        "${preprocess[@]}" --output-prefix "$out/dialogs"

    # --load is empty at first, so the run starts from the converted weights; afterwards it resumes.
    local train=(
        usdm-megatron pretrain --nproc-per-node 4
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --no-bf16
        --train-data-path "$out/data_train" --valid-data-path "$out/data_test"
        --seq-length 128 --global-batch-size 4 --micro-batch-size 1
        --lr 4e-3 --lr-warmup-iters 10 --lr-decay-iters 330
        --log-interval 15 --eval-interval 165 --save-interval 165 --save-total-limit 2
        --load "$out/run" --save "$out/run" --pretrained-checkpoint "$out/checkpoint"
    )
    step "5/7 pretrain on 4 ranks, TP2 x PP2: the first half, then resume from its checkpoint"
    run "${train[@]}" --train-iters 165
    run "${train[@]}" --train-iters 330

    step "6/7 export: checkpoint → Hugging Face, and compare the logits of both"
    run python tools/convert_hf_checkpoint.py export --load "$out/run" --hf-path "$out/exported"
    run python tools/convert_hf_checkpoint.py verify --hf-path "$out/exported" --load "$out/run" \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --json "$out/verify.json"

    step "7/7 result"
    run python -m usdm_megatron.demo.report --output-dir "$out"
    printf '\nthe whole demo took %d s\n' "$((SECONDS - started))"
}

# ------------------------------------------------------------------------------------------------- cluster

cluster() {
    local tp="${TP:-2}" pp="${PP:-2}" vpp="${VPP:-8}" problems=() problem name
    while IFS= read -r problem; do
        problems+=("$problem")
    done < <(launch_unset CHECKPOINT DATA OUT)
    [ "${#problems[@]}" -eq 0 ] || die "${problems[@]}"
    # A blend is words; a prefix with a space in it is one. Both are left to the trainer to judge.
    local data=("$DATA")
    [ -e "$DATA.idx" ] || read -r -a data <<<"$DATA"
    # A restart needs no converted checkpoint.
    if [ ! -e "$CHECKPOINT/latest_checkpointed_iteration.txt" ] &&
        [ ! -e "$OUT/latest_checkpointed_iteration.txt" ]; then
        problems+=("there is no checkpoint at CHECKPOINT=$CHECKPOINT; make it, once, with
    python tools/convert_hf_checkpoint.py import --hf-path mistralai/Mistral-7B-v0.1 --save $CHECKPOINT --extend-vocab usdm --dtype bf16")
    fi
    for name in DATA VALID_DATA; do
        case "${!name:-}" in
            "" | *" "*) ;;
            *) [ -e "${!name}.idx" ] || problems+=("there is no token store at $name=${!name}; make it, once, with
    python tools/preprocess_data.py cache --input YOUR_DATA_PATH_CACHE --output-prefix PREFIX
  which writes PREFIX_train (DATA) and PREFIX_test (VALID_DATA)") ;;
        esac
    done
    [ "${#problems[@]}" -eq 0 ] || die "${problems[@]}"

    if [ "${NNODES:-1}" -eq 1 ]; then
        source scripts/setup.sh demo
    fi
    local train=(
        pretrain --recipe "${RECIPE:-usdm}"
        --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp"
        --overlap-grad-reduce --overlap-param-gather
        --train-data-path "${data[@]}" ${VALID_DATA:+--valid-data-path "$VALID_DATA"}
        --seq-length 8192 --global-batch-size 1024 --micro-batch-size 1 --num-train-epochs 1
        --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.01
        --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --bf16 --seed 42
        --log-interval 50 --eval-interval 1000 --save-interval 1000 --save-total-limit 2
        --load "$OUT" --save "$OUT" --pretrained-checkpoint "$CHECKPOINT" --tensorboard-dir "$OUT/tensorboard"
    )
    [ "$tp" -eq 1 ] || train+=(--sequence-parallel)
    if [ "$pp" -gt 1 ]; then # docs/scaling.md
        [ "$vpp" -eq 1 ] || train+=(--num-virtual-stages-per-pipeline-rank "$vpp")
        [ $((tp * pp)) -gt "${GPUS_PER_NODE:-8}" ] || train+=(--use-tp-pp-dp-mapping)
    fi
    # shellcheck disable=SC2206  # EXTRA_ARGS is a list of words
    train+=(${EXTRA_ARGS:-})
    launch_training "${train[@]}"
}

if [ -z "${NNODES:-}${CHECKPOINT:-}${DATA:-}" ]; then
    [ "$#" -eq 0 ] || die "no arguments are expected ($*); the cluster run is set by variables, see the head of $0"
    demo
else
    cluster
fi
