"""`reverie sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampledImage, SampleRequest, SamplingPreview
from reverie_common.errors import FailedPreconditionError, FieldViolation, InvalidArgumentError

from reverie_client.cli.connection import Address, SamplerAddress, connect, run
from reverie_client.cli.console import Output, OutputFormat, print_json, stderr, stdout
from reverie_client.client import Reverie


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    path: Path
    clip_score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    pictures: tuple[_Picture, ...]
    previews: tuple[Path, ...]


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
    guidance_rescale: Annotated[
        float, typer.Option(help="Take so much of guidance's contrast back, 0 to 1; 0.7 is usual.")
    ] = 0.0,
    scheduler: Annotated[
        str | None, typer.Option(help="unipc, euler or flash. Default: the checkpoint's.", show_default=False)
    ] = None,
    shift: Annotated[
        float | None, typer.Option(help="Shift of the schedule. Default: the checkpoint's.", show_default=False)
    ] = None,
    preview_steps: Annotated[
        int, typer.Option(min=0, help="Write a preview after the first and every so many steps; 0 writes none.")
    ] = 0,
    clip_score: Annotated[bool, typer.Option("--clip-score", help="Score the pictures by CLIP.")] = False,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the sampler's model; the first picture of a size takes longer.")
    ] = False,
    to: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    address: Address = None,
    sampler: SamplerAddress = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Draw pictures with the base model or an adapter.

    Example: [bold]reverie sample "a photo of my cat on a beach" --job job-0123456789ab[/]
    """
    _check_adapter(adapter, job)
    _check_use(job is not None, "--step", step is not None, "--job, whose checkpoint it is")
    _check_use(job is not None or adapter is not None, "--strength", strength != 1.0, "--job or --adapter")
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
        guidance_rescale=guidance_rescale,
        scheduler=scheduler,
        shift=shift,
        preview_steps=preview_steps,
        clip_score=clip_score,
        compile=compile_model,
    )
    drawn = run(_sample(request, job, step, adapter, to, address, sampler))
    _print(drawn, output)


def _check_adapter(adapter: Path | None, job: str | None) -> None:
    if adapter is not None and job is not None:
        violation = FieldViolation(field="--adapter", description="--job names an adapter already; give one of them")
        raise InvalidArgumentError("two adapters were given", violations=[violation])
    if adapter is not None and not adapter.is_file():
        violation = FieldViolation(field="--adapter", description=f"{adapter} is not a file; check the path")
        raise InvalidArgumentError("there is no such adapter", violations=[violation])


def _check_use(is_used: bool, option: str, is_given: bool, needed: str) -> None:
    if is_given and not is_used:
        violation = FieldViolation(field=option, description=f"it does nothing without {needed}; give that, or neither")
        raise InvalidArgumentError("an option does nothing", violations=[violation])


def _print(drawn: _Drawn, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(
            {
                "files": [str(picture.path) for picture in drawn.pictures],
                "previews": [str(path) for path in drawn.previews],
                "clip_scores": [picture.clip_score for picture in drawn.pictures],
            }
        )
        return
    for picture in drawn.pictures:
        score = "" if picture.clip_score is None else f"  CLIP {picture.clip_score:.2f}"
        stdout().print(f"{picture.path}{score}", markup=False)


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
) -> _Drawn:
    async with connect(address, sampler=sampler) as reverie:
        found = await _adapter(reverie, job, step, adapter)
        if found is not None:
            request.adapter.CopyFrom(found)
        return await _draw(reverie, request, to)


async def _draw(reverie: Reverie, request: SampleRequest, to: Path) -> _Drawn:
    """Draw, and write previews and pictures as they come."""
    pictures: dict[int, _Picture] = {}
    previews: list[Path] = []
    with stderr().status("drawing") as status:
        async for response in reverie.sampling.sample(request):
            if response.HasField("progress"):
                status.update(f"drawing: step {response.progress.step} of {response.progress.num_steps}")
            elif response.HasField("notice"):
                stderr().print(response.notice.message, style="yellow", markup=False)
            elif response.HasField("preview"):
                path = to / _preview_name(request, response.preview)
                await reverie.sampling.save([response.preview], [path])
                previews.append(path)
                stderr().print(str(path), markup=False)
            else:
                path = to / _name(request, response.image)
                await reverie.sampling.save([response.image], [path])
                score = response.image.clip_score if response.image.HasField("clip_score") else None
                pictures[response.image.image_index] = _Picture(path=path, clip_score=score)
    return _Drawn(pictures=tuple(pictures[index] for index in sorted(pictures)), previews=tuple(previews))


def _name(request: SampleRequest, image: SampledImage) -> str:
    size = f"{image.width}x{image.height}"
    return f"{_words(request)}_{image.seed}_{size}_{image.image.sha256[:8]}.png"


def _preview_name(request: SampleRequest, preview: SamplingPreview) -> str:
    size = f"{request.width}x{request.height}"
    return f"{_words(request)}_{request.seed + preview.image_index}_{size}_step{preview.step:03d}.png"


def _words(request: SampleRequest) -> str:
    words = "".join(letter if letter.isalnum() else "-" for letter in request.prompt.lower())[:40].strip("-")
    return words or "picture"


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
