"""The Hugging Face Hub: the adapter with its model card when the job is done, and checkpoints on the way if wanted."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars
from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError
from reverie_common.storage import ObjectStore, get_object

from reverie_trainer.jobs.outlets.job_files import JobFiles
from reverie_trainer.jobs.outlets.model_card import ADAPTER_FILE, CardSample, model_card, result_file
from reverie_trainer.jobs.outlets.outlet import OutletFailedError
from reverie_trainer.jobs.preparing.prompt_library import prompt_texts
from reverie_trainer.jobs.state.records import SUCCEEDED

# Its bars are for terminals.
disable_progress_bars()

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FIRST_DELAY_SECONDS = 2.0
MAX_SAMPLES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAccount:
    """Where to publish, and as whom."""

    token: str
    endpoint: str | None = None
    """None is the Hub itself, or what HF_ENDPOINT says."""


class HubOutlet:
    """Publishes one job."""

    def __init__(self, account: HubAccount, store: ObjectStore, files: JobFiles) -> None:
        """Calls nobody yet."""
        self._api = HfApi(endpoint=account.endpoint, token=account.token)
        self._store = store
        self._files = files
        self._has_repository = False

    async def tell(self, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> bool:
        """See Outlet."""
        if not (event.HasField("checkpoint") and job.spec.publishing.push_checkpoints):
            return False
        step = event.checkpoint.step
        files = {f"checkpoint-{step}/{result_file(job)}": event.checkpoint.adapter}
        await self._commit(job, files, {}, f"Checkpoint at step {step}")
        return True

    async def finish(self, job: job_pb2.TrainingJob) -> None:
        """See Outlet; publishes a job that has SUCCEEDED, and nothing of one that has not."""
        if job.state != SUCCEEDED:
            return
        made = await self._files.all(job.job_id)
        pictures = _newest_pictures(made)
        files = {result_file(job): job.adapter}
        files |= {path.removeprefix("adapter/"): ref for path, ref in made.items() if _is_extra(path)}
        files |= {sample_path: ref for sample_path, (_, ref) in pictures.items()}
        prompts = prompt_texts(job.spec.validation)
        samples = [CardSample(prompt=prompts.get(name, name), path=path) for path, (name, _) in pictures.items()]
        texts = {"README.md": model_card(job, samples)}
        message = f"{job.spec.name}: {job.step} steps"
        await self._commit(job, files, texts, message)

    async def close(self) -> None:
        """See Outlet."""

    async def _commit(
        self,
        job: job_pb2.TrainingJob,
        files: Mapping[str, common_pb2.ObjectRef],
        texts: Mapping[str, str],
        message: str,
    ) -> None:
        delay = FIRST_DELAY_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await asyncio.to_thread(self._commit_once, job, files, texts, message)
            except (HfHubHTTPError, OSError, ReverieError, RuntimeError) as error:
                # The library wraps what went wrong with an upload into a RuntimeError.
                is_wrapped = type(error) is RuntimeError and isinstance(error.__cause__, Exception)
                cause = error.__cause__ if is_wrapped else error
                failure = _failure(job.spec.publishing.hub_model_id, cause)
                if attempt == ATTEMPTS or _is_final(cause):
                    raise failure from error
                logger.info("publishing failed, trying again in %.0f s: %s", delay, failure.message)
                await asyncio.sleep(delay)
                delay *= 2
            else:
                return

    def _commit_once(
        self,
        job: job_pb2.TrainingJob,
        files: Mapping[str, common_pb2.ObjectRef],
        texts: Mapping[str, str],
        message: str,
    ) -> None:
        publishing = job.spec.publishing
        if not self._has_repository:
            self._api.create_repo(publishing.hub_model_id, private=publishing.private, exist_ok=True)
            self._has_repository = True
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=get_object(self._store, reference))
            for path, reference in sorted(files.items())
        ]
        operations += [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode()) for path, text in sorted(texts.items())
        ]
        self._api.create_commit(publishing.hub_model_id, operations, commit_message=message)


def _newest_pictures(
    artifacts: Mapping[str, common_pb2.ObjectRef],
) -> dict[str, tuple[str, common_pb2.ObjectRef]]:
    """The newest step's pictures: path in the repository to (prompt name, object)."""
    by_step: dict[int, dict[str, common_pb2.ObjectRef]] = {}
    for path, reference in artifacts.items():
        if path.startswith("validation/step_") and path.endswith(".png"):
            step = int(path.removeprefix("validation/step_").split("_", 1)[0])
            by_step.setdefault(step, {})[path] = reference
    if not by_step:
        return {}
    newest = sorted(by_step[max(by_step)].items())[:MAX_SAMPLES]
    return {f"assets/{path.removeprefix('validation/')}": (_prompt_name(path), ref) for path, ref in newest}


def _prompt_name(path: str) -> str:
    """`cat` of `validation/step_20_cat_0_256x256.png`."""
    stem = path.removeprefix("validation/step_").removesuffix(".png").removesuffix("_ema")
    return stem.split("_", 1)[1].rsplit("_", 2)[0]


def _is_extra(path: str) -> bool:
    return path.startswith("adapter/") and not path.endswith(f"/{ADAPTER_FILE}")


def _failure(repository: str, error: BaseException | None) -> OutletFailedError:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no answer"
        why = f"the Hub answered {status}"
        remedy = "; the trainer's secret hf_token must be allowed to write there" if status in (401, 403) else ""
        return OutletFailedError(message=f"{repository} was not published: {why}{remedy}")
    if isinstance(error, ReverieError):
        return OutletFailedError(message=f"{repository} was not published: {error.message}")
    # What the library says may hold signed addresses; its kind says what to look for.
    return OutletFailedError(
        message=f"{repository} was not published: no answer ({type(error).__name__}); is the Hub reachable from the "
        "trainer? Where a Hub takes no uploads by Xet, set HF_HUB_DISABLE_XET=1 in the trainer's environment"
    )


def _is_final(error: BaseException | None) -> bool:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    return status in (400, 401, 403, 404, 413, 422)
