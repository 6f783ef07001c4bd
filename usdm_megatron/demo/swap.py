"""Does text follow the speech before it? The same held-out text behind its own and behind another's units.

A model that ignores the units has the same loss on both; one that reads them is helped by the
right ones and misled by the wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from usdm_megatron.demo.corpus import Tokenize, Utterance, mistral_tokenize, read_heldout, unit_ids
from usdm_megatron.demo.settings import DEMO, DemoSettings
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind, Vocabulary


@dataclass(frozen=True)
class SwapRows:
    """Samples `[bos] units <|correspond|> text [eos]`; `own[i]` and `other[i]` differ in the units only."""

    own: list[list[int]]
    other: list[list[int]]


@dataclass(frozen=True)
class SwapFigure:
    """Mean loss (nats) of the text tokens behind the right units and behind another utterance's."""

    own_loss: float
    other_loss: float

    @property
    def reduction(self) -> float:
        """The share by which the right units lower the loss."""
        return 1 - self.own_loss / self.other_loss


def swap_rows(
    heldout: list[Utterance], settings: DemoSettings = DEMO, vocabulary: Vocabulary = USDM_VOCABULARY
) -> SwapRows:
    """Both row sets, from the utterances that the interleaving rule leaves in one segment.

    Utterance i gets the units of the next one that says something else, so no row keeps its own.
    """
    whole = [utterance for utterance in heldout if utterance.unit_count < settings.segment_units]
    whole = whole[: settings.swap_utterances]
    tokenize = mistral_tokenize()
    own, other = [], []
    for i, utterance in enumerate(whole):
        following = whole[i + 1 :] + whole[:i]
        stranger = next(candidate for candidate in following if candidate.words != utterance.words)
        own.append(_row(utterance, utterance, tokenize, vocabulary))
        other.append(_row(stranger, utterance, tokenize, vocabulary))
    return SwapRows(own, other)


def swap_figure(
    model_directory: Path, corpus_directory: Path, vocabulary: Vocabulary = USDM_VOCABULARY
) -> SwapFigure:
    """The figure of an extended Hugging Face model, computed by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = swap_rows(read_heldout(corpus_directory), vocabulary=vocabulary)
    # a directory on this machine; older transformers load fp32, newer ones the type that was saved
    model = AutoModelForCausalLM.from_pretrained(model_directory)  # nosec B615 - nothing is downloaded
    model = model.float().eval()
    kinds = torch.from_numpy(vocabulary.kind_of_id())

    def text_loss(samples: list[list[int]]) -> float:
        loss_sum, targets = 0.0, 0
        for sample in samples:
            ids = torch.tensor([sample])
            is_text = kinds[ids[0, 1:]] == int(TargetKind.TEXT)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1][is_text]
            loss_sum += torch.nn.functional.cross_entropy(logits, ids[0, 1:][is_text], reduction="sum").item()
            targets += int(is_text.sum())
        return loss_sum / targets

    return SwapFigure(own_loss=text_loss(rows.own), other_loss=text_loss(rows.other))


def _row(speech: Utterance, text: Utterance, tokenize: Tokenize, vocabulary: Vocabulary) -> list[int]:
    units = unit_ids(speech.units, vocabulary)
    return [
        vocabulary.bos_id,
        *units,
        vocabulary.correspond_id,
        *tokenize(" ".join(text.words)),
        vocabulary.eos_id,
    ]
