"""The demo as a person runs it: its files, its second run, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def short_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart job with fewer steps and smaller pictures."""
    text = (QUICKSTART / "job.yaml").read_text()
    text = text.replace("max_steps: 60", "max_steps: 8").replace("every_steps: 20", "every_steps: 4")
    text = text.replace("256x256, 320x192", "128x128, 192x128").replace(
        "num_inference_steps: 8", "num_inference_steps: 2"
    )
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    path.write_text(text)
    return path


def start_demo(output: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo in a session of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    command = [sys.executable, str(QUICKSTART / "demo.py"), "--output", str(output), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def processes_below(directory: Path) -> list[str]:
    """Command lines of the processes whose environment or arguments name a directory."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any(str(directory) in word for word in words):
            found.append(" ".join(process.cmdline()))
    return found


def test_writes_what_the_readme_lists_and_encodes_nothing_twice(short_job: Path, tmp_path: Path) -> None:
    with start_demo(tmp_path, "--job", str(short_job), "--again") as demo:
        printed, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, printed
    assert "hit rate 0.00 (0 of 14 images" in printed
    assert "hit rate 1.00 (14 of 14 images" in printed
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"job.json", "sheet.png", "loss.png", "adapter/pytorch_lora_weights.safetensors"} <= written
    pictures = {name for name in written if name.startswith("validation/")}
    assert len(pictures) == 3 * 3 * 2  # base, step 4 and step 8; three prompts; two sizes
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height / 4
    assert not processes_below(tmp_path)


def test_ctrl_c_stops_every_process_and_says_what_is_left(tmp_path: Path) -> None:
    with start_demo(tmp_path) as demo:
        assert demo.stdout is not None
        while "training" not in (line := demo.stdout.readline()):
            assert line, "the demo ended before it trained"
        demo.send_signal(signal.SIGINT)
        printed, _ = demo.communicate(timeout=90)
    assert demo.returncode == 130
    assert "every process is stopped" in printed
    assert not processes_below(tmp_path)
