"""`reverie sample`."""

from pathlib import Path
from typing import Annotated

import typer
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampledImage, SampleRequest, SamplingProgress
from reverie_common.errors import FailedPreconditionError, FieldViolation, InvalidArgumentError

from reverie_client.cli.connection import Address, SamplerAddress, connect, run
from reverie_client.cli.console import Output, OutputFormat, print_json, stderr, stdout
from reverie_client.client import Reverie


def sample(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    job: Annotated[str | None, typer.Option(help="Draw with this job's adapter.")] = None,
    step: Annotated[int | None, typer.Option(help="Draw with the job's checkpoint at this step.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Draw with this adapter file.", dir_okay=False)] = None,
    strength: Annotated[float, typer.Option(help="Strength of the adapter.")] = 1.0,
    negative: Annotated[str, typer.Option(help="What guidance steers away from.")] = "",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.")] = "1024x1024",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; up to 1 switches it off.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; picture i uses seed + i.")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Number of pictures, 1 to 16.")] = 1,
    to: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    address: Address = None,
    sampler: SamplerAddress = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Draw pictures with the base model or an adapter.

    Example: [bold]reverie sample "a photo of my cat on a beach" --job job-0123456789ab[/]
    """
    if adapter is not None and job is not None:
        violation = FieldViolation(field="--adapter", description="--job names an adapter already; give one of them")
        raise InvalidArgumentError("two adapters were given", violations=[violation])
    if adapter is not None and not adapter.is_file():
        violation = FieldViolation(field="--adapter", description=f"{adapter} is not a file; check the path")
        raise InvalidArgumentError("there is no such adapter", violations=[violation])
    width, height = _size(size)
    request = SampleRequest(
        prompt=prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=seed,
        num_images=num_images,
        adapter_strength=strength,
    )
    paths = run(_sample(request, job, step, adapter, to, address, sampler))
    if output is OutputFormat.JSON:
        print_json({"files": [str(path) for path in paths]})
        return
    for path in paths:
        stdout().print(str(path), markup=False)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        violation = FieldViolation(field="--size", description=f"{text!r} is not WIDTHxHEIGHT, for instance 1024x768")
        raise InvalidArgumentError("the size is wrong", violations=[violation])
    return int(width), int(height)


async def _sample(
    request: SampleRequest,
    job: str | None,
    step: int | None,
    adapter: Path | None,
    to: Path,
    address: str | None,
    sampler: str | None,
) -> tuple[Path, ...]:
    async with connect(address, sampler=sampler) as reverie:
        found = await _adapter(reverie, job, step, adapter)
        if found is not None:
            request.adapter.CopyFrom(found)
        with stderr().status("drawing") as status:

            def show(progress: SamplingProgress) -> None:
                status.update(f"drawing: step {progress.step} of {progress.num_steps}")

            images = await reverie.sampling.draw(request, on_progress=show)
        paths = tuple(to / _name(request, image) for image in images)
        await reverie.sampling.save(images, paths)
        return paths


def _name(request: SampleRequest, image: SampledImage) -> str:
    words = "".join(letter if letter.isalnum() else "-" for letter in request.prompt.lower())[:40].strip("-")
    return f"{words or 'picture'}_{image.seed}_{image.width}x{image.height}_{image.image.sha256[:8]}.png"


async def _adapter(reverie: Reverie, job_id: str | None, step: int | None, file: Path | None) -> ObjectRef | None:
    if file is not None:
        return await reverie.datasets.send_file(file)
    if job_id is None:
        return None
    if step is not None:
        checkpoints = {found.step: found.adapter for found in await reverie.jobs.checkpoints(job_id)}
        if step not in checkpoints:
            kept = ", ".join(str(found) for found in sorted(checkpoints)) or "none"
            violation = FieldViolation(
                field="--step", description=f"there is no checkpoint at {step}; there are: {kept}"
            )
            raise InvalidArgumentError("there is no such checkpoint", violations=[violation])
        return checkpoints[step]
    job = await reverie.jobs.get(job_id)
    if not job.HasField("adapter"):
        raise FailedPreconditionError(f"job {job_id} has no adapter yet; give --step to draw with a checkpoint")
    return job.adapter
