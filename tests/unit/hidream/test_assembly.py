"""A transformer put together part by part: diffusers' weights, and never two unquantised parts in memory."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.assembly import CheckpointWeights, assemble, parts_of
from reverie_hidream.precisions import QUANTIZE_VIA
from reverie_hidream.quantise import quantise, weight_bytes
from reverie_hidream.transformer import build_meta_transformer, load_transformer
from safetensors.torch import load_file, save_file
from torch import nn

CPU = torch.device("cpu")


def tiny_config(checkpoint: Path) -> dict[str, object]:
    """Configuration of the tiny transformer."""
    config: dict[str, object] = json.loads((checkpoint / "transformer" / "config.json").read_text(encoding="utf-8"))
    return config


def test_loads_what_diffusers_loads(tiny_checkpoint: Path) -> None:
    expected = HiDreamImageTransformer2DModel.from_pretrained(tiny_checkpoint, subfolder="transformer").state_dict()
    loaded = load_transformer(tiny_checkpoint, dtype=torch.bfloat16).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(torch.bfloat16)) for name, tensor in loaded.items())


def test_reads_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (tmp_path / "transformer").mkdir()
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, tmp_path / "transformer" / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    index_name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "transformer" / index_name).write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(tiny_checkpoint / "transformer" / "config.json", tmp_path / "transformer")
    loaded = load_transformer(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize("quantize_via", QUANTIZE_VIA)
def test_quantises_to_the_same_as_the_whole(tiny_checkpoint: Path, quantize_via: str) -> None:
    whole = load_transformer(tiny_checkpoint, dtype=torch.bfloat16)
    quantise(whole, "int8-quanto")
    parts = load_transformer(
        tiny_checkpoint, dtype=torch.bfloat16, precision="int8-quanto", quantize_via=quantize_via
    ).state_dict()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("precision", ["int8-quanto", "nf4-bnb"])
def test_memory_peaks_at_the_result_and_one_unquantised_part(tiny_checkpoint: Path, precision: str) -> None:
    transformer = build_meta_transformer(tiny_config(tiny_checkpoint))
    peaks, unquantised = [], []
    gc.collect()
    before = live_bytes()

    with CheckpointWeights(tiny_checkpoint / "transformer") as weights:

        def read(name: str, part: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
            weights(name, part, device=device, dtype=dtype)
            # Now: the parts before as they will stay, and this one unquantised.
            peaks.append(live_bytes() - before)
            unquantised.append(weight_bytes(part))

        assemble(transformer, read, device=CPU, dtype=torch.bfloat16, precision=precision)
    result = weight_bytes(transformer)
    assert max(peaks) <= result + max(unquantised)
    assert max(peaks) < 0.9 * sum(unquantised)


def live_bytes() -> int:
    """Bytes of all tensors that Python knows of, each memory once."""
    storages = {}
    for tensor in _plain_tensors():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain_tensors() -> Iterator[torch.Tensor]:
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, nn.Parameter) and found.device.type == "cpu":
            yield found


def test_parts_are_blocks_and_what_is_around_them(tiny_checkpoint: Path) -> None:
    transformer = build_meta_transformer(tiny_config(tiny_checkpoint))
    names = [name for name, _ in parts_of(transformer)]
    assert len(names) == len(set(names))
    assert {"x_embedder", "final_layer", "double_stream_blocks.1", "single_stream_blocks.3"} <= set(names)
    assert sum(weight_bytes(part) for _, part in parts_of(transformer)) == weight_bytes(transformer)


def test_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no \*\.safetensors"):
        CheckpointWeights(tmp_path)


def test_names_what_is_missing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    del weights["final_layer.linear.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    transformer = build_meta_transformer(tiny_config(tiny_checkpoint))
    with CheckpointWeights(tmp_path) as source, pytest.raises(OSError, match=r"1 tensors, the first is final_layer\."):
        assemble(transformer, source, device=CPU, dtype=torch.float32, precision="no_change")


def test_names_what_does_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["final_layer.linear.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    transformer = build_meta_transformer(tiny_config(tiny_checkpoint))
    with CheckpointWeights(tmp_path) as source, pytest.raises(OSError, match=r"do not fit its config\.json"):
        assemble(transformer, source, device=CPU, dtype=torch.float32, precision="no_change")


def test_refuses_to_leave_something_without_weights(tiny_checkpoint: Path) -> None:
    transformer = build_meta_transformer(tiny_config(tiny_checkpoint))

    def nothing(name: str, part: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        if name != "x_embedder":
            part.to_empty(device=device)

    with pytest.raises(ValueError, match=r"2 tensors of x_embedder got .* first is proj\.weight"):
        assemble(transformer, nothing, device=CPU, dtype=torch.float32, precision="no_change")
