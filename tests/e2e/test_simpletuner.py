"""The reference configuration of SimpleTuner, brought to a running stack and trained on the tiny checkpoint."""

import json
import shutil
from pathlib import Path

from reverie.training.v1.job_pb2 import TrainingJobState
from reverie_client import SyncReverie
from reverie_client.cli.app import app
from reverie_client.stack import Stack
from typer.testing import CliRunner

TESTS = Path(__file__).resolve().parents[1]
REFERENCE = TESTS / "unit" / "client" / "simpletuner" / "reference"
PHOTOS = TESTS.parent / "examples" / "quickstart" / "photos"

SMALLER = {
    "resolution": 256,
    "minimum_image_size": 64,
    "maximum_image_size": 512,
    "target_downsample_size": 256,
}
SHORTER = {
    "max_train_steps": 4,
    "eval_steps_interval": 2,
    "validation_step_interval": 4,
    "validation_resolution": "128x128",
    "validation_num_inference_steps": 2,
    "lr_warmup_steps": 2,
    "text_encoder_3_precision": "no_change",
    "text_encoder_4_precision": "no_change",
}
"""Nothing else differs from the reference; the stack's encoders are not quantised."""


def test_the_reference_trains(stack: Stack, reverie: SyncReverie, tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(REFERENCE, config)
    entries = json.loads((REFERENCE / "multidatabackend.json").read_text())
    for entry in entries[:2]:
        entry.update(SMALLER)
        folder = tmp_path / entry["instance_data_dir"]
        folder.mkdir(parents=True)
        for name in ("cat", "coffee"):
            shutil.copy(PHOTOS / f"{name}.jpg", folder)
    entries.append({**entries[0], "id": "measured", "dataset_type": "eval", "is_regularisation_data": False})
    (config / "multidatabackend.json").write_text(json.dumps(entries))

    arguments = ["job", "submit", "--simpletuner", str(config), "--dataset-root", str(tmp_path)]
    for name, value in SHORTER.items():
        arguments += ["--set", f"{name}={value}"]
    result = CliRunner().invoke(app, arguments, env={"REVERIE_ADDRESS": stack.addresses["trainer"]})
    assert result.exit_code == 0, result.stderr

    job = reverie.jobs.wait(result.stdout.strip())
    assert job.state == TrainingJobState.TRAINING_JOB_STATE_SUCCEEDED, job.failure
    assert job.spec.name == "eval-loss-test1"
    assert job.spec.optimization.optimizer == "optimi-lion"
    assert job.spec.model.base_precision == "int8-quanto"
    assert [dataset.role for dataset in job.spec.datasets] == ["regularisation", "train", "evaluation"]
    assert job.step == 4
    assert job.adapter_report.num_modules > 0
    assert [evaluation.dataset for evaluation in job.evaluations] == ["measured"]
