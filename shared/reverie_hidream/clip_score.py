"""How well a picture fits its prompt: 100 times the cosine of CLIP's embeddings, at least 0 (spec 7.7)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from reverie_common.errors import NotFoundError
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reverie_hidream.checkpoint import progress_bars_disabled

SUGGESTED_MODEL = "openai/clip-vit-large-patch14"

_FILES = ("config.json", "preprocessor_config.json")


def require_clip_model(directory: Path) -> None:
    """Check that a directory holds a CLIP model, without reading its weights.

    Raises:
        NotFoundError: names what is missing, and the remedy.
    """
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise NotFoundError(
            f"{directory} is no CLIP model: it has no {', '.join(missing)}; give the folder of a CLIPModel "
            f"with safetensors weights, or a Hub id such as {SUGGESTED_MODEL}",
            reason="CLIP_MODEL_NOT_FOUND",
            metadata={"directory": str(directory)},
        )


def load_clip_scorer(directory: Path, *, device: str = "cpu") -> "ClipScorer":
    """Load a CLIP model, in float32. Blocks for seconds.

    Raises:
        NotFoundError: the directory holds none.
    """
    require_clip_model(directory)
    with progress_bars_disabled():
        model = CLIPModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    model.requires_grad_(False).eval().to(device)
    return ClipScorer(
        model=model,
        tokenizer=CLIPTokenizer.from_pretrained(directory, local_files_only=True),
        processor=CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True),
        device=torch.device(device),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScorer:
    """A loaded CLIP model. For one thread."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil
    device: torch.device

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that the model reads, 77 for OpenAI's; what is beyond them is cut."""
        return int(self.model.config.text_config.max_position_embeddings)

    def score(self, picture: Image.Image, prompt: str) -> float:
        """Score one picture: 0 to 100. Blocks for up to a second on a CPU."""
        words = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        pixels = self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = self.model(
                input_ids=words["input_ids"].to(self.device),
                attention_mask=words["attention_mask"].to(self.device),
                pixel_values=pixels.to(self.device),
            )
            # CLIPModel has brought both to length 1.
            cosine = float((output.image_embeds * output.text_embeds).sum())
        return max(100.0 * cosine, 0.0)
