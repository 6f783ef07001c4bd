"""A failure on one rank is everyone's: run something, agree on how it went, raise everywhere or nowhere.

Works with one process and without `torch.distributed` too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from usdm_megatron.errors import EXIT_USER_ERROR, CheckpointError, CheckpointFault, UserError

T = TypeVar("T")
_log = logging.getLogger(__name__)


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and their number; (0, 1) when `torch.distributed` is not set up."""
    dist = _distributed()
    return (dist.get_rank(), dist.get_world_size()) if dist else (0, 1)


def on_every_rank(what: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return what each one returned, by rank.

    `what` says what was being done, for the message. When it fails on any rank,
    `CheckpointError` is raised on all of them and names those ranks.
    """
    _, world_size = rank_and_world_size()
    own, cause = _attempt(what, action)
    outcomes: list[Any] = [own]
    if world_size > 1:
        outcomes = [None] * world_size
        _distributed().all_gather_object(outcomes, own)
    _raise_together(outcomes, cause)
    return [outcome.result for outcome in outcomes]


def on_rank_zero(what: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank; its failure is raised on all."""
    rank, world_size = rank_and_world_size()
    outcomes: list[Any] = [None]
    cause: Exception | None = None
    if rank == 0:
        outcomes[0], cause = _attempt(what, action)
    if world_size > 1:
        _distributed().broadcast_object_list(outcomes, src=0)
    _raise_together(outcomes, cause)
    return outcomes[0].result


@dataclass(frozen=True)
class _Outcome:
    """What one rank brought back: a result, or problems (the user's, or of the machine or ours)."""

    result: Any = None
    problems: tuple[str, ...] = ()
    is_users: bool = False


def _attempt(what: str, action: Callable[[], T]) -> tuple[_Outcome, Exception | None]:
    try:
        return _Outcome(action()), None
    except UserError as error:
        return _Outcome(problems=error.problems, is_users=error.exit_code == EXIT_USER_ERROR), error
    except OSError as error:
        return _Outcome(problems=(f"{what}: {error}",)), error
    except Exception as error:  # a bug of ours, or of a library: the others must hear of it all the same
        _log.error("%s failed", what, exc_info=error)
        return _Outcome(problems=(f"{what}: {type(error).__name__}: {error}",)), error


def _raise_together(outcomes: list[_Outcome], cause: Exception | None) -> None:
    """Raise one error with each different problem once, and the ranks that met it.

    `CheckpointError` when any of it is the user's to mend, `CheckpointFault` when none is.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        for problem in outcome.problems:
            ranks_of.setdefault(problem, []).append(rank)
    if not ranks_of:
        return
    if isinstance(cause, UserError) and len(outcomes) == 1:
        raise cause  # keeps its own type
    everyone = len(outcomes)
    kind = CheckpointError if any(outcome.is_users for outcome in outcomes) else CheckpointFault
    raise kind(
        *(
            problem if len(ranks) == everyone else f"{problem} (on rank {_some(ranks)} of {everyone})"
            for problem, ranks in ranks_of.items()
        )
    ) from cause


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _distributed() -> Any:
    """`torch.distributed` when a process group is open, else None."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None
