"""The shape of the model from its checkpoint: one small file, wherever the checkpoint is."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from reverie_common.errors import NotFoundError, ObjectNotFoundError
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.adapter_selection import TransformerConfig
from reverie_trainer.jobs.admission import parse_config

_CONFIG = "transformer/config.json"


def read_transformer_config(checkpoint: str, store: ObjectStore) -> TransformerConfig:
    """Read the transformer's configuration of a checkpoint in a directory, in the store, or on the Hub. Blocks.

    Raises:
        NotFoundError: the checkpoint has none.
        InvalidArgumentError: it is no HiDream transformer's.
    """
    if checkpoint.startswith("s3://"):
        return parse_config(_from_store(checkpoint, store), f"{checkpoint}/{_CONFIG}")
    directory = Path(checkpoint).expanduser()
    if directory.is_dir():
        return parse_config(_from_file(directory / _CONFIG, checkpoint), str(directory / _CONFIG))
    if checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~")):
        return parse_config(_from_hub(checkpoint), f"{checkpoint}/{_CONFIG}")
    raise _missing(checkpoint, "there is no such directory")


def _from_store(checkpoint: str, store: ObjectStore) -> bytes:
    try:
        return store.get(f"{store.key_of(checkpoint.rstrip('/'))}/{_CONFIG}")
    except ObjectNotFoundError as error:
        raise _missing(checkpoint, "the store has no such object") from error


def _from_file(path: Path, checkpoint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _missing(checkpoint, str(error)) from error


def _from_hub(checkpoint: str) -> bytes:
    try:
        return Path(hf_hub_download(checkpoint, _CONFIG)).read_bytes()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _missing(checkpoint, f"the Hub does not give it: {error}") from error


def _missing(checkpoint: str, why: str) -> NotFoundError:
    return NotFoundError(
        f"checkpoint {checkpoint!r} has no {_CONFIG}: {why}; give a directory in the Hugging Face layout, an s3:// "
        "prefix or a Hub id (`reverie checkpoint make-tiny DIR` makes a small one)",
        reason="CHECKPOINT_INCOMPLETE",
        metadata={"checkpoint": checkpoint, "part": _CONFIG},
    )
