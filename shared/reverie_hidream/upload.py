"""`python -m reverie_hidream.upload --directory DIR --prefix checkpoints/full`: a checkpoint into the object store.

The store and its credentials come from the environment (REVERIE_STORE_*), as for the services. May be repeated after an
interruption: chunks that arrived are not sent again.
"""

import logging
import sys
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from reverie_common.errors import ReverieError
from reverie_common.process import log_fatal
from reverie_common.settings import StoreSettings
from reverie_common.storage import open_store
from reverie_common.telemetry.logs import configure_logging

from reverie_hidream.checkpoint_store import upload_checkpoint


class UploadSettings(StoreSettings):
    """What to upload, and to where."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_UPLOAD_")

    directory: Path
    """A checkpoint in the Hugging Face layout (spec 1.1)."""

    prefix: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,200}$")
    """Where in the bucket; services then take `--checkpoint s3://BUCKET/PREFIX`."""


def main() -> int:
    """Upload and print the location."""
    configure_logging("upload", "console", level="info")
    try:
        settings = UploadSettings.from_command_line()
        location = upload_checkpoint(settings.directory, open_store(settings), settings.prefix)
    except ReverieError as error:
        log_fatal(error)
        return 1
    logging.getLogger(__name__).info("done: use --checkpoint %s", location)
    return 0


if __name__ == "__main__":
    sys.exit(main())
