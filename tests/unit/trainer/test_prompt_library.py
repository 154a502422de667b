"""What a validation draws, and under which names."""

import re
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobEvent, TrainingJobSpec, ValidationImage
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.outlets.messages import message_of
from reverie_trainer.jobs.preparing.prompt_library import LIBRARY, LIBRARY_PREFIX, prompt_texts, prompts_of
from reverie_trainer.jobs.spec import Validation, ValidationPrompt, spec_from_proto

OWN = ValidationPrompt(name="cat", prompt="a cat")


def violations(**validation: Any) -> dict[str, str]:
    job = {"name": "a", "datasets": [{"dataset": "a"}], "adapter": {"lokr": {}}, "optimization": {"max_steps": 5}}
    spec = spec_from_proto(ParseDict({**job, "validation": validation}, TrainingJobSpec()))
    return {violation.field: violation.description for violation in check_spec(spec)}


def test_the_job_s_own_prompts_are_drawn_alone() -> None:
    assert prompts_of(Validation(prompts=(OWN,))) == (OWN,)


def test_the_empty_prompt_comes_first_and_the_library_before_the_job_s_own() -> None:
    drawn = prompts_of(Validation(prompts=(OWN,), unconditional=True, prompt_library=True))
    assert drawn == (ValidationPrompt(name="unconditional", prompt=""), *LIBRARY, OWN)


def test_every_drawn_prompt_s_text_is_found_by_its_name() -> None:
    drawn = prompts_of(Validation(prompts=(OWN,), unconditional=True, prompt_library=True))
    spec = ParseDict({"prompts": [{"name": "cat", "prompt": "a cat"}]}, TrainingJobSpec().validation)
    assert prompt_texts(spec) == {prompt.name: prompt.prompt for prompt in drawn}


@pytest.mark.parametrize("prompt", [LIBRARY[0], ValidationPrompt(name="unconditional", prompt="")])
def test_webhooks_are_told_the_text_of_prompts_that_are_not_the_job_s_own(prompt: ValidationPrompt) -> None:
    event = TrainingJobEvent(validation_image=ValidationImage(prompt_name=prompt.name, step=1))
    message = message_of(event, TrainingJob())
    assert message is not None
    assert (message.title, message.data["prompt"]) == (f"Validation (step 1): {prompt.name}", prompt.prompt)
    assert message.body == prompt.prompt


def test_the_library_s_names_are_file_safe_and_in_a_name_space_of_their_own() -> None:
    names = [prompt.name for prompt in LIBRARY]
    assert 10 <= len(set(names)) == len(names) <= 20
    assert len({prompt.prompt for prompt in LIBRARY}) == len(names)
    assert all(re.fullmatch(r"lib-[a-z0-9_-]{1,59}", name) for name in names)
    assert all(prompt.prompt.strip() for prompt in LIBRARY)


@pytest.mark.parametrize("alone", [{"prompt_library": True}, {"unconditional": True}])
def test_a_job_needs_no_prompt_of_its_own(alone: dict[str, bool]) -> None:
    assert violations(**alone) == {}


@pytest.mark.parametrize(
    ("validation", "field", "words"),
    [
        ({"prompts": [{"name": "lib-cat", "prompt": "x"}]}, "validation.prompts[0].name", "built-in prompts do"),
        (
            {"unconditional": True, "prompts": [{"name": "unconditional", "prompt": "x"}]},
            "validation.prompts",
            "'unconditional' is given 2 times",
        ),
        ({"prompt_library": True, "guidance_rescale": 1.5}, "validation.guidance_rescale", "at most 1"),
        ({"prompt_library": True, "guidance_rescale": "NaN"}, "validation.guidance_rescale", "nan"),
        ({"prompt_library": True, "preview_steps": 201}, "validation.preview_steps", "0 to 200"),
        ({"prompt_library": True, "scheduler": "unipcc"}, "validation.scheduler", "did you mean 'unipc'"),
        ({"prompt_library": True, "every_epochs": -1}, "validation.every_epochs", "-1 is outside 0"),
        ({"prompt_library": True, "shift": 0}, "validation.shift", "above 0"),
        (
            {"prompts": [{"name": "a", "prompt": "x", "adapter_strength": 11}]},
            "validation.prompts[0].adapter_strength",
            "at most 10",
        ),
        ({"prompts": [{"name": f"p{i}", "prompt": "x"} for i in range(101)]}, "validation.prompts", "101 prompts"),
    ],
)
def test_what_is_wrong_is_named(validation: dict[str, Any], field: str, words: str) -> None:
    found = violations(**validation)
    assert list(found) == [field]
    assert words in found[field]


def test_no_other_name_can_look_like_the_library_s() -> None:
    assert LIBRARY_PREFIX == "lib-"
    assert "validation.prompts[0].name" in violations(prompts=[{"name": LIBRARY[0].name, "prompt": "x"}])
