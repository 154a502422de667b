"""Datasets in the layout of the Hugging Face Hub, read from this machine's disk."""

import io
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from reverie_client.hub import HubSource, read_hub
from reverie_common.errors import InvalidArgumentError


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 300 pictures: more than one part."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    images = [{"bytes": picture(number % 256), "path": f"{number}.png"} for number in range(300)]
    texts = [[f"picture {number}", "a square"] if number % 2 else [f"picture {number}"] for number in range(300)]
    parquet.write_table(pa.table({"photo": images, "text": texts}), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_pictures_come_in_parts_with_their_captions(hub: Path) -> None:
    source = HubSource(path=str(hub), image_column="photo", caption_column="text")
    found = {}
    sizes = []
    for part in read_hub(source):
        sizes.append(len(part.samples))
        found.update({sample.name: (sample.path.read_bytes(), sample.captions) for sample in part.samples})
    assert sizes == [256, 44]
    assert found["00000007-7.png"] == (picture(7), ("picture 7", "a square"))
    assert found["00000299-299.png"] == (picture(43), ("picture 299", "a square"))


def test_a_part_is_gone_with_the_next(hub: Path) -> None:
    parts = read_hub(HubSource(path=str(hub), image_column="photo"))
    first = next(parts).samples[0].path
    next(parts)
    assert not first.exists()
    parts.close()


def test_a_limit_takes_the_first(hub: Path) -> None:
    parts = list(read_hub(HubSource(path=str(hub), image_column="photo", limit=3)))
    assert [sample.name for sample in parts[0].samples] == [f"0000000{number}-{number}.png" for number in range(3)]
    assert parts[0].samples[0].captions == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_column": "image"}, "no column 'image', only photo, text"),
        ({"caption_column": "caption"}, "no column 'caption'"),
        ({"split": "test"}, "split 'test', cannot be read"),
    ],
)
def test_what_is_not_there_is_named(hub: Path, changes: dict[str, str], told: str) -> None:
    fields = {"path": str(hub), "image_column": "photo", **changes}
    with pytest.raises(InvalidArgumentError, match=told):
        list(read_hub(HubSource(**fields)))  # type: ignore[arg-type]


def test_a_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        list(read_hub(HubSource(path=str(tmp_path / "none"))))
