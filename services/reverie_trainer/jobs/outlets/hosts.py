"""Which addresses the trainer may send something to on behalf of a job."""

import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedHosts:
    """An allow-list of host names; nothing is allowed by default."""

    names: Collection[str] = ()

    def problem(self, url: str) -> str | None:
        """Return why a URL may not be called, None where it may; asks no name server."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").lower()
            _ = parts.port
        except ValueError:
            return "it is no URL; write https://host/path"
        if not host or parts.username is not None or parts.password is not None:
            return "it is no plain URL; write https://host/path, without a user"
        if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK_NAMES):
            return f"scheme {parts.scheme!r} is not allowed; use https"
        if host not in self.names:
            allowed = ", ".join(sorted(self.names)) or "none"
            return f"host {host!r} is not allowed (allowed: {allowed}); the trainer's --webhook-hosts says which are"
        return None

    def require_public_address(self, url: str) -> str | None:
        """Return why the addresses behind a URL's name may not be called. Blocks for a name server.

        A name on the list may come to point into the trainer's own network; an address or `localhost` that is on the
        list itself is meant.
        """
        host = (urlsplit(url).hostname or "").lower()
        if host in _LOOPBACK_NAMES or _is_address(host):
            return None
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            return f"host {host!r} is not found: {error}"
        private = [entry[4][0] for entry in found if not ipaddress.ip_address(entry[4][0]).is_global]
        return f"host {host!r} points to {private[0]}, which is not public" if private else None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
