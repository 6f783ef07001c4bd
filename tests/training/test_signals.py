"""A run that is asked to stop, or meets a NaN: every rank does the same thing, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from usdm_megatron.train.preemption import stop_on_signal

STEPS, DISTURBED = 6, 3  # steps of a run; the step (from 1) in which something happens
ROWS = 4 * STEPS
FAULTS = ("weight", "gradient")


def disturbed_job(environment: Any, store: Any, config: Any, rank: int, fault: str | int) -> dict[str, Any]:
    """`jobs.train` in which something happens to one rank inside step `DISTURBED`; counts the updates."""
    import torch

    from usdm_megatron.train.optimizer import AdamW
    from usdm_megatron.train.step import PipelineStep

    train, update = PipelineStep.train, AdamW.update
    calls = updates = 0

    def disturbed(step: Any, batches: Any, optimizer: Any, **arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == DISTURBED and environment.rank == rank:
            if fault == "weight":
                norm = next(parameter for parameter in step._chunks[0].parameters() if parameter.dim() == 1)
                norm.data.fill_(math.nan)
            elif fault == "gradient":
                optimizer.collect_gradients = lambda: torch.tensor(math.inf)
            elif fault == "bug":
                raise RuntimeError("a bug of ours")
            elif isinstance(fault, int):
                os.kill(os.getpid(), fault)
        return train(step, batches, optimizer, **arguments)

    def counted(optimizer: Any, *arguments: Any) -> None:
        nonlocal updates
        updates += 1
        update(optimizer, *arguments)

    PipelineStep.train, AdamW.update = disturbed, counted  # type: ignore[method-assign]
    try:
        return {**jobs.train(environment, store, config), "updates": updates}
    except RuntimeError as error:
        return {"code": None, "error": str(error)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_store(tmp_path_factory.mktemp("signals") / "rows", tiny.random_rows(ROWS, 64, seed=9))


def config(
    layout: Layout, rows: Path, tiny_model: Any, run: Path, save_interval: int = 2, **changes: Any
) -> Any:
    return jobs.run_config(
        layout,
        data={"train_data_path": (str(rows),)},
        checkpoint={
            "load": str(run),
            "save": str(run),
            "pretrained_checkpoint": str(tiny_model.root),
            "save_interval": save_interval,
            **changes,
        },
    )


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == kind
    ]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run, "train")]


def exit_record(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(rows: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run at a layout, made once."""
    made: dict[Layout, Path] = {}

    def run_at(layout: Layout) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("whole") / "run"
            results = run_ranks(layout.ranks, jobs.train, config(layout, rows, tiny_model, made[layout], 100))
            assert [result["code"] for result in results] == [0] * layout.ranks
        return made[layout]

    return run_at


SIGNALS = [(Layout(1, 1, 2), 1, signal.SIGTERM), (Layout(1, 2), 0, signal.SIGUSR1)]


@pytest.mark.parametrize(("layout", "rank", "number"), SIGNALS, ids=str)
def test_a_signal_to_one_rank_stops_all_after_a_save(
    layout: Layout, rank: int, number: int, rows: Path, tiny_model: Any, whole: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = config(layout, rows, tiny_model, run, 100)
    results = run_ranks(2, disturbed_job, started, rank, int(number))
    assert [result["code"] for result in results] == [3, 3]
    stopped = lines(run, "train")[-1]["step"]
    # the step under way is finished; the flag is read when a step begins, so one more may be
    assert stopped in (DISTURBED, DISTURBED + 1)
    assert [result["updates"] for result in results] == [stopped, stopped]
    assert exit_record(run) == {
        "code": 3, "reason": f"preempted after step {stopped}; the checkpoint is saved", "step": stopped,
    }  # fmt: skip
    assert [line["step"] for line in lines(run, "checkpoint")] == [stopped]
    assert (lines(run, "event")[-1]["step"], lines(run, "event")[-1]["what"]) == (stopped, "preempted")
    results = run_ranks(2, jobs.train, started)
    assert [result["code"] for result in results] == [0, 0]
    assert all(min(result["ledger"]) == stopped for result in results)
    assert losses(run) == losses(whole(layout))  # every bit, as if nothing had been
    final = f"iter_{STEPS:07d}"
    ours, expected = (
        {name: digest for name, digest in digests(path / final).items() if name.endswith(".distcp")}
        for path in (run, whole(layout))
    )
    assert ours == expected and expected
    assert exit_record(run) == {"code": 0, "reason": "done", "step": STEPS}


def test_a_signal_in_the_last_step_changes_nothing(rows: Path, tiny_model: Any, tmp_path: Path) -> None:
    """A run that is at its end anyway ends as done."""
    base = config(Layout(), rows, tiny_model, tmp_path / "run", 100)
    import dataclasses

    short = dataclasses.replace(base, training=dataclasses.replace(base.training, train_iters=DISTURBED))
    (result,) = run_ranks(1, disturbed_job, short, 0, int(signal.SIGTERM))
    assert result["code"] == 0 and exit_record(tmp_path / "run")["step"] == DISTURBED


NON_FINITE = [
    (Layout(1, 1, 2), 1, "weight"),
    (Layout(1, 2), 0, "weight"),
    (Layout(1, 1, 2), 1, "gradient"),
    (Layout(2), 1, "gradient"),
]


@pytest.mark.parametrize(("layout", "rank", "fault"), NON_FINITE, ids=str)
def test_non_finite_on_one_rank_stops_all_before_the_update(
    layout: Layout, rank: int, fault: str, rows: Path, tiny_model: Any, whole: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = config(layout, rows, tiny_model, run)
    results = run_ranks(2, disturbed_job, started, rank, fault)
    assert [result["code"] for result in results] == [1, 1]
    assert [result["updates"] for result in results] == [DISTURBED - 1] * 2, (
        "the update was made all the same"
    )
    assert [line["step"] for line in lines(run, "train")] == list(range(1, DISTURBED))
    (event,) = (line for line in lines(run, "event") if line["what"] == "non-finite")
    assert event["step"] == DISTURBED
    # whoever looks for the cause finds the rows of the step, over all ranks
    assert sorted(event["rows"]) == list(range(4 * (DISTURBED - 1), 4 * DISTURBED))
    assert event["loss"] == "nan" if fault == "weight" else math.isfinite(float(event["loss"]))
    assert event["grad_norm"] in ("nan", "inf")
    record = exit_record(run)
    assert record["code"] == 1
    for part in (
        f"step {DISTURBED}: loss",
        "the update was not applied",
        "the last checkpoint stands",
        "rows of this",
    ):
        assert part in record["reason"]
    assert [path.name for path in sorted(run.glob("iter_*"))] == ["iter_0000002"]
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    kept = digests(run / "iter_0000002")
    results = run_ranks(2, jobs.train, started)  # without the fault the run goes on as if it had not been
    assert [result["code"] for result in results] == [0, 0]
    assert digests(run / "iter_0000002") == kept
    assert losses(run) == losses(whole(layout))


def test_a_bug_of_ours_is_a_fault(rows: Path, tiny_model: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (result,) = run_ranks(1, disturbed_job, config(Layout(), rows, tiny_model, run), 0, "bug")
    assert result == {"code": None, "error": "a bug of ours"}  # it propagates with its traceback
    assert exit_record(run) == {"code": 1, "reason": "RuntimeError: a bug of ours", "step": None}


def test_a_refused_start_leaves_another_runs_record_alone(
    rows: Path, tiny_model: Any, whole: Any, tmp_path: Path
) -> None:
    run = whole(Layout(1, 2))
    before = digests(run)
    with pytest.raises(AssertionError, match="holds another run; name a fresh directory"):
        run_ranks(2, jobs.train, config(Layout(1, 2), rows, tiny_model, run, load=None))
    assert digests(run) == before


def test_signals_are_caught_inside_the_block_only() -> None:
    def other(number: int, frame: Any) -> None:
        raise AssertionError("the handler from before must not run inside the block")

    previous = signal.signal(signal.SIGUSR1, other)
    try:
        with stop_on_signal() as stop:
            assert not stop.requested
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested
        assert signal.getsignal(signal.SIGUSR1) is other
        with pytest.raises(ZeroDivisionError), stop_on_signal():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGUSR1) is other
    finally:
        signal.signal(signal.SIGUSR1, previous)
