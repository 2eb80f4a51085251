"""Writes csrc/common/constants.h from fastdeq/constants.py."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "common" / "constants.h"
_TEXT = """\
// Generated from fastdeq/constants.py, where each is explained, by csrc/generate_constants.py.

#pragma once

namespace fastdeq {{

{lines}

// All of them by their names in Python.
struct NamedConstant {{
  const char* name;
  double value;
}};
constexpr NamedConstant kConstants[] = {{
{table}
}};

}}  // namespace fastdeq
"""


def constants() -> dict[str, int | float]:
    """The constants by name, without importing fastdeq."""
    found = runpy.run_path(str(ROOT / "fastdeq" / "constants.py"))
    return {name: value for name, value in found.items() if name.isupper()}


def camel(name: str) -> str:
    """``RESIDUAL_EPS`` is ``kResidualEps`` in C++."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def header() -> str:
    """The text of the header."""
    lines, table = [], []
    for name, value in constants().items():
        kind = "int" if isinstance(value, int) else "double"
        lines.append(f"constexpr {kind} {camel(name)} = {value!r};")
        table.append(f'    {{"{name}", {camel(name)}}},')
    return _TEXT.format(lines="\n".join(lines), table="\n".join(table))


def write() -> None:
    """Writes the header only where it is not up to date, so that a build finds it unchanged."""
    text = header()
    if not HEADER.is_file() or HEADER.read_text() != text:
        HEADER.write_text(text)


if __name__ == "__main__":
    write()
