"""Every option of SimpleTuner's that exists for HiDream, and what becomes of it (spec 5 and 6): the tables."""

from reverie_client.simpletuner.keys.adapter import ADAPTER
from reverie_client.simpletuner.keys.data import DATA
from reverie_client.simpletuner.keys.dataset import BACKEND_KEYS, CACHE_BACKEND, DATASET
from reverie_client.simpletuner.keys.machine import MACHINE
from reverie_client.simpletuner.keys.model import MODEL
from reverie_client.simpletuner.keys.objective import OBJECTIVE
from reverie_client.simpletuner.keys.outlets import OUTLETS, WEBHOOK
from reverie_client.simpletuner.keys.training import TRAINING
from reverie_client.simpletuner.keys.validation import VALIDATION
from reverie_client.simpletuner.lycoris import LYCORIS, PRESET
from reverie_client.simpletuner.rules import Option

__all__ = ["CONFIG", "GROUPS", "WEBHOOK"]

CONFIG: tuple[Option, ...] = (*MODEL, *ADAPTER, *TRAINING, *OBJECTIVE, *DATA, *VALIDATION, *OUTLETS, *MACHINE)
"""Options of config.json."""

GROUPS: dict[str, tuple[Option, ...]] = {
    "Model and precision": MODEL,
    "Adapter": ADAPTER,
    "LyCORIS file": LYCORIS,
    "LyCORIS file: apply_preset": PRESET,
    "Training": TRAINING,
    "Objective": OBJECTIVE,
    "Data": DATA,
    "Dataset entries": DATASET,
    "Dataset entries: where the pictures are": BACKEND_KEYS,
    "Dataset entries: text_embeds and image_embeds": CACHE_BACKEND,
    "Validation and evaluation": VALIDATION,
    "Checkpoints, trackers, publishing, webhooks": OUTLETS,
    "Webhook file": WEBHOOK,
    "Machine": MACHINE,
}
"""The tables as the docs show them."""
