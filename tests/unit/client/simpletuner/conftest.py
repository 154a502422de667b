"""Configurations of SimpleTuner's: the reference folder, and small ones made by a test."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from reverie_client.simpletuner import Imported, ReportLine, import_configuration

BASE: Mapping[str, Any] = {
    "model_type": "lora",
    "lora_type": "lycoris",
    "lycoris_config": "config/lycoris_config.json",
    "data_backend_config": "config/multidatabackend.json",
    "max_train_steps": 100,
    "train_batch_size": 1,
    "optimizer": "adamw",
    "learning_rate": "1e-4",
    "validation_prompt": "a cat",
}
LOKR: Mapping[str, Any] = {"algo": "lokr", "multiplier": 1, "linear_dim": 64, "linear_alpha": 1, "factor": 8}
PHOTOS: Mapping[str, Any] = {
    "id": "photos",
    "type": "local",
    "instance_data_dir": "photos",
    "caption_strategy": "textfile",
}

Bring = Callable[..., Imported]


@pytest.fixture
def reference() -> Path:
    """The reference configuration: its settings unchanged, with prompts of our own."""
    return Path(__file__).parent / "reference"


@pytest.fixture
def bring(tmp_path: Path) -> Bring:
    """Import a small configuration with some options changed; None leaves one of the small configuration's out."""

    def import_with(
        config: Mapping[str, Any] | None = None,
        *,
        datasets: Any = (PHOTOS,),
        lycoris: Mapping[str, Any] = LOKR,
        files: Mapping[str, Any] | None = None,
        without: tuple[str, ...] = (),
    ) -> Imported:
        folder = tmp_path / "config"
        folder.mkdir(exist_ok=True)
        options = {key: value for key, value in {**BASE, **(config or {})}.items() if key not in without}
        written = {"config.json": options, "multidatabackend.json": list(datasets), "lycoris_config.json": lycoris}
        for name, document in {**written, **(files or {})}.items():
            (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
        return import_configuration(folder, dataset_root=tmp_path, draw_seed=lambda: 123456)

    return import_with


@pytest.fixture
def line_of() -> Callable[[Imported, str], ReportLine]:
    """Return the one line of a key."""

    def find(imported: Imported, key: str) -> ReportLine:
        (found,) = [line for line in imported.report.lines if line.key == key]
        return found

    return find


@pytest.fixture
def value_at() -> Callable[[Imported, str], Any]:
    """Return what the job says at a dotted path, None where it says nothing."""

    def find(imported: Imported, path: str) -> Any:
        place: Any = imported.document
        for part in path.split("."):
            if isinstance(place, list):
                place = place[int(part)]
            else:
                place = place.get(part) if isinstance(place, Mapping) else None
        return place

    return find
