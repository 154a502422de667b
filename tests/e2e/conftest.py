"""The whole product on free ports: one stack for all end-to-end tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reverie_client import SyncReverie
from reverie_client.stack import Stack, StackOptions

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack with the tiny checkpoint. A test that kills a service restarts it."""
    state_dir = tmp_path_factory.mktemp("stack")
    with Stack(StackOptions(state_dir=state_dir).with_ephemeral_ports()) as running:
        yield running


@pytest.fixture(scope="session")
def reverie(stack: Stack) -> Iterator[SyncReverie]:
    """The SDK, connected to every service of the stack."""
    addresses = stack.addresses
    with SyncReverie(
        addresses["trainer"], encoder=addresses["encoder"], vae=addresses["vae"], sampler=addresses["sampler"]
    ) as connected:
        yield connected


@pytest.fixture(scope="session")
def quickstart_dataset(reverie: SyncReverie) -> str:
    """The quickstart photographs, uploaded."""
    reverie.datasets.create("quickstart")
    reverie.datasets.upload_folder("quickstart", QUICKSTART / "photos")
    return "quickstart"
