"""States of several tensors: each part has memory of its own, read and written where it lies."""

import pytest
import torch
from operation_cases import Calls

from fastdeq import Anderson, DEQLayer, HeavyBall, Picard, fixed_point
from fastdeq.backends import extension

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SOLVERS = (Picard(), Picard(damping=0.6), Anderson(), Anderson(damping=0.7, window=7), HeavyBall())
SHAPES = (
    ((5, 3), (5, 2, 7)),
    ((1, 1), (1, 40_001), (1, 2, 3)),
    ((3, 2, 5, 3), (3, 0), (3,), (3, 17)),
    ((9, 4, 3, 3, 2), (9, 33)),
)


def states(shapes, dtypes=(torch.float64,), layouts=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, shape in enumerate(shapes):
        part = torch.randn(shape, generator=generator, dtype=torch.float64)
        part = part.to(dtypes[i % len(dtypes)])
        if layouts and part.dim() in (4, 5):
            kind = torch.channels_last if part.dim() == 4 else torch.channels_last_3d
            part = part.contiguous(memory_format=kind)
        made.append(part)
    return tuple(made)


def coupled(c):
    """Parts that depend on each other within a sample, a contraction by 0.8 at most."""

    def f(z):
        rows = [p.double().reshape(len(p), p[0].numel()) for p in z]
        mean = torch.stack([r.sum(1) / (1 + r.shape[1]) for r in rows]).mean(0)
        spread = (mean.view(-1, *[1] * (p.dim() - 1)) for p in z)
        return tuple(
            (0.4 * torch.sin(p.double()) + 0.3 * m + q.double()).to(p.dtype)
            for p, m, q in zip(z, spread, c, strict=True)
        )

    return f


def truth(f, c):
    z = tuple(torch.zeros_like(p, dtype=torch.float64) for p in c)
    for _ in range(200):
        z = f(z)
    return z


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_parts_are_solved_as_the_loop_in_python_solves_them(solver, shapes):
    c = states(shapes)
    f = coupled(c)
    start = states(shapes, seed=1)
    found = {}
    for backend in ("auto", "reference"):
        limits = {"tol": 1e-8, "max_iter": 80, "on_failure": "ignore", "backend": backend}
        with torch.no_grad():
            found[backend] = fixed_point(f, start, solver=solver, **limits)
    (z, actual), (_, expected) = found["auto"], found["reference"]
    assert actual.status.tolist() == expected.status.tolist()
    assert actual.iterations.tolist() == expected.iterations.tolist()
    for part, exact in zip(z, truth(f, c), strict=True):
        assert part.is_contiguous()
        torch.testing.assert_close(part, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layouts", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_dtypes_and_memory_formats(shapes, dtypes, layouts):
    c = states(shapes, dtypes, layouts)
    f, seen = coupled(c), []

    def looked_at(z):
        seen.extend((p.dtype, p.is_contiguous()) for p in z)
        for p, q in zip(z, c, strict=True):
            assert (p.dtype, p.shape) == (q.dtype, q.shape)
            assert p.stride() == q.stride() or p.numel() == 0 or 1 in p.shape
        return f(z)

    # Half precision rounds each value by up to 2^-9 of it.
    low = any(d.itemsize == 2 for d in dtypes)
    tol, bound = (2e-2, 0.1) if low else (1e-5, 1e-4)
    with torch.no_grad():
        z, solution = fixed_point(looked_at, states(shapes, dtypes, layouts, 3), tol=tol)
    assert solution.converged.all()
    exact = truth(f, tuple(p.double() for p in c))
    for part, q, right in zip(z, c, exact, strict=True):
        assert part.dtype == q.dtype
        largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(part.double(), right, rtol=0, atol=bound * largest)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), "auto"], ids=str)
def test_nothing_is_copied_between_two_evaluations(solver):
    c = states(((4, 3, 8, 8), (4, 6, 5), (4, 7)), (torch.float32,), layouts=True)

    def calls(max_iter):
        with torch.no_grad(), Calls() as seen:
            fixed_point(
                lambda z: tuple(torch.cos(0.95 * p) for p in z),
                c,
                solver=solver,
                tol=0.0,
                max_iter=max_iter,
                on_failure="ignore",
            )
        return seen.names

    added = calls(13)
    for name in calls(3):
        added.remove(name)
    assert len([n for n in added if "cos" in n]) == 30
    copies = [n for n in added if any(w in n for w in ("cat", "copy", "clone", "split"))]
    assert copies == []


def _strided(p):
    wide = torch.empty(*p.shape[:1], 2 * p[0].numel() + 3, dtype=p.dtype)
    view = wide[:, 2 : 2 + p[0].numel()]
    view.copy_(p.flatten(1))
    return view.view(p.shape)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        _strided,
        lambda p: p.transpose(0, -1).contiguous().transpose(0, -1),
        lambda p: torch.stack([p, p], -1)[..., 1],
        lambda p: torch.nn.Parameter(p),
        lambda p: torch.complex(p, -p).conj().imag,
    ],
    ids=["rows", "transposed", "interleaved", "parameter", "negated"],
)
def test_values_lie_anywhere(given, solver):
    c = states(((6, 5), (6, 2, 9), (6, 1)))
    f = coupled(c)
    with torch.no_grad():
        z, _ = fixed_point(lambda z: tuple(map(given, f(z))), c, solver=solver, tol=1e-8)
        expected, _ = fixed_point(f, c, solver=solver, tol=1e-8)
    for a, b in zip(z, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_what_a_map_keeps_reuses_or_writes_to(solver):
    c = states(((4, 3), (4, 2, 2)))
    f, kept, copies = coupled(c), [], []
    limits = {"solver": solver, "tol": 1e-8}
    with torch.no_grad():
        expected, _ = fixed_point(f, c, **limits)

    def keeps(z):
        kept.extend(z)
        copies.extend(p.clone() for p in z)
        return f(z)

    same = tuple(map(torch.empty_like, c))

    def reuses(z):
        return tuple(a.copy_(b) for a, b in zip(same, f(z), strict=True))

    def writes(z):
        return tuple(a.copy_(b) for a, b in zip(z, f(z), strict=True))

    for g in (keeps, reuses, writes):
        with torch.no_grad():
            z, solution = fixed_point(g, c, **limits)
        assert solution.converged.all()
        for a, b in zip(z, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert len(kept) > 8
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    with torch.no_grad():
        z, solution = fixed_point(lambda z: z, c, **limits)
    assert solution.iterations.tolist() == [0] * 4
    assert all(torch.equal(a, b) for a, b in zip(z, c, strict=True))


def test_a_start_that_is_not_finite_is_zero_in_all_parts():
    c = states(((3, 4), (3, 2)))
    start = tuple(p.clone() for p in c)
    start[1][1, 0] = torch.nan
    seen = []

    def f(z):
        seen.append([p.clone() for p in z])
        return coupled(c)(z)

    with torch.no_grad():
        fixed_point(f, start)
    assert [float(p[1].abs().sum()) for p in seen[0]] == [0.0, 0.0]
    assert all(torch.equal(p[::2], q[::2]) for p, q in zip(seen[0], start, strict=True))


def test_all_of_a_tuple_may_be_one_sample():
    c = states(((7, 3), (2, 5, 2), (1,)))
    with torch.no_grad():
        z, solution = fixed_point(
            lambda z: tuple(0.5 * torch.cos(p) + q for p, q in zip(z, c, strict=True)),
            c,
            batch_dim=None,
            tol=1e-9,
        )
    assert solution.iterations.shape == (1,)
    for p, q in zip(z, c, strict=True):
        torch.testing.assert_close(p, 0.5 * torch.cos(p) + q, rtol=0, atol=1e-7)


def test_wrong_parts_raise():
    c = states(((3, 4), (3, 2)))
    calls = []

    def later(z):
        calls.append(0)
        return coupled(c)(z) if len(calls) < 3 else (z[0], z[1][:, :1])

    with torch.no_grad(), pytest.raises(ValueError, match="shapes"):
        fixed_point(later, c, solver="picard", tol=0.0)


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_of_tuples(threads):
    shapes = ((2, 3, 64, 64), (2, 40_000), (2, 3))
    x = tuple(p.requires_grad_() for p in states(shapes, layouts=True))

    def cell(z, x):
        return coupled(x)(z)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        z = DEQLayer(cell, tol=1e-10)(x, z0=states(shapes, layouts=True, seed=2))
        found = torch.autograd.grad(sum(p.square().sum() for p in z), x)
    finally:
        torch.set_num_threads(before)
    y = tuple(torch.zeros_like(p) for p in x)
    for _ in range(60):
        y = cell(y, x)
    expected = torch.autograd.grad(sum(p.square().sum() for p in y), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
