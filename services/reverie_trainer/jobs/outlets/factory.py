"""Which outlets a job has, whether this trainer can serve them, and making them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reverie.training.v1 import job_pb2
from reverie_common.errors import FieldViolation
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.outlets.hosts import AllowedHosts
from reverie_trainer.jobs.outlets.hub import HubAccount, HubOutlet
from reverie_trainer.jobs.outlets.job_files import JobFiles
from reverie_trainer.jobs.outlets.named_secrets import Secrets
from reverie_trainer.jobs.outlets.outlet import Outlet
from reverie_trainer.jobs.outlets.posts import Poster
from reverie_trainer.jobs.outlets.tensorboard import TensorboardOutlet
from reverie_trainer.jobs.outlets.webhooks import WebhookOutlet, WebhookTarget
from reverie_trainer.jobs.outlets.weights_and_biases import WandbOutlet, WandbRun
from reverie_trainer.jobs.spec import JobSpec, spec_from_proto

HF_TOKEN, WANDB_KEY = "hf_token", "wandb_api_key"  # names of secrets


def outlet_names(spec: JobSpec) -> Iterator[str]:
    """Yield the names of a job's outlets; they say what each is."""
    if spec.tracking.tensorboard:
        yield "tensorboard"
    if spec.tracking.wandb:
        yield "wandb"
    if spec.publishing is not None:
        yield "hub"
    for index in range(len(spec.webhooks)):
        yield f"webhook-{index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutletFactory:
    """Makes outlets with what this trainer has and allows."""

    store: ObjectStore
    files: JobFiles
    secrets: Secrets
    hosts: AllowedHosts
    directory: Path
    """Where trackers write their files, a directory for each job."""
    hub_endpoint: str | None = None

    async def check(self, spec: JobSpec) -> list[FieldViolation]:
        """Return why a job's outlets cannot be served."""
        return [*self._check_webhooks(spec), *self._check_tracking(spec), *self._check_publishing(spec)]

    def make(self, job: job_pb2.TrainingJob, name: str) -> Outlet:
        """Make the outlet of a name, see `outlet_names`."""
        spec = spec_from_proto(job.spec)
        directory = self.directory / job.job_id / name
        if name == "tensorboard":
            return TensorboardOutlet(directory, self.store, self.files)
        if name == "wandb":
            return WandbOutlet(self._wandb_run(job, spec, directory), self.store)
        if name == "hub":
            account = HubAccount(token=self._hub_token() or "", endpoint=self.hub_endpoint)
            return HubOutlet(account, self.store, self.files)
        webhook = spec.webhooks[int(name.removeprefix("webhook-"))]
        target = WebhookTarget(webhook=webhook, read_secret=self.secrets.read)
        return WebhookOutlet(target, Poster(self.hosts), self.store)

    def _wandb_run(self, job: job_pb2.TrainingJob, spec: JobSpec, directory: Path) -> WandbRun:
        key = self._wandb_key()
        return WandbRun(
            run_id=job.job_id,
            name=spec.tracking.run_name,
            project=spec.tracking.project,
            mode=spec.tracking.wandb_mode or ("online" if key else "offline"),
            directory=directory,
            api_key=key,
        )

    def _check_webhooks(self, spec: JobSpec) -> Iterator[FieldViolation]:
        for index, webhook in enumerate(spec.webhooks):
            path = f"webhooks[{index}]"
            for field, name in (("url_secret", webhook.url_secret), ("token_secret", webhook.token_secret)):
                problem = self._webhook_secret_problem(name) if name else None
                if problem is not None:
                    yield FieldViolation(field=f"{path}.{field}", description=problem)
            url = webhook.url or self.secrets.read(webhook.url_secret) or ""
            problem = self.hosts.problem(url) if url else None
            if problem is not None:
                field = "url" if webhook.url else "url_secret"
                yield FieldViolation(field=f"{path}.{field}", description=problem)

    def _webhook_secret_problem(self, name: str) -> str | None:
        # Whoever may write a job could else have the trainer's accounts sent to a receiver of theirs.
        if name in (HF_TOKEN, WANDB_KEY):
            return f"secret {name!r} is an account of the trainer's and is sent to no webhook; name another secret"
        return self.secrets.problem(name)

    def _check_tracking(self, spec: JobSpec) -> Iterator[FieldViolation]:
        if spec.tracking.wandb and spec.tracking.wandb_mode == "online" and self._wandb_key() is None:
            description = (
                f"'online' needs a key; put it into the trainer's secret {WANDB_KEY}, or use offline and `wandb sync`"
            )
            yield FieldViolation(field="tracking.wandb_mode", description=description)

    def _check_publishing(self, spec: JobSpec) -> Iterator[FieldViolation]:
        if spec.publishing is not None and self._hub_token() is None:
            description = f"the trainer has no Hugging Face token; put one that may write into its secret {HF_TOKEN}"
            yield FieldViolation(field="publishing", description=description)

    def _hub_token(self) -> str | None:
        return self.secrets.read(HF_TOKEN) or os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")

    def _wandb_key(self) -> str | None:
        return self.secrets.read(WANDB_KEY) or os.environ.get("WANDB_API_KEY")
