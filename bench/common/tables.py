"""Tables of results that are not times of races."""

from __future__ import annotations

from collections.abc import Iterator

from report import table


class Tables:
    """Rows by title, in the order in which they came."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[tuple[str, ...], ...]]] = {}

    def add(self, title: str, head: tuple[str, ...], row: tuple[str, ...]) -> None:
        self.rows.setdefault(title, [(head,)]).append((row,))

    def sections(self) -> Iterator[tuple[str, list[str]]]:
        """Titles and lines."""
        for title, rows in self.rows.items():
            yield title, table(rows)
