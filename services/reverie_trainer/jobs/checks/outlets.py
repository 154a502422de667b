"""What may be said of trackers, the Hub and webhooks.

Whether a host is allowed and a secret is there depends on the trainer and is checked by `outlets.factory`.
"""

import re
from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import one_of, violation
from reverie_trainer.jobs.spec import JobSpec, Publishing, Webhook

MAX_WEBHOOKS = 8
WEBHOOK_KINDS = ("raw", "discord")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
WANDB_MODES = ("online", "offline")

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_MAX_CHARACTERS = 128


def check_outlets(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with where a job's results go."""
    tracking = spec.tracking
    for field, text in (("run_name", tracking.run_name), ("project", tracking.project)):
        if len(text) > _MAX_CHARACTERS or "/" in text:
            yield violation(f"tracking.{field}", f"{text[:40]!r} must have at most {_MAX_CHARACTERS} characters, no /")
    if tracking.wandb_mode is not None:
        yield from one_of("tracking.wandb_mode", tracking.wandb_mode, WANDB_MODES)
        if not tracking.wandb:
            yield violation("tracking.wandb_mode", "it does nothing while tracking.wandb is false; set both or neither")
    if spec.publishing is not None:
        yield from _publishing(spec.publishing)
    if len(spec.webhooks) > MAX_WEBHOOKS:
        yield violation("webhooks", f"{len(spec.webhooks)} webhooks are above {MAX_WEBHOOKS}; give fewer")
    for index, webhook in enumerate(spec.webhooks):
        yield from _webhook(f"webhooks[{index}]", webhook)


def _publishing(publishing: Publishing) -> Iterator[FieldViolation]:
    if not _MODEL_ID.fullmatch(publishing.hub_model_id):
        yield violation(
            "publishing.hub_model_id", f"{publishing.hub_model_id[:100]!r} is no repository; write owner/name"
        )
    if publishing.license and not _LICENSE.fullmatch(publishing.license):
        yield violation(
            "publishing.license", f"{publishing.license[:80]!r} is no licence identifier; write for instance mit"
        )


def _webhook(path: str, webhook: Webhook) -> Iterator[FieldViolation]:
    yield from one_of(f"{path}.kind", webhook.kind, WEBHOOK_KINDS)
    yield from one_of(f"{path}.log_level", webhook.log_level, LOG_LEVELS)
    if bool(webhook.url) == bool(webhook.url_secret):
        yield violation(f"{path}.url", "give either url, or url_secret: the name of a secret of the trainer")
    if len(webhook.message_prefix) > _MAX_CHARACTERS:
        yield violation(f"{path}.message_prefix", f"it is longer than {_MAX_CHARACTERS} characters; shorten it")
