"""What starting the preprocessor costs: help and a wrong flag wait for no heavy import."""

from __future__ import annotations

import pytest

from tests.cli.test_start_up import HEAVY, probe

COMMANDS = ["cache", "packed", "samples", "speech-text", "dialog", "sft", "merge"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--help",), 0, "speech-text"),
        *(((command, "--help"), 0, "--output-prefix") for command in COMMANDS),
        (("samples", "--input", __file__, "--output-prefix", "y", "--shard", "3"), 2, "it takes i/n"),
        (("samples", "--input", "x", "--output-prefix", "y", "--epochs", "3"), 2, "--epochs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_imports_nothing_heavy(arguments: tuple[str, ...], code: int, says: str) -> None:
    found = probe("preprocess", *arguments)
    assert found["code"] == code
    assert says in found["output"]
    assert set(found["modules"]).isdisjoint({*HEAVY, "ray", "tokenizers", "pyarrow", "praatio"})
