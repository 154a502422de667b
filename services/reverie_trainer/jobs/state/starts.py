"""Beginning a job with what another one has learnt: whether that is possible, and doing it."""

import asyncio
from dataclasses import dataclass, replace

from reverie_common.errors import FieldViolation, NotFoundError, ReverieError
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.spec import JobSpec, Start, spec_from_proto
from reverie_trainer.jobs.state.checkpoints import checkpoint_steps, copy_checkpoint
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.records import read_spec
from reverie_trainer.jobs.state.repository import get_job


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """The checkpoints of the jobs that this trainer knows."""

    database: Database
    store: ObjectStore

    async def check(self, spec: JobSpec) -> list[FieldViolation]:
        """Return why a job cannot begin where it wants to."""
        if spec.start is None:
            return []
        try:
            row = await self.database.run(lambda session: get_job(session, _of(spec).job_id))
        except NotFoundError as error:
            return [FieldViolation(field="start.job_id", description=error.message)]
        steps = await self._steps(spec.start.job_id)
        if not steps or (spec.start.step and spec.start.step not in steps):
            return [FieldViolation(field="start.step", description=_no_such_step(spec.start, steps))]
        return _check_continuation(spec, spec_from_proto(read_spec(row)), spec.start.step or steps[-1])

    async def resolve(self, spec: JobSpec) -> JobSpec:
        """Return a job that was checked, with the newest checkpoint by its number."""
        if spec.start is None or spec.start.step:
            return spec
        steps = await self._steps(spec.start.job_id)
        return replace(spec, start=replace(spec.start, step=steps[-1]))

    async def carry_out(self, spec: JobSpec, job_id: str) -> None:
        """Give a new job, which was resolved, its first checkpoint."""
        start = spec.start
        if start is not None:
            await asyncio.to_thread(
                lambda: copy_checkpoint(self.store, start.job_id, start.step, job_id, adapter_only=start.adapter_only)
            )

    async def _steps(self, job_id: str) -> list[int]:
        try:
            return await asyncio.to_thread(checkpoint_steps, self.store, job_id)
        except ReverieError as error:
            raise error.__class__(f"the checkpoints of {job_id} cannot be listed: {error.message}") from error


def _of(spec: JobSpec) -> Start:
    return spec.start or Start()


def _no_such_step(start: Start, steps: list[int]) -> str:
    if not steps:
        return f"job {start.job_id} has no checkpoint yet; wait for its first one, or leave start out"
    known = ", ".join(str(step) for step in steps)
    return f"job {start.job_id} has no checkpoint of step {start.step}; there are {known}, and 0 is the newest"


_STATE_FIELDS = ("optimizer_config", "gradient_release")
"""Fields that decide what the state of an optimiser consists of."""


def _check_continuation(spec: JobSpec, source: JobSpec, step: int) -> list[FieldViolation]:
    violations = []
    if spec.adapter != source.adapter or spec.model.flavour != source.model.flavour:
        description = (
            f"the adapter of job {_of(spec).job_id} is another one, and its numbers fit no other; use its adapter and "
            "flavour, or leave start out"
        )
        violations.append(FieldViolation(field="adapter", description=description))
    if _of(spec).adapter_only:
        return violations
    if spec.optimization.optimizer != source.optimization.optimizer:
        description = (
            f"{spec.optimization.optimizer!r} cannot go on with the state of {source.optimization.optimizer!r}; set "
            "start.adapter_only to begin with a fresh optimiser"
        )
        violations.append(FieldViolation(field="optimization.optimizer", description=description))
    for field in _STATE_FIELDS:
        value, other = getattr(spec.optimization, field), getattr(source.optimization, field)
        if value != other:
            description = (
                f"the optimiser state of job {_of(spec).job_id} was made with {other!r} and may not fit {value!r}; "
                "keep it, or set start.adapter_only to begin with a fresh optimiser"
            )
            violations.append(FieldViolation(field=f"optimization.{field}", description=description))
    if spec.optimization.max_steps and spec.optimization.max_steps <= step:
        description = (
            f"{spec.optimization.max_steps} steps are done already at the checkpoint of step {step}; raise it, or set "
            "start.adapter_only to begin at step 0"
        )
        violations.append(FieldViolation(field="optimization.max_steps", description=description))
    return violations
