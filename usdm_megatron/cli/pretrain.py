"""`usdm-megatron pretrain`."""

from __future__ import annotations

from usdm_megatron.cli.training import TrainingCommand

_COMMAND = TrainingCommand("pretrain", "Train on packed speech-text rows.")
main, parse = _COMMAND.main, _COMMAND.parse
