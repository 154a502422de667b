"""The shape of the model from its checkpoint: one small file, wherever the checkpoint is."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from reverie_common.errors import NotFoundError, ObjectNotFoundError, ReverieError
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig
from reverie_trainer.jobs.admission.admission import parse_config
from reverie_trainer.jobs.admission.encoder_estimate import ENCODER_PARTS, count_parameters

logger = logging.getLogger(__name__)

_CONFIG = "transformer/config.json"


def read_transformer_config(checkpoint: str, store: ObjectStore) -> TransformerConfig:
    """Read the transformer's configuration of a checkpoint in a directory, in the store, or on the Hub. Blocks.

    Raises:
        NotFoundError: the checkpoint has none.
        InvalidArgumentError: it is no HiDream transformer's.
    """
    return parse_config(_read(checkpoint, _CONFIG, store), f"{checkpoint}/{_CONFIG}")


def read_encoder_configs(checkpoint: str, store: ObjectStore) -> Mapping[str, Mapping[str, Any]]:
    """Read the configurations of the text encoders that a checkpoint has, by name. Blocks.

    The released checkpoint lacks Llama. What cannot be read is left out: only estimates use it.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    for name, part in ENCODER_PARTS.items():
        try:
            config = json.loads(_read(checkpoint, f"{part}/config.json", store))
            count_parameters(name, config)
            configs[name] = config
        except (ReverieError, ValueError) as error:
            logger.info("the size of %s is taken from the released model: %s", name, error)
    return configs


def _read(checkpoint: str, path: str, store: ObjectStore) -> bytes:
    if checkpoint.startswith("s3://"):
        return _from_store(checkpoint, path, store)
    directory = Path(checkpoint).expanduser()
    if directory.is_dir():
        return _from_file(directory, path, checkpoint)
    if checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~")):
        return _from_hub(checkpoint, path)
    raise _missing(checkpoint, path, "there is no such directory")


def _from_store(checkpoint: str, path: str, store: ObjectStore) -> bytes:
    try:
        return store.get(f"{store.key_of(checkpoint.rstrip('/'))}/{path}")
    except ObjectNotFoundError as error:
        raise _missing(checkpoint, path, "the store has no such object") from error


def _from_file(directory: Path, path: str, checkpoint: str) -> bytes:
    try:
        return (directory / path).read_bytes()
    except OSError as error:
        raise _missing(checkpoint, path, str(error)) from error


def _from_hub(checkpoint: str, path: str) -> bytes:
    try:
        return Path(hf_hub_download(checkpoint, path)).read_bytes()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _missing(checkpoint, path, f"the Hub does not give it: {error}") from error


def _missing(checkpoint: str, path: str, why: str) -> NotFoundError:
    return NotFoundError(
        f"checkpoint {checkpoint!r} has no {path}: {why}; give a directory in the Hugging Face layout, an s3:// "
        "prefix or a Hub id (`reverie checkpoint make-tiny DIR` makes a small one)",
        reason="CHECKPOINT_INCOMPLETE",
        metadata={"checkpoint": checkpoint, "part": path},
    )
