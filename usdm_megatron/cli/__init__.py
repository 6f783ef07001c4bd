"""Command lines: parse, one call, print. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.errors import EXIT_DONE, EXIT_USER_ERROR

# verb → (module with `main(argv)`, what it does)
COMMANDS = {
    "pretrain": ("usdm_megatron.cli.pretrain", "train on packed speech-text rows"),
    "sft": ("usdm_megatron.cli.sft", "fine-tune on spoken dialogs"),
    "convert": ("usdm_megatron.cli.convert", "import, export, verify: Hugging Face ↔ checkpoint"),
    "preprocess": ("usdm_megatron.cli.preprocess", "cached or packed token data → packed token store"),
    "plan": ("usdm_megatron.cli.plan", "will it fit, how fast will it be: every layout of a cluster, ranked"),
    "reply": ("usdm_megatron.cli.reply", "speech units → transcript → reply, and its error rates"),
    "inspect": (
        "usdm_megatron.cli.inspect",
        "look into a token store, a step, a checkpoint, the environment",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`usdm-megatron VERB …`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE if arguments else EXIT_USER_ERROR
    verb, *rest = arguments
    if verb not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(COMMANDS)} is expected"
        print(f"error: usdm-megatron {verb}: unknown command; {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    command: Callable[[Sequence[str]], int | None] = import_module(COMMANDS[verb][0]).main
    return run_guarded(command, rest)


def console_main() -> None:
    """Entry point of the installed `usdm-megatron` script."""
    sys.exit(main())


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<12}{what}" for verb, (_, what) in COMMANDS.items())
    return (
        f"usage: usdm-megatron VERB [options]\n\n{verbs}\n\nusdm-megatron VERB --help lists a verb's options"
    )
