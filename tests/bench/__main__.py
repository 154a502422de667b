"""`make bench`: ratios against the peer or the physical limit, each within one run.

Exit code 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.bench import images, services, storage, store, worker_step
from tests.bench.report import Figure

SECTIONS: dict[str, Callable[[], Iterable[Figure]]] = {
    "worker": worker_step.measure,
    "store": store.measure,
    "storage": storage.measure,
    "images": images.measure,
    "services": services.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which to run; default all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    figures: list[Figure] = []
    for name in chosen:
        for figure in SECTIONS[name]():
            sys.stdout.write(figure.line() + "\n")
            sys.stdout.flush()
            figures.append(figure)
    missed = [figure for figure in figures if not figure.passes]
    sys.stdout.write(f"{len(figures)} figures, {len(missed)} over their limit\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
