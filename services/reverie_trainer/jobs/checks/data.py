"""What may be said of the datasets."""

from collections.abc import Iterator, Sequence

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import JOB_NAME, between, name, one_of, text, violation
from reverie_trainer.jobs.spec import DatasetChoice

MAX_REPEATS = 1_000_000

RESOLUTION_TYPES = ("pixel_area", "pixel")
CROP_STYLES = ("center", "corner", "random")


def check_datasets(datasets: Sequence[DatasetChoice]) -> Iterator[FieldViolation]:
    """Yield what is wrong with the choice of datasets."""
    if not datasets:
        yield violation("datasets", "no dataset is given; name at least one that CreateDataset made")
    for index, dataset in enumerate(datasets):
        path = f"datasets[{index}]"
        yield from name(f"{path}.dataset", dataset.dataset, JOB_NAME, "[a-z0-9-]")
        yield from between(f"{path}.repeats", dataset.repeats, 0, MAX_REPEATS)
        yield from between(f"{path}.resolution", dataset.resolution, 64, 4096, "pixels")
        yield from one_of(f"{path}.resolution_type", dataset.resolution_type, RESOLUTION_TYPES)
        yield from one_of(f"{path}.crop_style", dataset.crop_style, CROP_STYLES)
        if dataset.instance_prompt is not None:
            yield from text(f"{path}.instance_prompt", dataset.instance_prompt)
