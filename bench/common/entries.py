"""Who takes part in which race."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from contestants import Contestant, FastDEQ, TorchDEQ, TorchDEQSimple
from jax_contestants import JaxOpt
from loops import PLAIN, Eager, Products
from problems import Problem, Spec

# In units of the tolerance. Solvers that return f(z) after a test at z pass with more than it.
FACTORS = (4, 2.8, 2, 1.4, 1, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.06, 0.03)

Build = Callable[[Problem, float, float], Contestant]  # problem, forward and adjoint setting


@dataclass(frozen=True)
class Entry:
    """How a contestant is built, and what is asked of it."""

    name: str
    build: Build
    needs: tuple[str, ...] = ()  # packages
    extra: str = "bench"  # of fastdeq, which brings them
    stops: bool = True  # has a stop test; without one its settings are numbers of iterations
    verified: bool = True

    @property
    def missing(self) -> str:
        """Why it cannot take part; empty when it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"no {' and '.join(absent)} here (`pip install 'fastdeq[{self.extra}]'`)"
        if "compiled" in self.name and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "inductor needs a C++ compiler"
        return ""

    def forward_settings(self, spec: Spec) -> Sequence[float]:
        """From the loosest to the tightest."""
        if not self.stops:
            return range(1, spec.max_iter + 1)
        return tolerances(spec)


def tolerances(spec: Spec) -> tuple[float, ...]:
    return tuple(spec.tol * factor for factor in FACTORS)


def _torchdeq(name: str, solver: str, **options: Any) -> Entry:
    build = partial(TorchDEQ, solver=solver, **options)
    return Entry(f"torchdeq-{name}", build, ("torchdeq",))


def _jaxopt(name: str, **options: Any) -> Entry:
    return Entry(f"jaxopt-{name}", partial(JaxOpt, **options), ("jax", "jaxopt"), "jax")


_AUTO = Entry("fastdeq-auto", FastDEQ)
_PLAIN = Entry("fastdeq-plain", partial(FastDEQ, **PLAIN))
_FLOAT32 = Entry("fastdeq-float32", partial(FastDEQ, precision="float32"))
_ANDERSON = Entry("fastdeq-anderson", partial(FastDEQ, solver="anderson", adjoint="anderson"))
_FIXED_POINT = _torchdeq("fixed-point", "fixed_point_iter")
_SIMPLE = Entry("torchdeq-simple", TorchDEQSimple, ("torchdeq",), stops=False)
_EAGER = Entry("eager-loop", Eager)
_COMPILED = Entry("eager-compiled", partial(Eager, compiled=True))
_PRODUCTS = Entry("bare-products", Products, verified=False)

EASY_ENTRIES = (
    _AUTO,
    _PLAIN,
    _FLOAT32,
    _FIXED_POINT,
    _torchdeq("anderson", "anderson", window=3),
    # It allocates and clears max_iter states, and needs fewer than the others.
    _torchdeq("broyden", "broyden", max_iter=25),
    _SIMPLE,
    _EAGER,
    _COMPILED,
    _jaxopt("fixed-point"),
    _jaxopt("anderson", window=5),
    _PRODUCTS,
)
HARD_ENTRIES = (
    _AUTO,
    _PLAIN,
    _FLOAT32,
    _ANDERSON,
    _FIXED_POINT,
    _torchdeq("anderson", "anderson", window=10),
    _torchdeq("anderson-20", "anderson", window=20),
    _torchdeq("broyden", "broyden", max_iter=100),
    _SIMPLE,
    _EAGER,
    _jaxopt("fixed-point"),
    _jaxopt("anderson", window=10),
    _jaxopt("anderson-vmap", window=10, per_sample=True),
    _PRODUCTS,
)
# Where a cost is followed over many problems: no one that was never the fastest.
SCALING_ENTRIES = (
    _AUTO,
    _PLAIN,
    _FIXED_POINT,
    _torchdeq("anderson", "anderson", window=3),
    _torchdeq("anderson-10", "anderson", window=10),
    _torchdeq("broyden", "broyden", max_iter=80),
    _PRODUCTS,
)


def entries_of(spec: Spec, scaling: bool = False) -> tuple[Entry, ...]:
    if scaling:
        return SCALING_ENTRIES
    return HARD_ENTRIES if spec.hard else EASY_ENTRIES


def is_reference(name: str) -> bool:
    """Whether it is one of torchdeq's solvers that stop by themselves."""
    return name.startswith("torchdeq-") and name != _SIMPLE.name
