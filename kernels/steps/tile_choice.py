"""Tiles of an affine step, and which of them to measure.

All compile for sm_80 and sm_90 without spilling, with the largest epilogue as well; twice as large
ones do not, nor do the large ones where 16 does not divide n.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import triton


class Tile(NamedTuple):
    """BLOCK_M, BLOCK_N, BLOCK_K, LOW_K, and how a program is run."""

    rows: int
    outputs: int
    inputs: int
    low_inputs: int
    warps: int
    stages: int

    def config(self) -> triton.Config:
        blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "LOW_K"), self[:4], strict=True))
        return triton.Config(blocks, num_warps=self.warps, num_stages=self.stages)


# From small to large; the second where 16 does not divide n: entries are then loaded one by one,
# which needs more registers.
TILES = (
    Tile(16, 32, 64, 128, 4, 4),
    Tile(16, 32, 128, 256, 8, 3),
    Tile(32, 32, 64, 128, 4, 3),
    Tile(32, 64, 32, 64, 4, 4),
    Tile(64, 64, 32, 64, 8, 3),
    Tile(64, 128, 32, 64, 8, 3),
)
TILES_UNALIGNED = (
    Tile(16, 32, 64, 64, 4, 4),
    Tile(32, 64, 32, 32, 8, 4),
    Tile(64, 64, 16, 16, 8, 4),
)
# Fused multiply-adds keep more of their factors in registers than tensor cores; and a product that
# may come from memory has a second layout.
_MANY_REGISTERS = (TILES[5], TILES_UNALIGNED[1])
_ENOUGH_PROGRAMS = 128  # about one to a multiprocessor of a large GPU


def candidates(batch: int, aligned: bool, precision: str, library: bool = False) -> list[Tile]:
    """The tiles worth measuring: at most 4. ``library``: for products that the library makes."""
    tiles = [t for t in (TILES if aligned else TILES_UNALIGNED) if t.rows < 2 * max(batch, 16)]
    few = precision == "ieee" or library
    return [t for t in tiles if not few or t not in _MANY_REGISTERS][-4:]


def default_tile(
    batch: int, size: int, aligned: bool, precision: str, library: bool = False
) -> Tile:
    """The largest tile that gives all multiprocessors something to do, where none was measured."""
    tiles = candidates(batch, aligned, precision, library)
    for tile in reversed(tiles):
        programs = triton.cdiv(batch, tile.rows) * triton.cdiv(size, tile.outputs)
        if programs >= _ENOUGH_PROGRAMS:
            return tile
    return tiles[0]


def tuner(kernel: Any, aligned: bool) -> triton.runtime.Autotuner:
    """The kernel with Triton's autotuner around it."""

    def prune(configs: list[triton.Config], arguments: dict, **named: Any) -> list[triton.Config]:
        arguments = {**arguments, **named}
        tiles = candidates(arguments["batch"], aligned, arguments["PRECISION"])
        offered = [tile.config().kwargs for tile in tiles]
        return [config for config in configs if config.kwargs in offered]

    known = inspect.signature(triton.autotune).parameters
    return triton.autotune(
        [tile.config() for tile in (TILES if aligned else TILES_UNALIGNED)],
        key=["size", "batch_bucket", "PRECISION"],
        prune_configs_by={"early_config_prune": prune},
        **({"cache_results": True} if "cache_results" in known else {}),
    )(kernel)
