"""What a round of validation asks the sampler, and what it tells the trainer."""

import math
from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampledImage, SampleRequest, SampleResponse, SamplingPreview
from reverie_common.storage.keys import content_digest
from reverie_trainer.jobs.spec import Validation, ValidationPrompt
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.picture_report import PictureReport
from reverie_trainer.worker.picture_requests import count_pictures, picture_requests

ADAPTER = ObjectRef(uri="s3://bucket/adapter", sha256="0" * 64)
OWN = (ValidationPrompt(name="cat", prompt="a cat"), ValidationPrompt(name="dog", prompt="a dog", adapter_strength=0.5))


def requests(weights: str = "adapter", **changes: Any) -> list[tuple[str, SampleRequest]]:
    validation = Validation(**{"prompts": OWN, "resolutions": ("64x96",), **changes})
    return list(picture_requests(validation, ADAPTER, weights=weights))


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"guidance_rescale": 0.7}, "guidance_rescale", 0.7),
        ({"scheduler": "unipc"}, "scheduler", "unipc"),
        ({"shift": 2.5}, "shift", 2.5),
        ({"clip_score": True}, "clip_score", True),
        ({"compile": True}, "compile", True),
        ({"preview_steps": 5}, "preview_steps", 5),
        ({"adapter_strength": 0.8}, "adapter_strength", 0.8),
        ({"seed": 9}, "seed", 9),
        ({"negative_prompt": "blurry"}, "negative_prompt", "blurry"),
    ],
)
def test_a_setting_changes_its_field_of_the_request_alone(changes: dict[str, Any], field: Any, value: Any) -> None:
    plain, changed = requests()[0][1], requests(**changes)[0][1]
    assert getattr(changed, field) == value
    changed.ClearField(field)
    plain.ClearField(field)
    assert changed == plain


def test_what_a_job_does_not_say_is_left_to_the_checkpoint() -> None:
    assert not requests()[0][1].HasField("scheduler")
    assert not requests()[0][1].HasField("shift")


def test_a_prompt_may_have_a_strength_of_its_own() -> None:
    strengths = {name: request.adapter_strength for name, request in requests(adapter_strength=0.8)}
    assert strengths == {"cat": 0.8, "dog": 0.5}


def test_every_prompt_is_drawn_in_every_size() -> None:
    validation = Validation(prompts=OWN, resolutions=("64x96", "128x64"), num_images=3, unconditional=True)
    asked = [(name, one.width, one.height) for name, one in picture_requests(validation, None, weights="adapter")]
    assert asked == [(name, *size) for name in ("unconditional", "cat", "dog") for size in ((64, 96), (128, 64))]
    assert count_pictures(validation) == 3 * 2 * 3


def test_no_name_is_ever_asked_for_so_none_can_be_confused_with_a_caption() -> None:
    # A caption "woman" of a dataset and the picture named woman: what is embedded is the prompt, by its text.
    prompt = ValidationPrompt(name="woman", prompt="a portrait of a queen")
    ((name, request),) = requests(prompts=(prompt,))
    assert (name, request.prompt) == ("woman", "a portrait of a queen")
    assert b"woman" not in request.SerializeToString()
    assert content_digest({"prompt": request.prompt}) != content_digest({"prompt": "woman"})


def test_previews_are_of_the_adapter_alone() -> None:
    assert requests("ema", preview_steps=5)[0][1].preview_steps == 0


def report() -> tuple[PictureReport, Outbox]:
    outbox = Outbox()
    return PictureReport(outbox=outbox, step=20, weights="adapter", num_total=3), outbox


def image(index: int, score: float | None = None) -> SampleResponse:
    picture = SampledImage(image_index=index, width=64, height=96, clip_score=score)
    return SampleResponse(image=picture)


def events(outbox: Outbox, kind: str) -> list[Any]:
    return [getattr(one, kind) for one in outbox.take().events if one.WhichOneof("payload") == kind]


def test_a_preview_is_told_once_with_where_the_sampler_is() -> None:
    told, outbox = report()
    preview = SamplingPreview(image_index=1, step=5, num_steps=20, timestep=812.5, image=ObjectRef(uri="s3://b/p"))
    for _ in range(2):
        told.add("cat", SampleRequest(width=64, height=96), SampleResponse(preview=preview))
    (event,) = events(outbox, "validation_preview")
    assert (event.step, event.prompt_name, event.image_index, event.width, event.height) == (20, "cat", 1, 64, 96)
    assert (event.sampling_step, event.num_sampling_steps, event.timestep) == (5, 20, 812.5)
    assert event.image.uri == "s3://b/p"


def test_the_scores_of_a_round_are_summed_up() -> None:
    told, outbox = report()
    scores = [20.5, 31.0, 27.25]
    for index, score in enumerate(scores):
        told.add("cat", SampleRequest(), image(index, score))
    told.add("cat", SampleRequest(), image(0, 99.0))  # answered twice, counted once
    told.finish()
    (event,) = events(outbox, "validation_scores")
    mean = sum(scores) / 3
    assert (event.step, event.weights, event.num_pictures, event.min, event.max) == (20, "adapter", 3, 20.5, 31.0)
    assert event.mean == pytest.approx(mean)
    assert event.std == pytest.approx(math.sqrt(sum((score - mean) ** 2 for score in scores) / 3))


def test_pictures_carry_their_score_and_without_scores_there_is_no_sum() -> None:
    told, outbox = report()
    told.add("cat", SampleRequest(), image(0))
    told.finish()
    taken = outbox.take().events
    assert [one.WhichOneof("payload") for one in taken] == ["validation_image", "validation_progress"]
    assert not taken[0].validation_image.HasField("clip_score")
    told.add("cat", SampleRequest(), image(1, 30.0))
    assert events(outbox, "validation_image")[0].clip_score == 30.0
