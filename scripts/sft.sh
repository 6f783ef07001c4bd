#!/usr/bin/env bash
# Fine-tuning on spoken dialogs: what the two examples share, which differ in what trains.
#
#   source scripts/sft.sh
#   sft_wants_demo "$@"     whether no variable asks for a run of one's own; arguments are refused
#   sft_demo DIR FLAG …     the demo, written to OUT or DIR, with these flags of what trains and how; the example's
#                           function sft_export makes $out/model from $out/run and compares them
#   sft_cluster FLAG …      this node's part of a run with the original's hyperparameters, with these flags of what trains
#
# Read: CHECKPOINT, DATA, VALID_DATA, OUT, TP, PP, RECIPE, EPOCHS, GLOBAL_BATCH_SIZE, EXTRA_ARGS; of the demo OUT and
# PRETRAINED; and what scripts/launch.sh reads.
source scripts/launch.sh

sft_wants_demo() {
    [ "$#" -eq 0 ] || die "no arguments are expected ($*); the run is set by variables, see the head of $0"
    [ -z "${NNODES:-}${CHECKPOINT:-}${DATA:-}" ]
}

# ---------------------------------------------------------------------------------------------------- demo

sft_demo() {
    local started=$SECONDS out pretrained
    [ -z "${PRETRAINED:-}" ] || sft_is_finished_demo "$PRETRAINED" ||
        die "PRETRAINED=$PRETRAINED is no finished demo of examples/pretrain_usdm.sh; run that, or leave PRETRAINED out"
    out="$(launch_new_directory "${OUT:-$1}")"
    shift

    step "1/7 set-up"
    source scripts/setup.sh demo
    printf 'python: %s, output: %s\n' "$PYTHON" "$out"
    export CUDA_VISIBLE_DEVICES="" # the demo is the CPU's, so that it prints the same figures everywhere
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

    step "2/7 the pre-trained model, and dialogs: those of the pre-training demo"
    pretrained="${PRETRAINED:-$(sft_newest_demo)}"
    if [ -z "$pretrained" ]; then
        printf 'there is no finished one in runs/demo*, so it runs first; it is reused from then on\n'
        OUT=runs/demo run bash examples/pretrain_usdm.sh
        pretrained="$(sft_newest_demo)"
        step "2/7 the pre-trained model is there now; on with the dialogs"
    fi
    printf 'from %s\n' "$pretrained"

    step "3/7 fine-tune on 4 ranks, TP2 x PP2; then loss and accuracy on held-out dialogs"
    run usdm-megatron sft --nproc-per-node 4 \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --no-bf16 \
        --train-data-path "$pretrained/dialogs_train" --valid-data-path "$pretrained/dialogs_test" \
        --seq-length 128 --lr-warmup-iters 10 --log-interval 50 --eval-interval 1000 --save-interval 1000 \
        --load "$out/run" --save "$out/run" --pretrained-checkpoint "$pretrained/run" "$@"

    step "4/7 export, and compare with the run"
    sft_export

    step "5/7 a held-out dialog: the user's units in, transcript, reply and the reply's units out"
    run python -m usdm_megatron.demo.held_out --pretrained "$pretrained" --output-dir "$out"
    run usdm-megatron reply --model "$out/model" --units "$out/held_out_units.txt" --max-new-tokens 64

    step "6/7 all held-out dialogs"
    run usdm-megatron reply --model "$out/model" --eval "$pretrained/dialogs_test" --max-new-tokens 64 \
        --batch-size 32 --json "$out/replies.json"

    step "7/7 result"
    run python -m usdm_megatron.demo.sft_report --pretrained "$pretrained" --output-dir "$out"
    printf '\nthe whole demo took %d s\n' "$((SECONDS - started))"
}

sft_is_finished_demo() { # DIR
    [ -e "$1/exported/config.json" ] && [ -e "$1/dialogs_train.idx" ] && grep -qs '"passed": true' "$1/verify.json"
}

sft_newest_demo() { # prints nothing if there is none
    local directory newest=""
    for directory in runs/demo runs/demo-*; do
        if sft_is_finished_demo "$directory" && [ ! "$newest" -nt "$directory/verify.json" ]; then
            newest="$directory/verify.json"
        fi
    done
    printf '%s' "${newest%/verify.json}"
}

# ------------------------------------------------------------------------------------------------- cluster

sft_cluster() {
    local tp="${TP:-2}" pp="${PP:-2}" problems=() problem name
    while IFS= read -r problem; do
        problems+=("$problem")
    done < <(launch_unset CHECKPOINT DATA OUT)
    [ "${#problems[@]}" -eq 0 ] || die "${problems[@]}"
    # A blend is words; a prefix with a space in it is one. Both are left to the trainer to judge.
    local data=("$DATA") starts=("$CHECKPOINT")
    [ -e "$DATA.idx" ] || read -r -a data <<<"$DATA"
    # A restart needs no checkpoint to start from, but an adapter its base.
    [ "${1:-}" = --lora ] || starts+=("$OUT")
    if ! sft_any_has_checkpoint "${starts[@]}"; then
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
    local train=(
        sft --recipe "${RECIPE:-usdm}" "$@"
        --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp"
        --overlap-grad-reduce --overlap-param-gather
        --train-data-path "${data[@]}" ${VALID_DATA:+--valid-data-path "$VALID_DATA"}
        --seq-length 8192 --global-batch-size "${GLOBAL_BATCH_SIZE:-64}" --micro-batch-size 2
        --num-train-epochs "${EPOCHS:-1}" --shuffle
        --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.01
        --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --bf16 --seed 42
        --log-interval 50 --eval-interval 1000 --save-interval 1000 --save-total-limit 2
        --load "$OUT" --save "$OUT" --pretrained-checkpoint "$CHECKPOINT" --tensorboard-dir "$OUT/tensorboard"
    )
    [ "$tp" -eq 1 ] || train+=(--sequence-parallel)
    # shellcheck disable=SC2206  # EXTRA_ARGS is a list of words
    train+=(${EXTRA_ARGS:-})
    launch_training "${train[@]}"
}

sft_any_has_checkpoint() { # DIR …
    local directory
    for directory in "$@"; do
        [ ! -e "$directory/latest_checkpointed_iteration.txt" ] || return 0
    done
    return 1
}
