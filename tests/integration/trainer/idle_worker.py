"""A worker that only writes its secret where the test finds it, and waits to be told to end."""

import os
import signal
import sys


def main() -> None:
    """Write the secret to the log and wait."""
    sys.stderr.write(f"token {os.environ['REVERIE_WORKER_TOKEN']}\n")
    sys.stderr.flush()
    signal.pause()


if __name__ == "__main__":
    main()
