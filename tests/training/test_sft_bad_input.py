"""Wrong input of `usdm-megatron sft`: one clear message, exit code 2, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.dialogs import Dialog, random_dialogs, write_rows
from tests.training.jobs import Layout
from usdm_megatron.cli import main
from usdm_megatron.vocab import Vocabulary

DIALOGS = random_dialogs(8, longest=30)
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stores")
    write_rows(directory / "dialogs", [[dialog] for dialog in DIALOGS])
    write_rows(directory / "packed", [DIALOGS[:4], DIALOGS[4:]])
    write_rows(
        directory / "untrained", [[Dialog(dialog.ids, (-100,) * len(dialog.ids))] for dialog in DIALOGS]
    )
    same_size = Vocabulary(text_size=200, unit_count=200)
    write_rows(directory / "other_ids", [[dialog] for dialog in DIALOGS], same_size)
    tiny.write_store(directory / "no_mask", tiny.random_rows(4, 64))
    return directory


@pytest.fixture
def refused(stores: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Call with a task, the training data and further flags: the message of the refusal."""

    def call(task: str, data: str, *flags: str) -> str:
        words = [
            task, "--train-data-path", str(stores / data), "--save", str(tmp_path / "run"),
            "--seq-length", "128", "--pretrained-checkpoint", str(tiny_model.root), "--dry-run", *flags,
        ]  # fmt: skip
        assert main(words) == 2
        return capsys.readouterr().err

    return call


def test_what_is_right_is_not_refused(
    stores: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, recipe in (("dialogs", "usdm"), ("dialogs", "corrected"), ("packed", "corrected")):
        flags = ["--train-data-path", str(stores / data), "--valid-data-path", str(stores / "dialogs")]
        flags += ["--recipe", recipe, "--save", str(tmp_path / "run"), "--seq-length", "128", "--dry-run"]
        assert main(["sft", *flags, "--pretrained-checkpoint", str(tiny_model.root)]) == 0
        assert "everything is in order" in capsys.readouterr().out


def test_a_store_without_a_mask(refused: Refused, stores: Path) -> None:
    message = refused("sft", "no_mask", "--valid-data-path", str(stores / "no_mask"))
    assert message.count("has no loss mask") == 2  # for training, and for evaluation
    assert "python tools/preprocess_data.py dialog (or sft)" in message


def test_a_store_with_a_mask_is_not_for_pretraining(refused: Refused) -> None:
    message = refused("pretrain", "dialogs")
    assert "comes with a loss mask" in message and "usdm-megatron sft" in message


def test_an_epoch_without_targets(refused: Refused) -> None:
    assert "not one of its" in refused("sft", "untrained")


def test_another_vocabulary(refused: Refused) -> None:
    assert "preprocess for this model" in refused("sft", "other_ids")


def test_packed_rows_are_not_the_originals(refused: Refused) -> None:
    message = refused("sft", "packed", "--recipe", "usdm")
    assert "packs 8 dialogs into 2 rows" in message and "--packing none" in message


def test_all_problems_come_at_once(refused: Refused, stores: Path) -> None:
    message = refused("sft", "packed", "--recipe", "usdm", "--valid-data-path", str(stores / "no_mask"))
    assert len(message.splitlines()) == 2


def test_a_run_of_the_other_task_gives_weights_only(
    refused: Refused, stores: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = tmp_path / "pretrained"
    config = jobs.run_config(
        Layout(),
        data={"train_data_path": (str(stores / "no_mask"),)},
        checkpoint={"save": str(pretrained), "pretrained_checkpoint": str(tiny_model.root)},
    )
    assert run_ranks(1, jobs.train, config)[0]["code"] == 0
    message = refused("sft", "dialogs", "--load", str(pretrained))
    assert "is a pretrain run and this is sft; start from its weights with --pretrained-checkpoint" in message
    flags = ["--train-data-path", str(stores / "dialogs"), "--seq-length", "128", "--dry-run"]
    assert (
        main(["sft", *flags, "--save", str(tmp_path / "sft"), "--pretrained-checkpoint", str(pretrained)])
        == 0
    )
    assert f"{pretrained / 'iter_0000001'} at step 0" in capsys.readouterr().out
