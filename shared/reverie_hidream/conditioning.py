"""What the transformer is told about the text: the embeddings of one batch (spec 1.2).

B batch, L Llama layers, T tokens (128), W width of an encoder, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

ENCODERS = ("clip_l", "clip_g", "t5", "llama")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConditioning:
    """Embeddings of a batch of prompts, padding included: the transformer attends to padded positions (spec 1.2)."""

    t5: torch.Tensor
    """(B, T, W5): last hidden state of T5."""
    llama: torch.Tensor
    """(L, B, T, WL): hidden states after each Llama block."""
    pooled: torch.Tensor
    """(B, P): CLIP-L then CLIP-G, projected and pooled."""

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong to one batch."""
        if self.t5.ndim != 3 or self.llama.ndim != 4 or self.pooled.ndim != 2:
            raise ValueError(
                "t5, llama and pooled must have 3, 4 and 2 dimensions; "
                f"got shapes {tuple(self.t5.shape)}, {tuple(self.llama.shape)}, {tuple(self.pooled.shape)}"
            )
        sizes = (self.t5.shape[0], self.llama.shape[1], self.pooled.shape[0])
        if len(set(sizes)) != 1:
            raise ValueError(f"t5, llama and pooled must hold the same batch; got {sizes[0]}, {sizes[1]}, {sizes[2]}")

    @property
    def batch_size(self) -> int:
        """Number of prompts."""
        return self.t5.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextConditioning:
        """The same embeddings on another device or in another dtype; tensors already there are shared."""
        return TextConditioning(
            t5=self.t5.to(device=device, dtype=dtype),
            llama=self.llama.to(device=device, dtype=dtype),
            pooled=self.pooled.to(device=device, dtype=dtype),
        )

    def select(self, indices: Sequence[int]) -> TextConditioning:
        """The prompts at these places."""
        chosen = list(indices)
        return TextConditioning(t5=self.t5[chosen], llama=self.llama[:, chosen], pooled=self.pooled[chosen])

    def repeat(self, num_copies: int) -> TextConditioning:
        """Each prompt `num_copies` times, copies of one prompt next to each other."""
        return TextConditioning(
            t5=self.t5.repeat_interleave(num_copies, dim=0),
            llama=self.llama.repeat_interleave(num_copies, dim=1),
            pooled=self.pooled.repeat_interleave(num_copies, dim=0),
        )


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> TextConditioning:
    """Join the embeddings of single prompts into one batch.

    Args:
        samples: for each prompt `clip_l` (768,), `clip_g` (1280,), `t5` (T, W5) and `llama` (L, T, WL).

    Raises:
        ValueError: nothing to join, or an encoder is missing.
    """
    if not samples:
        raise ValueError("collate needs at least one sample; got none")
    for index, sample in enumerate(samples):
        if missing := [name for name in ENCODERS if name not in sample]:
            raise ValueError(f"sample {index} lacks the embeddings of {', '.join(missing)}; encode it with all of them")
    return TextConditioning(
        t5=torch.stack([sample["t5"] for sample in samples]),
        llama=torch.stack([sample["llama"] for sample in samples], dim=1),
        pooled=torch.stack([torch.cat([sample["clip_l"], sample["clip_g"]]) for sample in samples]),
    )


def join(first: TextConditioning, second: TextConditioning) -> TextConditioning:
    """The prompts of `first`, then those of `second`, as one batch."""
    return TextConditioning(
        t5=torch.cat([first.t5, second.t5]),
        llama=torch.cat([first.llama, second.llama], dim=1),
        pooled=torch.cat([first.pooled, second.pooled]),
    )
