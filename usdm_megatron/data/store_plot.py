"""A picture of a store: lengths of samples and rows, tokens by kind, samples by pattern."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from usdm_megatron.data.inspect_store import StoreReport
from usdm_megatron.data.store_statistics import Lengths
from usdm_megatron.errors import ConfigError


def check_plot(path: Path) -> None:
    """Raise `ConfigError` if `write_plot` could not write `path`: said before a long count, not after it."""
    problems = []
    if path.suffix != ".png":
        problems.append(f"--plot is {path}; it takes the name of a .png file")
    if not path.parent.is_dir():
        problems.append(f"--plot is {path}, but {path.parent} is no directory; make it first")
    if not importlib.util.find_spec("matplotlib"):
        problems.append("--plot needs matplotlib; install it with `pip install 'usdm_megatron[plot]'`")
    if problems:
        raise ConfigError(*problems)


def write_plot(report: StoreReport, path: Path) -> None:
    """Draw `report` into the PNG file `path`, replacing it; needs no display."""
    # Figure and canvas themselves: pyplot keeps a global state, and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    summary, statistics = report.summary, report.statistics
    figure.suptitle(
        f"{Path(report.prefix).name}: {summary.rows:,} rows, {summary.samples:,} samples, "
        f"{summary.tokens:,} tokens, {summary.fill:.1%} full"
    )
    (samples, rows), (kinds, patterns) = figure.subplots(2, 2)
    _histogram(samples, statistics.sample_lengths, "tokens of a sample", "samples")
    _histogram(rows, statistics.row_lengths, f"tokens of a row (of {summary.row_capacity:,})", "rows")
    _bars(kinds, {kind.label: count for kind, count in statistics.tokens_by_kind.items()}, "tokens")
    if statistics.targets_by_kind is not None:
        targets = {kind.label: count for kind, count in statistics.targets_by_kind.items()}
        kinds.barh(list(targets), list(targets.values()), height=0.4, label="of them targets")
        kinds.legend(loc="lower right")
    _bars(patterns, {pattern.value: n for pattern, n in statistics.samples_by_pattern.items()}, "samples")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot is {path}, which cannot be written: {error.strerror or error}") from error


def _histogram(axes: Any, lengths: Lengths, of: str, what: str) -> None:
    bins = [f"{below - 1:,}" for below in lengths.edges[1:]]
    axes.bar(bins, lengths.counts, width=0.9)
    axes.set(xlabel=f"{of}, up to", ylabel=what)
    axes.tick_params(axis="x", rotation=45)


def _bars(axes: Any, counts: dict[str, int], what: str) -> None:
    bars = axes.barh(list(counts), list(counts.values()))
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(xlabel=what)
