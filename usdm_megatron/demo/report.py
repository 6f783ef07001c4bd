"""`python -m usdm_megatron.demo.report --output-dir DIR`: the table that the demo ends with.

Reads what the run left (metrics.jsonl, verify.json) and asks transformers, not our trainer,
whether the exported model predicts text from speech.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usdm_megatron.demo.build import CORPUS, MODEL
from usdm_megatron.demo.corpus import DIALOGS, UTTERANCES
from usdm_megatron.demo.swap import SwapFigure, swap_figure
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import TargetKind

LEAST_REDUCTION = 0.3  # the text loss behind the right units ends at least this share below the swapped one
PLACES = {  # what → path below the output directory; examples/pretrain_usdm.sh writes them
    "Hugging Face model before": MODEL,
    "speech-text corpus, and dialogs": f"{CORPUS}/{UTTERANCES}, {CORPUS}/{DIALOGS}",
    "converted checkpoint": "checkpoint",
    "token stores": "data_train, data_test",
    "token stores for fine-tuning": "dialogs_train, dialogs_test",
    "run (checkpoints, metrics.jsonl, tensorboard/)": "run",
    "Hugging Face model after": "exported",
}


@dataclass(frozen=True)
class LossTable:
    """Losses by kind (`loss` is the total) at the first and last logged step, and held out at the end.

    `accuracy`, held out, is named likewise, and in [0, 1]: of the likeliest next token.
    """

    first_step: int
    last_step: int
    first: dict[str, float | None]
    last: dict[str, float | None]
    heldout: dict[str, float | None]
    accuracy: dict[str, float | None]


def read_losses(metrics_path: Path) -> LossTable:
    """The first and last `train` lines and the last `eval` line of a run's metrics."""
    if not metrics_path.is_file():
        raise DataError(f"{metrics_path} does not exist; the demo's run has not written it")
    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    if not train or not evaluations:
        raise DataError(f"{metrics_path} holds no train or no eval line; the demo's run did not finish")
    return LossTable(
        first_step=train[0]["step"],
        last_step=train[-1]["step"],
        first=_losses(train[0]),
        last=_losses(train[-1]),
        heldout=_losses(evaluations[-1]),
        accuracy={name: share for name, share in evaluations[-1].items() if name.startswith("accuracy")},
    )


def print_report(output_dir: Path, losses: LossTable, swap: SwapFigure, parity: dict[str, Any]) -> None:
    """Print where each thing lies, the losses, the swap figure and the parity with transformers."""
    for what, where in PLACES.items():
        print(f"{what:<48}" + ", ".join(str(output_dir / name) for name in where.split(", ")))

    print_losses(losses)
    print(f"\nheld-out text behind its own speech units        {swap.own_loss:.3f}")
    print(f"the same text behind another utterance's units   {swap.other_loss:.3f}")
    print(
        f"so the units lower the text loss by {100 * swap.reduction:.0f} % "
        f"(at least {100 * LEAST_REDUCTION:.0f} % is expected)"
    )
    print(
        f"exported model in transformers against the checkpoint: "
        f"max |Δ logit| = {parity['max_abs_difference']:.2e}"
    )


def print_losses(losses: LossTable) -> None:
    """A line for every kind of target that occurs."""
    columns = (losses.first, losses.last, losses.heldout)
    headings = (f"step {losses.first_step}", f"step {losses.last_step}", "held out, at the end")
    print(f"\n{'loss (nats a token)':<20}" + "".join(f"{heading:>22}" for heading in headings))
    for name in losses.first:
        if any(column[name] is not None for column in columns):
            label = "all" if name == "loss" else name.removeprefix("loss_")
            print(f"{label:<20}" + "".join(f"{_format(column[name]):>22}" for column in columns))


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what the demo produced and learnt.")
    parser.add_argument("--output-dir", type=Path, required=True, help="the demo's OUT")
    output_dir: Path = parser.parse_args().output_dir

    import transformers

    transformers.utils.logging.disable_progress_bar()
    losses = read_losses(output_dir / "run" / "metrics.jsonl")
    parity = json.loads((output_dir / "verify.json").read_text(encoding="utf-8"))
    swap = swap_figure(output_dir / "exported", output_dir / "data_test")
    print_report(output_dir, losses, swap, parity)
    if swap.reduction < LEAST_REDUCTION:
        print("the model did not learn to read the units: something is wrong with this build")
        return 1
    return 0


def _losses(line: dict[str, Any]) -> dict[str, float | None]:
    names = ["loss", *(f"loss_{kind.label}" for kind in TargetKind)]
    return {name: line[name] for name in names}


def _format(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
