"""The GPU bench runs at a reduced size on a CPU, counts arithmetic as the specification does, and needs no service."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from reverie_hidream.transformer import REAL_CONFIG

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"
NOT_NEEDED = ("minio", "grpc", "optimi", "sqlalchemy", "prometheus_client", "reverie_trainer", "reverie")

RUN_AND_TELL = f"""
import runpy, sys
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print("LOADED", *[name for name in {NOT_NEEDED!r} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("width", "height", "forward", "training"),
    [(512, 512, 21.7, 44.9), (768, 768, 44.0, 93.3), (1024, 1024, 77.8, 170.4)],
)
def test_counts_arithmetic_as_the_specification(
    bench: ModuleType, width: int, height: int, forward: float, training: float
) -> None:
    case = bench.Case(precision="no_change", width=width, height=height)
    assert sum(bench.forward_flops(REAL_CONFIG, case)) / 1e12 == pytest.approx(forward, rel=0.01)
    assert bench.training_flops(REAL_CONFIG, case) / 1e12 == pytest.approx(training, rel=0.01)


def test_runs_at_a_reduced_size_and_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--device", "cpu", "--shape", "small", "--steps", "1", "--max-batch", "2", "--out", str(out)]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_AND_TELL, *options], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "LOADED"
    report = json.loads(out.read_text())
    assert {"device", "versions", "commit", "date", "peak_flops"} <= report.keys()
    cases = [(each["case"]["precision"], each["case"]["loop"], each["case"]["batch_size"]) for each in report["cases"]]
    sizes = 2
    for precision in ("no_change", "int8-quanto"):
        assert cases.count((precision, "reverie", 1)) == cases.count((precision, "diffusers", 1)) == 2 * sizes
        assert cases.count((precision, "reverie", 2)) == sizes
    for each in report["cases"]:
        assert each["status"] == "measured"
        assert 0 < each["step_p10"] <= each["step_median"] <= each["step_p90"]
        assert each["forward"] > 0
        assert each["backward"] > 0
        assert each["peak_memory_bytes"] > 0
    assert all(
        each["ratio_to_diffusers"] > 0
        for each in report["cases"]
        if each["case"]["loop"] == "reverie" and each["case"]["batch_size"] == 1
    )


def test_says_what_to_do_without_a_gpu() -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "--device cpu --shape small" in ran.stdout
