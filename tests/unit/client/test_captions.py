"""Captions from names and tables, and masks by stem."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from reverie_client.captions import TableColumns, open_captions
from reverie_client.folder import read_folders
from reverie_common.errors import InvalidArgumentError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures without text files, one of them in a sub-folder."""
    for name in ("a_red_cat.png", "b.jpg", "old/c.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "photos"


def read(photos: Path, strategy: str, table: Path | None = None, **columns: object) -> dict[str, tuple[str, ...]]:
    source = open_captions(strategy, table, TableColumns(**columns))  # type: ignore[arg-type]
    local = read_folders([photos], captions=source, needs_captions=False)
    return {sample.name: sample.captions for sample in local.samples}


def test_names_become_captions(photos: Path) -> None:
    assert read(photos, "filename") == {"a_red_cat.png": ("a red cat",), "b.jpg": ("b",), "old/c.webp": ("c",)}


def test_none_leaves_captions_out_even_where_there_are_text_files(photos: Path) -> None:
    (photos / "b.txt").write_text("a dog")
    assert read(photos, "textfile")["b.jpg"] == ("a dog",)
    assert set(read(photos, "none").values()) == {()}


def test_csv_is_read_by_its_columns(photos: Path) -> None:
    table = photos / "table.csv"
    table.write_bytes(
        "\ufefffile,text,short\na_red_cat,\u00e9tonn\u00e9,x\nold/c,,fallback\na_red_cat,again,y\n".encode()
    )
    captions = read(
        photos,
        "csv",
        table,
        filename="file",
        caption="text",
        fallback_caption="short",
        includes_extension=False,
    )
    assert captions == {"a_red_cat.png": ("\u00e9tonn\u00e9", "again"), "b.jpg": (), "old/c.webp": ("fallback",)}


def test_a_missing_column_of_a_parquet_file_is_told_with_all_that_there_are(photos: Path) -> None:
    table = photos.parent / "table.parquet"
    parquet.write_table(pa.table({"file": ["b.jpg"], "caption": ["one"], "width": [1]}), table)
    with pytest.raises(InvalidArgumentError, match="no column 'filename', only file, caption, width;"):
        read(photos, "parquet", table)


def test_parquet_is_read_by_its_columns_with_lists_as_alternatives(photos: Path) -> None:
    table = photos.parent / "table.parquet"
    rows = {"filename": ["b.jpg", "c.webp"], "caption": [["one", " two "], [""]], "width": [1, 2]}
    parquet.write_table(pa.table(rows), table)
    assert read(photos, "parquet", table) == {"a_red_cat.png": (), "b.jpg": ("one", "two"), "old/c.webp": ()}


def test_a_picture_without_a_row_is_named_with_the_remedy(photos: Path) -> None:
    table = photos.parent / "table.csv"
    table.write_text("filename,caption\nb.jpg,a dog\n")
    with pytest.raises(InvalidArgumentError) as caught:
        read_folders([photos], captions=open_captions("csv", table))
    assert [Path(violation.field).name for violation in caught.value.violations] == ["a_red_cat.png", "c.webp"]
    assert "add a row for a_red_cat.png" in caught.value.violations[0].description


@pytest.mark.parametrize(
    ("strategy", "body", "told"),
    [
        ("csv", b"name,caption\nb.jpg,x\n", "has no column 'filename', only name, caption"),
        ("csv", b"filename,caption\nb.jpg,\xe9\n", "not UTF-8: byte 0xe9"),
        ("parquet", b"no parquet", "cannot be read as parquet"),
        ("csv", b"filename,caption\nb.jpg," + b"x" * 9000 + b"\n", "captions that are too long"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(photos: Path, strategy: str, body: bytes, told: str) -> None:
    table = photos.parent / "table"
    table.write_bytes(body)
    with pytest.raises(InvalidArgumentError, match=told):
        open_captions(strategy, table)


@pytest.mark.parametrize(
    ("strategy", "table", "told"),
    [
        ("json", None, "use one of textfile"),
        ("csv", None, "--caption-file"),
        ("csv", Path("/nowhere/t.csv"), "there is no such file"),
    ],
)
def test_what_has_no_meaning_is_refused(strategy: str, table: Path | None, told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        open_captions(strategy, table)


def test_masks_are_found_by_path_and_stem(photos: Path) -> None:
    masks = photos.parent / "masks"
    (masks / "old").mkdir(parents=True)
    (masks / "b.png").write_bytes(b"mask b")
    (masks / "old" / "c.png").write_bytes(b"mask c")
    (masks / "of-nothing.png").write_bytes(b"mask d")
    local = read_folders([photos], needs_captions=False, masks=masks)
    found = {sample.name: sample.mask.sha256 if sample.mask else None for sample in local.samples}
    assert found == {
        "a_red_cat.png": None,
        "b.jpg": hashlib.sha256(b"mask b").hexdigest(),
        "old/c.webp": hashlib.sha256(b"mask c").hexdigest(),
    }
    assert local.ignored == (masks / "of-nothing.png",)


def test_a_folder_of_masks_that_suits_no_picture_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "other.png").write_bytes(b"mask")
    with pytest.raises(InvalidArgumentError) as caught:
        read_folders([photos], needs_captions=False, masks=tmp_path / "masks")
    assert "no mask has the name of a picture" in caught.value.violations[0].description
