"""Options of config.json about all datasets: their defaults, buckets, caches (spec 5.2, 6)."""

from reverie_client.simpletuner.rules import UNSET, Given, Option, Scope, choice, custom, flag, ignored, number, refused

CONTENT = "latents and embeddings lie in the store by their content"
FALLBACK = "for datasets that do not say it themselves"


def _fallback(name: str) -> Option:
    """An option that datasets take where they have none of their own."""

    def apply(scope: Scope, given: Given) -> None:
        scope.honour(given, f"datasets[].{name}", UNSET, FALLBACK)

    return custom(name, apply, "honoured", f"datasets[].{name}", FALLBACK)


def _backends(scope: Scope, given: Given) -> None:
    scope.honour(given, "datasets", UNSET, "read; its own keys are reported below")


def _alignment(scope: Scope, given: Given) -> None:
    if str(given.value) == "64":
        scope.ignore(given, "edges are multiples of 64 pixels for HiDream")
    else:
        scope.change(given, "", UNSET, "edges are multiples of 64 pixels for HiDream, in SimpleTuner too")


def _on_demand(scope: Scope, given: Given) -> None:
    if scope.is_on(given.name):
        scope.honour(given, "embedding_storage", "on_demand", "the encoders are asked ahead of use")
    else:
        scope.ignore(given, "it is off")


FALLBACKS = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "crop",
    "crop_style",
    "crop_aspect",
    "repeats",
)
"""What a dataset entry takes from config.json where it has none of its own."""

_CACHES = (
    "cache_dir",
    "cache_dir_text",
    "cache_dir_vae",
    "cache_file_suffix",
    "compress_disk_cache",
    "preserve_data_backend_cache",
    "override_dataset_config",
    "skip_file_discovery",
    "vae_cache_ondemand",
    "vae_cache_scan_behaviour",
    "cache_clear_validation_prompts",
    "keep_vae_loaded",
    "write_batch_size",
    "read_batch_size",
    "metadata_update_interval",
)

DATA: tuple[Option, ...] = (
    custom(
        "data_backend_config", _backends, "honoured", "datasets", "the file is read; see the table of dataset entries"
    ),
    *(_fallback(name) for name in FALLBACKS),
    number("aspect_bucket_rounding", "aspect_bucket_rounding", low=1, high=9, is_whole=True),
    custom(
        "aspect_bucket_alignment", _alignment, "ignored", note="edges are multiples of 64 pixels for HiDream, there too"
    ),
    choice("data_backend_sampling", "dataset_sampling", {"auto-weighting": "auto", "uniform": "uniform"}),
    flag("allow_dataset_oversubscription", "allow_dataset_oversubscription"),
    ignored("disable_bucket_pruning", "a bucket that is too small is told, never left out in silence"),
    custom("text_cache_ondemand", _on_demand, "honoured", "embedding_storage", "`on_demand`"),
    custom("text_cache_disable", _on_demand, "honoured", "embedding_storage", "`on_demand`"),
    ignored("vae_cache_clear_each_epoch", "a crop is drawn once for each picture, by its name and the seed"),
    *(ignored(name, CONTENT) for name in _CACHES),
    ignored("delete_unwanted_images", "nothing of yours is deleted"),
    ignored("delete_problematic_images", "nothing of yours is deleted; preparation names what cannot be used"),
    refused(
        "instance_data_dir",
        "datasets are named in the data_backend_config",
        "write an entry there",
        aliases=("instance_data_root",),
    ),
    refused("caption_dropout_input", "captions are replaced whole", "use caption_dropout_probability"),
)
