"""Pictures and measurements while training (spec 7)."""

import re
from typing import Any

from reverie_common.sampling_methods import SCHEDULERS

from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    custom,
    flag,
    ignored,
    number,
    parse_flag,
    parse_number,
    refused,
    text,
    when,
)

PIXELS = (64, 4096)
NO_EVALUATION = (
    "nothing is measured, in SimpleTuner too: that needs an entry with dataset_type eval, and eval_steps_interval or "
    "eval_epoch_interval"
)


def draws_pictures(scope: Scope) -> bool:
    """Whether pictures are drawn at all."""
    return not scope.is_on("validation_disable")


def is_measuring(scope: Scope) -> bool:
    """Whether evaluation datasets, if there are any, are measured."""
    has_interval = any(parse_number(scope.value(name)) for name in ("eval_steps_interval", "eval_epoch_interval"))
    return has_interval and not scope.is_on("eval_loss_disable")


def evaluates(scope: Scope) -> bool:
    """Whether a loss is measured: an evaluation dataset is there too, which the trainer would miss otherwise."""
    datasets = scope.draft.document.get("datasets") or []
    return is_measuring(scope) and any(dataset.get("role") == "evaluation" for dataset in datasets)


def _resolutions(scope: Scope, given: Given) -> None:
    sizes: list[str] = []
    changes: list[str] = []
    for part in filter(None, (part.strip().lower() for part in str(given.value).split(","))):
        match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", part)
        edges = [int(match[1]), int(match[2] or match[1])] if match else []
        if not match or any(not PIXELS[0] <= edge <= PIXELS[1] for edge in edges):
            scope.refuse(given, f"{part!r} is no size of 64 to 4096 pixels", "write 1024x1024 or 1024x1024,1280x768")
            return
        size = "x".join(str(16 * round(edge / 16)) for edge in edges)
        if size != "x".join(str(edge) for edge in edges):
            changes.append(f"{part} is no multiple of 16")
        if size not in sizes:
            sizes.append(size)
    if changes:
        scope.change(given, "validation.resolutions", sizes, "; ".join(changes))
    else:
        scope.honour(given, "validation.resolutions", sizes, _drawn_as_asked(given, sizes))


def _drawn_as_asked(given: Given, sizes: list[str]) -> str:
    if given.is_default:
        return "what SimpleTuner draws when no size is given: one megapixel, named 256"
    is_rescaled = any(size != "1024x1024" for size in sizes)
    return "drawn at this size; SimpleTuner's pipeline brings every size to one megapixel" if is_rescaled else ""


def _prompt(scope: Scope, given: Given) -> None:
    if not isinstance(given.value, str):
        scope.refuse(given, "it is not text", "put it in quotes")
        return
    prompts = scope.draft.document.setdefault("validation", {}).setdefault("prompts", [])
    prompts.append({"name": "validation", "prompt": given.value})
    scope.honour(given, "validation.prompts", UNSET, "under the name validation")


def _library(scope: Scope, given: Given) -> None:
    if given.value == "audio":
        scope.refuse(given, "those prompts are for sound", "use true")
    elif parse_flag(given.value) is True:
        scope.change(
            given, "validation.prompt_library", True, "Reverie's own 16 prompts; SimpleTuner's are not carried"
        )
    else:
        scope.ignore(given, "it is off")


def _user_library(scope: Scope, given: Given) -> None:
    scope.honour(given, "validation.prompts", UNSET, "read; its own keys are reported below")


def _preview(scope: Scope, given: Given) -> None:
    if parse_flag(given.value) is True:
        steps = parse_number(scope.value("validation_preview_steps", 1), is_whole=True) or 1
        scope.honour(
            given, "validation.preview_steps", int(steps), "through the tiny decoder; SimpleTuner has none for HiDream"
        )
    else:
        scope.ignore(given, "it is off")


def _preview_steps(scope: Scope, given: Given) -> None:
    value = parse_number(given.value, is_whole=True)
    if value is None or not 1 <= value <= 200:
        scope.refuse(given, "it is not a whole number from 1 to 200")
    else:
        scope.honour(
            given,
            "validation.preview_steps",
            int(value),
            "after the first step too: with 20 and 5, at 1, 5, 10, 15 and 20",
        )


def _compile(scope: Scope, given: Given) -> None:
    value = parse_flag(given.value)
    if value is None:
        scope.refuse(given, "it is neither true nor false")
    else:
        scope.honour(
            given, "validation.compile", value, "" if value else "the text is read as false; SimpleTuner drops it"
        )


def _scheduler(scope: Scope, given: Given) -> None:
    if given.value in ("flow_unipc", "unipc"):
        scope.honour(given, "validation.scheduler", "unipc")
    elif given.value in SCHEDULERS:
        scope.honour(given, "validation.scheduler", given.value)
    else:
        scope.refuse(
            given,
            "it is no sampling method for flow models",
            f"the nearest is unipc; there are {', '.join(SCHEDULERS)}",
        )


def _evaluation_type(scope: Scope, given: Given) -> None:
    if given.value == "clip":
        scope.honour(
            given, "validation.clip_score", True, "the sampler is started with the CLIP model; every picture is scored"
        )
    elif given.value in ("none", ""):
        scope.ignore(given, "it is off")
    else:
        scope.refuse(given, f"there is no {given.value!r}", "use clip")


def _eval_images(scope: Scope, given: Given) -> None:
    value = parse_number(given.value, is_whole=True)
    batch = parse_number(scope.value("train_batch_size", 4), is_whole=True) or 1
    if value is None or not 1 <= value * batch <= 1000:
        scope.refuse(given, "it does not make 1 to 1000 images")
    elif batch == 1:
        scope.honour(given, "evaluation.num_images", int(value), "always the same images, the first by name")
    else:
        scope.change(
            given, "evaluation.num_images", int(value * batch), f"SimpleTuner counts batches, of {batch} images here"
        )


def _eval_epochs(scope: Scope, given: Given) -> None:
    if parse_number(scope.value("eval_steps_interval")) is None:
        scope.draft.put("evaluation.every_steps", 0)
    number("eval_epoch_interval", "evaluation.every_epochs", low=0.0).apply(scope, given)


def _not_before(name: str) -> Option:
    def apply(scope: Scope, given: Given) -> None:
        if parse_number(given.value) in (None, 0):
            scope.ignore(given, "it is off")
        else:
            scope.change(given, "", UNSET, "pictures are drawn from the beginning; there is no such limit here")

    return custom(name, apply, "changed", note="pictures are drawn from the beginning")


def _every(name: str, path: str, **more: Any) -> Option:
    return number(name, path, low=1, high=1_000_000, is_whole=True, **more)


_PICTURES: tuple[Option, ...] = (
    _every("validation_step_interval", "validation.every_steps", aliases=("validation_steps",), default=100),
    number("validation_epoch_interval", "validation.every_epochs", low=0.0),
    number("validation_seed", "validation.seed", low=0, high=2**64 - 1, is_whole=True),
    custom(
        "validation_resolution",
        _resolutions,
        "honoured",
        "validation.resolutions",
        "drawn at the size asked; edges become multiples of 16",
        default="1024x1024",
    ),
    custom("validation_prompt", _prompt, "honoured", "validation.prompts", "under the name `validation`"),
    custom("validation_prompt_library", _library, "changed", "validation.prompt_library", "Reverie's own prompts"),
    custom(
        "user_prompt_library",
        _user_library,
        "honoured",
        "validation.prompts",
        "the file is read; names are made safe for files",
    ),
    flag(
        "validation_disable_unconditional",
        "validation.unconditional",
        "the empty prompt is drawn unless it is disabled",
        opposite=True,
        default=False,
    ),
    text("validation_negative_prompt", "validation.negative_prompt", default="blurry, cropped, ugly"),
    number(
        "validation_num_inference_steps", "validation.num_inference_steps", low=1, high=200, is_whole=True, default=30
    ),
    number("validation_guidance", "validation.guidance_scale", low=0.0, high=100.0, default=7.5),
    number(
        "validation_guidance_rescale",
        "validation.guidance_rescale",
        "it works here; in SimpleTuner it does nothing for HiDream",
        low=0.0,
        high=1.0,
    ),
    number("num_validation_images", "validation.num_images", low=1, high=10, is_whole=True),
    number("validation_lycoris_strength", "validation.adapter_strength", low=-10.0, high=10.0),
    flag("disable_benchmark", "validation.disable_benchmark", "step-0 pictures are of the bare base model"),
    custom(
        "validation_preview",
        _preview,
        "honoured",
        "validation.preview_steps",
        "through the tiny decoder; SimpleTuner has none for HiDream",
    ),
    *when(
        lambda scope: draws_pictures(scope) and scope.is_on("validation_preview"),
        "validation_preview is off",
        (
            custom(
                "validation_preview_steps",
                _preview_steps,
                "honoured",
                "validation.preview_steps",
                "after the first and every so many steps",
            ),
        ),
    ),
    custom("validation_torch_compile", _compile, "honoured", "validation.compile", "gone from SimpleTuner"),
    custom("validation_noise_scheduler", _scheduler, "honoured", "validation.scheduler"),
    custom("evaluation_type", _evaluation_type, "honoured", "validation.clip_score"),
    ignored(
        "pretrained_evaluation_model_name_or_path", "the sampler is started with its CLIP model: `--clip-model PLACE`"
    ),
    _not_before("validate_after_step"),
    _not_before("validate_after_epoch"),
    ignored("validation_on_startup", "ask for pictures at any time: `reverie job validate JOB`"),
    refused(
        "validation_randomize",
        "pictures are compared with each other, so the noise stays the same",
        "give a validation_seed",
    ),
    ignored("validation_seed_source", "noise is drawn on the CPU, the same on every card"),
    ignored("validation_image_format", "pictures are PNG, without loss"),
    ignored("validation_image_quality", "pictures are PNG, without loss"),
    ignored(
        "tracker_image_layout",
        "each picture is a picture of its own, and a sheet of all comes with `reverie job fetch`",
    ),
    refused(
        "validation_method",
        "pictures are drawn by the sampler service",
        "use simpletuner-local",
        off=(None, "", "simpletuner-local"),
    ),
    refused(
        "validation_external_script",
        "pictures are drawn by the sampler service",
        "read the job's events: `reverie job watch -o json`",
    ),
    refused("validation_guidance_skip_layers", "layers are not skipped for HiDream", "leave it out"),
)

VALIDATION: tuple[Option, ...] = (
    custom("validation_disable", lambda scope, given: _disable(scope, given), "honoured", "validation"),
    *when(draws_pictures, "validation_disable is on", _PICTURES),
    *when(
        evaluates,
        NO_EVALUATION,
        (
            _every("eval_steps_interval", "evaluation.every_steps"),
            custom("eval_epoch_interval", _eval_epochs, "honoured", "evaluation.every_epochs"),
            custom(
                "num_eval_images",
                _eval_images,
                "honoured",
                "evaluation.num_images",
                "images, where SimpleTuner counts batches: times the batch size",
                default=4,
            ),
            number("eval_timesteps", "evaluation.num_timesteps", low=2, high=1000, is_whole=True),
            ignored("eval_dataset_pooling", "each dataset is measured by itself"),
            refused(
                "eval_dataset_id", "every evaluation dataset is measured", "disable the entries that you do not want"
            ),
        ),
    ),
    ignored("eval_loss_disable", "evaluation is left out where it is on"),
)


def _disable(scope: Scope, given: Given) -> None:
    if draws_pictures(scope):
        scope.ignore(given, "it is off")
    else:
        scope.honour(given, "validation", UNSET, "left out")
