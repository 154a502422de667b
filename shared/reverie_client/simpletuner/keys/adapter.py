"""What is trained: LyCORIS, LoRA or everything (spec 4.8, 5.2)."""

from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    choice,
    custom,
    flag,
    ignored,
    number,
    refused,
    when,
)

NOT_LORA = "it means something only with model_type lora and lora_type standard"
NOT_LYCORIS = "it means something only with model_type lora and lora_type lycoris"
TARGETS = ["to_q", "to_k", "to_v", "to_out"]


def is_lora(scope: Scope) -> bool:
    """Whether a standard LoRA is trained."""
    return bool(scope.value("model_type", "full") == "lora" and scope.value("lora_type", "standard") == "standard")


def is_lycoris(scope: Scope) -> bool:
    """Whether a LyCORIS adapter is trained."""
    return bool(scope.value("model_type", "full") == "lora" and scope.value("lora_type", "standard") == "lycoris")


def _model_type(scope: Scope, given: Given) -> None:
    if given.value == "full":
        scope.honour(given, "adapter.full_rank", {}, "every weight is trained, which needs several large cards")
    elif given.value == "lora":
        scope.honour(given, "adapter", UNSET)
    else:
        scope.refuse(given, f"there is no {given.value!r}", "use lora or full")


def _lora_type(scope: Scope, given: Given) -> None:
    if scope.value("model_type", "full") != "lora":
        scope.ignore(given, "model_type is full")
    elif given.value == "standard":
        scope.change(
            given,
            "adapter.lora.target_modules",
            list(TARGETS),
            "SimpleTuner's to_out.0 matches nothing in HiDream, so that its 144 modules lack the output projections; "
            "here they are among the 192",
        )
    elif given.value == "lycoris":
        scope.honour(given, "adapter", UNSET, "the file that lycoris_config names says which")
    else:
        scope.refuse(given, f"there is no {given.value!r}", "use standard or lycoris")


def _lycoris_file(scope: Scope, given: Given) -> None:
    """The file is read by the import itself; here it is only reported."""
    scope.honour(given, "adapter", UNSET, "read; its own keys are reported below")


def _init_norm(scope: Scope, given: Given) -> None:
    number("init_lokr_norm", "adapter.lokr.init_lokr_norm", low=0.0, high=1.0).apply(scope, given)


_LORA = when(
    is_lora,
    NOT_LORA,
    (
        number("lora_rank", "adapter.lora.rank", low=1, high=256, is_whole=True, aliases=("rank",), default=16),
        number(
            "lora_alpha", "adapter.lora.alpha", "an alpha that is not the rank is stated in the exported file", low=1e-9
        ),
        number("lora_dropout", "adapter.lora.dropout", low=0.0, high=0.999, default=0.1),
        choice(
            "lora_init_type",
            "adapter.lora.init_type",
            ("default", "gaussian", "olora", "pissa"),
            "",
            refused={
                "loftq": "it needs the quantised weights' error, which is not kept; the nearest that works is pissa",
            },
        ),
        flag("use_dora", "adapter.lora.use_dora", "works on a quantised base too"),
        choice("lora_format", "adapter.lora.format", ("diffusers", "comfyui")),
        refused("peft_lora_mode", "PEFT has no such LoRA here", "use standard", off=(None, "", "standard", "none")),
    ),
)

ADAPTER: tuple[Option, ...] = (
    Option(
        name="model_type",
        apply=_model_type,
        outcome="honoured",
        field="adapter",
        note="`full` becomes full_rank",
        default="full",
    ),
    Option(
        name="lora_type",
        apply=_lora_type,
        outcome="honoured",
        field="adapter",
        note="`standard` also adapts the output projections, which SimpleTuner's to_out.0 misses",
        default="standard",
        is_default_needed=is_lora,
    ),
    *when(
        is_lycoris,
        NOT_LYCORIS,
        (
            custom(
                "lycoris_config",
                _lycoris_file,
                "honoured",
                "adapter.lokr or adapter.lycoris",
                "the file is read; see its own table",
            ),
            custom(
                "init_lokr_norm",
                _init_norm,
                "honoured",
                "adapter.lokr.init_lokr_norm",
                "the step-0 pictures are of the bare base model all the same",
            ),
        ),
    ),
    *_LORA,
    refused(
        "init_lora", "a weights file cannot be trained on", "start from another job: start.job_id with adapter_only"
    ),
    refused("slider_lora_target", "there are no sliders here", "leave it out"),
    ignored("lora_initialisation_style", "lora_init_type says it"),
)
