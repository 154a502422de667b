"""What the tests of every area share: a real S3 server, stores on it, the tiny checkpoint, and free ports."""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from reverie_common.ports import free_ports
from reverie_common.storage import MemoryStore, S3Store
from reverie_common.storage.seaweed import Seaweed

HIDREAM_SOURCES = Path(__file__).parents[1] / "shared" / "reverie_hidream"


@pytest.fixture(scope="session", autouse=True)
def _no_process_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run when a process that a test started outlives all tests; set up first, so torn down last."""
    base = str(tmp_path_factory.getbasetemp())
    yield
    left = [found for process in psutil.process_iter() if (found := _if_below(process, base))]
    assert not left, f"tests left processes behind: {left}"


def _if_below(process: psutil.Process, directory: str) -> str | None:
    """Return the command line of a process that names `directory` in its arguments or environment."""
    try:
        words = [*process.cmdline(), *process.environ().values()]
        is_ours = process.pid != os.getpid() and any(directory in word for word in words)
        return " ".join(process.cmdline()) if is_ours else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return None


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A SeaweedFS server with random credentials. A test that stops it has to start it again."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_store(seaweed: Seaweed) -> S3Store:
    """A store on a new, empty bucket of the session's SeaweedFS; it does not retry."""
    return make_bucket(seaweed)


@pytest.fixture(scope="module")
def module_s3_store(seaweed: Seaweed) -> S3Store:
    """Like s3_store, one bucket for all tests of a module."""
    return make_bucket(seaweed)


def make_bucket(seaweed: Seaweed) -> S3Store:
    """Make a bucket of a random name and a store on it."""
    bucket = f"test-{secrets.token_hex(6)}"
    store = S3Store(seaweed.endpoint, bucket, seaweed.access_key, seaweed.secret_key, retry_seconds=0.0)
    store.make_bucket()
    return store


@pytest.fixture
def memory_store() -> MemoryStore:
    """An empty store in memory."""
    return MemoryStore()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Chooses a loopback port that nothing listens on."""
    return lambda: free_ports(1)[0]


@pytest.fixture
def store_environment(s3_store: S3Store, seaweed: Seaweed) -> dict[str, str]:
    """Environment with which a Reverie process uses the bucket of s3_store."""
    return {**seaweed.environment, "REVERIE_STORE_BUCKET": s3_store.bucket}


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Undo what configure_logging does to the root logger, so that tests pass in any order."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny HiDream checkpoint, made once for each state of the code that makes it."""
    from reverie_hidream.tiny import make_tiny_checkpoint  # torch: only for tests that need it

    digest = hashlib.sha256()
    for source in sorted(HIDREAM_SOURCES.glob("**/*.py")):
        digest.update(source.read_bytes())
    # Beside the numbered directories of the runs, so that the next run finds it.
    directory = tmp_path_factory.getbasetemp().parent / f"tiny-checkpoint-{digest.hexdigest()[:16]}"
    if not (directory / "model_index.json").is_file():
        part = tmp_path_factory.mktemp("tiny") / "checkpoint"
        make_tiny_checkpoint(part)
        if not directory.exists():
            part.rename(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of a few thousand random weights, with its tokenizer and image processor."""
    import torch
    from reverie_hidream.tiny_tokenizers import clip_tokenizer, corpus_lines
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 1024, "bos_token_id": 1022, "eos_token_id": 1023, "pad_token_id": 1023}
    directory = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
        CLIPModel(config).save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    clip_tokenizer(corpus_lines(), model_max_length=77).save_pretrained(directory)
    return directory
