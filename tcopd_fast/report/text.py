"""Numbers and hostile text as plain strings and as HTML."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tcopd_fast.report.collect import number, union

MISSING = "–"
_TERMINAL_COLUMNS = 10_000


def visible(text: str, keep: str = "") -> str:
    """`text` with every invisible character (controls, format and bidi marks, odd spaces, surrogates) as ⟨U+XXXX⟩.

    The ordinary space and the characters in `keep` stay.
    """
    return "".join(f"⟨U+{ord(char):04X}⟩" if char not in keep and _is_invisible(char) else char for char in text)


def _is_invisible(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp") or (category == "Zs" and char != " ")


def escape(value: Any) -> str:
    """Any value as HTML text that is also safe inside a quoted attribute."""
    return html.escape(visible(str(value), keep="\n"), quote=True)


def fixed(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with a fixed count of decimals and a real minus sign."""
    value = number(value)
    return MISSING if value is None else format(value, f"{'+' if sign else ''}.{digits}f").replace("-", "−")


def percent(value: Any) -> str:
    """A share as percent with one decimal, without the sign."""
    value = number(value)
    return MISSING if value is None else f"{100 * value:.1f}"


def percent_pm(value: Any, error: Any) -> str:
    """`52.3 ± 0.8`, in percent."""
    return percent(value) if number(error) is None else f"{percent(value)} ± {percent(error)}"


def seconds(value: Any) -> str:
    """A duration with three significant digits."""
    value = number(value)
    if value is None:
        return MISSING
    scaled, unit = (value, "s") if value >= 1 else (1000 * value, "ms")
    decimals = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{decimals}f} {unit}"


def size(value: Any) -> str:
    """Bytes in MiB or GiB."""
    value = number(value)
    if value is None:
        return MISSING
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def summary_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(title, unit, one formatted cell per row) of the summary's number columns; empty columns are left out."""
    teachers = union(row["reverse_kl"] for row in rows)
    columns = [
        ("step", "", [_count(row["step"]) for row in rows]),
        ("mean@k", "%", [percent_pm(row["mean_at_k"], row["standard_error"]) for row in rows]),
        ("before", "%", [percent(row["start"]) for row in rows]),
        ("change", "points", [_points(row["change"]) for row in rows]),
        ("forgotten", "points", [_points(row["forgetting"]).lstrip("+") for row in rows]),
        ("pass@k", "%", [percent(row["pass_at_k"]) for row in rows]),
        ("length", "tokens", [fixed(row["response_length"], 1) for row in rows]),
        ("truncated", "%", [percent(row["truncation_rate"]) for row in rows]),
        *((f"KL to {name}", "nats", [fixed(row["reverse_kl"].get(name)) for row in rows]) for name in teachers),
        ("time/step", "", [seconds(row["time_s_per_step"]) for row in rows]),
    ]
    return [column for column in columns if any(cell != MISSING for cell in column[2])]


def _points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return MISSING if share is None else fixed(100 * share, 1, sign=True)


def _count(value: Any) -> str:
    return MISSING if value is None else str(value)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summary_table` as aligned plain text without control characters, one line per row."""
    columns = [(title, "", [str(row[title]) for row in rows]) for title in ("run", "set")]
    columns += [(title, "", [_count(row[title]) for row in rows]) for title in ("problems", "k")]
    columns += [("T", "", [MISSING if row["temperature"] is None else f"{row['temperature']:g}" for row in rows])]
    columns += summary_columns(rows)
    return _aligned(columns)


def format_short_table(rows: Sequence[Mapping[str, Any]], teacher: str) -> str:
    """The rows of one evaluation setting, narrow enough for a terminal; the setting becomes the first line.

    teacher: whose reverse KL is shown.
    """
    first = rows[0]
    caption = f"{first['set']}: {first['problems']} problems × {first['k']} samples at T={first['temperature']:g}"
    columns = [
        ("run", "", [str(row["run"]) for row in rows]),
        ("mean@k", "%", [percent_pm(row["mean_at_k"], row["standard_error"]) for row in rows]),
        ("before", "%", [percent(row["start"]) for row in rows]),
        ("pass@k", "%", [percent(row["pass_at_k"]) for row in rows]),
        ("length", "", [fixed(row["response_length"], 1) for row in rows]),
        (f"KL to {teacher}", "nats", [fixed(row["reverse_kl"].get(teacher)) for row in rows]),
        ("step", "", [seconds(row["time_s_per_step"]) for row in rows]),
    ]
    return f"{caption}\n{_aligned(columns)}"


def _aligned(columns: Sequence[tuple[str, str, list[str]]]) -> str:
    """(title, unit, cells) columns as plain text."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, unit, _ in columns:
        heading = f"{title}, {unit}" if unit else title
        table.add_column(Text(heading), justify="left" if title in ("run", "set") else "right", no_wrap=True)
    for cells in zip(*(cells for _, _, cells in columns), strict=True):
        table.add_row(*(Text(visible(cell)) for cell in cells))
    stream = StringIO()
    Console(file=stream, width=_TERMINAL_COLUMNS, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
