"""Reverie's SDK: `Reverie` for asyncio, `SyncReverie` for everything else. Needs grpcio and protobuf only.

Job files are read by `reverie_client.specs`, which needs PyYAML; the command is in `reverie_client.cli`.
"""

from reverie_client.calls import CallPolicy
from reverie_client.client import Reverie
from reverie_client.errors import JobFailedError, TransferError, UrlExpiredError
from reverie_client.folder import LocalFolder, LocalSample, read_folders
from reverie_client.sync import SyncReverie
from reverie_client.transfer import Progress

__all__ = [
    "Reverie",
    "SyncReverie",
    "CallPolicy",
    "read_folders",
    "LocalFolder",
    "LocalSample",
    "Progress",
    "JobFailedError",
    "TransferError",
    "UrlExpiredError",
]
