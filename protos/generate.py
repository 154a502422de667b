"""Generate protos/gen from protos/reverie, or with --check fail where the committed code differs.

The generated packages are importable because protos/gen is a source root; nothing in them is edited.
"""

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
GENERATED = PROTOS / "gen"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed code and write nothing")
    if parser.parse_args().check:
        return check()
    shutil.rmtree(GENERATED, ignore_errors=True)
    generate(GENERATED)
    return 0


def check() -> int:
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        drift = differences(Path(fresh), GENERATED)
    if drift:
        sys.stderr.write("protos/gen differs from protos/reverie; run `make protos`: " + ", ".join(drift) + "\n")
    return 1 if drift else 0


def generate(target: Path) -> None:
    """Write Python modules, type stubs and package markers for every .proto into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    # protoc finds its plugins on PATH, where an environment that was not activated is missing.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / "reverie").rglob("*.proto"))
    include = str(metadata.distribution("grpcio-tools").locate_file("grpc_tools/_proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy")]
    status = protoc.main(["protoc", f"-I{PROTOS}", f"-I{include}", *outputs, f"--mypy_grpc_out={target}", *sources])
    if status:
        raise SystemExit(status)
    for directory in sorted(path for path in target.rglob("*") if path.is_dir()):
        (directory / "__init__.py").touch()
    (target / "reverie" / "py.typed").touch()


def differences(fresh: Path, committed: Path) -> list[str]:
    """Return the relative paths that are not the same in both trees."""

    def names(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*.py*") if "__pycache__" not in path.parts}

    both = names(fresh) | names(committed)
    _, changed, missing = filecmp.cmpfiles(fresh, committed, sorted(both), shallow=False)
    return sorted(changed + missing)


if __name__ == "__main__":
    sys.exit(main())
