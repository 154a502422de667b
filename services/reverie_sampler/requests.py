"""What is asked of the sampler, checked: every violation at once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1 import sampling_pb2
from reverie_common.errors import FieldViolation, InvalidArgumentError
from reverie_common.sampling_methods import SCHEDULERS

MAX_PROMPT_CHARACTERS = 8192
MAX_SIDE_PIXELS = 4096
MAX_STEPS = 200
MAX_IMAGES = 16
MAX_SEED = 2**64
MAX_GUIDANCE = 100.0
MAX_SHIFT = 100.0
MAX_STRENGTH = 100.0

KeyOf = Callable[[str], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRule:
    """Which pictures a model can draw."""

    pixel_multiple: int
    max_pixels: int
    """Of a picture that is not square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """A request with every default filled in."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    shift: float | None
    adapter: ObjectRef | None
    adapter_strength: float
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    """None is the checkpoint's own."""
    preview_steps: int = 0
    clip_score: bool = False
    compile: bool = False

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt matters."""
        return self.guidance_scale > 1.0


def checked_order(request: sampling_pb2.SampleRequest, rule: SizeRule, key_of: KeyOf) -> SampleOrder:
    """Fill in the defaults of a request.

    Raises:
        InvalidArgumentError: with everything that is wrong with it.
    """
    order = SampleOrder(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps if request.HasField("num_inference_steps") else 20,
        guidance_scale=request.guidance_scale if request.HasField("guidance_scale") else 5.0,
        seed=request.seed,
        num_images=request.num_images if request.HasField("num_images") else 1,
        shift=request.shift if request.HasField("shift") else None,
        adapter=request.adapter if request.HasField("adapter") else None,
        adapter_strength=request.adapter_strength if request.HasField("adapter_strength") else 1.0,
        guidance_rescale=request.guidance_rescale,
        scheduler=request.scheduler if request.HasField("scheduler") else None,
        preview_steps=request.preview_steps,
        clip_score=request.clip_score,
        compile=request.compile,
    )
    violations = [*_text_violations(order), *_size_violations(order, rule), *_number_violations(order)]
    violations += _method_violations(order)
    violations += _adapter_violations(order, key_of)
    if violations:
        raise InvalidArgumentError(
            f"{len(violations)} fields of the request are wrong, the first: "
            f"{violations[0].field}: {violations[0].description}",
            violations=violations,
        )
    return order


def _text_violations(order: SampleOrder) -> Iterator[FieldViolation]:
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(order, name))
        if length > MAX_PROMPT_CHARACTERS:
            yield FieldViolation(
                field=name,
                description=f"{length} characters, the limit is {MAX_PROMPT_CHARACTERS}; shorten the text",
            )


def _size_violations(order: SampleOrder, rule: SizeRule) -> Iterator[FieldViolation]:
    is_whole = True
    for name in ("width", "height"):
        side = getattr(order, name)
        if not 0 < side <= MAX_SIDE_PIXELS or side % rule.pixel_multiple:
            is_whole = False
            yield FieldViolation(
                field=name,
                description=f"{side} pixels, must be a multiple of {rule.pixel_multiple} from {rule.pixel_multiple} to "
                f"{MAX_SIDE_PIXELS}",
            )
    num_pixels = order.width * order.height
    if is_whole and order.width != order.height and num_pixels > rule.max_pixels:
        yield FieldViolation(
            field="width",
            description=f"{order.width}x{order.height} has {num_pixels} pixels, a picture that is not square may have "
            f"{rule.max_pixels}; lower it or make it square",
        )


def _number_violations(order: SampleOrder) -> Iterator[FieldViolation]:
    for name, low, high in (("num_inference_steps", 1, MAX_STEPS), ("num_images", 1, MAX_IMAGES)):
        value = getattr(order, name)
        if not low <= value <= high:
            yield FieldViolation(field=name, description=f"{value}, must be {low} to {high}")
    if order.seed + order.num_images > MAX_SEED:
        yield FieldViolation(field="seed", description=f"{order.seed}, must be below 2**64 for every picture")
    if not 0.0 <= order.guidance_scale <= MAX_GUIDANCE:
        yield FieldViolation(
            field="guidance_scale", description=f"{order.guidance_scale}, must be 0 to {MAX_GUIDANCE:g}; 5.0 is usual"
        )
    if order.shift is not None and not 0.0 < order.shift <= MAX_SHIFT:
        yield FieldViolation(
            field="shift", description=f"{order.shift}, must be above 0 and at most {MAX_SHIFT:g}; 3.0 is usual"
        )
    if not (math.isfinite(order.adapter_strength) and abs(order.adapter_strength) <= MAX_STRENGTH):
        yield FieldViolation(
            field="adapter_strength",
            description=f"{order.adapter_strength}, must be within +-{MAX_STRENGTH:g}; 1.0 is as trained",
        )


def _method_violations(order: SampleOrder) -> Iterator[FieldViolation]:
    if not 0.0 <= order.guidance_rescale <= 1.0:
        yield FieldViolation(
            field="guidance_rescale", description=f"{order.guidance_rescale}, must be 0 to 1; 0.7 is usual"
        )
    if order.scheduler is not None and order.scheduler not in SCHEDULERS:
        yield FieldViolation(
            field="scheduler",
            description=f"unknown value {order.scheduler[:80]!r}, expected one of {', '.join(SCHEDULERS)}; without it "
            "the checkpoint's own is used",
        )
    if order.preview_steps > MAX_STEPS:
        yield FieldViolation(
            field="preview_steps", description=f"{order.preview_steps}, must be 0 to {MAX_STEPS}; 5 is usual"
        )


def _adapter_violations(order: SampleOrder, key_of: KeyOf) -> Iterator[FieldViolation]:
    if order.adapter is None:
        return
    try:
        key_of(order.adapter.uri)
    except InvalidArgumentError as error:
        yield FieldViolation(field="adapter.uri", description=error.message)
    if not order.adapter.sha256:
        yield FieldViolation(field="adapter.sha256", description="empty; give the digest of the adapter file")
