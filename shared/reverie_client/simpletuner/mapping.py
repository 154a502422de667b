"""From SimpleTuner's configuration folder to a job file, with a report that has a line for each key."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor
from reverie.training.v1.job_pb2 import TrainingJobSpec
from reverie_common.errors import InvalidArgumentError

from reverie_client.names import plain_name
from reverie_client.prompt_library import parse_prompt_library
from reverie_client.simpletuner.datasets import Entries, read_entries
from reverie_client.simpletuner.keys import CONFIG, WEBHOOK
from reverie_client.simpletuner.keys.adapter import is_lora, is_lycoris
from reverie_client.simpletuner.keys.objective import timestep_mode
from reverie_client.simpletuner.keys.validation import NO_EVALUATION, draws_pictures, is_measuring
from reverie_client.simpletuner.lycoris import read_lycoris
from reverie_client.simpletuner.plan import DatasetPlan
from reverie_client.simpletuner.reading import (
    ConfigFolder,
    open_config,
    option_name,
    parse_json,
    read_json,
    require_object,
)
from reverie_client.simpletuner.report import Report, ReportLine
from reverie_client.simpletuner.rules import UNSET, Draft, Given, Scope, apply_options, resolve

DATASETS_DEFAULT = "multidatabackend.json"
LYCORIS_DEFAULT = "config/lycoris_config.json"
UNKNOWN = "unknown option"
NO_SIGMOID = "timesteps are drawn in another way, which has no such offset, in SimpleTuner too"
LATENTS_ONCE = "SimpleTuner draws each latent once and keeps it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A configuration, brought over."""

    document: Mapping[str, Any]
    """The job file."""
    comments: Mapping[str, str]
    """Where values come from that are not in the configuration, by path."""
    report: Report
    plans: tuple[DatasetPlan, ...]


@dataclass(kw_only=True, slots=True)
class _Import:
    """What is known while a folder is read."""

    folder: ConfigFolder
    draft: Draft
    scope: Scope
    files: list[Path] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        """What the report calls a file."""
        return path.name if path.parent == self.folder.path else str(path)

    def read(self, path: Path) -> Any:
        self.files.append(path)
        return read_json(path)


def import_configuration(
    place: Path,
    *,
    dataset_root: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    draw_seed: Callable[[], int] | None = None,
) -> Imported:
    """Turn a configuration folder of SimpleTuner's into a job.

    Args:
        place: the folder with config.json, or that file.
        dataset_root: where relative paths of pictures begin; the current folder by default.
        overrides: options that take the place of those in config.json, as on SimpleTuner's command line.
        draw_seed: where a random seed comes from.

    Raises:
        NotFoundError: a file that is named is not there.
        InvalidArgumentError: a file cannot be read at all. What can be read and not be done is in the report.
    """
    work = _begin(open_config(place), overrides or {}, draw_seed)
    plans = _read_datasets(work, dataset_root or Path())
    apply_options(work.scope, CONFIG, UNKNOWN)
    _read_adapter(work)
    _read_prompts(work)
    _read_webhooks(work)
    _finish(work)
    _report_unread(work)
    report = Report(lines=_in_order(work))
    return Imported(
        document=_ordered(work.draft.document), comments=work.draft.comments, report=report, plans=tuple(plans)
    )


def _begin(folder: ConfigFolder, overrides: Mapping[str, Any], draw_seed: Callable[[], int] | None) -> _Import:
    draft = Draft() if draw_seed is None else Draft(draw_seed=draw_seed)
    document = dict(require_object(read_json(folder.main), str(folder.main)))
    replaced = {option_name(key): value for key, value in overrides.items()}
    names = {option_name(key): key for key in document}
    document.update({names.get(name, name): value for name, value in replaced.items()})
    given, again = resolve(document, CONFIG, option_name)
    scope = Scope(file=folder.main.name, draft=draft, given=given)
    for extra in again:
        scope.refuse(extra, f"{given[extra.name].key} says the same", "remove one of both")
    return _Import(folder=folder, draft=draft, scope=scope, files=[folder.main])


def _read_datasets(work: _Import, root: Path) -> Sequence[DatasetPlan]:
    named = str(work.scope.value("data_backend_config", DATASETS_DEFAULT))
    path = work.folder.require(named, "data_backend_config")
    entries = Entries(
        file=work.name_of(path),
        draft=work.draft,
        config={name: given for name, given in work.scope.given.items() if given.value is not None},
        roots=(root, work.folder.path, work.folder.path.parent),
        unused={} if timestep_mode(work.scope) == "sigmoid" else {"timestep_sampling_offset": NO_SIGMOID},
        unmeasured="" if is_measuring(work.scope) else NO_EVALUATION,
    )
    read_entries(entries, work.read(path))
    return entries.plans


def _read_adapter(work: _Import) -> None:
    if is_lycoris(work.scope):
        path = work.folder.require(str(work.scope.value("lycoris_config", LYCORIS_DEFAULT)), "lycoris_config")
        read_lycoris(work.draft, work.name_of(path), require_object(work.read(path), str(path)))
    elif is_lora(work.scope):
        work.draft.document.setdefault("adapter", {}).setdefault("lora", {})


def _read_prompts(work: _Import) -> None:
    """Add the user's prompts before the main one, as SimpleTuner orders them."""
    named = work.scope.value("user_prompt_library")
    if not named or not draws_pictures(work.scope):
        return
    path = work.folder.require(str(named), "user_prompt_library")
    library = require_object(work.read(path), str(path))
    scope = Scope(file=work.name_of(path), draft=work.draft, given={})
    prompts = work.draft.document.setdefault("validation", {}).setdefault("prompts", [])
    main, taken = list(prompts), {prompt["name"] for prompt in prompts}
    prompts.clear()
    for key, value in library.items():
        _read_prompt(scope, prompts, taken, Given(name=key, key=key, value=value))
    prompts += main


def _read_prompt(scope: Scope, prompts: list[dict[str, Any]], taken: set[str], given: Given) -> None:
    try:
        read = parse_prompt_library({given.key: given.value}, name=given.key, taken=taken)
    except InvalidArgumentError as error:
        scope.refuse(given, "; ".join(found.description for found in error.violations) or error.message)
        return
    prompt = read.prompts[0]
    strength = {"adapter_strength": prompt.adapter_strength} if prompt.HasField("adapter_strength") else {}
    entry = {"name": prompt.name, "prompt": prompt.prompt, **strength}
    prompts.append(entry)
    taken.add(prompt.name)
    notes = [note.partition(": ")[2] if ": " in note else "names become file names" for note in read.notes]
    if "<token>" in prompt.prompt:
        notes.append("put your subject's name in place of <token>")
    record = scope.change if read.notes else scope.honour
    record(given, "validation.prompts[].name", UNSET, "; ".join(dict.fromkeys([f"named {prompt.name}", *notes])))


def _read_webhooks(work: _Import) -> None:
    value = work.scope.value("webhook_config")
    if isinstance(value, str) and value.strip():
        text = value.strip()
        if text[0] in "[{":
            file, document = work.folder.main.name, parse_json(text, "webhook_config")
        else:
            path = work.folder.require(text, "webhook_config")
            file, document = work.name_of(path), work.read(path)
    else:
        file, document = work.folder.main.name, value
    hooks = document if isinstance(document, list) else [document] if document else []
    for index, hook in enumerate(hooks, start=1):
        _read_webhook(work, file, f"webhook-{index}", require_object(hook, "webhook_config"))


def _read_webhook(work: _Import, file: str, label: str, hook: Mapping[str, Any]) -> None:
    given, _ = resolve(hook, WEBHOOK, option_name)
    scope = Scope(file=file, draft=work.draft, given=given, root="webhooks[].", prefix=f"{label}.", fields={})
    apply_options(scope, WEBHOOK, "unknown key of a webhook")
    work.draft.document.setdefault("webhooks", []).append(scope.fields)


def _finish(work: _Import) -> None:
    """Write what no option says: the job's name, what SimpleTuner always does, what measuring needs."""
    draft = work.draft
    run_name = str(work.scope.value("tracker_run_name") or work.folder.path.resolve().name or "imported")
    draft.put(
        "name", plain_name(run_name, "job"), "" if work.scope.value("tracker_run_name") else "the name of the folder"
    )
    habit = Given(name="sample_latents_once", key="(always)", value=True, is_default=True)
    work.scope.honour(habit, "optimization.sample_latents_once", True, LATENTS_ONCE)
    rollout = (draft.get("optimization") or {}).get("scheduled_sampling")
    if rollout is not None and "max_step_offset" not in rollout:
        del draft.document["optimization"]["scheduled_sampling"]  # the offset was refused, so nothing is rolled out


def _report_unread(work: _Import) -> None:
    """Name the JSON files of the folder that nothing names: a line for each of their keys."""
    for path in work.folder.others(work.files):
        document = read_json(path)
        keys = list(document) if isinstance(document, dict) else [f"[{index}]" for index in range(len(document))]
        option = "user_prompt_library" if "prompt" in path.name else "lycoris_config" if "lycoris" in path.name else ""
        remedy = f"; to use it: --set {option}={path.name}" if option else ""
        scope = Scope(file=path.name, draft=work.draft, given={})
        for key in keys:
            value = document[key] if isinstance(document, dict) else ""
            scope.ignore(
                Given(name=str(key), key=str(key), value=value),
                f"{work.folder.main.name} does not name this file{remedy}",
            )


def _in_order(work: _Import) -> list[ReportLine]:
    """Lines by file: the main one first, the others as they were read; what was added ends each file."""
    names = list(dict.fromkeys([work.folder.main.name, *(line.file for line in work.draft.report.lines)]))
    return sorted(work.draft.report.lines, key=lambda line: (names.index(line.file), line.outcome == "added"))


def _ordered(document: Mapping[str, Any], descriptor: Descriptor | None = None) -> dict[str, Any]:
    """Bring keys into the order of the contract's fields."""
    fields = (descriptor or TrainingJobSpec.DESCRIPTOR).fields
    ordered: dict[str, Any] = {}
    for item in fields:
        if item.name not in document:
            continue
        value = document[item.name]
        inner = item.message_type
        is_map = inner is not None and inner.GetOptions().map_entry
        if inner is None or is_map:
            ordered[item.name] = value
        elif isinstance(value, list):
            ordered[item.name] = [_ordered(each, inner) for each in value]
        else:
            ordered[item.name] = _ordered(value, inner)
    return ordered
