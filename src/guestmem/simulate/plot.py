"""The answer as a picture: four panels over the trace, a line for each row. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from guestmem.simulate.row import Result, Row, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
_DASHES = ("-", "--", ":", "-.")


class NoPlot(Exception):
    """A picture cannot be made; says why and what would help."""


class Panel(NamedTuple):
    title: str
    unit: str
    value: Callable[[Sample], float]


PANELS = (
    Panel("memory in 2M and 1G folios", "GiB", lambda sample: _huge(sample) / (1 << 30)),
    Panel("vmemmap given back by HVO", "MiB", lambda sample: sample.vmemmap_given_back / (1 << 20)),
    Panel("stage-2 leaves", "thousands", lambda sample: sum(sample.leaves.values()) / 1000),
    Panel("cost by the model, so far", "s", lambda sample: sample.cost_ns / 1e9),
)


def _huge(sample: Sample) -> int:
    return sample.folio_bytes["2m"] + sample.folio_bytes["1g"]


def check_plot(path: Path) -> None:
    """Before hours of replay: can this be drawn? Raises: NoPlot."""
    if path.suffix.lower() not in SUFFIXES:
        raise NoPlot(f"{path}: a plot is {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise NoPlot(f"{path}: no such folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NoPlot("plots need matplotlib: pip install 'guestmem[plot]'") from None


def plot(result: Result, path: Path) -> None:
    """Draw to a file; its suffix says as what. Raises: NoPlot; OSError."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True).flat
    lines = _lines(result.rows)
    for axes, panel in zip(panels, PANELS, strict=True):
        _draw(axes, panel, lines)
    figure.suptitle(f"{result.trace}: {result.events:,} events")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _lines(rows: list[Row]) -> dict[str, list[Sample]]:
    """Samples by label; rows of the same samples are one line."""
    lines: dict[str, list[Sample]] = {}
    for row in rows:
        same = next((label for label, samples in lines.items() if samples == row.samples), None)
        if same is None:
            lines[row.label] = row.samples
        else:
            lines = {f"{label} = {row.label}" if label == same else label: lines[label] for label in lines}
    return lines


def _draw(axes: Axes, panel: Panel, lines: dict[str, list[Sample]]) -> None:
    for number, (label, samples) in enumerate(lines.items()):
        axes.plot(
            [sample.events for sample in samples],
            [panel.value(sample) for sample in samples],
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[number % len(_DASHES)],
            label=label,
        )
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("events of the trace")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
