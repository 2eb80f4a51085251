"""The command line, ``python -m fastdeq info``: options, and the question about a shape; and where
``study`` is found."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import __version__
from .activations import ActivationName
from .backends.report import engines_for, gpu_asked_about, report
from .cells import AffineCell
from .options import Options, Precision
from .solvers import SolveOptions, resolve
from .weights import WeightName

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
    info.add_argument("--size", type=int, help="features of an AffineCell: print its engine")
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
    commands.add_parser("study", help="the initialisation study, with its report; study --help")
    return parser


def report_shape(
    size: int,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
    capability: tuple[int, int] | None = None,
    weight: WeightName = "dense",
    activation: ActivationName = "tanh",
    scale: float = 0.9,
    precision: Precision = "auto",
    **solvers: Any,
) -> str:
    """The choice for the forward and the adjoint solve of ``AffineCell(..., size)`` on ``batch``
    samples; ``solvers`` are "solver" and "adjoint" of a layer.

    Raises:
        ValueError: options that do not exist, or a capability of which nothing is known.
    """
    options = Options(precision=precision, **solvers)
    cell = AffineCell(1, min(size, 2), activation=activation, weight=weight, scale=scale)
    gpu, note = gpu_asked_about(device, capability)
    lines = [
        f"AffineCell(..., {size}, activation={activation!r}, weight={weight!r}, scale={scale:g}), "
        f"{batch} samples, {str(dtype).removeprefix('torch.')}, on {device}{note}"
    ]
    for what, given in (("forward", options.solver), ("adjoint", options.adjoint)):
        solver = resolve(given, cell.structure(), options.tol, adjoint=what == "adjoint")
        how = SolveOptions.of(
            solver, tol=options.tol, max_iter=options.max_iter, precision=precision
        )
        first, *others = engines_for(device, size, batch, dtype, how, gpu)
        lines += ["", f"{what}: {solver}", f"  {first}", *others]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["study"]:
        try:
            from .study.command import main as study  # has its own options
        except ImportError as error:  # a package of fastdeq[study] is missing: it says which
            sys.exit(f"python -m fastdeq study: {error}")
        sys.exit(study(sys.argv[2:]))
    parser = _parser()
    given = vars(parser.parse_args())
    if given["size"] is None:
        defaults = vars(parser.parse_args(["info"]))
        of_shapes = [name for name, value in given.items() if value != defaults[name]]
        if of_shapes:
            parser.error(f"--{of_shapes[0]} asks about a shape: give --size as well")
        print(report(__version__))
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
