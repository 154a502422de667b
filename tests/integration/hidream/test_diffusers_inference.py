"""The example that draws with an adapter and uses no Reverie code, run as people run it."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reverie_hidream.adapters import LokrConfig, LoraConfig, attach_adapter, merged_state
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.transformer import load_transformer

SCRIPT = Path(__file__).parents[3] / "examples" / "inference" / "diffusers_inference.py"
CONFIGS: dict[str, AdapterConfig] = {
    "lokr": LokrConfig(factor=4),
    "split": LokrConfig(factor=4, full_matrix=False, linear_dim=2, linear_alpha=0.5),
    "lora": LoraConfig(rank=4, alpha=2.0),
}

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter files that change a lot."""
    directory = tmp_path_factory.mktemp("adapters")
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32)
    files = {}
    for name, config in CONFIGS.items():
        adapter = attach_adapter(transformer, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in adapter.parameters():
                tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
        files[name] = directory / f"{name}.safetensors"
        files[name].write_bytes(adapter.export())
        adapter.detach()
    return files


@pytest.fixture(scope="module")
def draw(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    def run(*arguments: str, width: int = 64, height: int = 48) -> Image.Image:
        output = tmp_path_factory.mktemp("drawn") / "picture.png"
        command = [sys.executable, str(SCRIPT), "--model", str(tiny_checkpoint), "--prompt", "a red circle"]
        command += ["--steps", "2", "--width", str(width), "--height", str(height), "--output", str(output), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return Image.open(output).convert("RGB")

    return run


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures' channels, of 255."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


def test_adapters_change_the_picture(draw: Draw, adapters: dict[str, Path]) -> None:
    base = draw()

    assert base.size == (64, 48)
    assert difference(base, draw("--adapter", str(adapters["lokr"]), "--quantize", "int8")) > 1
    assert difference(base, draw("--adapter", str(adapters["lora"]))) > 1


def test_uses_no_code_of_reverie() -> None:
    imported = re.findall(r"^\s*(?:from|import) (\w+)", SCRIPT.read_text(), flags=re.MULTILINE)

    assert not [name for name in imported if name.startswith("reverie")]


@pytest.fixture(scope="module")
def script() -> Any:
    """The example as a module."""
    specification = importlib.util.spec_from_file_location("diffusers_inference", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["lokr", "split"])
def test_merges_as_we_do(name: str, script: Any, tiny_checkpoint: Path, adapters: dict[str, Path]) -> None:
    """LyCORIS' own merge multiplies with the scale of a split LoKr twice."""
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32)
    base = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}
    expected = merged_state(transformer, adapters[name].read_bytes(), strength=0.5)

    assert script.merge_lycoris(transformer, adapters[name], 0.5) == len(expected)

    state = transformer.state_dict()
    for key, tensor in expected.items():
        change = tensor - base[key]
        assert math.isclose(float((state[key] - tensor).norm() / change.norm()), 0.0, abs_tol=1e-3)
