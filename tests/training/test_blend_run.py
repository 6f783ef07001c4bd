"""A run over a blend: its rows, its resume, what it says about itself, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from tests.training.test_oracle import train_lines
from usdm_megatron.cli import main
from usdm_megatron.config import DataConfig
from usdm_megatron.data.blend import open_rows

EPOCH = 15  # rows of 0.7 A 0.3 B, which reads ABAABAAABA ABAAB: all ten of A and five of B


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("blend")
    for name, rows, seed in (("A", 10, 1), ("B", 9, 2), ("V", 3, 3)):
        tiny.write_store(directory / name, tiny.random_rows(rows, 64, seed=seed))
    return directory


def words(stores: Path, first: str = "0.7", second: str = "0.3") -> tuple[str, ...]:
    return (first, str(stores / "A"), second, str(stores / "B"))


def config(stores: Path, tiny_model: Any, run: Path, **data: Any) -> Any:
    return jobs.run_config(
        Layout(),
        recipe="usdm",  # mean of micro-batch means: each is weighed by its own targets
        data={
            "train_data_path": words(stores),
            "valid_data_path": str(stores / "V"),
            "micro_batch_size": 2,
            **data,
        },
        training={"num_train_epochs": 2, "eval_interval": 100},
        checkpoint={
            "load": str(run),
            "save": str(run),
            "pretrained_checkpoint": str(tiny_model.root),
            "save_interval": 2,
        },
    )


@pytest.fixture(scope="module")
def whole(stores: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two epochs without interruption, and the rows that it read by step."""
    run = tmp_path_factory.mktemp("whole") / "run"
    (result,) = run_ranks(1, jobs.train, config(stores, tiny_model, run))
    assert result["code"] == 0
    return run, result["ledger"]


def killed_after(step: int, run: Path, copy: Path) -> Path:
    """What a kill right after the checkpoint of `step` leaves behind."""
    shutil.copytree(run, copy)
    for directory in copy.glob("iter_*"):
        if int(directory.name[5:]) > step:
            shutil.rmtree(directory)
    (copy / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    return copy


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in train_lines(run)]


def test_every_epoch_reads_the_blend_in_order(whole: tuple[Path, Any]) -> None:
    _, ledger = whole
    read = [row for step in sorted(ledger) for row in ledger[step] if row >= 0]
    assert read == [*range(EPOCH), *range(EPOCH)]


def test_the_objective_is_that_of_the_same_rows_in_one_store(
    whole: tuple[Path, Any], stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """A store that holds the blend's rows one after another trains to the same bits."""
    data = DataConfig(train_data_path=words(stores)).train_stores
    blend = open_rows([part.prefix for part in data], [part.weight for part in data])
    rows = []
    for row in map(blend.row, range(EPOCH)):
        ends = row.sample_lengths.cumsum()
        rows.append(
            [
                row.tokens[end - length : end].tolist()
                for end, length in zip(ends, row.sample_lengths, strict=True)
            ]
        )
    joined = tiny.write_store(tmp_path / "joined", rows)
    run = tmp_path / "run"
    (result,) = run_ranks(1, jobs.train, config(stores, tiny_model, run, train_data_path=(str(joined),)))
    assert result["code"] == 0
    assert losses(run) == losses(whole[0])


@pytest.mark.parametrize("step", [2, 4], ids=["inside the first epoch", "at its end"])
def test_a_resumed_run_is_the_uninterrupted_one(
    step: int, whole: tuple[Path, Any], stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    run, ledger = whole
    resumed = killed_after(step, run, tmp_path / "resumed")
    (result,) = run_ranks(1, jobs.train, config(stores, tiny_model, resumed))
    assert result["ledger"] == {number: rows for number, rows in ledger.items() if number >= step}
    assert losses(resumed) == losses(run)


def call(run: Path, *data: str) -> int:
    return main(
        [
            "pretrain", "--config", str(run / "run_config.yaml"), "--dry-run",
            "--train-data-path", *data,
        ]
    )  # fmt: skip


def test_the_same_blend_in_other_words_resumes(
    whole: tuple[Path, Any], stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole[0]
    assert call(run, *words(stores, "70", "3e1")) == 0
    report = capsys.readouterr().out
    assert f"train data  7 {stores / 'A'} 3 {stores / 'B'} ({EPOCH} rows)" in report
    assert f"70.00% {stores / 'A'}: 10 of its 10 rows an epoch" in report
    assert f"30.00% {stores / 'B'}: 5 of its 9 rows an epoch" in report


def test_other_data_does_not_resume(
    whole: tuple[Path, Any], stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(stores / "A"), str(stores / "B")
    for data, kind in (
        (words(stores, "0.6", "0.4"), "blend"),
        (("0.3", b, "0.7", a), "blend"),
        ((a,), "token store"),
    ):
        assert call(whole[0], *data) == 2
        assert f"was trained on another {kind} than " in capsys.readouterr().err


def test_inspect_step_names_store_and_row(
    whole: tuple[Path, Any], stores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(whole[0] / "run_config.yaml")]
    assert main(["inspect", "step", "3", *flags]) == 0
    first, second, rows = capsys.readouterr().out.splitlines()
    assert first == f"store 1: 70.00% {stores / 'A'}: 10 of its 10 rows an epoch"
    assert second == f"store 2: 30.00% {stores / 'B'}: 5 of its 9 rows an epoch"
    assert rows == "dp rank 0: 8=2:2 9=1:6 10=1:7 11=2:3"
    assert main(["inspect", "step", "5", *flags]) == 0  # the second epoch begins every store anew
    assert capsys.readouterr().out.splitlines()[-1] == "dp rank 0: 0=1:0 1=2:0 2=1:1 3=1:2"


def refused(stores: Path, tiny_model: Any, tmp_path: Path, capsys: Any, data: Any, *flags: str) -> str:
    arguments = [
        "pretrain", "--train-data-path", *data, "--pretrained-checkpoint", str(tiny_model.root),
        "--save", str(tmp_path / "run"), "--seq-length", "64", "--global-batch-size", "4", "--dry-run",
        *flags,
    ]  # fmt: skip
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_more_steps_than_an_epoch_needs_epochs(
    stores: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(stores, tiny_model, tmp_path, capsys, words(stores), "--train-iters", "5")
    assert f"needs more rows than the {EPOCH} of {' '.join(words(stores))}; use --num-train-epochs" in message


def test_every_store_of_a_blend_is_checked(
    stores: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(stores, tiny_model, tmp_path, capsys, words(stores), "--seq-length", "16")
    for name in ("A", "B"):
        assert f"{stores / name}: its longest row holds" in message
    data = ("1", str(stores / "A"), "1", str(stores / "nowhere"), "1", str(stores / "missing"))
    message = refused(stores, tiny_model, tmp_path, capsys, data)
    assert message.count("no token store") == 2


def test_the_resolved_configuration_keeps_the_words(whole: tuple[Path, Any], stores: Path) -> None:
    from usdm_megatron.config_file import load_config

    assert load_config(whole[0] / "run_config.yaml").data.train_data_path == words(stores)
    state = json.loads((whole[0] / f"iter_{2 * -(-EPOCH // 4):07d}" / "train_state.json").read_text())
    assert state["consumed_rows"] == 2 * EPOCH
