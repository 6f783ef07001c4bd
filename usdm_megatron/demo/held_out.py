"""`python -m usdm_megatron.demo.held_out --pretrained DIR --output-dir OUT`: a dialog to be answered.

Also tells whether a model has met a sentence in training: what the fine-tuning demo is judged by must be new
combinations of words that it knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.reply.greedy import GreedyDecoder, load_model
from usdm_megatron.reply.inference import Replier
from usdm_megatron.reply.model_directory import ModelDirectory, open_model_directory
from usdm_megatron.reply.references import reference_exchanges
from usdm_megatron.vocab import TargetKind

EXPORTED = "exported"  # these are below the pre-training demo's OUT
TRAINED_ON = ("data_train", "dialogs_train")
HELD_OUT = "dialogs_test"
UNITS = "held_out_units.txt"  # below the fine-tuning demo's OUT


@dataclass(frozen=True)
class TrainedText:
    """Every line of text of the stores that a model was trained on, as words separated by single spaces."""

    lines: frozenset[str]

    @classmethod
    def read(cls, stores: Iterable[TokenStore], directory: ModelDirectory) -> TrainedText:
        """Decoded by the tokenizer of `directory`; what stands between units or control tokens is text."""
        lines = (line for store in stores for text in _texts(store, directory) for line in text.splitlines())
        return cls(frozenset(" ".join(line.split()) for line in lines))

    def has(self, sentence: str) -> bool:
        """Whether it was said, as a whole."""
        return sentence in self.lines

    def has_within(self, sentences: Iterable[str]) -> list[bool]:
        """Of each, whether it was said, alone or in the middle of a longer one."""
        joined = "\n".join(f" {line} " for line in sorted(self.lines))
        return [f" {sentence} " in joined for sentence in sentences]


def trained_text(pretrained: Path) -> TrainedText:
    """What the fine-tuned model has read: utterances of pre-training, dialogs of fine-tuning."""
    directory = open_model_directory(pretrained / EXPORTED)
    return TrainedText.read((TokenStore.open(pretrained / name) for name in TRAINED_ON), directory)


def write_held_out_units(pretrained: Path, output_dir: Path) -> None:
    """Write the units of the first held-out dialog's user; print what they say, and the right reply."""
    directory = open_model_directory(pretrained / EXPORTED)
    replier = Replier(directory, GreedyDecoder(lambda: load_model(directory), directory.context_tokens))
    exchange = next(reference_exchanges(TokenStore.open(pretrained / HELD_OUT), replier))
    units = " ".join(map(str, replier.units_of(exchange.heard).tolist()))
    path = output_dir / UNITS
    path.write_text(units + "\n", encoding="utf-8")
    print(f"{path}: {units}")
    print(f"they say     {exchange.transcript}")
    print(f"right reply  {exchange.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the units of a held-out dialog.")
    parser.add_argument("--pretrained", type=Path, required=True, help="the pre-training demo's OUT")
    parser.add_argument("--output-dir", type=Path, required=True, help="the fine-tuning demo's OUT")
    arguments = parser.parse_args()
    write_held_out_units(arguments.pretrained, arguments.output_dir)


def _texts(store: TokenStore, directory: ModelDirectory) -> Iterator[str]:
    """Runs of text tokens."""
    is_text = store.summary.vocabulary.kind_of_id() == TargetKind.TEXT
    for row_id in range(store.rows):
        tokens = store.row(row_id).tokens
        for of_text, run in groupby(
            zip(is_text[tokens].tolist(), tokens.tolist(), strict=True), lambda pair: pair[0]
        ):
            if of_text:
                yield directory.decode([token for _, token in run])


if __name__ == "__main__":
    main()
