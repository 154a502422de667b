"""CLIP scores, against transformers' own logits and a float64 cosine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reverie_common.errors import NotFoundError
from reverie_hidream.clip_score import ClipScorer, load_clip_scorer
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PROMPT = "a red circle on grey"


@pytest.fixture(scope="module")
def scorer(tiny_clip: Path) -> ClipScorer:
    return load_clip_scorer(tiny_clip)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def cosine(directory: Path, image: Image.Image, tokens: list[int]) -> float:
    """100 times the cosine, from the features and in float64."""
    model = CLIPModel.from_pretrained(directory, dtype=torch.float64)
    pixels = CLIPImageProcessorPil.from_pretrained(directory)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        text = model.get_text_features(input_ids=torch.tensor([tokens])).pooler_output[0].numpy()
        seen = model.get_image_features(pixel_values=pixels.double()).pooler_output[0].numpy()
    return float(100 * text @ seen / np.sqrt((text @ text) * (seen @ seen)))


@pytest.mark.parametrize("seed", range(4))
def test_a_score_is_the_cosine_in_percent_and_never_negative(scorer: ClipScorer, tiny_clip: Path, seed: int) -> None:
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(PROMPT)["input_ids"]
    expected = cosine(tiny_clip, picture(seed), tokens)
    assert scorer.score(picture(seed), PROMPT) == pytest.approx(max(expected, 0.0), abs=1e-3)


def test_scores_are_clip_s_own_logits_without_their_scale(scorer: ClipScorer, tiny_clip: Path) -> None:
    model = CLIPModel.from_pretrained(tiny_clip)
    words = CLIPTokenizer.from_pretrained(tiny_clip)(PROMPT, return_tensors="pt")
    images = [picture(seed) for seed in range(4)]
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(**words, pixel_values=pixels).logits_per_image[:, 0] / model.logit_scale.exp()
    scores = [scorer.score(image, PROMPT) for image in images]
    assert scores == pytest.approx((100 * logits).clamp(min=0).tolist(), abs=1e-3)
    assert max(scores) > 0.0


def test_a_long_prompt_is_cut_at_the_model_s_tokens(scorer: ClipScorer, tiny_clip: Path) -> None:
    prompt = " ".join(["circle square cat"] * 100)
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(prompt)["input_ids"]
    cut = [*tokens[: scorer.max_tokens - 1], tokens[-1]]
    assert (scorer.max_tokens, len(cut)) == (77, 77)
    expected = cosine(tiny_clip, picture(0), cut)
    assert scorer.score(picture(0), prompt) == pytest.approx(max(expected, 0.0), abs=1e-3)


def test_a_folder_without_a_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"has no config.json, preprocessor_config.json, \*.safetensors; give"):
        load_clip_scorer(tmp_path)
