"""Which layers each pipeline stage holds, chunk by chunk: arithmetic only.

Chunk c of stage p is number c x pp + p along the model. Layers are divided evenly; or the first or the
last stage takes another number, which its chunks share evenly; or a layout says what every chunk holds, in
Megatron's words (`--pipeline-model-parallel-layout "Et*3|t*4|t*4|t*3L"`): E the embedding, t a layer, L the
output and loss, `x*n` n times x, `(x|)*n` a group n times, `|` between chunks; commas count for nothing.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import TYPE_CHECKING

from usdm_megatron.errors import ConfigError

if TYPE_CHECKING:
    from usdm_megatron.parallel_config import ParallelConfig

StageLayers = tuple[tuple[range, ...], ...]  # [stage][chunk]

_MOST_LETTERS = 100_000  # `t*999999999` must not fill the memory
_REPEATS = (re.compile(r"\(([^()]+)\)\*(\d{1,5})"), re.compile(r"([^()*])\*(\d{1,5})"))


def stage_layers(layers: int, parallel: ParallelConfig) -> StageLayers:
    """Layer indices, from 0, of every chunk of every stage.

    Raises `ConfigError` with all that does not fit a model of `layers`.
    """
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    text = parallel.pipeline_model_parallel_layout
    counts = _counts_of_split(layers, parallel) if text is None else _counts_of_layout(layers, text, pp, vpp)
    starts = list(accumulate(counts, initial=0))
    chunks = [range(start, start + count) for start, count in zip(starts[:-1], counts, strict=True)]
    return tuple(tuple(chunks[stage::pp]) for stage in range(pp))


def layout_chunks(text: str) -> tuple[str, ...]:
    """The chunks of a layout along the model, each as its letters: `Et*2|tL` is `("Ett", "tL")`.

    Raises `ConfigError` with everything that is wrong with it whatever the model.
    """
    expanded = text.replace(",", "").replace(" ", "")
    for repeat in _REPEATS:
        if sum(len(match[1]) * int(match[2]) for match in repeat.finditer(expanded)) > _MOST_LETTERS:
            raise ConfigError(_of_layout(text, f"has more than {_MOST_LETTERS:,} letters; check its counts"))
        expanded = repeat.sub(lambda match: match[1] * int(match[2]), expanded)
    unknown = sorted(set(expanded) - set("EtL|"))
    if unknown:
        hint = "; the model has no multi-token prediction" if "m" in unknown else ""
        raise ConfigError(
            _of_layout(
                text,
                f"has {' '.join(map(repr, unknown))} where E, t, L, |, x*n or (…)*n can stand{hint}",
            )
        )
    problems = []
    if expanded.count("E") != 1 or not expanded.startswith("E"):
        problems.append(_of_layout(text, "must hold E, the embedding, once and first"))
    if expanded.count("L") != 1 or not expanded.endswith("L"):
        problems.append(_of_layout(text, "must hold L, the output and loss, once and last"))
    chunks = tuple(expanded.split("|"))
    problems += [
        _of_layout(text, f"gives chunk {index} of {len(chunks)} nothing; put E, t or L into every chunk")
        for index, chunk in enumerate(chunks, 1)
        if not chunk
    ]
    if problems:
        raise ConfigError(*problems)
    return chunks


def _counts_of_layout(layers: int, text: str, pp: int, vpp: int) -> list[int]:
    chunks = layout_chunks(text)
    counts = [chunk.count("t") for chunk in chunks]
    problems = []
    if len(chunks) != pp * vpp:
        problems.append(wrong_chunk_count(text, len(chunks), pp, vpp))
    if sum(counts) != layers:
        problems.append(
            _of_layout(text, f"holds {sum(counts)} layers and the model has {layers}; it must hold them all")
        )
    if problems:
        raise ConfigError(*problems)
    return counts


def wrong_chunk_count(text: str, chunks: int, pp: int, vpp: int) -> str:
    """That a layout of `chunks` is none of pp x vpp, and what would make it one."""
    remedy = (
        f"set --num-virtual-stages-per-pipeline-rank {chunks // pp}"
        if chunks % pp == 0
        else f"give it a multiple of {pp} chunks"
    )
    return _of_layout(text, f"has {chunks} chunks, and pp={pp} x vpp={vpp} is {pp * vpp}; {remedy}")


def _counts_of_split(layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each chunk, along the model."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is None and last is None:
        if layers % (pp * vpp):
            raise ConfigError(
                f"parallel: {pp * vpp} pipeline chunks (pp={pp} x vpp={vpp}) do not divide the model's "
                f"{layers} layers; set --pipeline-model-parallel-size to a divisor, or say what each holds "
                "with --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers or "
                "--pipeline-model-parallel-layout"
            )
        return [layers // (pp * vpp)] * (pp * vpp)
    given = (first or 0) + (last or 0)
    between = pp - (first is not None) - (last is not None)  # stages that share what is left
    rest = layers - given
    said = " and ".join(
        f"{count} in the {which} stage" for which, count in (("first", first), ("last", last)) if count
    )
    if between == 0 and rest:
        raise ConfigError(
            f"parallel: {said} are {given} layers and the model has {layers}; with pp={pp} they must be all "
            "of them: drop one of the two flags"
        )
    if between and (rest < between or rest % between):
        raise ConfigError(
            f"parallel: {said} leave {max(rest, 0)} of the model's {layers} layers to {between} other "
            "stages, which must share them evenly, one each at least; change the number, or give a "
            "--pipeline-model-parallel-layout"
        )
    middle = rest // between if between else 0
    stages = [middle] * pp
    stages[0] = middle if first is None else first
    stages[-1] = stages[-1] if last is None else last
    uneven = sorted({count for count in stages if count % vpp})
    if uneven:
        raise ConfigError(
            f"parallel: {vpp} virtual stages do not divide the {' or '.join(map(str, uneven))} layers of a "
            f"pipeline stage ({said}); make every stage's number a multiple of {vpp}, or give a "
            "--pipeline-model-parallel-layout"
        )
    return [count // vpp for count in stages] * vpp


def _of_layout(text: str, complaint: str) -> str:
    return f"parallel: pipeline_model_parallel_layout {text!r} {complaint}"
