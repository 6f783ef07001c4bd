"""The demos' numbers, in one place; the scripts in `examples/` repeat those that are flags.

Found by trial with plain transformers on one CPU thread: small enough for two cores and three
minutes, large enough that text is predicted from the speech before it. What decides is the
number of updates (4 rows of 128 tokens learn more than 4 of 256 from as many tokens), the width
(64 is too little), two speech units a word, few words, little noise, and the initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningSettings:
    """A fine-tuning run."""

    train_iters: int  # steps
    global_batch_size: int  # dialogs
    lr: float


@dataclass(frozen=True)
class DemoSettings:
    """Shape of the demo's model, corpus, preprocessing and runs."""

    seed: int = 42

    # model
    hidden_size: int = 96
    intermediate_size: int = 192
    layers: int = 4
    heads: int = 4
    query_groups: int = 2
    head_dim: int = 32  # not hidden / heads, as a reminder that it need not be
    sliding_window: int = 40  # tokens; shorter than the longest sample
    max_positions: int = 512  # tokens
    rms_norm_eps: float = 3e-4
    initializer_range: float = 0.1  # at 0.02 so small a model learns nothing across modalities in time

    # corpus
    word_units: int = 2  # speech units that a word is made of
    repeated_unit_share: float = 0.1  # a unit lasts twice as long
    noisy_unit_share: float = 0.02  # a unit is another one
    utterances: int = 5830  # a little more than the run reads
    short_utterance_words: tuple[int, int] = (3, 6)
    long_utterance_words: tuple[int, int] = (9, 16)
    long_utterance_share: float = 0.1
    dialogs: int = 2200  # a little more than the longest fine-tuning run reads
    dialog_turns: tuple[int, int] = (2, 4)
    dialog_words: tuple[int, int] = (3, 5)

    # preprocessing
    seq_length: int = 128  # tokens a row
    epochs: int = 2  # draws of every utterance
    heldout_share: float = 0.05  # of utterances, and of dialogs

    # run
    global_batch_size: int = 4  # rows
    micro_batch_size: int = 1  # rows
    train_iters: int = 330  # steps
    lr: float = 4e-3
    lr_warmup_iters: int = 10  # steps

    # fine-tuning
    full_tuning: TuningSettings = TuningSettings(train_iters=1000, global_batch_size=4, lr=3e-3)
    lora_tuning: TuningSettings = TuningSettings(train_iters=1000, global_batch_size=4, lr=3e-3)
    max_new_tokens: int = 64  # of each step of a reply; the longest of the corpus takes half of it

    # reports
    most_word_errors: float = 0.10  # of the transcripts of held-out dialogs
    swap_utterances: int = 100

    @property
    def train_rows(self) -> int:
        """Rows that the run reads, each once, in order."""
        return self.train_iters * self.global_batch_size


DEMO = DemoSettings()
