"""Every command in the README does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)(?:`|$)", README, re.MULTILINE))
    assert {"demo", "test", "bench"} <= named <= targets


def test_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    tour = next(block for block in blocks("sh") if "reverie up" in block)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("REVERIE_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REVERIE_STATE_DIR": str(tmp_path / "state"),
    }
    # Other stacks may hold the default ports while tests run.
    script = tour.replace("reverie up --detach", "reverie up --detach --ephemeral-ports")
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    finally:
        subprocess.run(["reverie", "down"], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "results" / "sheet.png").exists()
    assert list((tmp_path / "results").glob("*.png"))


def test_job_in_ten_lines_is_a_job(tmp_path: Path) -> None:
    from reverie_client.specs import load_job_spec

    spec = load_job_spec(blocks("yaml")[0])
    assert spec.adapter.lokr.use_scalar
    assert spec.optimization.optimizer == "optimi-lion"


def test_python_example_compiles_and_its_names_exist() -> None:
    namespace: dict[str, object] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), namespace)  # noqa: S102 - our own README
    assert callable(namespace["train"])
