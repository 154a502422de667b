"""Getting one file from the web without being led astray: hosts and addresses are checked before anything is sent.

A host must be on the list; a private address must be on it too, so that a name that somebody points at the inside of
this network opens nothing. The connection goes to the very address that was checked.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3

_CHUNK_BYTES = 1 << 20
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"https": 443, "http": 80}


class DownloadError(Exception):
    """A file cannot be had; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadLimits:
    """What may be asked for, and for how long."""

    hosts: Sequence[str]
    """`HOST` at its usual port, or `HOST:PORT`."""
    max_bytes: int
    timeout_seconds: float = 60.0
    """Without a byte for so long, the server is given up."""
    total_seconds: float = 300.0
    """The whole file must be there within so long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A URL that was checked, and the address that it was checked for."""

    url: SplitResult
    host: str
    port: int
    address: str


def download(url: str, limits: DownloadLimits) -> bytes:
    """Return the bytes behind a URL. Blocks.

    Raises:
        DownloadError: it may not be asked for, is too large, too slow, or not there.
    """
    deadline = time.monotonic() + limits.total_seconds
    for _ in range(_MAX_REDIRECTS + 1):
        place = _check(url, limits)
        try:
            answer = _ask(place, limits, deadline)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise DownloadError(f"{place.host} does not give the file: {error}; try again later") from error
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise DownloadError(f"more than {_MAX_REDIRECTS} redirections; give the URL that they lead to")


def _check(url: str, limits: DownloadLimits) -> _Place:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise DownloadError(f"{url[:200]!r} is no URL: {error}; correct it") from error
    if parts.scheme not in _PORTS or not host or parts.username is not None:
        raise DownloadError(f"{url[:200]!r} is no https URL without a user name; correct it")
    if not _is_listed(host, port, parts.scheme, limits.hosts):
        listed = ", ".join(limits.hosts) or "none"
        raise DownloadError(
            f"host {host} at port {port} is not one that the trainer may read from (--source-hosts: {listed}); add it "
            "there, or upload the file"
        )
    address = _resolve(host, port)
    _check_address(host, port, address, parts.scheme, limits.hosts)
    return _Place(url=parts, host=host, port=port, address=address)


def _is_listed(host: str, port: int, scheme: str, hosts: Sequence[str]) -> bool:
    return _written(host, port) in hosts or (host in hosts and port == _PORTS[scheme])


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolve(host: str, port: int) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DownloadError(f"host {host} has no address: {error}; check its name") from error
    # The first one that most servers listen on: only the address that is checked is connected to.
    return str(min(found, key=lambda item: item[0] != socket.AF_INET)[4][0])


def _check_address(host: str, port: int, address: str, scheme: str, hosts: Sequence[str]) -> None:
    parsed = ipaddress.ip_address(address.split("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    plain = mapped or parsed
    if not plain.is_global and not _is_listed(str(plain), port, scheme, hosts):
        raise DownloadError(
            f"host {host} has the private address {plain}, which is not one that the trainer may read from; add "
            f"{_written(str(plain), port)} to --source-hosts, or upload the file"
        )
    if scheme == "http" and not plain.is_loopback:
        raise DownloadError(f"http is only for this machine, and {host} is {plain}; use https")


def _ask(place: _Place, limits: DownloadLimits, deadline: float) -> bytes | str:
    """Return the body, or where a redirection leads."""
    target = place.url.path or "/"
    if place.url.query:
        target += f"?{place.url.query}"
    with _pool(place, limits) as pool:
        response = pool.urlopen(
            "GET",
            target,
            headers={"Host": place.url.netloc, "Accept": "image/*", "User-Agent": "reverie"},
            redirect=False,
            retries=False,
            preload_content=False,
            # Nothing is unpacked here: a small file could become an enormous one.
            decode_content=False,
        )
        with response:
            if response.status in _REDIRECTS and response.headers.get("Location"):
                return str(response.headers["Location"])
            if response.status != 200:
                raise DownloadError(f"{place.host} answered {response.status}; check the URL")
            return _read(response, limits, deadline)


def _pool(place: _Place, limits: DownloadLimits) -> urllib3.HTTPConnectionPool:
    timeout = urllib3.Timeout(connect=limits.timeout_seconds, read=limits.timeout_seconds)
    if place.url.scheme == "http":
        return urllib3.HTTPConnectionPool(place.address, place.port, timeout=timeout)
    return urllib3.HTTPSConnectionPool(
        place.address,
        place.port,
        timeout=timeout,
        # The address was checked, the certificate must be the name's.
        server_hostname=place.host,
        assert_hostname=place.host,
        ssl_context=ssl.create_default_context(),
    )


def _read(response: urllib3.BaseHTTPResponse, limits: DownloadLimits, deadline: float) -> bytes:
    said = response.headers.get("Content-Length", "")
    if said.isdigit() and int(said) > limits.max_bytes:
        raise DownloadError(f"the file has {said} bytes, the limit is {limits.max_bytes}; make it smaller")
    parts = []
    num_bytes = 0
    for chunk in response.stream(_CHUNK_BYTES, decode_content=False):
        num_bytes += len(chunk)
        if num_bytes > limits.max_bytes:
            raise DownloadError(f"the file has more than {limits.max_bytes} bytes, the limit; make it smaller")
        if time.monotonic() > deadline:
            raise DownloadError(f"the file was not there within {limits.total_seconds:g} s; try again later")
        parts.append(chunk)
    return b"".join(parts)
