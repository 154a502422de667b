"""Checkpoints, trackers, publishing and webhooks (spec 5.10, 7.5, 8)."""

from collections.abc import Callable

from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    custom,
    flag,
    ignored,
    is_off,
    number,
    refused,
    text,
    when,
)

TRACKERS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "all": ("tensorboard", "wandb")}
NO_HUB = "push_to_hub is off"
NO_WEBHOOK = "this webhook_type has none"
LEVELS = ("critical", "error", "warning", "info", "debug")


def _report_to(scope: Scope, given: Given) -> None:
    words = [word.strip() for word in str(given.value).split(",") if word.strip() not in ("", "none")]
    unknown = [word for word in words if word not in TRACKERS]
    trackers = sorted({tracker for word in words for tracker in TRACKERS.get(word, ())})
    if unknown:
        scope.refuse(given, f"{', '.join(unknown)} is not written to", "the nearest that works is tensorboard or wandb")
    elif not trackers:
        scope.ignore(given, "the job's own events have every figure")
    else:
        for tracker in trackers:
            scope.draft.put(f"tracking.{tracker}", True)
        scope.honour(given, " and ".join(f"tracking.{tracker}" for tracker in trackers), UNSET)


def _resume(scope: Scope, given: Given) -> None:
    if given.value == "":
        scope.ignore(given, "a submitted job begins anew")
    elif given.value == "latest":
        scope.change(
            given,
            "",
            UNSET,
            "a job goes on from its newest checkpoint by itself after a crash, and by `reverie job resume JOB` after a "
            "cancellation; a submitted job begins anew",
        )
    else:
        scope.refuse(
            given,
            "checkpoints of SimpleTuner's cannot be resumed from",
            "`reverie job fork JOB` takes up a checkpoint of another job of Reverie's",
        )


def _output_dir(scope: Scope, given: Given) -> None:
    scope.change(given, "", UNSET, f"results lie in the store: `reverie job fetch JOB --to {given.value}`")


def _hub(scope: Scope, given: Given) -> None:
    if not scope.is_on("push_to_hub"):
        scope.ignore(given, "it is off")
    elif "/" not in str(scope.value("hub_model_id", "")):
        scope.refuse(given, "hub_model_id does not say where to", "give it as owner/name")
    else:
        scope.honour(
            given, "publishing.hub_model_id", str(scope.value("hub_model_id")), "the trainer's secret hf_token is used"
        )


def _model_id(scope: Scope, given: Given) -> None:
    if "/" in str(given.value):
        scope.honour(given, "publishing.hub_model_id", given.value)
    else:
        scope.refuse(given, "it names no owner", f"the nearest that works is OWNER/{given.value}")


def _webhooks(scope: Scope, given: Given) -> None:
    if is_off(given.value):
        scope.ignore(given, "it is empty")
    else:
        scope.honour(given, "webhooks", UNSET, "read; its own keys are reported below")


def _publishes(scope: Scope) -> bool:
    return scope.is_on("push_to_hub") and "/" in str(scope.value("hub_model_id", ""))


def _run_name(scope: Scope, given: Given) -> None:
    scope.honour(given, "tracking.run_name", str(given.value), "and, made safe, the job's name")


OUTLETS: tuple[Option, ...] = (
    number(
        "checkpoint_step_interval",
        "checkpoints.every_steps",
        low=0,
        high=1_000_000,
        is_whole=True,
        aliases=("checkpointing_steps",),
    ),
    number("checkpoint_epoch_interval", "checkpoints.every_epochs", low=0.0),
    number(
        "checkpoints_total_limit",
        "checkpoints.keep",
        low=0,
        high=1_000_000,
        is_whole=True,
        aliases=("save_total_limit",),
    ),
    refused("checkpointing_rolling_steps", "there is one kind of checkpoint", "use a smaller checkpoint_step_interval"),
    ignored("checkpoints_rolling_total_limit", "there is one kind of checkpoint"),
    ignored("checkpointing_use_tempdir", "a checkpoint is complete or it is not there"),
    ignored("delete_invalid_checkpoints", "a checkpoint is complete or it is not there"),
    custom(
        "resume_from_checkpoint",
        _resume,
        "changed",
        note="a job resumes its own newest checkpoint; `reverie job fork` takes up another's",
    ),
    custom(
        "output_dir",
        _output_dir,
        "changed",
        note="results lie in the store; `reverie job fetch` writes them to a folder",
    ),
    custom(
        "report_to",
        _report_to,
        "honoured",
        "tracking",
        "tensorboard, wandb or all; comet_ml, swanlab, custom-tracker and simpletuner are refused",
    ),
    custom("tracker_run_name", _run_name, "honoured", "tracking.run_name", "also the job's name"),
    text("tracker_project_name", "tracking.project"),
    ignored("logging_dir", "the trainer decides where event files lie"),
    custom("push_to_hub", _hub, "honoured", "publishing", "needs hub_model_id as owner/name"),
    *when(
        lambda scope: scope.is_on("push_to_hub"),
        NO_HUB,
        (custom("hub_model_id", _model_id, "honoured", "publishing.hub_model_id"),),
    ),
    *when(
        _publishes,
        NO_HUB,
        (
            flag("push_checkpoints_to_hub", "publishing.push_checkpoints"),
            flag("model_card_private", "publishing.private"),
            ignored("model_card_note", "the model card is written from the job"),
            ignored("model_card_safe_for_work", "the model card is written from the job"),
        ),
    ),
    custom(
        "webhook_config",
        _webhooks,
        "honoured",
        "webhooks",
        "an object, a list or a path; secrets become names of the trainer's secrets",
    ),
    ignored("webhook_reporting_interval", "events are sent as they happen, never blocking training"),
)


def _secret(path: str, role: str) -> Callable[[Scope, Given], None]:
    def apply(scope: Scope, given: Given) -> None:
        name = f"{scope.prefix.rstrip('.').replace('[', '-').replace(']', '') or 'webhook'}-{role}"
        scope.change(
            given,
            path,
            name,
            f"it is a secret: put it into a file {name} in the trainer's --secrets-dir; it is not in the job file",
        )

    return apply


def _webhook_type(scope: Scope, given: Given) -> None:
    if given.value in ("discord", "raw"):
        scope.honour(given, "kind", given.value)
    else:
        scope.refuse(given, f"there is no {given.value!r}", "use raw or discord")


def _level(scope: Scope, given: Given) -> None:
    if given.value in LEVELS:
        scope.honour(given, "log_level", given.value)
    else:
        scope.refuse(given, f"there is no {given.value!r}", f"use one of {', '.join(LEVELS)}")


WEBHOOK: tuple[Option, ...] = (
    custom("webhook_type", _webhook_type, "honoured", "webhooks[].kind"),
    *when(
        lambda scope: scope.value("webhook_type") == "discord",
        NO_WEBHOOK,
        (
            custom(
                "webhook_url",
                _secret("url_secret", "url"),
                "changed",
                "webhooks[].url_secret",
                "a Discord URL is a secret: it goes into the trainer's secrets directory",
            ),
        ),
    ),
    *when(
        lambda scope: scope.value("webhook_type") == "raw",
        NO_WEBHOOK,
        (
            text("callback_url", "url", "its host must be among the trainer's allowed ones"),
            custom(
                "auth_token",
                _secret("token_secret", "token"),
                "changed",
                "webhooks[].token_secret",
                "sent as X-API-Key; it goes into the trainer's secrets directory",
            ),
        ),
    ),
    text("message_prefix", "message_prefix"),
    custom("log_level", _level, "honoured", "webhooks[].log_level"),
    refused(
        "ssl_no_verify", "certificates are always checked", "add the certificate's issuer to the trainer's machine"
    ),
)
