"""The job files under examples/ are right by themselves."""

from pathlib import Path

import pytest
from reverie_client.specs import load_job_spec
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
JOBS = [EXAMPLES / "quickstart" / "job.yaml", *sorted((EXAMPLES / "jobs").glob("*.yaml"))]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_an_example(path: Path) -> None:
    assert check_spec(spec_from_proto(load_job_spec(path))) == []
