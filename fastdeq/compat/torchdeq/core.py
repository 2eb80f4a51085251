"""DEQs as torchdeq has them: modules that are called with a function and a start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import check_choice
from .base import DEQBase, check_names, is_own
from .dropout import reset_dropout
from .grad import Writer
from .norm import reset_norm
from .sampled import SampledDEQ, limit_of
from .solver import SolverStat
from .utils.config import DEQConfig
from .utils.layer_utils import StateMap


class DEQIndexing(SampledDEQ):
    """Returns states after some evaluations of one solve, each with a gradient of its own."""

    def _compute_f_iter(self, f_max_iter: float) -> list[int]:
        """The evaluations after which states are returned, the last one included."""
        count, indexing = self._asked_for()
        most = int(f_max_iter)
        if count <= 1:
            return [*indexing, most]
        count = max(min(most, count), 1)
        return [most - (count - 1 - k) * (most // count) for k in range(count)]

    def _solve_fixed_point(
        self,
        deq_func: StateMap,
        z_init: Tensor,
        f_max_iter: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        indexing: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor], SolverStat]:
        """The state, those after the steps in ``indexing``, and statistics; without a graph."""
        indexing = indexing if self.training else None
        return self._found(deq_func, z_init, solver_kwargs, max_iter=f_max_iter, indexing=indexing)

    def _trained(
        self, deq_func: StateMap, z: Tensor, kwargs: dict[str, Any], writer: Writer | None
    ) -> tuple[list[Tensor], SolverStat]:
        limit = limit_of(kwargs)
        steps = self.indexing if limit is None else self._compute_f_iter(limit)
        most = self.f_max_iter if limit is None else limit
        _, along, info = self._solve_fixed_point(
            deq_func, z, f_max_iter=most, solver_kwargs=kwargs, indexing=steps
        )
        states = []
        # A solver of one's own may return fewer; the last gradient is that of the last state.
        gradients = self.produce_grad[len(self.produce_grad) - len(along) :]
        for state, gradient in zip(along, gradients, strict=False):
            states += gradient(self, deq_func, deq_func.detach(state), writer=writer)
        return states, info


class DEQSliced(SampledDEQ):
    """Returns the states at the ends of successive solves, each of which begins where the steps
    that are differentiated at the end of the one before led to."""

    def _compute_f_iter(self, f_max_iter: float) -> list[int]:
        """Most evaluations of each of the solves."""
        count, indexing = self._asked_for()
        most = int(f_max_iter)
        if count > 1:
            return [most // count] * count
        ends = [*indexing, most]
        return [end - begin for begin, end in zip([0, *indexing], ends, strict=True)]

    def _solve_fixed_point(
        self,
        deq_func: StateMap,
        z_init: Tensor,
        f_max_iter: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, SolverStat]:
        """The state and statistics; without a graph."""
        z, _, info = self._found(deq_func, z_init, solver_kwargs, max_iter=f_max_iter)
        return z, info

    def _trained(
        self, deq_func: StateMap, z: Tensor, kwargs: dict[str, Any], writer: Writer | None
    ) -> tuple[list[Tensor], SolverStat]:
        limit = limit_of(kwargs)
        steps = self.indexing if limit is None else self._compute_f_iter(limit)
        states: list[Tensor] = []
        info = SolverStat()
        for most, gradient in zip(steps, self.produce_grad, strict=False):
            z, info = self._solve_fixed_point(deq_func, z, f_max_iter=most, solver_kwargs=kwargs)
            states += gradient(self, deq_func, deq_func.detach(z), writer=writer)
            z = states[-1]
        return states, info


_core: dict[str, Any] = {"indexing": DEQIndexing, "sliced": DEQSliced}


def register_deq(deq_type: str, core: Any) -> None:
    """Makes ``core``, a class whose instances are made of a ``DEQConfig``, known as
    ``deq_type``."""
    _core[deq_type] = core


def get_deq(args: Any = None, **kwargs: Any) -> Any:
    """A DEQ of the class ``core``: "sliced", "indexing", or one that was registered.

    Args:
        args: an ``argparse.Namespace``, a mapping or a ``DEQConfig``. It may hold other names.
        kwargs: options, which go before those in ``args``: see ``DEQSliced``.

    Raises:
        TypeError, ValueError: an unknown option or name, with the known ones.
    """
    config = DEQConfig(args)
    config.update(**kwargs)
    name = config.get("core", "sliced")
    check_choice(name, _core, "core")
    core = _core[name]
    if is_own(core):
        check_names("get_deq", kwargs)
    return core(config)


def reset_deq(model: nn.Module) -> None:
    """Makes the normalised weights of a model anew, and forgets its dropout masks: to be called at
    the beginning of each training step."""
    reset_norm(model)
    reset_dropout(model)


__all__ = ["DEQBase", "DEQIndexing", "DEQSliced", "get_deq", "register_deq", "reset_deq"]
