"""`usdm-megatron sft`."""

from __future__ import annotations

from usdm_megatron.cli.training import TrainingCommand

_COMMAND = TrainingCommand(
    "sft", "Fine-tune on spoken dialogs: only the targets of their loss mask carry a loss."
)
main, parse = _COMMAND.main, _COMMAND.parse
