"""The demos from their first line to their last: they reach the figures that they check themselves."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from usdm_megatron.demo.settings import DEMO

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(5400)]


def run(script: str, **variables: Path) -> str:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    result = subprocess.run(["bash", f"examples/{script}"], cwd=ROOT, env=environment, capture_output=True)
    output = (result.stdout + result.stderr).decode()
    assert result.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demos") / "demo"
    assert "so the units lower the text loss by" in run("pretrain_usdm.sh", OUT=out)
    return out


@pytest.mark.parametrize(
    ("script", "exports"), [("sft_usdm.sh", ["model"]), ("sft_lora_usdm.sh", ["model", "adapter"])]
)
def test_held_out_dialogs_are_understood(
    script: str, exports: list[str], pretrained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    output = run(script, OUT=out, PRETRAINED=pretrained)
    assert "said in training        0\n" in output
    record = json.loads((out / "replies.json").read_text())
    assert record["transcript_word_error_rate"] <= DEMO.most_word_errors
    assert all(f"({out / name})" in output for name in exports)
