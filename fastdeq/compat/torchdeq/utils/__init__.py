"""Helpers: the arguments of a command line, configurations, starts, and checkpoints."""

from .arg_utils import add_deq_args
from .init import mixed_init
from .mem import mem_gc

__all__ = ["add_deq_args", "mem_gc", "mixed_init"]
