"""Every optimiser on the shapes of the reference LoKr: time of a step and bytes of state, one thread of a CPU.

    python -m tests.bench.optimizer_steps

256 modules with factors of 16 x 16 and 160 x 160, 6,619,136 numbers (spec 4.3). The gradient is random and there from
the start, so that nothing but the optimiser is timed.
"""

import logging
import statistics
import sys
import time

import torch
from reverie_hidream.optimizers import OPTIMIZERS, build_optimizer, optimizer_tensors, parameter_dtype
from torch import nn

NUM_MODULES = 256
SHAPES = ((16, 16), (160, 160))
NUM_STEPS = 5


def reference_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """The factors of the reference LoKr with a gradient each."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for _ in range(NUM_MODULES) for shape in SHAPES
    ]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


def measure(name: str) -> tuple[float, float]:
    """Median seconds of a step, and MB of state."""
    parameters = reference_parameters(parameter_dtype(name))
    optimizer = build_optimizer(name, parameters, learning_rate=1e-4)
    seconds = []
    # SOAP finds its first bases in the first step, and makes no other.
    for _ in range(2 + NUM_STEPS):
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:]), sum(tensor.nbytes for tensor in optimizer_tensors(optimizer).values()) / 1e6


def main() -> None:
    """Print a line for each optimiser."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name in OPTIMIZERS:
        seconds, megabytes = measure(name)
        sys.stdout.write(f"{name:28} {1000 * seconds:8.1f} ms/step {megabytes:8.1f} MB of state\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
