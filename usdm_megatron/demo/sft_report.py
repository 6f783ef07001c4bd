"""`python -m usdm_megatron.demo.sft_report --pretrained DIR --output-dir OUT`: what fine-tuning has taught.

Reads what the demo left (metrics.jsonl, replies.json), and asks transformers, and peft of an adapter, for the
held-out loss of what was exported. Exit code 1 if the model does not listen well enough, or is not the run's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.held_out import EXPORTED, HELD_OUT, TrainedText, trained_text
from usdm_megatron.demo.report import LossTable, print_losses, read_losses
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.reply.error_rate import ErrorCount, total, word_errors

LARGEST_DIFFERENCE = (
    1e-4  # relative, of the held-out loss: trainer (unmerged, in shards) against transformers
)
PLACES = {  # what → path below the output directory; scripts/sft.sh and the two examples write them
    "run (checkpoints, metrics.jsonl, tensorboard/)": "run",
    "adapter, for peft": "adapter",
    "Hugging Face model": "model",
    "replies to the held-out dialogs": "replies.json",
}


@dataclass(frozen=True)
class Listening:
    """Word errors in what a model understood of held-out dialogs, and how new their sentences were to it."""

    dialogs: int
    said_in_training: int
    errors: ErrorCount
    new_dialogs: int  # of which the sentence does not even occur within a longer one
    new_errors: ErrorCount

    @classmethod
    def of(cls, replies: list[dict[str, Any]], trained: TrainedText) -> Listening:
        """Of `reply --eval`'s records."""
        sentences = [" ".join(reply["reference_transcript"].split()) for reply in replies]
        errors = [
            word_errors(sentence, reply["transcript"])
            for sentence, reply in zip(sentences, replies, strict=True)
        ]
        is_new = [not within for within in trained.has_within(sentences)]
        return cls(
            dialogs=len(replies),
            said_in_training=sum(map(trained.has, sentences)),
            errors=total(errors),
            new_dialogs=sum(is_new),
            new_errors=total(count for count, new in zip(errors, is_new, strict=True) if new),
        )

    def problems(self) -> list[str]:
        found = []
        if not self.dialogs:
            found.append("no dialog was held out, so nothing shows what the model has learnt")
        if self.said_in_training:
            found.append(
                f"{self.said_in_training} held-out sentences were said in training: the word error rate "
                "proves nothing"
            )
        if self.errors.rate > DEMO.most_word_errors:
            found.append(
                f"the word error rate of the transcripts is {self.errors.rate:.1%}, and at most "
                f"{DEMO.most_word_errors:.0%} is expected: the model did not learn to listen"
            )
        return found


@dataclass(frozen=True)
class ExportedLoss:
    """The held-out loss of something exported, computed by `library`, beside the run's own."""

    what: str
    library: str
    loss: float
    of_run: float

    @property
    def difference(self) -> float:
        """Relative."""
        return abs(self.loss - self.of_run) / self.of_run

    def problems(self) -> list[str]:
        if self.difference <= LARGEST_DIFFERENCE:
            return []
        return [
            f"{self.what}: its held-out loss is {self.loss:.6f} in {self.library}, and the run's was "
            f"{self.of_run:.6f}: what was exported is not what was trained"
        ]


def exported_losses(pretrained: Path, output_dir: Path, of_run: float) -> Iterator[ExportedLoss]:
    """Of the model, and of the adapter over its base if there is one and peft is installed."""
    from transformers import AutoModelForCausalLM

    def load(directory: Path) -> Any:  # a directory on this machine
        return AutoModelForCausalLM.from_pretrained(directory).float().eval()  # nosec B615 - nothing is downloaded

    store = TokenStore.open(pretrained / HELD_OUT)
    yield ExportedLoss(
        f"{output_dir / 'model'}", "transformers", masked_loss(load(output_dir / "model"), store), of_run
    )
    adapter = output_dir / "adapter"
    if not adapter.is_dir():
        return
    if importlib.util.find_spec("peft") is None:
        print(f"{adapter}: not compared, peft is not installed (pip install peft)")
        return
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(pretrained / EXPORTED), adapter).eval()
    yield ExportedLoss(f"{adapter}", "peft", masked_loss(adapted, store), of_run)


def masked_loss(model: Any, store: TokenStore) -> float:
    """Mean loss (nats) of a store's targets, a row at a time; rows hold a dialog each."""
    import torch

    loss_sum, targets = 0.0, 0
    for row_id in range(store.rows):
        row = store.row(row_id)
        assert row.loss_mask is not None
        ids = torch.from_numpy(row.tokens.astype(np.int64))
        is_target = torch.from_numpy(row.loss_mask[1:] != 0)
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][is_target]
        loss_sum += torch.nn.functional.cross_entropy(logits, ids[1:][is_target], reduction="sum").item()
        targets += len(logits)
    return loss_sum / targets


def print_report(
    output_dir: Path,
    losses: LossTable,
    listening: Listening,
    replies: dict[str, Any],
    exported: list[ExportedLoss],
) -> None:
    """Print where each thing lies, losses, accuracy, error rates, and held-out losses of the exports."""
    for what, where in PLACES.items():
        if (output_dir / where).exists():
            print(f"{what:<48}{output_dir / where}")
    print_losses(losses)
    shares = [
        f"{name.removeprefix('accuracy').removeprefix('_')} {share:.1%}".strip()
        for name, share in losses.accuracy.items()
        if share is not None
    ]
    print(f"next tokens that are right, held out: {', '.join(shares)}")

    print(f"\nheld-out dialogs                                 {listening.dialogs}")
    print(f"of what their users say, said in training        {listening.said_in_training}")
    print(f"not even within something longer                 {listening.new_dialogs}")
    print(
        f"word error rate of the transcripts               {listening.errors.rate:.1%} "
        f"(of the latter {listening.new_errors.rate:.1%}; at most {DEMO.most_word_errors:.0%} is expected)"
    )
    print(f"word error rate of the replies' text             {replies['text_word_error_rate']:.1%}")
    print(f"unit error rate of the replies                   {replies['unit_error_rate']:.1%}")
    print(f"held-out loss in the run                         {exported[0].of_run:.6f}")
    for one in exported:
        print(f"{'held-out loss in ' + one.library:<49}{one.loss:.6f} ({one.what})")


def main() -> int:
    parser = argparse.ArgumentParser(description="Print what the fine-tuning demo produced and learnt.")
    parser.add_argument("--pretrained", type=Path, required=True, help="the pre-training demo's OUT")
    parser.add_argument("--output-dir", type=Path, required=True, help="the fine-tuning demo's OUT")
    arguments = parser.parse_args()
    pretrained, output_dir = arguments.pretrained, arguments.output_dir

    import transformers

    transformers.utils.logging.disable_progress_bar()
    losses = read_losses(output_dir / "run" / "metrics.jsonl")
    replies = json.loads((output_dir / "replies.json").read_text(encoding="utf-8"))
    listening = Listening.of(replies["replies"], trained_text(pretrained))
    of_run = losses.heldout["loss"]
    assert of_run is not None
    exported = list(exported_losses(pretrained, output_dir, of_run))
    print_report(output_dir, losses, listening, replies, exported)
    problems = [*listening.problems(), *(problem for one in exported for problem in one.problems())]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
