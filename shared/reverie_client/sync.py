"""The SDK for code without asyncio: the same methods, blocking."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from reverie_client.client import Reverie
from reverie_client.datasets import Datasets
from reverie_client.encoders import Encoders
from reverie_client.jobs import Jobs
from reverie_client.sampling import Sampling
from reverie_client.vae import Vae

Group = TypeVar("Group")
Params = ParamSpec("Params")
Result = TypeVar("Result")
Item = TypeVar("Item")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reverie-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def iterate(self, items: AsyncIterator[Item]) -> Iterator[Item]:
        try:
            while True:
                try:
                    yield self.run(_next(items))
                except StopAsyncIteration:
                    return
        finally:
            self.run(_close(items))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(items: AsyncIterator[Item]) -> Item:
    return await anext(items)


async def _close(items: AsyncIterator[Any]) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()


class _Blocking(Generic[Group]):
    """Base of the blocking groups: an asynchronous group and the loop that runs it."""

    def __init__(self, group: Group, loop: _Loop) -> None:
        self._group = group
        self._loop = loop


class _call(Generic[Group, Params, Result]):  # noqa: N801 - reads as a decorator
    """Turns a coroutine method of a group into a blocking method of the same signature."""

    def __init__(self, method: Callable[Concatenate[Group, Params], Coroutine[Any, Any, Result]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, owner: None, kind: Any) -> Self: ...
    @overload
    def __get__(self, owner: _Blocking[Group], kind: Any) -> Callable[Params, Result]: ...
    def __get__(self, owner: _Blocking[Group] | None, kind: Any) -> Self | Callable[Params, Result]:
        if owner is None:
            return self

        def blocking(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            return owner._loop.run(self._method(owner._group, *args, **kwargs))

        return blocking


class _iterate(Generic[Group, Params, Item]):  # noqa: N801 - reads as a decorator
    """Turns an asynchronous iterator method of a group into a blocking iterator of the same signature."""

    def __init__(self, method: Callable[Concatenate[Group, Params], AsyncIterator[Item]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, owner: None, kind: Any) -> Self: ...
    @overload
    def __get__(self, owner: _Blocking[Group], kind: Any) -> Callable[Params, Iterator[Item]]: ...
    def __get__(self, owner: _Blocking[Group] | None, kind: Any) -> Self | Callable[Params, Iterator[Item]]:
        if owner is None:
            return self

        def blocking(*args: Params.args, **kwargs: Params.kwargs) -> Iterator[Item]:
            return owner._loop.iterate(self._method(owner._group, *args, **kwargs))

        return blocking


class SyncJobs(_Blocking[Jobs]):
    """`Jobs`, blocking."""

    check = _call(Jobs.check)
    submit = _call(Jobs.submit)
    get = _call(Jobs.get)
    list = _call(Jobs.list)
    fork = _call(Jobs.fork)
    request_validation = _call(Jobs.request_validation)
    cancel = _call(Jobs.cancel)
    resume = _call(Jobs.resume)
    watch = _iterate(Jobs.watch)
    wait = _call(Jobs.wait)
    result = _call(Jobs.result)
    checkpoints = _call(Jobs.checkpoints)
    artifacts = _call(Jobs.artifacts)
    metrics = _call(Jobs.metrics)
    validation_images = _call(Jobs.validation_images)
    evaluations = _call(Jobs.evaluations)
    fetch = _call(Jobs.fetch)


class SyncDatasets(_Blocking[Datasets]):
    """`Datasets`, blocking."""

    create = _call(Datasets.create)
    upload = _call(Datasets.upload)
    upload_folder = _call(Datasets.upload_folder)
    send_files = _call(Datasets.send_files)
    send_file = _call(Datasets.send_file)
    add = _call(Datasets.add)
    get = _call(Datasets.get)
    list = _call(Datasets.list)
    delete = _call(Datasets.delete)
    scan = _iterate(Datasets.scan)
    upload_hub = _call(Datasets.upload_hub)
    import_bucket = _iterate(Datasets.import_bucket)
    import_urls = _iterate(Datasets.import_urls)


class SyncEncoders(_Blocking[Encoders]):
    """`Encoders`, blocking."""

    encode = _iterate(Encoders.encode)
    describe = _call(Encoders.describe)


class SyncVae(_Blocking[Vae]):
    """`Vae`, blocking."""

    inspect = _iterate(Vae.inspect)
    encode = _iterate(Vae.encode)
    encode_masks = _iterate(Vae.encode_masks)
    decode = _call(Vae.decode)
    preview = _call(Vae.preview)
    describe = _call(Vae.describe)


class SyncSampling(_Blocking[Sampling]):
    """`Sampling`, blocking."""

    sample = _iterate(Sampling.sample)
    draw = _call(Sampling.draw)
    save = _call(Sampling.save)
    describe = _call(Sampling.describe)


class SyncReverie:
    """`Reverie`, blocking.

        with SyncReverie("127.0.0.1:50053") as reverie:
            print(reverie.jobs.list())

    The methods, their arguments and their errors are those of `Reverie`; `watch` and the other streams are iterators.
    Callbacks run on the connection's own thread.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `Reverie`."""
        self._loop = _Loop()
        self._reverie = self._loop.run(_construct(args, kwargs))

    @property
    def jobs(self) -> SyncJobs:
        """Training jobs."""
        return SyncJobs(self._reverie.jobs, self._loop)

    @property
    def datasets(self) -> SyncDatasets:
        """Datasets."""
        return SyncDatasets(self._reverie.datasets, self._loop)

    @property
    def encoders(self) -> SyncEncoders:
        """The text encoders."""
        return SyncEncoders(self._reverie.encoders, self._loop)

    @property
    def vae(self) -> SyncVae:
        """The VAE."""
        return SyncVae(self._reverie.vae, self._loop)

    @property
    def sampling(self) -> SyncSampling:
        """The sampler."""
        return SyncSampling(self._reverie.sampling, self._loop)

    def close(self) -> None:
        """Close every connection and end the thread."""
        self._loop.run(self._reverie.close())
        self._loop.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


async def _construct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reverie:
    return Reverie(*args, **kwargs)
