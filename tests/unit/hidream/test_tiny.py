"""The tiny checkpoint: reproducible, complete, and shaped like the real one."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImagePipeline
from reverie_hidream.tiny import make_tiny_checkpoint
from reverie_hidream.tiny_tokenizers import corpus_lines, llama_tokenizer
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer


def digests(directory: Path) -> dict[str, str]:
    """Name and sha256 of every file."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def config_of(checkpoint: Path, part: str) -> dict[str, Any]:
    """A part's config.json."""
    config: dict[str, Any] = json.loads((checkpoint / part / "config.json").read_text(encoding="utf-8"))
    return config


def test_two_processes_write_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "reverie_hidream.tiny", str(tmp_path / "again")], check=True, timeout=120)
    assert digests(tmp_path / "again") == digests(tiny_checkpoint)


def test_another_seed_changes_every_weight_file_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "leftover.json").write_text("{}", encoding="utf-8")
    other, usual = digests(make_tiny_checkpoint(directory, seed=1)), digests(tiny_checkpoint)
    changed = {name for name in usual if other.get(name) != usual[name]}
    assert other.keys() == usual.keys()
    assert changed == {name for name in usual if name.endswith(".safetensors")}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_is_a_few_megabytes_without_pickles(tiny_checkpoint: Path) -> None:
    files = [path for path in tiny_checkpoint.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 7_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_diffusers_pipeline_loads_all_eleven_parts_and_draws(tiny_checkpoint: Path) -> None:
    pipeline = HiDreamImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = 8
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline("a red fox", num_inference_steps=2, generator=generator, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)
    assert pictures.std() > 0.02


def test_transformer_has_the_structure_of_the_real_one(tiny_checkpoint: Path) -> None:
    config = config_of(tiny_checkpoint, "transformer")
    assert (config["num_layers"], config["num_single_layers"]) == (2, 4)
    assert (config["num_routed_experts"], config["num_activated_experts"]) == (4, 2)
    assert config["llama_layers"] == [0, 1, 2, 3, 3, 3]
    assert config["max_resolution"] == [16, 64]
    assert sum(config["axes_dims_rope"]) == config["attention_head_dim"]


def test_widths_all_differ_and_fit_together(tiny_checkpoint: Path) -> None:
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "transformer")
    clip_l, clip_g, t5, llama, transformer = (config_of(tiny_checkpoint, part) for part in parts)
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    widths = [clip_l["projection_dim"], clip_g["projection_dim"], t5["d_model"], llama["hidden_size"], width]
    assert len({*widths, transformer["text_emb_dim"]}) == 6
    assert transformer["text_emb_dim"] == clip_l["projection_dim"] + clip_g["projection_dim"]
    assert transformer["caption_channels"] == [t5["d_model"], llama["hidden_size"]]
    assert max(transformer["llama_layers"]) == llama["num_hidden_layers"] - 1


def test_vae_and_scheduler_have_the_released_constants(tiny_checkpoint: Path) -> None:
    vae = config_of(tiny_checkpoint, "vae")
    scheduler = json.loads((tiny_checkpoint / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert (vae["latent_channels"], vae["scaling_factor"], vae["shift_factor"]) == (16, 0.3611, 0.1159)
    assert len(vae["block_out_channels"]) == 4
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 3.0)


def test_llama_adds_bos_and_has_no_pad_token_of_its_own(tiny_checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint / "tokenizer_4")
    assert tokenizer("a red fox").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer.pad_token is None


def test_clip_has_the_end_token_last_and_two_padding_habits(tiny_checkpoint: Path) -> None:
    small = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    large = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer_2")
    assert small.eos_token_id == large.eos_token_id == len(small) - 1
    assert (small.pad_token_id, large.pad_token_id) == (small.eos_token_id, 0)


def test_t5_has_the_special_ids_of_sentencepiece(tiny_checkpoint: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(tiny_checkpoint / "tokenizer_3")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("").input_ids == [1]


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"])
def test_token_ids_fit_the_embedding_tables(tiny_checkpoint: Path, folder: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint / folder)
    table = config_of(tiny_checkpoint, folder.replace("tokenizer", "text_encoder"))["vocab_size"]
    assert len(tokenizer) <= table
    assert min(128, tokenizer.model_max_length) == 128


@pytest.mark.parametrize("text", ["A photo of a zorp, 1234.", "caf\u00e9 \u4f60\u597d", "two\nlines  and spaces"])
def test_llama_tokens_decode_to_the_text(text: str) -> None:
    tokenizer = llama_tokenizer(corpus_lines(), model_max_length=1024)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
