"""Pieces of HTML that several sections of the page share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tcopd_fast.report.collect import Run
from tcopd_fast.report.plots import run_colour
from tcopd_fast.report.text import escape


def table(head: str, body: Sequence[str], width: str = "full") -> str:
    """A table in a frame that scrolls sideways; head: its header cells, body: its rows."""
    return (
        f'<div class="panel scroll {width}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def run_headers(runs: Sequence[Run], shown: Iterable[int], style: str) -> str:
    """A header cell for each of these runs."""
    return "".join(f'<th class="{style}">{chip(index)}{escape(runs[index].name)}</th>' for index in shown)


def chip(run: int) -> str:
    """A dash in the run's colour."""
    return f'<span class="chip" style="background:{run_colour(run)}"></span>'


def colour_keys(colours: Mapping[str, str]) -> str:
    """A legend: name -> colour."""
    keys = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in colours.items())
    return f'<ul class="keys">{keys}</ul>'
