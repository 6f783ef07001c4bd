"""What starting costs: help, a wrong flag and `--print-config` wait for no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("torch", "megatron", "transformers", "datasets", "tensorboard", "sentencepiece")
_PROBE = """
import contextlib, io, json, sys, time
started_at = time.perf_counter()
from usdm_megatron.cli import main
with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
    try:
        code = main(sys.argv[1:])
    except SystemExit as stop:
        code = stop.code
print(json.dumps({
    "code": code, "output": output.getvalue(),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "elapsed_s": time.perf_counter() - started_at,
}))
"""


def probe(*arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(result.stdout)


CASES = [
    (("--help",), 0, "usage: usdm-megatron VERB"),
    (("pretrain", "--help"), 0, "--train-data-path"),
    (("pretrain", "--print-config"), 0, "recipe: corrected"),
    (("pretrain", "--lr", "-1"), 2, "error: optimizer: lr is -1.0"),
    (("pretrain", "--no-such-flag"), 2, "--no-such-flag"),
    (("nothing",), 2, "unknown command"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_imports_nothing_heavy(arguments: tuple[str, ...], code: int, says: str) -> None:
    found = probe(*arguments)
    assert found["code"] == code
    assert says in found["output"]
    assert set(found["modules"]).isdisjoint(HEAVY)


def test_help_is_immediate() -> None:
    """Under 1 s with the interpreter; the import set keeps it so, a generous bound here sees the rest."""
    found = probe("--help")
    assert set(found["modules"]).isdisjoint({"tyro", "yaml", "numpy", "rich"})
    assert found["elapsed_s"] < 0.5
    for verb in ("pretrain", "convert", "preprocess", "inspect"):
        assert verb in found["output"]


def test_importing_does_nothing() -> None:
    """No module of the pure floor configures logging, patches, or touches the environment."""
    script = (
        "import numpy, tyro, yaml\n"  # numpy filters its own warnings
        "import logging, os, warnings; env, filters = dict(os.environ), list(warnings.filters)\n"
        "import usdm_megatron.cli.pretrain, usdm_megatron.layout, usdm_megatron.vocab\n"
        "assert dict(os.environ) == env and list(warnings.filters) == filters and not logging.root.handlers\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
