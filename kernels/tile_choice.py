"""Tiles of an affine step, and which of them to measure.

All compile for sm_80 and sm_90 without spilling, with the largest epilogue as well; twice as large
ones do not, nor do the large ones where 16 does not divide n.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """BLOCK_M, BLOCK_N, BLOCK_K, NARROW_K, and how a program is run."""

    rows: int
    outputs: int
    inputs: int
    narrow_inputs: int
    warps: int
    stages: int

    def config(self) -> triton.Config:
        blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "NARROW_K"), self[:4], strict=True))
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
# Fused multiply-adds keep more of their factors in registers than tensor cores.
_NOT_FOR_IEEE = (TILES[5], TILES_UNALIGNED[1])
_ENOUGH_PROGRAMS = 128  # about one to a multiprocessor of a large GPU


def candidates(batch: int, aligned: bool, precision: str) -> list[Tile]:
    """The tiles worth measuring: at most 4."""
    tiles = [t for t in (TILES if aligned else TILES_UNALIGNED) if t.rows < 2 * max(batch, 16)]
    return [t for t in tiles if precision != "ieee" or t not in _NOT_FOR_IEEE][-4:]


def default_tile(batch: int, size: int, aligned: bool, precision: str) -> Tile:
    """The largest tile that gives all multiprocessors something to do, where none was measured."""
    tiles = candidates(batch, aligned, precision)
    for tile in reversed(tiles):
        programs = triton.cdiv(batch, tile.rows) * triton.cdiv(size, tile.outputs)
        if programs >= _ENOUGH_PROGRAMS:
            return tile
    return tiles[0]


def default_precision(tensor: Tensor) -> str:
    """ "tf32x3" where there are tensor cores for it."""
    tensor_cores = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return "tf32x3" if tensor_cores else "ieee"


def tuner(kernel: Any, aligned: bool) -> triton.runtime.Autotuner:
    """The kernel with Triton's autotuner around it."""

    def prune(configs: list[triton.Config], arguments: dict, **options: Any) -> list[triton.Config]:
        tiles = candidates(arguments["batch"], aligned, options["PRECISION"])
        wanted = [tile.config().kwargs for tile in tiles]
        return [config for config in configs if config.kwargs in wanted]

    known = inspect.signature(triton.autotune).parameters
    return triton.autotune(
        [tile.config() for tile in (TILES if aligned else TILES_UNALIGNED)],
        key=["size", "batch_bucket", "PRECISION"],
        prune_configs_by={"early_config_prune": prune},
        **({"cache_results": True} if "cache_results" in known else {}),
    )(kernel)
