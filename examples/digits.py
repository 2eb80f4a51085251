"""Which weights can a deep equilibrium model start from?

Trains a DEQ classifier on handwritten digits for every weight family at scales from safe (the map
contracts) to harsh (it does not), prints what each run came to, and saves a figure.

    python examples/digits.py                            about 15 seconds on one core
    python examples/digits.py --quick                    a few seconds
    python examples/digits.py --init-only                structure at initialisation only
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from fastdeq.study import Config, digits, figure, grid, sweep, table


def arguments() -> tuple[argparse.Namespace, list[Config]]:
    """The options, and the runs they ask for."""
    parser = argparse.ArgumentParser(
        description="Weight families and scales of a DEQ, on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    families = ["dense", "orthogonal", "symmetric"]
    scales = [0.5, 0.9, 1.5, 2.0, 3.0, 6.0]
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--scales", nargs="+", type=float, default=scales, metavar="S")
    parser.add_argument("--features", type=int, default=128, help="size of the state")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training part")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order")
    parser.add_argument("--out", type=Path, default="demo.png", help="where the figure goes")
    # The products are too small to gain from a second thread, and suffer when its core is busy.
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help="one epoch, at scales 0.5 and 3")
    parser.add_argument(
        "--init-only", action="store_true", help="let W leave its structure while it trains"
    )
    args = parser.parse_args()
    if not args.out.parent.is_dir():  # better said now than after the training
        parser.error(f"--out: there is no folder {args.out.parent}")
    try:
        runs = grid(
            args.families,
            [0.5, 3.0] if args.quick else sorted(args.scales),
            features=args.features,
            epochs=1 if args.quick else args.epochs,
            seed=args.seed,
            parametrized=not args.init_only,
        )
    except ValueError as error:
        parser.error(str(error))
    return args, runs


def main() -> None:
    args, runs = arguments()
    torch.set_num_threads(args.threads)
    dataset = digits(args.seed)
    console = Console()
    console.print(
        f"{len(runs)} DEQ classifiers, {args.features} features, {runs[0].epochs} epochs each"
    )
    console.print(f"{len(dataset.x_train)} digits to train on, {len(dataset.x_test)} to test on")
    start = time.perf_counter()
    results = sweep(dataset, runs, console)
    console.print(table(results))
    saved = figure(results, args.out)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")
    print(f"Figure saved as {saved}")


if __name__ == "__main__":
    main()
