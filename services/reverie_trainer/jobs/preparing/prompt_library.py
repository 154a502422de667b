"""Which prompts a validation draws: the empty one, the built-in library, the job's own, in this order (spec 7.2)."""

from reverie.training.v1 import job_pb2

from reverie_trainer.jobs.spec import Validation, ValidationPrompt

UNCONDITIONAL = "unconditional"
"""Name of the empty prompt."""

LIBRARY_PREFIX = "lib-"
"""Every name of the built-in library begins with it, and no other."""

_LIBRARY = {
    "portrait": "a studio portrait of an elderly woman with silver hair, soft window light, shallow depth of field",
    "hands": "two hands kneading bread dough on a floured wooden table, seen from above",
    "crowd": "a busy morning market street with dozens of people, fruit stalls on both sides, wide shot",
    "cat": "a tabby cat asleep on a stack of books, warm lamp light",
    "horse": "a brown horse galloping through shallow sea water, spray in the air, side view",
    "landscape": "a mountain valley at sunrise, mist over a river, pine forest in the foreground",
    "city": "a rainy city crossing at night, neon signs reflected in the wet asphalt",
    "interior": "a small kitchen with blue tiles, copper pans on the wall and a bowl of lemons on the table",
    "still-life": "a glass of water, a pear and a folded newspaper on white linen, hard side light",
    "text": 'a hand-painted wooden sign that says "OPEN DAILY" above a bakery door',
    "counting": "exactly three red balloons tied to a green bicycle",
    "relations": "a small blue cube on top of a large yellow sphere, plain grey background",
    "watercolour": "a loose watercolour sketch of sailing boats in a harbour, visible paper texture",
    "ink": "a black ink drawing of a heron among reeds, few strokes, empty background",
    "render": "an isometric 3D render of a tiny workshop with a robot repairing a clock",
    "macro": "a macro photograph of dew drops on a spider web, green background out of focus",
}

LIBRARY: tuple[ValidationPrompt, ...] = tuple(
    ValidationPrompt(name=f"{LIBRARY_PREFIX}{name}", prompt=prompt) for name, prompt in _LIBRARY.items()
)
"""Written for this project: faces, hands, crowds, animals, places, text, counting, relations and styles."""


def prompts_of(validation: Validation) -> tuple[ValidationPrompt, ...]:
    """Return everything that a validation draws, in order."""
    empty = (ValidationPrompt(name=UNCONDITIONAL, prompt=""),) if validation.unconditional else ()
    return (*empty, *(LIBRARY if validation.prompt_library else ()), *validation.prompts)


def prompt_texts(validation: job_pb2.ValidationSpec) -> dict[str, str]:
    """Return the text of everything that a validation may have drawn, by name."""
    named = {UNCONDITIONAL: "", **{prompt.name: prompt.prompt for prompt in LIBRARY}}
    return named | {prompt.name: prompt.prompt for prompt in validation.prompts}
