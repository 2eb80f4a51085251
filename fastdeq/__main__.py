"""``python -m fastdeq info``."""

from __future__ import annotations

import argparse

import torch

from .info import report
from .info_shape import report_shape

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastdeq")
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser(
        "info", help="which backends are in use, and why one is not; with --size, for one shape"
    )
    info.add_argument("--size", type=int, help="features of an AffineCell: print who solves it")
    info.add_argument("--batch", type=int, default=256, help="samples (default 256)")
    info.add_argument("--dtype", choices=_DTYPES, default="float32")
    info.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    info.add_argument(
        "--capability", type=_capability, help="of a GPU that is not at hand, such as 9.0"
    )
    info.add_argument("--weight", default="dense")
    info.add_argument("--activation", default="tanh")
    info.add_argument("--scale", type=float, default=0.9)
    info.add_argument("--precision", default="auto")
    info.add_argument("--solver", default="auto")
    info.add_argument("--adjoint", default="auto")
    return parser


def main() -> None:
    parser = _parser()
    given = vars(parser.parse_args())
    if given["size"] is None:
        defaults = vars(parser.parse_args(["info"]))
        of_shapes = [name for name, value in given.items() if value != defaults[name]]
        if of_shapes:
            parser.error(f"--{of_shapes[0]} asks about a shape: give --size as well")
        print(report())
        return
    size, batch = given.pop("size"), given.pop("batch")
    if size < 1 or batch < 1:
        parser.error(f"--size and --batch must be at least 1, got {size} and {batch}")
    given["dtype"] = _DTYPES[given["dtype"]]
    try:
        print(report_shape(size, batch, **given))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
