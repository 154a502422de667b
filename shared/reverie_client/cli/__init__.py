"""The `reverie` command. Needs the extra `cli`; `up`, `down` and `status` need `standalone`."""

import sys


def main() -> None:
    """Run the command line of this process."""
    try:
        from reverie_client.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "yaml"):
            raise
        sys.exit(f"the reverie command needs {error.name}: pip install 'reverie[cli]'")
    app()
