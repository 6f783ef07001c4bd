"""Which defaults the recipe and the task decide; every field can be set on the command line too.

Source: `docs/from-usdm.md`, naver-ai/usdm `train_pt.py`, `train_sft.py`.
"""

from __future__ import annotations

from typing import Any, Literal

RecipeName = Literal["usdm", "corrected"]
Task = Literal["pretrain", "sft"]
DEFAULT_RECIPE: RecipeName = "corrected"

# The named differences between the original's training and what we recommend.
# (section, field): (original, corrected)
_DIFFERENCES: dict[tuple[str, str], tuple[Any, Any]] = {
    # the step from one sample's eos to the next one's bos is a target
    ("training", "train_sample_boundaries"): (True, False),
    # what the loss of a step is the mean of
    ("training", "loss_reduction"): ("micro-batch-mean", "token-mean"),
    # 0 = no gradient clipping
    ("optimizer", "clip_grad"): (0.0, 1.0),
    # weight decay on RMSNorm weights
    ("optimizer", "decay_norms"): (True, False),
    # of LoRA: whether the rows of the speech ids, random in a freshly extended model, train too
    ("lora", "train_new_embeddings"): (False, True),
}
# Fine-tuning starts from rows that pre-training has learnt, and leaves them, as PEFT does: with them an
# adapter of the 7B model (r 8) is 25 times as large.
_OF_PRETRAINING = {("lora", "train_new_embeddings")}


def recipe_fields(recipe: RecipeName, task: Task = "pretrain") -> dict[str, dict[str, Any]]:
    """Section → field → value of everything that `recipe` decides for `task`."""
    column = 0 if recipe == "usdm" else 1
    fields: dict[str, dict[str, Any]] = {}
    for key, values in _DIFFERENCES.items():
        if task == "pretrain" or key not in _OF_PRETRAINING:
            section, field = key
            fields.setdefault(section, {})[field] = values[column]
    return fields


# Where fine-tuning starts from other values than pre-training: section → field → value. The original's batch
# is 2 rows x 4 accumulated on each process, the 8 rows of `--global-batch-size` on one.
_SFT_FIELDS: dict[str, dict[str, Any]] = {
    "data": {"micro_batch_size": 2, "shuffle": True, "row_padding": "step"},
    "lora": {"alpha": 16.0, "train_new_embeddings": False},
}


def task_fields(task: Task) -> dict[str, dict[str, Any]]:
    """Section → field → value of what `task` starts from instead of the dataclasses' defaults."""
    return _SFT_FIELDS if task == "sft" else {}
