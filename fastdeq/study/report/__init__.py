"""What a study found: a table and a figure of a few runs, and the report of a whole study."""

from __future__ import annotations

from .html import write_report
from .runs import figure, table
from .stability import summary

__all__ = ["figure", "summary", "table", "write_report"]
