"""`python -m reverie_encoder`: the encoder process."""

from reverie_common.process import run_process
from reverie_common.rpc.server import run_server
from reverie_common.storage import open_store
from reverie_common.telemetry.logs import configure_logging

from reverie_encoder.settings import EncoderSettings


async def serve() -> None:
    """Serve until told to stop."""
    settings = EncoderSettings.from_command_line()
    configure_logging("encoder", settings.log_format, level=settings.log_level)
    # After the settings: importing torch takes seconds, and a wrong flag should not.
    from reverie_encoder.service import EncoderService

    service = EncoderService(settings, open_store(settings))
    await run_server([service.served], settings, load=service.load, stop=service.close)


if __name__ == "__main__":
    run_process(serve)
