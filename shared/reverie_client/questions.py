"""What `reverie configure` asks, with defaults that follow from the answers before, and the job that they make."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reverie_common.optimizer_catalogue import CATALOGUE, UnknownOptimizerError, find_optimizer

from reverie_client.names import plain_name
from reverie_client.simpletuner.rules import parse_flag, parse_number

Answers = Mapping[str, Any]

BF16_GIGABYTES = 48
"""Of a card that holds the base as it is: 34 GB of weights and 4 GB for the rest, with room (spec 10.2)."""

INT8_GIGABYTES = 24
"""Of a card that holds the base in int8: 17 GB of weights and 5 GB for the rest."""

LION_SHARE = 0.2
"""A step by sign needs about a fifth of AdamW's rate: the guide's 2e-5 for 1e-4."""

SHARED_PATTERNS = (
    "double_stream_blocks.*.block.attn*",
    "double_stream_blocks.*.block.ff_t*",
    "double_stream_blocks.*.block.ff_i.shared_experts*",
    "single_stream_blocks.*.block.attn*",
    "single_stream_blocks.*.block.ff_i.shared_experts*",
)
"""Attention and every feed-forward but the routed experts: 448 modules of HiDream-I1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question."""

    name: str
    text: str
    explanation: str
    parse: Callable[[Any], Any]
    """Turns an answer into its value; raises ValueError with what is expected."""
    default: Callable[[Answers], Any]
    applies: Callable[[Answers], bool] = lambda _: True

    def show(self, value: Any) -> str:
        """Return a value as one would type it."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return "; ".join(value)
        return f"{value:g}" if isinstance(value, float) else str(value)


def _text(answer: Any) -> str:
    return str(answer).strip()


def _required(answer: Any) -> str:
    if not (text := _text(answer)):
        raise ValueError("write something")
    return text


def _name(answer: Any) -> str:
    text = _text(answer)
    if not re.fullmatch(r"[a-z0-9-]{1,63}", text):
        raise ValueError(f"{text!r} is no name: use a-z, 0-9 and -, for instance {plain_name(text, 'job')}")
    return text


def _flag(answer: Any) -> bool:
    short = {"y": True, "n": False}.get(_text(answer).lower())
    value = parse_flag(answer) if short is None else short
    if value is None:
        raise ValueError(f"{answer!r} is neither yes nor no")
    return value


def _texts(answer: Any) -> list[str]:
    parts = answer if isinstance(answer, list) else str(answer).split(";")
    texts = [text for text in (_text(part) for part in parts) if text]
    if not texts:
        raise ValueError("write at least one, with ; between several")
    return texts


def _one_of(*words: str) -> Callable[[Any], str]:
    def parse(answer: Any) -> str:
        if (word := _text(answer)) not in words:
            raise ValueError(f"{word!r} is none of {', '.join(words)}")
        return word

    return parse


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(answer: Any) -> int:
        value = parse_number(answer, is_whole=True)
        if value is None or not low <= value <= high:
            raise ValueError(f"{answer!r} is no whole number from {low} to {high}")
        return int(value)

    return parse


def _rate(answer: Any) -> float:
    value = parse_number(answer)
    if value is None or not 0 < value <= 1:
        raise ValueError(f"{answer!r} is no number above 0, at most 1")
    return float(value)


def _size(answer: Any) -> str:
    text = _text(answer).lower()
    edges = [int(edge) for edge in text.split("x")] if re.fullmatch(r"[0-9]{2,4}x[0-9]{2,4}", text) else []
    if not edges or any(edge % 16 or not 64 <= edge <= 4096 for edge in edges):
        raise ValueError(f"{text!r} is no size; write WIDTHxHEIGHT in multiples of 16, for instance 1024x1024")
    return text


def _optimizer(answer: Any) -> str:
    try:
        find_optimizer(_text(answer))
    except UnknownOptimizerError as error:
        raise ValueError(str(error)) from None
    return _text(answer)


def default_precision(answers: Answers) -> str:
    """How the base fits on a card of so many gigabytes (spec 10.2)."""
    if answers["card_memory"] >= BF16_GIGABYTES:
        return "no_change"
    return "int8-quanto" if answers["card_memory"] >= INT8_GIGABYTES else "nf4-bnb"


def default_rate(answers: Answers) -> float:
    """The guide's rates: LoKr 1e-4 with AdamW, LoRA 4e-4 to rank 8 and 6e-5 from rank 64, a fifth of it with Lion."""
    name = answers["optimizer"]
    if CATALOGUE[name].finds_rate:
        return 1.0
    rank = answers.get("lora_rank")
    rate = 1e-4 if rank is None else 4e-4 if rank <= 8 else 6e-5 if rank >= 64 else 1e-4
    return rate * LION_SHARE if "lion" in name else rate


def _always(value: Any) -> Callable[[Answers], Any]:
    return lambda _: value


def _is_lora(answers: Answers) -> bool:
    return bool(answers["adapter"] == "lora")


QUESTIONS: Sequence[Question] = (
    Question(
        name="name",
        text="What is the job called?",
        explanation="Made of a-z, 0-9 and -.",
        parse=_name,
        default=_always("my-adapter"),
    ),
    Question(
        name="dataset",
        text="Which dataset?",
        explanation="Its name at the trainer, there already or made next.",
        parse=_name,
        default=lambda answers: answers["name"],
    ),
    Question(
        name="folder",
        text="Where are its pictures?",
        explanation="A folder on this machine; - where the dataset is there already.",
        parse=lambda answer: "" if _text(answer) == "-" else _text(answer),
        default=_always(""),
    ),
    Question(
        name="captions",
        text="Where do captions come from?",
        explanation="textfile: PICTURE.txt beside each. filename: its name. instanceprompt: one for all.",
        parse=_one_of("textfile", "filename", "instanceprompt"),
        default=_always("textfile"),
    ),
    Question(
        name="instance_prompt",
        text="Which caption?",
        explanation="With a rare word for your subject.",
        parse=_required,
        default=lambda answers: f"a photo of {answers['name']}",
        applies=lambda answers: bool(answers["captions"] == "instanceprompt"),
    ),
    Question(
        name="repeats",
        text="How many extra passes over it in an epoch?",
        explanation="0 shows each picture once. More is needed only beside larger datasets.",
        parse=_whole(0, 1_000_000),
        default=_always(0),
    ),
    Question(
        name="resolution",
        text="At which resolution?",
        explanation="The edge of a square of the same area: 1024 is the model's own; 512 is about four times as fast.",
        parse=_whole(64, 4096),
        default=_always(1024),
    ),
    Question(
        name="flavour",
        text="Which model?",
        explanation="full is the one that is not distilled; dev and fast are hard to train.",
        parse=_one_of("full", "dev", "fast"),
        default=_always("full"),
    ),
    Question(
        name="card_memory",
        text="How much memory has the card, in gigabytes?",
        explanation="It decides how the frozen base is held: 48 as it is, 24 in int8, below in 4 bits.",
        parse=_whole(4, 1000),
        default=_always(24),
    ),
    Question(
        name="base_precision",
        text="How is the frozen base held?",
        explanation="no_change, int8-quanto, nf4-bnb or another name of docs/quantisation.md.",
        parse=_required,
        default=default_precision,
    ),
    Question(
        name="adapter",
        text="What is trained?",
        explanation="attention: a LoKr there. shared: on feed-forwards too, not on routed experts. lora: a LoRA.",
        parse=_one_of("attention", "shared", "lora"),
        default=_always("attention"),
    ),
    Question(
        name="lora_rank",
        text="Which rank?",
        explanation="1 to 256; more can learn more, and overfit more.",
        parse=_whole(1, 256),
        default=_always(16),
        applies=_is_lora,
    ),
    Question(
        name="optimizer",
        text="Which optimiser?",
        explanation="optimi-lion, adamw, prodigy or another name of docs/optimizers.md.",
        parse=_optimizer,
        default=_always("optimi-lion"),
    ),
    Question(
        name="learning_rate",
        text="At which learning rate?",
        explanation="The default is the usual one for this adapter and optimiser.",
        parse=_rate,
        default=default_rate,
    ),
    Question(
        name="max_steps",
        text="How many optimiser steps?",
        explanation="Subjects are often learnt in 1000 to 3000.",
        parse=_whole(1, 1_000_000),
        default=_always(3000),
    ),
    Question(
        name="batch_size",
        text="How many pictures in a step?",
        explanation="1 takes the least memory.",
        parse=_whole(1, 128),
        default=_always(1),
    ),
    Question(
        name="ema",
        text="Keep a running average of the adapter?",
        explanation="It costs little and gives smoother results.",
        parse=_flag,
        default=_always(True),
    ),
    Question(
        name="validation_prompts",
        text="Which prompts are drawn while training?",
        explanation="With ; between several.",
        parse=_texts,
        default=lambda answers: [answers.get("instance_prompt", f"a photo of {answers['name']}")],
    ),
    Question(
        name="validation_size",
        text="At which size are they drawn?",
        explanation="WIDTHxHEIGHT in multiples of 16.",
        parse=_size,
        default=lambda answers: f"{_drawn(answers)}x{_drawn(answers)}",
    ),
    Question(
        name="validation_steps",
        text="After how many steps are they drawn each time?",
        explanation="Drawing takes time from nobody but the sampler's card.",
        parse=_whole(1, 1_000_000),
        default=_always(200),
    ),
    Question(
        name="trigger_words",
        text="Which words trigger the adapter?",
        explanation="Written into its metadata; - for none, ; between several.",
        parse=lambda answer: [] if answer in ("-", "", []) else _texts(answer),
        default=_always([]),
    ),
    Question(
        name="tensorboard",
        text="Write TensorBoard files?",
        explanation="The job's own events have every figure too.",
        parse=_flag,
        default=_always(False),
    ),
)
"""In the order in which they are asked."""


def _drawn(answers: Answers) -> int:
    return max(64, 16 * round(int(answers["resolution"]) / 16))


def job_of(answers: Answers) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the job file that answers make, and comments on its fields by their paths."""
    document: dict[str, Any] = {
        "name": answers["name"],
        "model": _model(answers),
        "datasets": [_dataset(answers)],
        "adapter": _adapter(answers),
        "optimization": {
            "max_steps": answers["max_steps"],
            "batch_size": answers["batch_size"],
            "optimizer": answers["optimizer"],
            "learning_rate": answers["learning_rate"],
            "lr_warmup_steps": min(100, answers["max_steps"] // 10),
            "gradient_checkpointing": True,
        },
        "checkpoints": {"every_steps": 500, "keep": 5},
        "validation": _validation(answers),
        "seed": 42,
    }
    optional = {
        "trigger_words": answers["trigger_words"],
        "ema": {"decay": 0.995} if answers["ema"] else None,
        "tracking": {"tensorboard": True} if answers["tensorboard"] else None,
    }
    document.update({key: value for key, value in optional.items() if value})
    return document, _comments(answers)


def _model(answers: Answers) -> dict[str, Any]:
    model = {"flavour": answers["flavour"], "base_precision": answers["base_precision"], "mixed_precision": "bf16"}
    is_small = answers["card_memory"] <= INT8_GIGABYTES and answers["base_precision"] != "no_change"
    return {**model, "quantize_via": "cpu"} if is_small else model


def _dataset(answers: Answers) -> dict[str, Any]:
    dataset = {"dataset": answers["dataset"], "repeats": answers["repeats"], "resolution": answers["resolution"]}
    if answers["captions"] == "instanceprompt":
        return {**dataset, "caption_strategy": "instanceprompt", "instance_prompt": answers["instance_prompt"]}
    strategy = {"textfile": "captions", "filename": "filename"}[answers["captions"]]
    return {**dataset, "caption_strategy": strategy}


def _adapter(answers: Answers) -> dict[str, Any]:
    if _is_lora(answers):
        return {"lora": {"rank": answers["lora_rank"]}}
    lokr: dict[str, Any] = {"factor": 16, "linear_alpha": 1, "full_matrix": True, "use_scalar": True}
    preset: dict[str, Any] = {"target_module": ["Attention"]}
    if answers["adapter"] == "shared":
        preset = {"target_name": list(SHARED_PATTERNS), "use_fnmatch": True}
    return {"lokr": {**lokr, "apply_preset": preset}}


def _validation(answers: Answers) -> dict[str, Any]:
    prompts = [
        {"name": "validation" if number == 1 else f"validation-{number}", "prompt": prompt}
        for number, prompt in enumerate(answers["validation_prompts"], start=1)
    ]
    return {
        "every_steps": answers["validation_steps"],
        "prompts": prompts,
        "resolutions": [answers["validation_size"]],
        "num_inference_steps": 30,
        "guidance_scale": 3.0,
    }


def _comments(answers: Answers) -> dict[str, str]:
    """The questions' own explanations, beside what they decided."""
    places = {
        "flavour": "model.flavour",
        "base_precision": "model.base_precision",
        "adapter": "adapter",
        "optimizer": "optimization.optimizer",
        "learning_rate": "optimization.learning_rate",
        "max_steps": "optimization.max_steps",
        "batch_size": "optimization.batch_size",
        "ema": "ema",
        "validation_steps": "validation.every_steps",
        "trigger_words": "trigger_words",
        "tensorboard": "tracking",
    }
    by_name = {question.name: question.explanation for question in QUESTIONS}
    comments = {path: by_name[name] for name, path in places.items() if name in answers}
    comments["datasets"] = f"{by_name['repeats']}\n{by_name['resolution']}"
    comments["model.quantize_via"] = (
        "Quantised block by block in host memory, so that the whole base never lies on the card."
    )
    comments["validation.guidance_scale"] = "2.5 to 3 looks the most natural."
    return comments
