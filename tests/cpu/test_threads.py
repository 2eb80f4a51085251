"""The CPU engine on several threads: the same bits as on one, and solves in forked processes."""

import os
import subprocess
import sys

import pytest
import torch
from engine_cases import Call, make_adjoint, make_forward
from paths import CASES

from fastdeq.backends import extension
from fastdeq.solvers import Anderson, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Around the size from which workers share one packed weight, and where they share products.
@pytest.mark.parametrize(
    ("size", "batch"), [(30, 900), (250, 70), (256, 3), (257, 70), (740, 1), (740, 2)]
)
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_results_do_not_depend_on_the_number_of_threads(threads, size, batch, precision):
    torch.manual_seed(size)
    for make in (make_forward, make_adjoint):
        case = make(batch, size, torch.float32, rate=0.9)
        for solver in (Picard(), Anderson()):
            call = Call(solver, 1e-5, 60, precision)
            threads(1)
            known = case.engine(call)
            for count in (2, 3, 2, 2):  # whether threads are used may change from call to call
                threads(count)
                for expected, actual in zip(known, case.engine(call), strict=True):
                    assert expected is actual is None or torch.equal(expected, actual)


FORKED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from engine_cases import Call, make_adjoint, make_forward
from fastdeq.solvers import Anderson
torch.set_num_threads(2)
cases = [make_forward(200, 60, torch.float64), make_adjoint(40, 300, torch.float32)]
call = Call(Anderson(), 1e-6, 50)
known = [case.engine(call).value for case in cases]
child = os.fork()
if child == 0:
    signal.alarm(40)  # ends a child that hangs
    same = all(torch.equal(case.engine(call).value, k) for case, k in zip(cases, known))
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_solves():
    """GCC's OpenMP would wait for the threads of the parent."""
    done = subprocess.run([sys.executable, "-c", FORKED, str(CASES)], timeout=60, check=False)
    assert done.returncode == 0
