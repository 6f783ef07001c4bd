"""What LoRA trains, in PEFT's words (pure: no torch)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from usdm_megatron.errors import ConfigError

# The projections that can be adapted, as PEFT's `target_modules` names them.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = frozenset({"q_proj", "v_proj"})  # PEFT's own for Mistral


@dataclass(frozen=True)
class LoraSpec:
    """Rank and scale of the adapters, their dropout, the projections that have one.

    `train_new_embeddings`: the embedding and output rows of the ids that speech added train too.
    Raises `ConfigError` with every problem.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: frozenset[str] = DEFAULT_TARGETS
    train_new_embeddings: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            problems.append(f"lora: r is {self.r!r}; it must be a whole number, 1 or more")
        if not 0 < self.alpha < float("inf"):
            problems.append(f"lora: alpha is {self.alpha!r}; it must be a positive number")
        if not 0 <= self.dropout < 1:
            problems.append(f"lora: dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if not self.targets:
            problems.append(f"lora: no target modules; name some of {', '.join(TARGETS)}")
        problems += [_unknown(name) for name in sorted(set(self.targets) - set(TARGETS))]
        if problems:
            raise ConfigError(*problems)

    @property
    def scale(self) -> float:
        """What `B·A` is multiplied by."""
        return self.alpha / self.r


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, TARGETS, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(TARGETS)}"
    return f"lora: target module {name!r} is unknown; {remedy}"
