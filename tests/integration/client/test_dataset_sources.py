"""Where pictures come from: the command, the SDK and a trainer process, on a real store."""

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from reverie.training.v1 import training_pb2
from reverie_client import SyncReverie
from reverie_client.cli.app import app
from reverie_common.errors import FailedPreconditionError
from reverie_common.storage import S3Store
from reverie_common.storage.keys import dataset_manifest_key
from reverie_common.storage.seaweed import Seaweed
from typer.testing import CliRunner, Result

SOURCE_BUCKET = "client-test-photos"

Run = Callable[..., Result]


class Trainer(Protocol):
    """What conftest's TrainerProcess offers."""

    address: str


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> Run:
    environment = {"REVERIE_ADDRESS": trainer.address, "REVERIE_STATE_DIR": str(tmp_path / "state")}
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments], env=environment)


@pytest.fixture
def name(run: Run) -> str:
    """An empty dataset."""
    name = f"sources-{uuid.uuid4().hex[:8]}"
    assert run("dataset", "create", name).exit_code == 0
    return name


@pytest.fixture
def samples_of(reverie: SyncReverie, seaweed: Seaweed) -> Callable[[str], dict[str, Any]]:
    """Reads the samples of a dataset, by name, as the trainer keeps them."""
    bucket = seaweed.environment["REVERIE_STORE_BUCKET"]
    store = S3Store(seaweed.endpoint, bucket, seaweed.access_key, seaweed.secret_key)

    def read(name: str) -> dict[str, Any]:
        key = dataset_manifest_key(name, reverie.datasets.get(name).version)
        return {sample["name"]: sample for sample in json.loads(store.get(key))["samples"]}

    return read


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_captions_of_a_table_and_masks_are_sent(run: Run, name: str, samples_of: Any, tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    for folder, number in ((photos, 1), (masks, 2)):
        folder.mkdir()
        (folder / "a.png").write_bytes(png(number))
    (photos / "b.png").write_bytes(png(3))
    table = tmp_path / "table.csv"
    table.write_text("file,text\na,a red square\nb,another\n")
    words = ("--captions", "csv", "--caption-file", table, "--filename-column", "file", "--caption-column", "text")
    result = run("dataset", "add", name, photos, *words, "--no-extension", "--masks", masks, "-o", "json")
    assert result.exit_code == 0, result.output
    found = samples_of(name)
    assert {sample: entry["captions"] for sample, entry in found.items()} == {
        "a.png": ["a red square"],
        "b.png": ["another"],
    }
    assert found["a.png"]["mask"]["size_bytes"] == len(png(2))
    assert "mask" not in found["b.png"]


def test_a_dataset_of_the_hub_is_sent(run: Run, name: str, samples_of: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(3)]
    rows = pa.table({"image": images, "text": ["zero", "one", "two"]})
    parquet.write_table(rows, tmp_path / "data" / "train-00000-of-00001.parquet")
    result = run("dataset", "add", name, "--huggingface", tmp_path, "--caption-column", "text", "--limit", "2")
    assert result.exit_code == 0, result.output
    assert "2 added, 0 replaced" in result.stdout
    assert {sample: entry["captions"] for sample, entry in samples_of(name).items()} == {
        "00000000-0.png": ["zero"],
        "00000001-1.png": ["one"],
    }


def test_a_bucket_is_imported_and_what_is_left_out_is_named(
    run: Run, name: str, samples_of: Any, seaweed: Seaweed
) -> None:
    store = S3Store(seaweed.endpoint, SOURCE_BUCKET, seaweed.access_key, seaweed.secret_key)
    store.make_bucket()
    contents = {"cats/a.png": png(7), "cats/a.txt": b"a cat", "cats/none.png": b""}
    for key, body in contents.items():
        store.replace(key, body)
    result = run("dataset", "import", name, "--bucket", SOURCE_BUCKET, "--prefix", "cats/")
    assert result.exit_code == 1, result.output
    assert "none.png is left out: the file has 0 bytes" in result.stdout
    assert f"dataset {name}: 1 samples" in result.stdout
    entry = samples_of(name)["a.png"]
    assert (entry["captions"], entry["image"]["uri"]) == (["a cat"], f"s3://{SOURCE_BUCKET}/cats/a.png")


def test_a_host_that_is_not_listed_is_named(run: Run, name: str, tmp_path: Path, reverie: SyncReverie) -> None:
    (tmp_path / "list.csv").write_text("url,caption\nhttps://pictures.example/a.png,a cat\n")
    result = run("dataset", "import", name, "--urls", tmp_path / "list.csv", "-o", "json")
    assert result.exit_code != 0
    assert "no images detected in dataset" in result.output
    assert "host pictures.example at port 443 is not one that the trainer may read from" in result.output
    with pytest.raises(FailedPreconditionError):
        list(reverie.datasets.import_urls(name, [training_pb2.UrlImage(url="https://pictures.example/a.png")]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("add", "x"), "folders or --huggingface"),
        (("add", "x", "photos", "--huggingface", "org/name"), "folders or --huggingface"),
        (("import", "x"), "--bucket or --urls"),
        (("import", "x", "--urls", "/nowhere.csv"), "there is no such file"),
        (("add", "x", "photos", "--captions", "json"), "use one of textfile"),
    ],
)
def test_commands_that_say_too_little_or_too_much_are_refused(run: Run, arguments: Any, told: str) -> None:
    result = run("dataset", *arguments)
    assert result.exit_code == 2
    assert told in result.output.replace("\n", " ")
