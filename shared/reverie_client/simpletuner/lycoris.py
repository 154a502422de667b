"""SimpleTuner's LyCORIS file: the adapter and the modules that it changes (spec 4.1, 4.2)."""

from collections.abc import Iterator, Mapping
from typing import Any

from reverie_client.simpletuner.report import shown
from reverie_client.simpletuner.rules import (
    UNSET,
    Draft,
    Given,
    Option,
    Scope,
    apply_options,
    custom,
    flag,
    is_off,
    number,
    parse_flag,
    resolve,
    when,
)

ALGORITHMS = ("locon", "loha", "lokr", "full", "ia3", "dylora", "glora", "diag-oft", "boft")
SAME_ALGORITHM = {"lora": "locon", "oft": "diag-oft"}
INTENDED = "these modules alone: 448 on HiDream-I1. SimpleTuner adapts all 1128 Linears where the base is not quantised"


def _algo(scope: Scope) -> str:
    name = str(scope.value("algo", "lokr")).lower()
    return SAME_ALGORITHM.get(name, name)


def _is_lokr(scope: Scope) -> bool:
    """Whether the adapter is LoKr throughout; a mixture is the job's other kind of LyCORIS adapter."""
    return scope.root.startswith("adapter.lokr.")


def _mixes(document: Mapping[str, Any]) -> bool:
    """Whether a selection has an algorithm of its own."""
    preset = document.get("apply_preset")
    maps = [preset.get(name) for name in ("module_algo_map", "name_algo_map")] if isinstance(preset, Mapping) else []
    overrides = [each for found in maps if isinstance(found, Mapping) for each in found.values()]
    own = [str(each["algo"]).lower() for each in overrides if isinstance(each, Mapping) and "algo" in each]
    return any(name != "lokr" for name in own)


def _take_algo(scope: Scope, given: Given) -> None:
    name = _algo(scope)
    if name not in ALGORITHMS:
        scope.refuse(
            given, f"there is no {given.value!r}", f"the nearest that works is lokr; there are {', '.join(ALGORITHMS)}"
        )
    elif _is_lokr(scope):
        scope.honour(given, "", UNSET, "adapter.lokr says it")
    else:
        scope.honour(given, "algo", name)


def _cast(name: str, low: float) -> Option:
    """A number that SimpleTuner cuts to a whole one."""

    def apply(scope: Scope, given: Given) -> None:
        cut = "kept as it is; SimpleTuner cuts it to a whole number"
        note = cut if shown(given.value) != shown(_whole(given.value)) else ""
        number(name, name, note, low=low, outcome="changed" if note else "honoured").apply(scope, given)

    return custom(name, apply, "honoured", name, "fractions are kept; SimpleTuner cuts them to whole numbers")


def _whole(value: Any) -> Any:
    return value if not isinstance(value, float) or value == int(value) else int(value)


def _bypass(scope: Scope, given: Given) -> None:
    if parse_flag(given.value) is None:
        scope.refuse(given, "it is neither true nor false")
    else:
        scope.ignore(given, "LoKr is always computed in bypass mode, which is mathematically equal")


def _lokr_or_option(option: Option) -> Option:
    """A field of LoKr that other algorithms know, if they do, as an option of their own."""

    def apply(scope: Scope, given: Given) -> None:
        if _is_lokr(scope):
            option.apply(scope, given)
        else:
            _other(scope, given)

    return Option(
        name=option.name,
        apply=apply,
        outcome=option.outcome,
        field=option.field,
        note=option.note,
        default=option.default,
        is_default_needed=_is_lokr,
    )


def _other(scope: Scope, given: Given) -> None:
    """A setting of one algorithm alone."""
    value = given.value
    scope.honour(given, f"options.{given.name}", str(value).lower() if isinstance(value, bool) else str(value))


LYCORIS: tuple[Option, ...] = (
    custom(
        "algo",
        _take_algo,
        "honoured",
        "adapter.lokr or adapter.lycoris.algo",
        "lokr, and the other algorithms of lycoris-lora",
    ),
    _cast("multiplier", 1e-9),
    number("linear_dim", "linear_dim", low=1, high=1_000_000, is_whole=True),
    _cast("linear_alpha", 1e-9),
    _lokr_or_option(number("factor", "factor", low=-1, high=65536, is_whole=True, default=-1)),
    _lokr_or_option(flag("full_matrix", "full_matrix", default=False)),
    flag("use_scalar", "use_scalar", "the scalar is kept at checkpoints, so that a resumed job goes on exactly"),
    _lokr_or_option(flag("decompose_both", "decompose_both")),
    number("dropout", "dropout", low=0.0, high=0.999999),
    number("rank_dropout", "rank_dropout", low=0.0, high=0.999999),
    number("module_dropout", "module_dropout", low=0.0, high=0.999999),
    Option(
        name="dora_wd", apply=flag("dora_wd", "dora_wd").apply, outcome="honoured", field="dora_wd", aliases=("wd",)
    ),
    custom(
        "bypass_mode", _bypass, "ignored", note="LoKr is always computed in bypass mode, which is mathematically equal"
    ),
)
"""Fields below adapter.lokr, or below adapter.lycoris."""


def _names(name: str, note: str = "") -> Option:
    def apply(scope: Scope, given: Given) -> None:
        if isinstance(given.value, list) and all(isinstance(each, str) for each in given.value):
            scope.honour(given, name, list(given.value), note)
        else:
            scope.refuse(given, "it is no list of names")

    return custom(name, apply, "honoured", f"apply_preset.{name}", note)


def _maps(scope: Scope, given: Given) -> None:
    """Overrides by class or by name: a line for each."""
    if not isinstance(given.value, Mapping):
        scope.refuse(given, "it is no object from names to settings")
        return
    place: dict[str, Any] = {}
    scope.draft.put(f"{scope.root}{given.name}", place)
    for selector, overrides in given.value.items():
        inner = _inner(scope, f"{given.key}.{selector}.", overrides)
        place[selector] = inner.fields
        if not inner.given:
            scope.honour(Given(name=given.name, key=f"{given.key}.{selector}", value=overrides), given.name, UNSET)
        apply_options(inner, _OVERRIDES, "no algorithm of LyCORIS has this setting")


def _inner(scope: Scope, prefix: str, overrides: Any) -> Scope:
    document = overrides if isinstance(overrides, Mapping) else {}
    given, _ = resolve(document, _OVERRIDES, str)
    return Scope(
        file=scope.file,
        draft=scope.draft,
        given=given,
        root=f"{scope.root}{prefix}",
        prefix=f"{scope.prefix}{prefix}",
        fields={},
    )


def _override_algo(scope: Scope, given: Given) -> None:
    name = SAME_ALGORITHM.get(str(given.value).lower(), str(given.value).lower())
    if _is_lokr(scope):
        scope.ignore(given, "it is the algorithm of the adapter")
    elif name in ALGORITHMS:
        scope.honour(given, "algo", name)
    else:
        scope.refuse(given, f"there is no {given.value!r}", f"use one of {', '.join(ALGORITHMS)}")


_OVERRIDES: tuple[Option, ...] = (
    number("factor", "factor", low=-1, high=65536, is_whole=True),
    number("linear_dim", "linear_dim", low=1, high=1_000_000, is_whole=True, aliases=("dim",)),
    number("linear_alpha", "linear_alpha", low=1e-9, aliases=("alpha",)),
    flag("full_matrix", "full_matrix"),
    flag("use_scalar", "use_scalar"),
    flag("decompose_both", "decompose_both"),
    number("dropout", "dropout", low=0.0, high=0.999999),
    number("rank_dropout", "rank_dropout", low=0.0, high=0.999999),
    number("module_dropout", "module_dropout", low=0.0, high=0.999999),
    custom("algo", _override_algo, "honoured"),
)


def _selects_by_name(scope: Scope) -> bool:
    return any(not is_off(scope.value(name)) for name in ("name_algo_map", "target_name", "exclude_name"))


PRESET: tuple[Option, ...] = (
    _names("target_module", "class names as SimpleTuner has them"),
    custom("module_algo_map", _maps, "honoured", "apply_preset.module_algo_map", "overrides by class"),
    custom(
        "name_algo_map",
        _maps,
        "honoured",
        "apply_preset.name_algo_map",
        f"overrides by name; without target_module, {INTENDED}",
    ),
    _names("target_name"),
    _names("exclude_name"),
    *when(
        _selects_by_name,
        "no name is given",
        (flag("use_fnmatch", "use_fnmatch", default=False),),
    ),
    flag("enable_conv", "enable_conv", "HiDream's transformer has no convolution"),
)
"""Fields of apply_preset."""


def read_lycoris(draft: Draft, file: str, document: Mapping[str, Any]) -> None:
    """Turn a LyCORIS file into the draft's adapter; every key gets its line."""
    algo = _algo(Scope(file=file, draft=draft, given=resolve(document, LYCORIS, str)[0]))
    root = "adapter.lokr." if algo == "lokr" and not _mixes(document) else "adapter.lycoris."
    plain = {key: value for key, value in document.items() if key != "apply_preset"}
    given, again = resolve(plain, LYCORIS, str)
    scope = Scope(file=file, draft=draft, given=given, root=root)
    draft.put(root.rstrip("."), draft.get(root.rstrip(".")) or {})
    for extra in again:
        scope.refuse(extra, "another key of this file says the same", "remove one of both")
    table = LYCORIS if root == "adapter.lokr." else (*LYCORIS, *_own_options(given))
    apply_options(scope, table, "LoKr has no such setting")
    if "apply_preset" in document:
        _read_preset(draft, file, root, document["apply_preset"])


def _own_options(given: Mapping[str, Given]) -> Iterator[Option]:
    known = {option.name for option in LYCORIS}
    for name in given:
        if name not in known:
            yield custom(name, _other, "honoured", f"adapter.lycoris.options.{name}")


def _read_preset(draft: Draft, file: str, root: str, document: Any) -> None:
    scope = Scope(file=file, draft=draft, given={}, root=f"{root}apply_preset.", prefix="apply_preset.")
    if not isinstance(document, Mapping):
        scope.prefix = ""
        scope.refuse(Given(name="apply_preset", key="apply_preset", value=document), "it is no object")
        return
    scope.given, _ = resolve(document, PRESET, str)
    apply_options(scope, PRESET, "LyCORIS has no such setting of a preset")
    if scope.value("name_algo_map") and scope.value("target_module") is None:
        none = Given(name="target_module", key="target_module", value=[], is_default=True)
        scope.honour(none, "target_module", UNSET, INTENDED)
