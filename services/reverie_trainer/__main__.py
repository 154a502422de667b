"""`python -m reverie_trainer`: the trainer service."""

from reverie_common.process import run_process
from reverie_common.rpc.server import run
from reverie_common.telemetry.logs import configure_logging

from reverie_trainer.app import make_server
from reverie_trainer.settings import TrainerSettings


async def serve() -> None:
    """Serve until told to stop."""
    settings = TrainerSettings.from_command_line()
    configure_logging("trainer", settings.log_format, level=settings.log_level)
    await run(await make_server(settings))


if __name__ == "__main__":
    run_process(serve)
