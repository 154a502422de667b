"""SimpleTuner's dataset file: entries become datasets of the job and plans for bringing their pictures (spec 6)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reverie_client.names import plain_name, unique_name
from reverie_client.simpletuner.keys.data import FALLBACKS
from reverie_client.simpletuner.keys.dataset import BACKEND_KEYS, CACHE_BACKEND, DATASET, strategy
from reverie_client.simpletuner.plan import DatasetPlan
from reverie_client.simpletuner.rules import (
    Draft,
    Given,
    Option,
    Scope,
    apply_defaults,
    apply_given,
    apply_options,
    ignored,
    parse_flag,
    resolve,
)

PICTURES = ("image", "eval")
CACHES = ("text_embeds", "image_embeds")
MASKS = {"mask": "mask", "segmentation": "segmentation"}
SOURCES = {"local": "local", "aws": "bucket", "huggingface": "huggingface", "csv": "urls"}
UNKNOWN = "SimpleTuner's dataset entries have no such key for HiDream"

ENTRY: tuple[Option, ...] = (*DATASET, *BACKEND_KEYS)


@dataclass(kw_only=True, slots=True)
class Entries:
    """Everything that is known while the entries are read."""

    file: str
    draft: Draft
    config: Mapping[str, Given]
    """Options of config.json, which entries fall back on."""
    roots: Sequence[Path]
    """Where relative paths may begin, the likeliest first."""
    plans: list[DatasetPlan] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    by_id: dict[str, dict[str, Any]] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    """Keys that mean nothing in this configuration, with the reason."""
    unmeasured: str = ""
    """Why evaluation entries are not used; empty where they are."""

    def place(self, named: str) -> Path:
        """Return where a relative path is: the first place that exists, otherwise below the dataset root."""
        path = Path(named)
        if path.is_absolute():
            return path
        parts = path.parts
        places = [root.joinpath(*parts[start:]) for root in self.roots for start in range(len(parts))]
        return next((place for place in places if place.exists()), self.roots[0] / path)


def read_entries(entries: Entries, document: Any) -> None:
    """Turn the entries of a dataset file into datasets and plans; every key gets its line."""
    found = document if isinstance(document, list) else [document]
    objects = [entry for entry in found if isinstance(entry, Mapping)]
    for index, entry in enumerate(found):
        if not isinstance(entry, Mapping):
            scope = Scope(file=entries.file, draft=entries.draft, given={})
            scope.refuse(Given(name="entry", key=f"[{index}]", value=entry), "it is no object")
    entries.by_id = {str(entry["id"]): dict(entry) for entry in objects if "id" in entry}
    entries.draft.put("datasets", [])
    for index, entry in enumerate(objects):
        _read_entry(entries, entry, str(entry.get("id", f"[{index}]")))


def _read_entry(entries: Entries, entry: Mapping[str, Any], label: str) -> None:
    kind = str(entry.get("dataset_type", "image"))
    prefix = f"{label}."
    if _is_disabled(entry):
        _ignore_all(entries, entry, prefix, ENTRY, "the entry is disabled")
    elif kind in CACHES:
        table = [
            *CACHE_BACKEND,
            *(option for option in ENTRY if option.name not in {each.name for each in CACHE_BACKEND}),
        ]
        _ignore_all(
            entries, entry, prefix, table, "embeddings lie in the store by their content, without a cache of their own"
        )
    elif kind == "conditioning":
        _read_masks(entries, entry, prefix, label)
    elif kind == "eval" and entries.unmeasured:
        _ignore_all(entries, entry, prefix, ENTRY, entries.unmeasured)
    elif kind in PICTURES:
        _read_pictures(entries, entry, prefix, label)
    else:
        reason = f"dataset_type {kind} is refused"
        _ignore_all(
            entries, entry, prefix, ENTRY, reason, refused="dataset_type", why="HiDream trains on pictures; use image"
        )


def _is_disabled(entry: Mapping[str, Any]) -> bool:
    return any(parse_flag(entry.get(key)) is True for key in ("disabled", "disable"))


def _scope(entries: Entries, entry: Mapping[str, Any], prefix: str, table: Sequence[Option]) -> Scope:
    given, again = resolve(entry, table, str)
    scope = Scope(file=entries.file, draft=entries.draft, given=given, prefix=prefix)
    for extra in again:
        scope.refuse(extra, "another key of this entry says the same", "remove one of both")
    return scope


def _ignore_all(
    entries: Entries,
    entry: Mapping[str, Any],
    prefix: str,
    table: Sequence[Option],
    reason: str,
    *,
    refused: str = "",
    why: str = "",
) -> None:
    """Give every key of an entry that is not used its line; what is unknown is refused all the same."""
    scope = _scope(entries, entry, prefix, table)
    if refused in scope.given:
        scope.refuse(scope.given[refused], why)
    scope.given = {name: given for name, given in scope.given.items() if name != refused}
    apply_options(scope, [ignored(option.name, reason) for option in table], UNKNOWN)


def _read_masks(entries: Entries, entry: Mapping[str, Any], prefix: str, label: str) -> None:
    """An entry with masks belongs to the entry that names it."""
    kind = str(entry.get("conditioning_type", ""))
    parents = [name for name, each in entries.by_id.items() if each.get("conditioning_data") == label]
    if kind not in MASKS:
        reason = f"conditioning_type {kind or 'is missing and'} is refused"
        why = "HiDream has no other conditions than masks here; the nearest that works is mask or segmentation"
        key = "conditioning_type" if "conditioning_type" in entry else "dataset_type"
        _ignore_all(entries, entry, prefix, ENTRY, reason, refused=key, why=why)
    elif parents:
        _ignore_all(
            entries, entry, prefix, ENTRY, f"its pictures are the masks of {', '.join(parents)}, cut as those are"
        )
    else:
        why = "no entry names it as its conditioning_data; do so in the entry with the pictures"
        _ignore_all(entries, entry, prefix, ENTRY, "no pictures belong to these masks", refused="dataset_type", why=why)


def _read_pictures(entries: Entries, entry: Mapping[str, Any], prefix: str, label: str) -> None:
    name = unique_name(plain_name(label, "dataset"), entries.names)
    entries.names.add(name)
    scope = _scope(entries, entry, prefix, ENTRY)
    scope.root = "datasets[]."
    scope.fields = {"dataset": name}
    inherited = {key: entries.config[key] for key in FALLBACKS if key in entries.config and scope.value(key) is None}
    _take_masks(entries, scope)
    own, scope.given = scope.given, {**inherited, **scope.given}
    _apply_inherited(scope, inherited)
    table = [ignored(each.name, entries.unused[each.name]) if each.name in entries.unused else each for each in ENTRY]
    apply_given(scope, own, table, UNKNOWN)
    apply_defaults(scope, ENTRY)
    entries.draft.document["datasets"].append(scope.fields)
    plan = _plan(entries, scope, name, label)
    if plan is not None:
        entries.plans.append(plan)


def _apply_inherited(scope: Scope, inherited: Mapping[str, Given]) -> None:
    """Fill in what config.json says for all datasets; its line stands there, unless it cannot be used here."""
    table = {option.name: option for option in DATASET}
    kept = list(scope.draft.report.lines)
    for key, given in inherited.items():
        table[key].apply(scope, given)
    new = scope.draft.report.lines[len(kept) :]
    scope.draft.report.lines = kept + [line for line in new if line.outcome == "refused"]


def _take_masks(entries: Entries, scope: Scope) -> None:
    masks = entries.by_id.get(str(scope.value("conditioning_data", "")), {})
    kind = MASKS.get(str(masks.get("conditioning_type")))
    if (
        scope.fields is not None
        and masks
        and not _is_disabled(masks)
        and kind is not None
        and scope.value("type", "local") == "local"
    ):
        scope.fields["mask_type"] = kind


def _plan(entries: Entries, scope: Scope, name: str, label: str) -> DatasetPlan | None:
    kind = SOURCES.get(str(scope.value("type", "local")))
    makers = {"local": _local, "bucket": _bucket, "huggingface": _hub, "urls": _urls}
    return makers[kind](entries, scope, name, label) if kind is not None else None


def _local(entries: Entries, scope: Scope, name: str, label: str) -> DatasetPlan:
    word = strategy(scope)
    captions = {"instanceprompt": "none", "huggingface": "textfile"}.get(word, word)
    table = scope.value("parquet") if isinstance(scope.value("parquet"), Mapping) else {}
    columns: Mapping[str, Any] = table if word == "parquet" else {"path": scope.value("csv_file")}
    return DatasetPlan(
        name=name,
        entry=label,
        kind="local",
        folder=entries.place(str(scope.value("instance_data_dir", label))),
        captions=captions,
        table=entries.place(str(columns.get("path") or "captions")) if word in ("parquet", "csv") else None,
        filename_column=str(columns.get("filename_column") or "filename"),
        caption_column=str(columns.get("caption_column") or scope.value("csv_caption_column", "")),
        fallback_column=str(columns.get("fallback_caption_column") or ""),
        has_extension=parse_flag(columns.get("identifier_includes_extension", True)) is not False,
        masks=_masks(entries, scope),
        needs_captions=word != "instanceprompt",
    )


def _masks(entries: Entries, scope: Scope) -> Path | None:
    masks = entries.by_id.get(str(scope.value("conditioning_data", "")), {})
    folder = masks.get("instance_data_dir")
    is_used = scope.fields is not None and "mask_type" in scope.fields
    return entries.place(str(folder)) if folder and is_used else None


def _bucket(entries: Entries, scope: Scope, name: str, label: str) -> DatasetPlan:
    del entries
    prefix = str(scope.value("aws_data_prefix", "")).strip("/")
    return DatasetPlan(
        name=name,
        entry=label,
        kind="bucket",
        place=str(scope.value("aws_bucket_name", "")),
        prefix=f"{prefix}/" if prefix else "",
        captions="filename" if strategy(scope) in ("filename", "instanceprompt") else "textfile",
    )


def _hub(entries: Entries, scope: Scope, name: str, label: str) -> DatasetPlan:
    del entries
    inner = scope.value("huggingface") if isinstance(scope.value("huggingface"), Mapping) else {}
    return DatasetPlan(
        name=name,
        entry=label,
        kind="huggingface",
        place=str(scope.value("dataset_name", "")),
        split=str(scope.value("split", "train")),
        revision=scope.value("revision"),
        image_column=str(scope.value("image_column") or inner.get("image_column") or "image"),
        caption_column=str(scope.value("caption_column") or inner.get("caption_column") or "caption")
        if strategy(scope) == "huggingface"
        else "",
        needs_captions=strategy(scope) == "huggingface",
    )


def _urls(entries: Entries, scope: Scope, name: str, label: str) -> DatasetPlan:
    return DatasetPlan(
        name=name,
        entry=label,
        kind="urls",
        table=entries.place(str(scope.value("csv_file", "captions.csv"))),
        url_column=str(scope.value("csv_url_column", "url")),
        caption_column=str(scope.value("csv_caption_column", "caption")),
    )


def files_of(plans: Iterable[DatasetPlan]) -> list[Path]:
    """The local folders and tables that plans read."""
    return [path for plan in plans for path in (plan.folder, plan.table, plan.masks) if path is not None]
