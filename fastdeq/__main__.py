"""``python -m fastdeq info``."""

from __future__ import annotations

import argparse

from .info import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdeq")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("info", help="which backends are in use, and why one is not")
    parser.parse_args()
    print(report())


if __name__ == "__main__":
    main()
