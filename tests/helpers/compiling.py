"""torch.compile without kernels of its own, counted."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

# one for all tests: a function that was compiled in an earlier one is compiled with it again after a reset
COUNTER = CompileCounterWithBackend("aot_eager")
compile_with = torch.compile


def counted(function, **options):
    return compile_with(function, backend=COUNTER, **options)


def fresh():
    """The counter at zero, and nothing compiled yet."""
    torch._dynamo.reset()
    COUNTER.clear()
    return COUNTER
