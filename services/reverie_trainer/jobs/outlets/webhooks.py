"""Webhooks: JSON for programs, messages with the picture attached for Discord (spec 7.5)."""

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import urllib3
from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError
from reverie_common.storage import ObjectStore, get_object

from reverie_trainer.jobs.outlets.messages import SEVERITIES, Message, message_of
from reverie_trainer.jobs.outlets.outlet import OutletFailedError
from reverie_trainer.jobs.outlets.posts import Post, Poster
from reverie_trainer.jobs.spec import Webhook

_MAX_DISCORD_CHARACTERS = 1900

# Many steps a second are of no use elsewhere; one in so many seconds of the job's own clock is told.
_STEP_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookTarget:
    """Where to, with what is secret about it read at each use."""

    webhook: Webhook
    read_secret: Callable[[str], str | None]

    def url(self) -> str:
        """Where to POST.

        Raises:
            OutletFailedError: the secret that holds it is gone.
        """
        return self._secret(self.webhook.url_secret) if self.webhook.url_secret else self.webhook.url

    def headers(self, media_type: str) -> dict[str, str]:
        """Headers of a request.

        Raises:
            OutletFailedError: the secret that proves who we are is gone.
        """
        headers = {"Content-Type": media_type, "User-Agent": "reverie"}
        if self.webhook.token_secret:
            headers["X-API-Key"] = self._secret(self.webhook.token_secret)
        return headers

    def _secret(self, name: str) -> str:
        secret = self.read_secret(name)
        if secret is None:
            raise OutletFailedError(message=f"secret {name!r} is gone from the trainer's secrets directory")
        return secret


class WebhookOutlet:
    """One webhook of one job."""

    def __init__(self, target: WebhookTarget, poster: Poster, store: ObjectStore) -> None:
        self._target = target
        self._poster = poster
        self._store = store
        self._least = SEVERITIES.index(target.webhook.log_level)
        self._last_step_seconds = float("-inf")

    async def tell(self, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> bool:
        """See Outlet."""
        message = message_of(event, job)
        if message is None or SEVERITIES.index(message.severity) < self._least or self._is_too_soon(event):
            return False
        image = await self._image(message)
        build = _discord_post if self._target.webhook.kind == "discord" else _raw_post
        await self._poster.send(build(self._target, message, image, event, job), is_patient=not message.is_preview)
        return True

    async def finish(self, job: job_pb2.TrainingJob) -> None:
        """See Outlet; the change of state has said it."""

    async def close(self) -> None:
        """See Outlet."""

    def _is_too_soon(self, event: job_pb2.TrainingJobEvent) -> bool:
        if not event.HasField("step"):
            return False
        seconds = event.time.ToNanoseconds() / 1e9
        if seconds - self._last_step_seconds < _STEP_INTERVAL_SECONDS:
            return True
        self._last_step_seconds = seconds
        return False

    async def _image(self, message: Message) -> bytes | None:
        if message.image is None:
            return None
        try:
            return await asyncio.to_thread(get_object, self._store, message.image)
        except ReverieError as error:
            raise OutletFailedError(message=f"the picture could not be read: {error.message}") from error


def _raw_post(
    target: WebhookTarget,
    message: Message,
    image: bytes | None,
    event: job_pb2.TrainingJobEvent,
    job: job_pb2.TrainingJob,
) -> Post:
    prefix = target.webhook.message_prefix
    title = f"{prefix} {message.title}".strip()
    payload: dict[str, Any] = {
        "type": message.type,
        "title": title,
        "message": title,
        "body": message.body,
        "data": dict(message.data),
        "images": [] if image is None else [base64.b64encode(image).decode()],
        "job_id": job.job_id,
        "severity": message.severity,
        "timestamp": event.time.ToDatetime(UTC).isoformat(),
    }
    if "stage" in payload["data"]:
        payload["stage"] = payload["data"]["stage"]
    return Post(url=target.url(), body=json.dumps(payload).encode(), headers=target.headers("application/json"))


def _discord_post(
    target: WebhookTarget,
    message: Message,
    image: bytes | None,
    event: job_pb2.TrainingJobEvent,
    job: job_pb2.TrainingJob,
) -> Post:
    del event, job
    prefix = f"`({target.webhook.message_prefix})` " if target.webhook.message_prefix else ""
    content = f"{prefix}{message.title}" + (f"\n{message.body}" if message.body else "")
    # Text of a job must not call people or roles of the channel.
    payload = {"content": content[:_MAX_DISCORD_CHARACTERS], "allowed_mentions": {"parse": []}}
    fields: dict[str, Any] = {"payload_json": (None, json.dumps(payload).encode(), "application/json")}
    if image is not None:
        fields["file0"] = ("picture.png", image, "image/png")
    body, media_type = urllib3.encode_multipart_formdata(fields)
    return Post(url=target.url(), body=body, headers=target.headers(media_type))
