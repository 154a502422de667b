"""Who is told of what a job does: trackers, the Hub, webhooks."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where the curves go besides the job's own events."""

    run_name: str = ""
    project: str = "reverie"
    tensorboard: bool = False
    wandb: bool = False
    wandb_mode: str | None = None
    """None is online where the trainer has a key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publishing:
    """Where the adapter goes on the Hugging Face Hub."""

    hub_model_id: str = ""
    push_checkpoints: bool = False
    private: bool = True
    license: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Who is told of what happens."""

    kind: str = ""
    url: str = ""
    url_secret: str = ""
    token_secret: str = ""
    message_prefix: str = ""
    log_level: str = "info"
