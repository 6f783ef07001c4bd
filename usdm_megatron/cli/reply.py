"""`usdm-megatron reply`: does an exported model understand and answer?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from usdm_megatron.errors import ConfigError

if TYPE_CHECKING:
    from usdm_megatron.reply.error_rate import ErrorCount
    from usdm_megatron.reply.evaluate import Evaluation
    from usdm_megatron.reply.inference import Replier, Reply


_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class ReplyFlags:
    """Greedy three-step inference: speech units → transcript → reply text → reply units."""

    model: Path
    """Directory of an exported model (LoRA: with --merge-lora)."""
    units: str | None = None
    """File of the user's units, decimal numbers and white space; - reads standard input."""
    store: Annotated[str | None, tyro.conf.arg(name="eval")] = None
    """Prefix of a dialog store: word error rate of the transcripts, unit error rate of the replies."""
    limit: int | None = None
    """With --eval: only its first dialogs (default: all)."""
    max_new_tokens: int | None = None
    """Most tokens that a step writes (default: until the context is full, as the original)."""
    batch_size: int | None = None
    """With --eval: replies made at a time (default: 8)."""
    json: Path | None = None
    """Also write the outcome there, a file."""

    def __post_init__(self) -> None:
        problems = []
        if (self.units is None) == (self.store is None):
            given = "neither is given" if self.units is None else "both are given"
            problems.append(
                f"reply: --units and --eval: {given}; give one, a file of units or a dialog store"
            )
        if self.limit is not None and self.store is None:
            problems.append("reply: --limit counts the dialogs of --eval; drop it, or give a store")
        if self.batch_size is not None and self.store is None:
            problems.append("reply: --batch-size counts replies of --eval; drop it, or give a store")
        problems += [
            f"reply: --{name} is {value}; it must be at least 1"
            for name, value in (
                ("limit", self.limit),
                ("max-new-tokens", self.max_new_tokens),
                ("batch-size", self.batch_size),
            )
            if value is not None and value < 1
        ]
        if self.json is not None and self.json.is_dir():  # known before the work, not after it
            problems.append(
                f"reply: --json {self.json}: is a directory; name a file, {self.json / 'reply.json'}"
            )
        elif self.json is not None and not self.json.parent.is_dir():
            problems.append(f"reply: --json {self.json}: {self.json.parent} is no directory; make it first")
        if problems:
            raise ConfigError(*problems)


def main(argv: Sequence[str]) -> None:
    """Check the input, load the model, reply or evaluate, print."""
    flags = tyro.cli(ReplyFlags, args=list(argv), prog="usdm-megatron reply")
    if flags.units is not None:
        _reply(flags, flags.units)
    elif flags.store is not None:
        _evaluate(flags, flags.store)


def _reply(flags: ReplyFlags, source: str) -> None:
    from usdm_megatron.reply.unit_file import read_units

    replier = _open_replier(flags)
    units = read_units(source, replier.directory.vocabulary)
    (reply,) = replier.reply([replier.prompts.for_transcript(units)])
    print(_describe_reply(reply))
    _write_json(flags.json, reply.to_json())


def _evaluate(flags: ReplyFlags, prefix: str) -> None:
    from usdm_megatron.data.token_store import TokenStore
    from usdm_megatron.reply.evaluate import evaluate

    store = TokenStore.open(prefix)
    evaluation = evaluate(
        _open_replier(flags),
        store,
        batch_size=flags.batch_size or _BATCH_SIZE,
        limit=flags.limit,
        on_progress=lambda done, of: print(f"{done:,} of {of:,} replies", file=sys.stderr),
    )
    print(_describe_evaluation(prefix, evaluation))
    _write_json(flags.json, evaluation.to_json())


def _open_replier(flags: ReplyFlags) -> Replier:
    """Everything but the weights is read and checked; these are loaded for the first reply."""
    from usdm_megatron.reply.model_directory import open_model_directory

    directory = open_model_directory(flags.model)

    from usdm_megatron.architecture import HFArchitecture
    from usdm_megatron.convert.hf_source import check_tensors, open_source
    from usdm_megatron.convert.name_table import architecture_table
    from usdm_megatron.reply.greedy import GreedyDecoder, load_model
    from usdm_megatron.reply.inference import Replier

    source = open_source(flags.model)
    check_tensors(source, architecture_table(source.config), HFArchitecture.from_hf_config(source.config))

    def load() -> Any:
        _check_hashes(flags.model)
        return load_model(directory)

    decode = GreedyDecoder(load, directory.context_tokens, flags.max_new_tokens)
    return Replier(directory, decode)


def _check_hashes(model: Path) -> None:
    """Refuse files that are not what the export, or the hub, recorded; what nobody keeps record of passes."""
    from usdm_megatron.convert.source_hashes import WeightHasher, expected_hashes

    present = [name for name in expected_hashes(model) if (model / name).is_file()]
    with WeightHasher(model, present) as hasher:
        hasher.result()


def _describe_reply(reply: Reply) -> str:
    lines = [
        f"transcript   {reply.transcript}",
        f"reply text   {reply.text}",
        f"reply units  {' '.join(map(str, reply.units.tolist()))}",
    ]
    if reply.unfinished:
        lines.append(f"unfinished   {', '.join(reply.unfinished)}: no stop token within the most tokens")
    return "\n".join(lines)


def _describe_evaluation(prefix: str, evaluation: Evaluation) -> str:
    def line(what: str, rate: str, count: ErrorCount, of: str) -> str:
        return (
            f"  {what:<13}{rate} error rate {count.rate:7.2%}  ({count.edits:,} of {count.reference:,} {of})"
        )

    replies = len(evaluation.replies)
    lines = [
        f"{prefix}: {replies:,} {'reply' if replies == 1 else 'replies'}",
        line("transcript", "word", evaluation.transcript, "words"),
        line("reply text", "word", evaluation.text, "words"),
        line("reply units", "unit", evaluation.units, "units"),
    ]
    if evaluation.unfinished:
        lines.append(f"  unfinished   {evaluation.unfinished:,}: no stop token within the most tokens")
    return "\n".join(lines)


def _write_json(path: Path | None, content: str) -> None:
    if path is None:
        return
    from usdm_megatron.data.file_writing import write_atomically

    try:
        write_atomically(path, content.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"reply: --json {path}: cannot be written ({error.strerror})") from error
