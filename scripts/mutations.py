"""The faults that `mutate.py` injects, and the tests that must fail for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One edit (`old` occurs exactly once in `file`), and the tests that must fail for it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str  # why nothing else would show it


_LOGITS = "tests/training/test_model_parity.py::test_logits_equal_transformers"
_GRADIENTS = "tests/training/test_model_parity.py::test_gradients_equal_transformers"
_ISOLATION = "tests/training/test_isolation.py::test_changing_a_sample_changes_no_other_logit"
_INVARIANCE = "tests/training/test_invariance.py::test_loss_and_gradients_do_not_depend_on"
_PADDING = "tests/training/test_invariance.py::test_padding_of_the_vocabulary_adds_nothing"
_RESUME = "tests/training/test_resume.py::"
_TABLE = "tests/convert_floor/test_name_table.py::"
_BATCH = "tests/data_floor/test_packed_batch.py::"
_ROWS = "tests/data_floor/test_row_order.py::"
_BRUTE_FORCE = f"{_BATCH}test_equals_the_builder_that_goes_token_by_token"
_SFT = "tests/training/test_sft_oracle.py::test_fine_tuning_equals_plain_pytorch"
_LORA = "tests/training/test_lora.py::"
_LORA_PARITY = "tests/model_floor/test_lora_parity.py::test_equals_peft"
_LORA_LAYOUTS = "tests/model_floor/test_lora_layouts.py::"
_PEFT = "tests/convert_floor/test_peft_round_trip.py::"
_LATE_GATHER = "test_a_checkpoint_holds_the_last_update_when_parameters_are_gathered_late"
_CORRECTED = "tests/training/test_faults_caught.py::test_corrected_training_equals_plain_pytorch"

FAULTS = (
    Fault(
        "window-one-up",
        "usdm_megatron/model/architecture.py",
        "else (window - 1, 0)",
        "else (window, 0)",
        (f"{_LOGITS}[1x1x1]",),
        "one key more per query: the loss hardly moves, and only samples longer than the window differ",
    ),
    Fault(
        "window-one-down",
        "usdm_megatron/model/architecture.py",
        "else (window - 1, 0)",
        "else (window - 2, 0)",
        (f"{_LOGITS}[1x1x1]",),
        "one key less per query, as above",
    ),
    Fault(
        "isolation-off",
        "usdm_megatron/model/attention.py",
        "for length in row.segment_lengths:",
        "for length in (sum(row.segment_lengths),):",
        (f"{_ISOLATION}[1x1x1]", f"{_LOGITS}[1x1x1]"),
        "samples of a row see each other; training even profits a little, generation suffers",
    ),
    Fault(
        "isolation-off-in-the-batch",
        "usdm_megatron/data/batch.py",
        'row.sample_lengths if cross_sample_attention == "masked" else',
        'row.sample_lengths if cross_sample_attention == "never" else',
        (_BRUTE_FORCE, f"{_ISOLATION}[1x1x1]"),
        "the same by cu_seqlens that do not know the samples",
    ),
    Fault(
        "qkv-order",
        "usdm_megatron/convert/name_table.py",
        'for name in "qkv"',
        'for name in "qvk"',
        (f"{_TABLE}test_qkv_rows_by_sentinels", f"{_LOGITS}[1x1x1]"),
        "keys and values have one shape, and the round trip undoes the swap: export is bit-exact",
    ),
    Fault(
        "qkv-not-by-group",
        "usdm_megatron/convert/name_table.py",
        "g = model.kv_heads",
        "g = 1",
        (f"{_TABLE}test_qkv_rows_by_sentinels", f"{_LOGITS}[1x1x1]"),
        "[all q, all k, all v] has the same shape as core's order by query group",
    ),
    Fault(
        "gate-and-up-swapped",
        "usdm_megatron/convert/name_table.py",
        '(f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),',
        '(f"{_HF_LAYER}.mlp.up_proj.weight", f"{_HF_LAYER}.mlp.gate_proj.weight"),',
        (f"{_TABLE}test_gate_comes_before_up", f"{_LOGITS}[1x1x1]"),
        "both have one shape, and the round trip undoes the swap",
    ),
    Fault(
        "pads-in-the-softmax",
        "usdm_megatron/model/loss.py",
        "columns = min(max(vocabulary_size - first_column, 0), width)",
        "columns = width",
        (f"{_PADDING}[1x1x1]", f"{_GRADIENTS}[1x1x1]"),
        "a loss a few hundredths of a nat too high, falling as it should",
    ),
    Fault(
        "norm-gradient-not-summed",
        "usdm_megatron/model/layer_spec.py",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
        (f"{_GRADIENTS}[2x1x1-sp]", f"{_INVARIANCE}[2x1x1-sp-4]"),
        "each tensor parallel rank steps its norms by its own slice of the sequence; the copies drift apart",
    ),
    Fault(
        "shared-adam-step",
        "usdm_megatron/train/optimizer.py",
        "self._states.set_steps(steps)",
        "self._states.set_steps(steps); s = torch.tensor(float(steps)); "
        "[e.update(step=s) for e in states.values()]",
        (f"{_RESUME}test_resume_is_bit_exact[1x1x1-{{}}]",),
        "bias correction is off after a resume only, and fades",
    ),
    Fault(
        "masters-not-reloaded",
        "usdm_megatron/train/adam_states.py",
        "self._sharded.reload_model_params()",
        "pass",
        (f"{_RESUME}test_a_bf16_start_does_not_jump",),
        "fp32 masters are views and cannot show it; in bf16 the first update brings the random start back",
    ),
    Fault(
        "labels-shifted-across-rows",
        "usdm_megatron/data/batch.py",
        "    lengths = np.concatenate(segments)",
        "    for end in range(seq_length - 1, size - 1, seq_length):\n"
        "        labels[end], loss_mask[end] = tokens[end + 1], tokens[end] != vocabulary.pad_id\n"
        "    lengths = np.concatenate(segments)",
        (f"{_BATCH}test_the_last_token_of_a_row_is_not_trained_on_the_next_rows_bos", _BRUTE_FORCE),
        "one wrong target a row, and only with micro-batches of two rows or more that are full",
    ),
    Fault(
        "a-row-skipped",
        "usdm_megatron/data/order.py",
        "start = step_in_epoch * self.global_batch_size",
        "start = step_in_epoch * self.global_batch_size + min(step_in_epoch, 1)",
        (f"{_ROWS}test_the_ledger_over_all_ranks_is_the_store_in_order",),
        "nobody misses one row of a hundred thousand",
    ),
    Fault(
        "unit-rows-permuted-on-export",
        "usdm_megatron/convert/name_table.py",
        "parts = (tensor[: model.vocab_size],)",
        "parts = (torch.cat((tensor[:32_002], tensor[32_002 : model.vocab_size].flip(0))),)",
        (
            "tests/convert_floor/test_new_rows.py::test_the_checkpoint_holds_them_whatever_its_type",
            "tests/convert_floor/test_round_trip.py::test_a_model_that_has_the_tokens_is_taken_as_it_is",
        ),
        "shapes and text are right; only speech in the exported model is noise",
    ),
    Fault(
        "positions-not-reset",
        "usdm_megatron/data/batch.py",
        "position_ids = np.arange(size, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)",
        "position_ids = np.arange(size, dtype=np.int64) % seq_length",
        (_BRUTE_FORCE,),
        "RoPE is relative: in fp32 no logit shows it; in bf16 large angles cost precision late in a row",
    ),
    Fault(
        "mean-of-means",
        "usdm_megatron/train/step.py",
        "share = total / targets",
        "share = total / mask_S.sum().clamp(min=1) / replicas",
        (f"{_INVARIANCE}[1x1x1-2]", f"{_GRADIENTS}[1x1x1]"),
        "the loss is a mean all the same, but depends on micro-batch and DP size",
    ),
    Fault(
        "mean-of-means-by-recipe",
        "usdm_megatron/recipes.py",
        '("micro-batch-mean", "token-mean")',
        '("micro-batch-mean", "micro-batch-mean")',
        (f"{_INVARIANCE}[1x1x1-2]",),
        "the same by the table of recipes",
    ),
    Fault(
        "a-stage-without-its-cu-seqlens",
        "usdm_megatron/train/step.py",
        "packed_seq_params=self._rope.pack(batch, self._dtype)",
        "packed_seq_params=self._rope.pack(batch if self._groups.coordinates.pp != 1 else "
        'type(batch)(**{**vars(batch), "segment_lengths": (batch.tokens.numel(),)}), self._dtype)',
        (f"{_GRADIENTS}[1x3x1]",),
        "isolation holds on the first and the last stage; quality falls (Megatron-LM#4092)",
    ),
    Fault(
        "a-stage-without-its-cu-seqlens-in-verify",
        "usdm_megatron/model/logits.py",
        "packed_seq_params=rope.pack(batch, dtype)",
        "packed_seq_params=rope.pack(batch if chunk.decoder.layers[0].layer_number == 1 else "
        'type(batch)(**{**vars(batch), "segment_lengths": (batch.tokens.numel(),)}), dtype)',
        (f"{_LOGITS}[1x2x1]", f"{_ISOLATION}[1x3x1]"),
        "the same where logits are made for verification",
    ),
    Fault(
        "sharded-weights-not-marked",
        "usdm_megatron/model/build.py",
        "        _mark_sharded_weights(model)\n",
        "",
        (f"{_GRADIENTS}[2x1x1]", f"{_INVARIANCE}[2x1x1-1]"),
        "gradients are right; their norm counts the shards of one rank, so clipping clips less (seen here)",
    ),
    Fault(
        "outputs-freed-while-gloo-sends",
        "usdm_megatron/model/architecture.py",
        "return parallel.num_virtual_stages_per_pipeline_rank == 1 or",
        "return True or",
        ("tests/training/test_faults_caught.py::test_outputs_are_not_freed_while_they_are_sent",),
        "a race: another wrong loss every run, no error (seen here, interleaved pipelines on CPU)",
    ),
    Fault(
        "targets-counted-across-samples",
        "usdm_megatron/data/step_work.py",
        "len(rows) if self._train_sample_boundaries else samples",
        "len(rows)",
        (f"{_CORRECTED}[1x1x1]",),
        "`corrected` divides by targets that carry no loss: loss and gradient a little too small",
    ),
    Fault(
        "clipping-off",
        "usdm_megatron/train/optimizer.py",
        "if limit > 0 and gradient_norm > limit",
        "if limit < 0",
        (f"{_CORRECTED}[1x1x1]",),
        "nothing but a spike needs it, weeks later",
    ),
    Fault(
        "norms-decayed",
        "usdm_megatron/train/optimizer.py",
        '{"wd_mult": 0.0}',
        '{"wd_mult": 1.0}',
        (f"{_CORRECTED}[1x1x1]",),
        "`corrected` promises norms without weight decay; the loss does not show it for long",
    ),
    Fault(
        "saved-before-the-gather",
        "usdm_megatron/train/run_checkpoint.py",
        "        self._optimizer.finish_update()\n",
        "",
        (f"{_CORRECTED.split('::')[0]}::{_LATE_GATHER}",),
        "with --overlap-param-gather a save misses the last update of the other replicas' shards (seen here)",
    ),
    Fault(
        "loss-mask-shifted-by-one",
        "usdm_megatron/data/batch.py",
        "row.loss_mask[1:]",
        "row.loss_mask[:-1]",
        (
            "tests/data_floor/test_masked_batch.py::test_equals_the_builder_that_goes_token_by_token",
            f"{_SFT}[1x1x1]",
            "tests/training/test_sft.py::test_tokens_without_loss_contribute_nothing",
        ),
        "as many targets, nearly all the right ones: a reply learns to begin with its second token",
    ),
    Fault(
        "masked-targets-of-another-store",
        "usdm_megatron/data/step_work.py",
        "self._masked_targets[place.store][place.row]",
        "self._masked_targets[0][place.row]",
        ("tests/training/test_sft_oracle.py::test_blended_stores_are_fine_tuned_on",),
        "a blend's objective is divided by the wrong number: another learning rate every step",
    ),
    Fault(
        "accuracy-by-shard",
        "usdm_megatron/model/loss.py",
        "ids_S = first_column + local_S",
        "ids_S = local_S",
        (
            f"{_SFT}[2x1x1]",
            "tests/model_floor/test_predicted_ids.py::test_equals_argmax[2-19-torch.float32]",
        ),
        "the loss is right, and so is the accuracy of text, on the first shard; units are never predicted",
    ),
    Fault(
        "lora-gradient-of-a-replicated-factor-not-summed",
        "usdm_megatron/model/lora/adapter.py",
        "whole.sequence_parallel = self.lora_sequence_parallel",
        "whole.sequence_parallel = False",
        (f"{_LORA_PARITY}[2x1x1-sp]", f"{_LORA}test_training_equals_peft[2x2x1-sp]"),
        "each tensor parallel rank steps its copy by its own tokens; the copies drift apart, the loss falls",
    ),
    Fault(
        "lora-gradient-not-summed-without-sp",
        "usdm_megatron/model/lora/adapter.py",
        "return copy_to_tensor_model_parallel_region(a, group=group)",
        "return a",
        (f"{_LORA_PARITY}[2x1x1]", f"{_LORA}test_training_equals_peft[2x1x1]"),
        "as above: A learns from the rank's own heads alone",
    ),
    Fault(
        "lora-a-from-the-shards-fan-in",
        "usdm_megatron/model/lora/adapter.py",
        "self.lora.r, self.lora_fan_in, seed)",
        "self.lora.r, self.lora_fan_in, seed) * self.lora_group.size() ** (0.5 * self.lora_row_parallel)",
        (f"{_LORA_LAYOUTS}test_initial_values_at_any_layout", f"{_LORA}test_training_equals_peft[2x1x1]"),
        "A's spread grows with the tensor parallel size, and with it the learning rate it feels",
    ),
    Fault(
        "merged-in-another-qkv-order",
        "usdm_megatron/convert/adapter_weights.py",
        "parts = self._parts_by_weight.get(hf_name)",
        'swapped = hf_name.replace(".k_", ".?_").replace(".v_", ".k_").replace(".?_", ".v_")\n'
        "        parts = self._parts_by_weight.get(swapped)",
        (f"{_PEFT}test_any_layout_of_saving[2x1]",),
        "keys and values have one shape: the merged model loads, talks, and is another one than was trained",
    ),
    Fault(
        "dropout-not-replayed-by-recompute",
        "usdm_megatron/model/lora/adapter.py",
        "F.dropout(x, self.lora.dropout)",
        "F.dropout(x + 0 * torch.seed() if torch.is_grad_enabled() else x, self.lora.dropout)",
        (f"{_LORA_LAYOUTS}test_recompute_replays_dropout[1x1x1]",),
        "gradients belong to another mask than the loss: noise, which training survives",
    ),
    Fault(
        "dropout-not-replayed-by-resume",
        "usdm_megatron/train/run_checkpoint.py",
        "set_random_state(states[self._groups.rank])",
        "pass",
        (f"{_LORA}test_resume_is_bit_exact[1x1x1]",),
        "the resumed run is as good as the other; it is just not the same one",
    ),
    Fault(
        "new-rows-share-a-bucket",
        "usdm_megatron/train/optimizer.py",
        "module.weight.shared_embedding = True",
        "module.weight.shared_embedding = False",
        (f"{_LORA}test_training_equals_peft[2x1x2-sp]",),
        "replicas divide A otherwise on each tensor parallel rank; unlike parts are summed (seen here)",
    ),
    Fault(
        "optimizer-state-shifted-by-padding",
        "usdm_megatron/train/optimizer.py",
        "(start - gaps[index], end - gaps[index], index)",
        "(start, end, index)",
        (f"{_LORA}test_first_b_moves_then_a",),
        "moments of a neighbour after a resume, where buckets are padded: a bump in the loss (seen here)",
    ),
    Fault(
        "tied-new-rows-not-summed",
        "usdm_megatron/train/step.py",
        "        sum_tied_rows(self._bare_chunks, self._groups.collection.embd)\n",
        "",
        (f"{_LORA}test_tied_new_rows_on_two_stages[1x2x1]",),
        "input and output embedding of one model drift apart, each on its own stage",
    ),
    Fault(
        "warm-up-half-as-long",
        "usdm_megatron/plan/schedule.py",
        "return 2 * (pp - stage - 1) + (vpp - 1) * pp",
        "return (pp - stage - 1) + (vpp - 1) * pp",
        ("tests/plan_floor/test_schedule.py::test_order_is_cores[3]",),
        "the planner's memory of interleaved stages a few activations too low: out of memory in step 1",
    ),
    Fault(
        "finished-inputs-not-counted",
        "usdm_megatron/plan/memory.py",
        "                stale.add(call.chunk)\n",
        "                pass\n",
        (
            "tests/plan_floor/test_memory.py::test_mistral_7b_on_512_ranks_is_what_its_real_modules_hold"
            "[2x2x128-sp-vpp8-overlap_grad_reduce]",
        ),
        "the same by 0.2 GiB, which only the real modules know",
    ),
)
