"""What a job trains on, and how its images are brought to size."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CropAspect:
    """One aspect to crop to."""

    aspect: float = 1.0
    """Width / height."""
    weight: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetChoice:
    """One dataset in a job and how its images are brought to size."""

    dataset: str = ""
    repeats: int = 0
    """Extra passes in each epoch: 0 is one pass."""
    resolution: float = 1024.0
    """Pixels, or megapixels where resolution_type is `area`."""
    resolution_type: str = "pixel_area"
    crop: bool = False
    crop_style: str = "center"
    instance_prompt: str | None = None
    caption_strategy: str = "captions"
    instance_prompts: tuple[str, ...] = ()
    prepend_instance_prompt: bool = False
    probability: float = 1.0
    role: str = "train"
    crop_aspect: str = "square"
    crop_aspect_buckets: tuple[CropAspect, ...] = ()
    minimum_image_size: float = 0.0
    maximum_image_size: float = 0.0
    target_downsample_size: float = 0.0
    minimum_aspect_ratio: float = 0.0
    maximum_aspect_ratio: float = 0.0
    max_upscale_threshold: float = 0.0
    max_num_samples: int = 0
    start_step: int = 0
    end_step: int = 0
    caption_shuffle: bool = False
    timestep_sampling_offset: float = 0.0
    mask_type: str = "none"
