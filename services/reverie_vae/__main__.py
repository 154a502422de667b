"""`python -m reverie_vae`: the VAE process."""

from reverie_common.process import run_process
from reverie_common.rpc.server import run_server
from reverie_common.storage import open_store
from reverie_common.telemetry.logs import configure_logging

from reverie_vae.settings import VaeSettings


async def serve() -> None:
    """Serve until told to stop."""
    settings = VaeSettings.from_command_line()
    configure_logging("vae", settings.log_format, level=settings.log_level)
    # After the settings: importing torch takes seconds, and a wrong flag should not.
    from reverie_vae.service import VaeService

    service = VaeService(settings, open_store(settings))
    await run_server([service.served], settings, load=service.load, stop=service.close)


if __name__ == "__main__":
    run_process(serve)
