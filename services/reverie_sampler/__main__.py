"""`python -m reverie_sampler`: the sampler process."""

from reverie_common.process import run_process
from reverie_common.rpc.server import run_server
from reverie_common.storage import open_store
from reverie_common.telemetry.logs import configure_logging

from reverie_sampler.service import SamplerService
from reverie_sampler.settings import SamplerSettings


async def serve() -> None:
    """Serve until told to stop."""
    settings = SamplerSettings.from_command_line()
    configure_logging("sampler", settings.log_format, level=settings.log_level)
    service = SamplerService(settings, open_store(settings))
    await run_server([service.served], settings, load=service.load, stop=service.close)


if __name__ == "__main__":
    run_process(serve)
