"""The entry to the SDK: one object, a group of methods for each service."""

from types import TracebackType
from typing import Self, TypeVar

import grpc
from reverie_common.errors import FailedPreconditionError
from reverie_common.rpc.channel import connect

from reverie_client.calls import CallPolicy
from reverie_client.datasets import Datasets
from reverie_client.encoders import Encoders
from reverie_client.jobs import Jobs
from reverie_client.sampling import Sampling
from reverie_client.vae import Vae

Group = TypeVar("Group")

DEFAULT_ADDRESS = "127.0.0.1:50053"


class Reverie:
    """A connection to Reverie's services.

        async with Reverie("127.0.0.1:50053") as reverie:
            job = await reverie.jobs.submit(load_job_spec(Path("job.yaml")))
            job = await reverie.jobs.result(job.job_id)

    Every call has a deadline, is repeated for `policy.retry_seconds` while the server is unavailable (a request id
    makes that safe), and raises the classes of `reverie_common.errors`. Nothing connects before the first call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        encoder: str | None = None,
        vae: str | None = None,
        sampler: str | None = None,
        policy: CallPolicy | None = None,
    ) -> None:
        """Name the services as `host:port`: the trainer, and those of the others that are to be called directly."""
        self.address = address
        self._policy = policy or CallPolicy()
        self._channels: list[grpc.aio.Channel] = []
        trainer = self._connect(address)
        self.jobs = Jobs(trainer, self._policy)
        self.datasets = Datasets(trainer, self._policy)
        self._encoders = Encoders(self._connect(encoder), self._policy) if encoder else None
        self._vae = Vae(self._connect(vae), self._policy) if vae else None
        self._sampling = Sampling(self._connect(sampler), self._policy) if sampler else None

    @property
    def encoders(self) -> Encoders:
        """The text encoders. Raises FailedPreconditionError without an address."""
        return _named(self._encoders, "encoder")

    @property
    def vae(self) -> Vae:
        """The VAE. Raises FailedPreconditionError without an address."""
        return _named(self._vae, "vae")

    @property
    def sampling(self) -> Sampling:
        """The sampler. Raises FailedPreconditionError without an address."""
        return _named(self._sampling, "sampler")

    async def close(self) -> None:
        """Close every connection."""
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        await self.close()

    def _connect(self, target: str) -> grpc.aio.Channel:
        # Every call is repeated by `calls`, which hears why it failed; gRPC's own retries would use up its deadline.
        channel = connect(target, retries=False)
        self._channels.append(channel)
        return channel


def _named(group: Group | None, name: str) -> Group:
    if group is None:
        raise FailedPreconditionError(
            f"the address of the {name} was not given; construct Reverie(..., {name}='host:port')",
            reason="NO_ADDRESS",
            metadata={"service": name},
        )
    return group
