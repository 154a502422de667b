"""The command line and environment of each service."""

import os
import sys
from collections.abc import Mapping

from reverie_common.process import child_environment

from reverie_client.stack.options import StackOptions
from reverie_client.stack.processes import STACK_VARIABLE
from reverie_client.stack.state import StateDirectory

PEERS: Mapping[str, Mapping[str, str]] = {
    "encoder": {},
    "vae": {},
    "sampler": {"--encoders": "encoder", "--vae": "vae"},
    "trainer": {"--encoders": "encoder", "--vae": "vae", "--sampler": "sampler"},
}
"""Which services each service calls, by the flag that takes the address."""


def service_command(
    name: str,
    *,
    options: StackOptions,
    state: StateDirectory,
    checkpoint: str,
    addresses: Mapping[str, str],
    metrics_port: int,
) -> list[str]:
    """Return the command that runs one service."""
    port = addresses[name].rpartition(":")[2]
    command = [sys.executable, "-m", f"reverie_{name}", "--checkpoint", checkpoint]
    command += ["--port", port, "--metrics-port", str(metrics_port), "--ready-file", str(state.ready_file(name))]
    for flag, peer in PEERS[name].items():
        command += [flag, addresses[peer]]
    if name == "trainer":
        command += ["--state-dir", str(state.service_dir("trainer"))]
    return [*command, *options.flags.get(name, ())]


def service_environment(
    options: StackOptions, state: StateDirectory, store_environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of every service: ours without settings of other stacks, plus the store's."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("REVERIE_")}
    return {
        **child_environment(inherited),
        # One thread in each service: with two, tensor copies spin and cost 2-6 times the CPU.
        "OMP_NUM_THREADS": "1",
        # Threads that wait for one another must sleep: spinning on shared cores made a step 3-20 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        STACK_VARIABLE: str(state.path),
        **store_environment,
        **options.environment,
    }
