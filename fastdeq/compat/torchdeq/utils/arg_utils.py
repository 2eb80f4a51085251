"""The options of a DEQ as arguments of a command line."""

from __future__ import annotations

from typing import Any

#: Name, type and default of the arguments that take one value, and what they are.
_VALUES: tuple[tuple[str, type[Any], Any, str], ...] = (
    ("f_solver", str, "fixed_point_iter", "solver of the forward pass"),
    ("b_solver", str, "fixed_point_iter", "solver of the implicit gradient"),
    ("f_max_iter", int, 40, "most evaluations of a forward solve"),
    ("b_max_iter", int, 40, "most products of an implicit gradient"),
    ("f_tol", float, 1e-3, "tolerance of the forward solve, see f_stop_mode"),
    ("b_tol", float, 1e-6, "tolerance of the implicit gradient, see b_stop_mode"),
    ("f_stop_mode", str, "abs", "'abs': |f(z) - z| of each sample; 'rel': divided by |f(z)|"),
    ("b_stop_mode", str, "abs", "'abs': relative to the incoming gradient; 'rel': to the adjoint"),
    ("eval_factor", float, 1.0, "f_max_iter is multiplied by it in eval mode"),
    ("eval_f_max_iter", int, 0, "f_max_iter in eval mode, where it is not 0"),
    ("norm_type", str, "weight_norm", "'weight_norm', 'spectral_norm', 'none', or one registered"),
    ("norm_clip_value", float, 1.0, "largest factor of a weight, with --norm_clip"),
    ("norm_target_norm", float, 1.0, "norm of a weight, with --norm_no_scale"),
    ("sn_n_power_iters", int, 1, "power iterations of each reset of a spectral norm"),
    ("core", str, "sliced", "'sliced', 'indexing', or one registered"),
    ("n_states", int, 1, "states along a solve that a training step returns, spaced evenly"),
    ("gamma", float, 0.8, "decay of the weights of fp_correction"),
    ("tau", float, 1.0, "damping of the steps that are differentiated"),
    ("sup_gap", int, -1, "returns each so-many-th step that is differentiated, where it is > 0"),
    ("jac_loss_weight", float, 0.0, "weight of a Jacobian penalty, for the training script"),
    ("jac_loss_freq", float, 0.0, "how often it is applied, for the training script"),
    ("jac_incremental", int, 0, "after how many steps it grows, for the training script"),
)
_LISTS: tuple[tuple[str, list[int], str], ...] = (
    ("indexing", [], "evaluations after which a training step returns states too"),
    ("grad", [1], "steps that are differentiated, one number or one for each state"),
    ("sup_loc", [], "which of the steps that are differentiated are returned too"),
)
_FLAGS: tuple[tuple[str, str], ...] = (
    ("norm_no_scale", "no learnable norm of a weight: --norm_target_norm"),
    ("norm_clip", "limit the factor of a weight to --norm_clip_value"),
    ("ift", "the implicit gradient"),
    ("hook_ift", "the same"),
    ("sradius_mode", "estimate the spectral radius in eval mode, for the training script"),
)

#: Every option of a command line, by name.
NAMES = (*(v[0] for v in _VALUES), *(v[0] for v in _LISTS), *(v[0] for v in _FLAGS))


def add_deq_args(parser: Any) -> None:
    """Adds the options of a DEQ, its normalization and its penalties to an argument parser."""
    for name, kind, default, text in _VALUES:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, numbers, text in _LISTS:
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(numbers), help=text)
    for name, text in _FLAGS:
        parser.add_argument(f"--{name}", action="store_true", help=text)
