"""The training package can be carried to a machine that has torch, diffusers, lycoris and optimum.quanto alone."""

import subprocess
import sys

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"grpc", "minio", "reverie", "reverie_trainer", "pydantic", "sqlalchemy"}:
            raise ImportError(name + " is not there")
        if name == "google.protobuf":
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Absent())
import reverie_hidream.training.draws, reverie_hidream.training.step
"""


def test_needs_neither_services_nor_a_store() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
