"""What workers tell about their jobs, as transactions: lease, progress, completion."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2, measures_pb2, training_pb2
from reverie_common.errors import (
    AbortedError,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    PermissionDeniedError,
)
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from reverie_trainer.jobs.spec import spec_from_proto
from reverie_trainer.jobs.state.artifacts import (
    LYCORIS_CONFIG_PATH,
    METRICS_PATH,
    adapter_path,
    ema_adapter_path,
    validation_image_path,
)
from reverie_trainer.jobs.state.database import mark_changed
from reverie_trainer.jobs.state.events import append_event, append_notice, now
from reverie_trainer.jobs.state.models import CheckpointRow, JobRow
from reverie_trainer.jobs.state.records import (
    CANCELLED,
    TRAINING,
    add_phase,
    job_message,
    read_record,
    read_spec,
    state_name,
    write_record,
)
from reverie_trainer.jobs.state.repository import INFO, fail_job, get_job, put_artifact, succeed, transition

WORKER_EVENTS = (
    "step",
    "checkpoint",
    "validation_image",
    "validation_progress",
    "validation_preview",
    "validation_scores",
    "evaluation",
    "notice",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A job in a worker's hands."""

    lease_id: str
    job: job_pb2.TrainingJob
    prepared: common_pb2.ObjectRef


def note_launch(session: Session, job_id: str, token: str) -> int | None:
    """Note that a worker with this secret is about to be started; None when the job shall not be trained any more.

    An older worker's secret and lease end with it. Returns how many workers were started for the job so far.
    """
    row = get_job(session, job_id)
    if row.state != TRAINING or row.cancel_time is not None:
        return None
    row.token_digest = hashlib.sha256(token.encode()).hexdigest()
    row.lease_id = None
    row.worker_process = None
    row.launch_time = time.time()
    row.starts_without_progress += 1
    record = read_record(row)
    record.num_worker_starts += 1
    write_record(row, record)
    return record.num_worker_starts


def note_process(session: Session, job_id: str, process: dict[str, str]) -> None:
    """Keep how the worker that was just started is found again."""
    get_job(session, job_id).worker_process = process


def note_exit(session: Session, job_id: str, process: Mapping[str, str]) -> None:
    """Note that a worker is gone; does nothing when another one was started since."""
    row = get_job(session, job_id)
    if row.worker_process != process:
        return
    row.worker_process = None
    row.lease_id = None
    row.token_digest = None
    mark_changed(session, job_id)


def lease_job(session: Session, request: training_pb2.LeaseJobRequest) -> Lease:
    """Give a job to the worker that was started for it; an older lease ends.

    Raises:
        PermissionDeniedError: the secret is not that of the worker that was started last.
        FailedPreconditionError: the job is not in TRAINING.
    """
    row = get_job(session, request.job_id)
    if row.state != TRAINING or row.prepared is None:
        raise FailedPreconditionError(
            f"job {row.job_id} is {state_name(row.state)}; only a job in TRAINING is leased",
            reason="WRONG_JOB_STATE",
            metadata={"job_id": row.job_id, "state": state_name(row.state)},
        )
    digest = hashlib.sha256(request.worker_token.encode()).hexdigest()
    if row.token_digest is None or not hmac.compare_digest(digest, row.token_digest):
        raise PermissionDeniedError(
            f"worker {request.worker_id} has no valid token for job {row.job_id}: another worker was started since",
            reason="WRONG_WORKER_TOKEN",
            metadata={"job_id": row.job_id},
        )
    row.lease_id = secrets.token_hex(16)
    row.worker_id = request.worker_id[:255]
    row.report_sequence = 0
    if row.launch_time is not None:
        record = read_record(row)
        add_phase(record, "start_worker", max(0.0, time.time() - row.launch_time))
        write_record(row, record)
        # A second lease of the same worker, after a lost answer, is not a second start.
        row.launch_time = None
    mark_changed(session, row.job_id)
    return Lease(lease_id=row.lease_id, job=job_message(row), prepared=common_pb2.ObjectRef.FromString(row.prepared))


def record_progress(session: Session, request: training_pb2.ReportProgressRequest) -> JobRow:
    """Keep what a worker reports; a repetition of a report changes nothing.

    Raises:
        AbortedError: the lease was lost.
        InvalidArgumentError: an event is not a worker's to report.
    """
    row = _leased_row(session, request.lease_id)
    _check_events(request.events)
    if request.report_sequence <= row.report_sequence:
        return row
    row.report_sequence = request.report_sequence
    record = read_record(row)
    for phase in request.phases:
        add_phase(record, phase.name, phase.seconds)
    if request.HasField("adapter_report"):
        record.adapter_report.CopyFrom(request.adapter_report)
    for event in request.events:
        _record_event(session, row, record, event)
    write_record(row, record)
    mark_changed(session, row.job_id)
    return row


def complete_job(session: Session, request: training_pb2.CompleteJobRequest) -> str:
    """End a lease with its outcome and return the job's id.

    Raises:
        AbortedError: the lease was lost.
        InvalidArgumentError: the outcome is missing, or a success without an adapter.
    """
    row = _leased_row(session, request.lease_id)
    row.lease_id = None
    row.token_digest = None
    if request.outcome == training_pb2.WORKER_OUTCOME_SUCCEEDED:
        _put_results(session, row, request)
        succeed(session, row, request.adapter)
    elif request.outcome == training_pb2.WORKER_OUTCOME_FAILED:
        fail_job(session, row.job_id, request.failure)
    elif row.cancel_time is not None:
        transition(session, row, CANCELLED, "the worker saved and stopped")
    else:
        # It stopped because the trainer did; an orderly stop is no failed start.
        row.starts_without_progress = 0
        append_notice(session, row, INFO, "WORKER_STOPPED", "the worker saved and stopped; another one goes on")
    return row.job_id


def _put_results(session: Session, row: JobRow, request: training_pb2.CompleteJobRequest) -> None:
    adapter = spec_from_proto(read_spec(row)).adapter
    put_artifact(session, row.job_id, adapter_path(adapter), request.adapter)
    if request.HasField("metrics"):
        put_artifact(session, row.job_id, METRICS_PATH, request.metrics)
    if request.HasField("lycoris_config"):
        put_artifact(session, row.job_id, LYCORIS_CONFIG_PATH, request.lycoris_config)
    if request.HasField("ema_adapter"):
        put_artifact(session, row.job_id, ema_adapter_path(adapter), request.ema_adapter)
        record = read_record(row)
        record.ema_adapter.CopyFrom(request.ema_adapter)
        write_record(row, record)


def check_completion(request: training_pb2.CompleteJobRequest) -> None:
    """Refuse a completion that says too little.

    Raises:
        InvalidArgumentError: the outcome is missing, or a success has no adapter, or a failure no message.
    """
    violations = []
    if request.outcome == training_pb2.WORKER_OUTCOME_UNSPECIFIED:
        violations.append(FieldViolation(field="outcome", description="it is missing; say how the worker ended"))
    if request.outcome == training_pb2.WORKER_OUTCOME_SUCCEEDED and not request.adapter.uri:
        violations.append(FieldViolation(field="adapter", description="it is missing; a success exports an adapter"))
    if request.outcome == training_pb2.WORKER_OUTCOME_FAILED and not request.failure.message:
        violations.append(FieldViolation(field="failure.message", description="it is missing; say why it failed"))
    if violations:
        raise InvalidArgumentError("the completion says too little", violations=violations)


def _leased_row(session: Session, lease_id: str) -> JobRow:
    row = session.scalars(select(JobRow).where(JobRow.lease_id == lease_id)).one_or_none() if lease_id else None
    if row is None:
        raise AbortedError(
            "the lease was lost: another worker has the job, or it has ended; exit without touching anything",
            reason="LEASE_LOST",
            metadata={"lease_id": lease_id[:64]},
        )
    return row


def _check_events(events: Sequence[job_pb2.TrainingJobEvent]) -> None:
    for index, event in enumerate(events):
        kind = event.WhichOneof("payload")
        if kind not in WORKER_EVENTS:
            description = f"{kind} is not a worker's to report; expected one of {', '.join(WORKER_EVENTS)}"
            raise InvalidArgumentError(
                description, violations=[FieldViolation(field=f"events[{index}]", description=description)]
            )


def _record_event(session: Session, row: JobRow, record: job_pb2.TrainingJob, event: job_pb2.TrainingJobEvent) -> None:
    kind = event.WhichOneof("payload")
    if kind == "step":
        record.step = event.step.step
        record.metrics.CopyFrom(event.step)
        _note_progress(row, event.step.step)
    elif kind == "checkpoint":
        keep_checkpoint(session, row, event.checkpoint)
    elif kind == "validation_image":
        put_artifact(session, row.job_id, validation_image_path(event.validation_image), event.validation_image.image)
    elif kind == "evaluation":
        _keep_evaluation(record, event.evaluation)
    append_event(session, row, event)


def _keep_evaluation(record: job_pb2.TrainingJob, result: measures_pb2.EvaluationResult) -> None:
    """Keep the newest measurement of each dataset and kind of weights."""
    newest = {(each.dataset, each.weights): each for each in (*record.evaluations, result)}
    kept = [newest[key] for key in sorted(newest)]
    record.ClearField("evaluations")
    record.evaluations.extend(kept)


def keep_checkpoint(session: Session, row: JobRow, checkpoint: job_pb2.Checkpoint) -> None:
    """Keep a checkpoint and forget those that the job's retention drops."""
    if not checkpoint.HasField("create_time"):
        checkpoint.create_time.CopyFrom(now())
    session.merge(CheckpointRow(job_id=row.job_id, step=checkpoint.step, body=checkpoint.SerializeToString()))
    session.flush()
    keep = read_spec(row).checkpoints.keep
    if keep:
        steps = select(CheckpointRow.step).where(CheckpointRow.job_id == row.job_id)
        old = session.scalars(steps.order_by(CheckpointRow.step.desc()).offset(keep)).all()
        session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == row.job_id, CheckpointRow.step.in_(old)))


def _note_progress(row: JobRow, step: int) -> None:
    """Only a step beyond every earlier one is progress: a worker that always dies at the same step makes none."""
    if step > row.furthest_step:
        row.furthest_step = step
        row.starts_without_progress = 0
