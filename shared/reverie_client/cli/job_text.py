"""Jobs in words, for people."""

from collections.abc import Iterable, Iterator

from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.job_pb2 import EstimatePart, JobEstimate, PreparationReport, TrainingJob

from reverie_client.cli.progress import readable_bytes, state_name


def describe_job(job: TrainingJob) -> Iterator[tuple[str, str]]:
    """Yield a job's facts as rows of a table."""
    yield ("job", f"{job.job_id}  {job.spec.name}")
    yield ("state", state_name(job.state))
    yield ("step", f"{job.step} of {job.spec.optimization.max_steps}")
    if job.HasField("metrics"):
        yield ("loss", f"{job.metrics.loss:.4f} at {job.metrics.step_seconds:.2f} s/step")
    if job.HasField("preparation"):
        yield from describe_preparation(job.preparation)
    if job.HasField("adapter_report"):
        report = job.adapter_report
        yield ("adapter", f"{report.num_modules} modules, {report.num_parameters:,} parameters")
    if job.HasField("adapter"):
        yield ("adapter file", readable_bytes(job.adapter.size_bytes))
    for phase in job.phases:
        yield (f"phase {phase.name}", f"{phase.seconds:.1f} s")
    if job.HasField("failure"):
        yield ("failure", f"{job.failure.reason}: {job.failure.message}")


def describe_preparation(report: PreparationReport) -> Iterator[tuple[str, str]]:
    """Yield what preparation found as rows of a table."""
    yield ("images", f"{report.num_images}, {report.num_images_cached} found in the store")
    yield ("captions", f"{report.num_prompts}, {report.num_prompts_cached} found in the store")
    if report.buckets:
        yield ("buckets", ", ".join(f"{each.width}x{each.height}: {each.num_images}" for each in report.buckets))
    for rejected in report.rejected:
        yield ("rejected", f"{rejected.sample}: {rejected.message}")
    for cut in report.truncated:
        yield ("cut", f"{cut.sample}: {cut.encoder} saw {cut.max_length} of {cut.num_tokens} tokens")
    for error in report.embedding_errors:
        yield ("compact", f"{error.encoder} embeddings changed by {error.mean:.2%} on average, {error.max:.2%} at most")


def hit_rate(report: PreparationReport) -> float:
    """Return the share of images and captions that the store already held, 0 to 1."""
    wanted = report.num_images + report.num_prompts
    return (report.num_images_cached + report.num_prompts_cached) / wanted if wanted else 0.0


def plan_lines(answer: pb.CheckTrainingJobResponse) -> Iterator[str]:
    """Yield the plan and the estimate of a checked job as lines."""
    yield from answer.plan
    if not answer.HasField("estimate"):
        return
    estimate = answer.estimate
    yield from estimate_lines(estimate)
    if estimate.HasField("training_time"):
        yield f"training time: about {estimate.training_time.ToTimedelta()}"


def estimate_lines(estimate: JobEstimate) -> Iterator[str]:
    """Yield the memory and the storage that a job needs, with the parts of each sum."""
    yield f"the worker needs {readable_bytes(estimate.worker_memory_bytes)} of accelerator memory:"
    yield from _part_lines(estimate.worker_memory)
    if estimate.encoder_memory:
        yield "the encoders need, each where it runs:"
        yield from _part_lines(estimate.encoder_memory)
    yield f"the store needs {readable_bytes(estimate.storage_bytes)} for embeddings and latents:"
    yield from _part_lines(estimate.storage_parts)
    if estimate.storage:
        yield "with embedding_storage:"
        yield from _part_lines(estimate.storage)


def _part_lines(parts: Iterable[EstimatePart]) -> Iterator[str]:
    for part in parts:
        is_range = part.least_bytes and part.least_bytes != part.size_bytes
        compressed = f", compressed {readable_bytes(part.least_bytes)} at best" if is_range else ""
        yield f"  {readable_bytes(part.size_bytes):>10}  {part.name}{compressed}"
