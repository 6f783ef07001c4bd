"""What every command has in common: user errors become one message and exit code 2, Ctrl-C a word and 130."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from usdm_megatron.errors import EXIT_DONE, UserError
from usdm_megatron.log import quiet_upstream

_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_guarded(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run `command(argv)`; print a `UserError` without a traceback (rank 0 only); return the exit code."""
    quiet_upstream()
    try:
        code = command(argv)
    except UserError as error:
        if is_main_rank():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main_rank():
            print("interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # `… | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at exit
        return EXIT_DONE
    return EXIT_DONE if code is None else code


def is_main_rank() -> bool:
    """Whether this process is the one that talks to people (rank 0 of torchrun or Slurm, or the only one)."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
