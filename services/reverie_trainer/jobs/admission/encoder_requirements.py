"""Whether the encoder services hold their encoders as a job demands (`model.text_encoder_precision`)."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from reverie.encoder.v1 import encoder_pb2
from reverie_common.errors import FieldViolation, ReverieError
from reverie_hidream.precisions import refusal

from reverie_trainer.jobs.preparing.services import ENCODER_NAMES, EncoderClient
from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.jobs.spec import JobSpec

logger = logging.getLogger(__name__)

_DESCRIBE_SECONDS = 3.0


class EncoderRequirements:
    """Checks jobs against the encoder services that answer now; preparation checks again when it asks them."""

    def __init__(self, clients: Sequence[EncoderClient]) -> None:
        """Ask these addresses."""
        self._clients = tuple(clients)

    async def check(self, spec: JobSpec) -> list[FieldViolation]:
        """Return what the encoders do not fulfil; nothing where nobody answers."""
        if not spec.model.text_encoder_precision:
            return []
        try:
            held = [item for client in self._clients for item in await client.describe(_DESCRIBE_SECONDS)]
        except ReverieError as error:
            logger.info("the encoders' precisions are left to preparation: %s", error.message)
            return []
        return unmet(spec.model.text_encoder_precision, held)


def unmet(wanted: Mapping[str, str], held: Iterable[encoder_pb2.EncoderDescription]) -> list[FieldViolation]:
    """Return a violation for each encoder that is held otherwise than wanted; the first that holds one counts."""
    precisions: dict[str, str] = {}
    for item in held:
        precisions.setdefault(ENCODER_NAMES.get(item.encoder, ""), item.precision)
    return [
        FieldViolation(
            field=f"model.text_encoder_precision[{name!r}]",
            description=(
                f"the job wants {name} in {precision!r}, the encoder service holds it in {precisions[name]!r}; restart "
                f"the service with --precision {name}={precision}, or leave the entry out"
            ),
        )
        for name, precision in wanted.items()
        # A precision that no service could be started with is refused by itself.
        if name in precisions and precisions[name] != precision and refusal(precision, is_trained_on=False) is None
    ]


def require_precisions(wanted: Mapping[str, str], held: Iterable[encoder_pb2.EncoderDescription]) -> None:
    """Refuse to prepare a job with encoders that are held otherwise than it wants.

    Raises:
        JobFailedError: names each such encoder.
    """
    violations = unmet(wanted, held)
    if violations:
        raise JobFailedError(
            "ENCODER_PRECISION",
            "; ".join(violation.description for violation in violations),
            "Restart the encoder service as the message says, then resume the job.",
        )
