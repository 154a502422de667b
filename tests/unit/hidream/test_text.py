"""Text encoders: shapes, cuts, fingerprints and refusals. Their numbers are in tests/numerics."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reverie_common.errors import NotFoundError
from reverie_hidream.checkpoint import resolve_llama
from reverie_hidream.text import ENCODER_NAMES, TextEncoder, load_text_encoder

SHAPES = {"clip_l": (32,), "clip_g": (48,), "t5": (128, 112), "llama": (4, 128, 96)}
NUM_SPECIAL = {"clip_l": 2, "clip_g": 2, "t5": 1, "llama": 1}
LONGEST_CAPTION = 8192


@pytest.fixture(scope="module")
def encoders(tiny_checkpoint: Path) -> dict[str, TextEncoder]:
    """All four, in float32."""
    return {name: load_text_encoder(tiny_checkpoint, name, dtype=torch.float32) for name in ENCODER_NAMES}


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_announces_the_shape_and_dtype_that_it_returns(encoders: dict[str, TextEncoder], name: str) -> None:
    encoder = encoders[name]
    (encoded,) = encoder.encode(["a red fox"])
    assert encoder.name == name
    assert encoder.max_length == 128
    assert encoded.tensor.shape == encoder.shape == SHAPES[name]
    assert encoded.tensor.dtype == encoder.dtype
    assert encoded.tensor.is_contiguous()


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_embeddings_can_take_part_in_autograd(encoders: dict[str, TextEncoder], name: str) -> None:
    (encoded,) = encoders[name].encode(["a red fox"])
    weight = torch.ones((), requires_grad=True)
    (encoded.tensor * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_the_empty_prompt_is_its_special_tokens(encoders: dict[str, TextEncoder], name: str) -> None:
    (encoded,) = encoders[name].encode([""])
    assert encoded.num_tokens == NUM_SPECIAL[name]
    assert encoded.dropped_text == ""
    assert encoded.tensor.isfinite().all()


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_no_prompts_give_no_embeddings(encoders: dict[str, TextEncoder], name: str) -> None:
    assert encoders[name].encode([]) == []


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_keeps_128_tokens_and_reports_the_rest(encoders: dict[str, TextEncoder], name: str) -> None:
    # One token in every vocabulary.
    fitting = "a " * (128 - NUM_SPECIAL[name])
    encoder = encoders[name]
    whole, cut, longer = encoder.encode([fitting.strip(), f"{fitting}Red Foxes", f"{fitting}Blue Whales"])
    assert (whole.num_tokens, whole.dropped_text) == (128, "")
    assert cut.num_tokens > 128
    assert (cut.dropped_text, longer.dropped_text) == ("Red Foxes", "Blue Whales")


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_measuring_while_another_thread_encodes_gives_what_encoding_gives(
    encoders: dict[str, TextEncoder], name: str
) -> None:
    encoder, prompts = encoders[name], ["a red fox", "grass " * 300, ""] * 5
    with ThreadPoolExecutor(2) as pool:
        encoding = pool.submit(encoder.encode, prompts)
        measured = list(pool.map(encoder.measure, prompts))
    assert measured == [(encoded.num_tokens, encoded.dropped_text) for encoded in encoding.result()]


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_what_was_cut_has_no_influence(encoders: dict[str, TextEncoder], name: str) -> None:
    kept = "grass " * 200
    first, second = encoders[name].encode([f"{kept}red", f"{kept}blue whales in the sea"])
    assert torch.equal(first.tensor, second.tensor)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_takes_the_longest_caption(encoders: dict[str, TextEncoder], name: str) -> None:
    caption = ("a photo of a zorp, \u4f60\u597d caf\u00e9; " * 500)[:LONGEST_CAPTION]
    (encoded,) = encoders[name].encode([caption])
    assert encoded.num_tokens > 1000
    assert caption.endswith(encoded.dropped_text)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_different_prompts_differ(encoders: dict[str, TextEncoder], name: str) -> None:
    first, second = encoders[name].encode(["a red fox", "a blue fox"])
    assert not torch.equal(first.tensor, second.tensor)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_the_batch_has_no_influence_on_a_prompt(encoders: dict[str, TextEncoder], name: str) -> None:
    encoder = encoders[name]
    (alone,) = encoder.encode(["a red fox"])
    together = encoder.encode(["grass " * 300, "a red fox", "", "a photo of the sea"])
    assert torch.equal(together[1].tensor, alone.tensor)


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_bfloat16_is_close_to_float32(tiny_checkpoint: Path, encoders: dict[str, TextEncoder], name: str) -> None:
    (exact,) = encoders[name].encode(["a red fox"])
    (rounded,) = load_text_encoder(tiny_checkpoint, name).encode(["a red fox"])
    assert rounded.tensor.dtype == torch.bfloat16
    # A few layers of bfloat16 at 2^-9 each.
    assert (rounded.tensor.float() - exact.tensor).norm() / exact.tensor.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_int8_is_close_to_the_original(
    tiny_checkpoint: Path, encoders: dict[str, TextEncoder], name: str, dtype: torch.dtype
) -> None:
    (exact,) = encoders[name].encode(["a red fox"])
    encoder = load_text_encoder(tiny_checkpoint, name, dtype=dtype, precision="int8-quanto")
    (quantised,) = encoder.encode(["a red fox"])
    assert encoder.precision == "int8-quanto"
    assert quantised.tensor.dtype == dtype
    # Random weights have no outliers: 0.5 % for each matrix.
    assert 0 < (quantised.tensor.float() - exact.tensor).norm() / exact.tensor.norm() < 0.05


def test_fingerprint_is_the_same_for_the_same_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    first, second = load_text_encoder(tiny_checkpoint, "t5"), load_text_encoder(copy, "t5")
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


def test_fingerprint_covers_encoder_dtype_and_precision(
    tiny_checkpoint: Path, encoders: dict[str, TextEncoder]
) -> None:
    others = [
        load_text_encoder(tiny_checkpoint, "t5"),
        load_text_encoder(tiny_checkpoint, "t5", dtype=torch.float32, precision="int8-quanto"),
    ]
    assert len({encoder.fingerprint for encoder in [*encoders.values(), *others]}) == 6


@pytest.mark.parametrize("part", ["text_encoder_3/config.json", "tokenizer_3/tokenizer_config.json"])
def test_fingerprint_covers_configuration_and_tokenizer(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    path = copy / part
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert load_text_encoder(copy, "t5").fingerprint != load_text_encoder(tiny_checkpoint, "t5").fingerprint


def test_llama_of_a_plain_repository_gives_the_same(
    tiny_checkpoint: Path, tmp_path: Path, encoders: dict[str, TextEncoder]
) -> None:
    plain = Path(shutil.copytree(tiny_checkpoint / "text_encoder_4", tmp_path / "llama"))
    shutil.copytree(tiny_checkpoint / "tokenizer_4", plain, dirs_exist_ok=True)
    llama = load_text_encoder(resolve_llama(tiny_checkpoint, str(plain)), "llama", dtype=torch.float32)
    assert torch.equal(llama.encode(["a fox"])[0].tensor, encoders["llama"].encode(["a fox"])[0].tensor)


def test_llama_is_padded_with_eos_on_the_right_whatever_its_files_say(
    tiny_checkpoint: Path, tmp_path: Path, encoders: dict[str, TextEncoder]
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    path = copy / "tokenizer_4" / "tokenizer_config.json"
    edited = path.read_text(encoding="utf-8").replace(
        '"model_max_length"', '"padding_side": "left", "pad_token": "<|end_of_text|>", "model_max_length"'
    )
    path.write_text(edited, encoding="utf-8")
    llama = load_text_encoder(copy, "llama", dtype=torch.float32)
    assert torch.equal(llama.encode(["a fox"])[0].tensor, encoders["llama"].encode(["a fox"])[0].tensor)


def test_refuses_unknown_names_and_precisions(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'bert' is not known; use one of clip_l, clip_g, t5, llama"):
        load_text_encoder(tiny_checkpoint, "bert")
    with pytest.raises(ValueError, match="'int3' is not known"):
        load_text_encoder(tiny_checkpoint, "t5", precision="int3")


def test_names_the_missing_part(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="text_encoder_3"):
        load_text_encoder(tmp_path, "t5")
