"""Layers of pipeline chunks against megatron-core's own division, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.config import ParallelConfig, RunConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.pipeline_stages import StageLayers, layout_chunks, stage_layers


def parallel(pp: int, vpp: int = 1, **fields: Any) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vpp, **fields)


def split(pp: int, vpp: int, first: int | None, last: int | None) -> ParallelConfig:
    return parallel(pp, vpp, decoder_first_pipeline_num_layers=first, decoder_last_pipeline_num_layers=last)


def cores_division(layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> StageLayers | None:
    """What core would build on every stage; None where it refuses, or would count below zero."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=float,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        places = [(stage, chunk if vpp > 1 else None) for stage in range(pp) for chunk in range(vpp)]
        counts = [get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage) for stage, chunk in places]
        starts = [get_transformer_layer_offset(config, chunk, stage) for stage, chunk in places]
    except (ValueError, AssertionError):
        return None
    except ZeroDivisionError:  # interleaved, first and last stage alone: core cannot say where they start
        starts = [
            chunk * layers // vpp + (first or 0) // vpp * stage for stage in range(pp) for chunk in range(vpp)
        ]
    if min(counts) <= 0:
        return None
    chunks = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return tuple(tuple(chunks[stage * vpp : (stage + 1) * vpp]) for stage in range(pp))


SPLITS = list(itertools.product((1, 5, 6, 8, 12), (2, 3, 4), (1, 2, 3), (None, 1, 2, 3, 7), (None, 1, 2, 6)))


def test_divisions_are_those_of_core() -> None:
    agreed = 0
    for layers, pp, vpp, first, last in SPLITS:
        expected = cores_division(layers, pp, vpp, first, last)
        try:
            ours = stage_layers(layers, split(pp, vpp, first, last))
        except ConfigError:
            assert expected is None, (layers, pp, vpp, first, last)
            continue
        assert ours == expected, (layers, pp, vpp, first, last)
        assert sorted(layer for chunks in ours for chunk in chunks for layer in chunk) == list(range(layers))
        agreed += 1
    assert agreed > 50


TERMS = st.recursive(
    st.sampled_from(["t", "t*3", "t*2,t", "|", "t|t"]),
    lambda inner: (
        st.builds("({})*{}".format, st.sampled_from(["t|", "tt", "|t*2", "t,t|"]), st.integers(1, 4))
        | st.builds("{}{}".format, inner, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(TERMS, st.integers(1, 4))
def test_layouts_mean_what_they_mean_to_core(middle: str, pp: int) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout as Core

    text = f"E{middle}L"
    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    core = ["".join(letters[layer] for layer in stage) for stage in Core.parse_str_to_list(text)]
    try:
        chunks = layout_chunks(text)
    except ConfigError as error:
        assert "" in core and "nothing; put E, t or L into every chunk" in str(error)
        return
    assert list(chunks) == core
    if len(chunks) % pp:
        return
    layout = Core(text, pp)
    vpp, layers = len(chunks) // pp, "".join(chunks).count("t")
    ours = stage_layers(layers, parallel(pp, vpp, pipeline_model_parallel_layout=text))
    for stage, held in enumerate(ours):
        assert [len(chunk) for chunk in held] == [
            part.count(LayerType.decoder) for part in layout.layout[stage]
        ]
    in_order = [layer for chunk in range(vpp) for held in ours for layer in held[chunk]]
    assert in_order == list(range(layers))


LAYOUT = "pipeline_model_parallel_layout"
REFUSED = [
    (6, split(4, 1, None, None), "4 pipeline chunks (pp=4 x vpp=1) do not divide the model's 6 layers; set"),
    (6, split(2, 1, 2, 3), "2 in the first stage and 3 in the last stage are 5 layers and the model has 6"),
    (6, split(4, 1, 2, None), "2 in the first stage leave 4 of the model's 6 layers to 3 other stages"),
    (6, split(3, 1, 5, 5), "leave 0 of the model's 6 layers to 1 other stages"),  # core counts to -4
    (6, split(2, 1, None, 6), "6 in the last stage leave 0 of the model's 6 layers to 1 other stages"),
    (8, split(2, 2, 3, 5), "2 virtual stages do not divide the 3 or 5 layers of a pipeline stage"),
    (6, parallel(2, **{LAYOUT: "Et*2|t*3L"}), "holds 5 layers and the model has 6; it must hold them all"),
    (6, parallel(2, **{LAYOUT: "Et*2|t*2|tt|L"}), "has 4 chunks, and pp=2 x vpp=1 is 2; set --num-virtual"),
    (6, parallel(2, 2, **{LAYOUT: "Et*3|t|ttL"}), "has 3 chunks, and pp=2 x vpp=2 is 4; give it a mult"),
    (6, parallel(2, **{LAYOUT: "Ett|m|L"}), "has 'm' where E, t, L, |, x*n or (…)*n can stand; the mod"),
    (6, parallel(2, **{LAYOUT: "E(t|(tt)*2|)*2L"}), "can stand"),
    (6, parallel(2, **{LAYOUT: "tE*2|tL"}), "must hold E, the embedding, once and first"),
    (6, parallel(2, **{LAYOUT: "Ettt|Lttt"}), "must hold L, the output and loss, once and last"),
    (6, parallel(3, **{LAYOUT: "Ettt||tttL"}), "gives chunk 2 of 3 nothing; put E, t or L into every chunk"),
    (6, parallel(2, **{LAYOUT: "Et*99999(|t*99999)*99999L"}), "has more than 100,000 letters"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "config", "message"), REFUSED, ids=[m[:44] for _, _, m in REFUSED])
def test_refused(layers: int, config: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        stage_layers(layers, config)
    assert message in str(error.value)


def test_what_no_model_could_do_is_refused_without_one() -> None:
    fields = {"decoder_first_pipeline_num_layers": 2, LAYOUT: "Ett|t|L"}
    with pytest.raises(ConfigError) as error:
        RunConfig(parallel=parallel(2, **fields))
    assert [problem.split(";")[0] for problem in error.value.problems] == [
        "parallel: --pipeline-model-parallel-layout says what every stage holds",
        "parallel: pipeline_model_parallel_layout 'Ett|t|L' has 3 chunks, and pp=2 x vpp=1 is 2",
    ]
    for count in (0, -1):
        with pytest.raises(ConfigError, match=f"decoder_last_pipeline_num_layers is {count}; it must be at"):
            RunConfig(parallel=split(2, 1, None, count))
