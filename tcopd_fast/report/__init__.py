"""Reports over run directories: one self-contained HTML page, and a summary table for the terminal."""

from __future__ import annotations

from tcopd_fast.report.collect import summary_table
from tcopd_fast.report.page import write_report
from tcopd_fast.report.text import format_short_table, format_table

__all__ = ["format_short_table", "format_table", "summary_table", "write_report"]
