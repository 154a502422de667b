"""Keys of the entries of the dataset file (spec 6.1)."""

from typing import Any

from reverie_client.names import plain_name
from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    choice,
    custom,
    flag,
    ignored,
    is_off,
    number,
    parse_flag,
    parse_number,
    refused,
    when,
)

CONTENT = "latents and embeddings lie in the store by their content"
PLAN = "see the datasets below the table"
STRATEGIES = {
    "textfile": "captions",
    "filename": "filename",
    "instanceprompt": "instanceprompt",
    "parquet": "captions",
    "csv": "captions",
    "huggingface": "captions",
}
READABLE = {
    "local": ("textfile", "filename", "instanceprompt", "parquet", "csv"),
    "aws": ("textfile", "filename", "instanceprompt"),
    "huggingface": ("huggingface", "instanceprompt"),
    "csv": ("csv", "instanceprompt"),
}
"""Caption strategies by where the pictures are."""

LISTED = ("random", "closest")
CLIPPED_CROP = "without crop, pictures are brought to the nearest aspect"


def strategy(scope: Scope) -> str:
    """SimpleTuner's caption strategy of an entry."""
    return "instanceprompt" if scope.is_on("only_instance_prompt") else str(scope.value("caption_strategy", "filename"))


def _is_cropped(scope: Scope) -> bool:
    return scope.is_on("crop")


def _id(scope: Scope, given: Given) -> None:
    name = (
        scope.fields["dataset"]
        if scope.fields and "dataset" in scope.fields
        else plain_name(str(given.value), "dataset")
    )
    if name == given.value:
        scope.honour(given, "dataset", name)
    else:
        scope.change(given, "dataset", name, "names of datasets have a-z, 0-9 and - only")


def _strategy(scope: Scope, given: Given) -> None:
    word = str(given.value)
    if word not in STRATEGIES:
        scope.refuse(given, f"there is no {word!r}", f"use one of {', '.join(STRATEGIES)}")
    elif word not in READABLE.get(str(scope.value("type", "local")), STRATEGIES):
        kind = str(scope.value("type", "local"))
        scope.refuse(
            given, f"captions of pictures of type {kind} are not read so", f"use {' or '.join(READABLE[kind])}"
        )
    elif scope.is_on("only_instance_prompt") and word != "instanceprompt":
        scope.ignore(given, "only_instance_prompt comes before it")
    elif word == "instanceprompt" and is_off(scope.value("instance_prompt")):
        scope.refuse(given, "there is no instance_prompt to read", "give one")
    else:
        note = (
            "read from PICTURE.txt, a caption on each line, when the pictures are uploaded"
            if word == "textfile"
            else ""
        )
        note = "read when the pictures are uploaded" if word in ("parquet", "csv", "huggingface") else note
        scope.honour(given, "caption_strategy", STRATEGIES[word], note)


def _only_instance(scope: Scope, given: Given) -> None:
    if not scope.is_on("only_instance_prompt"):
        scope.ignore(given, "it is off")
    elif is_off(scope.value("instance_prompt")):
        scope.refuse(given, "there is no instance_prompt to read", "give one")
    else:
        scope.honour(given, "caption_strategy", "instanceprompt")


def _instance_prompt(scope: Scope, given: Given) -> None:
    is_read = strategy(scope) == "instanceprompt" or scope.is_on("prepend_instance_prompt")
    prompts = given.value if isinstance(given.value, list) else [given.value]
    if not is_read:
        scope.ignore(given, f"caption_strategy {strategy(scope)} does not read it")
    elif not prompts or not all(isinstance(each, str) and each.strip() for each in prompts):
        scope.refuse(given, "it is neither a text nor a list of texts")
    elif len(prompts) == 1:
        scope.honour(given, "instance_prompt", prompts[0])
    else:
        scope.honour(given, "instance_prompts", prompts, "one is chosen at each visit")


def _prepend(scope: Scope, given: Given) -> None:
    if scope.is_on("prepend_instance_prompt") and strategy(scope) == "instanceprompt":
        scope.ignore(given, "the instance prompt is the whole caption")
    else:
        flag("prepend_instance_prompt", "prepend_instance_prompt").apply(scope, given)


def _size(name: str, note: str = "", **more: Any) -> Option:
    """A size in the unit that resolution_type says; 0 is off."""

    def apply(scope: Scope, given: Given) -> None:
        is_area = scope.value("resolution_type", "pixel_area") == "area"
        low, high = (0.004, 16.8) if is_area else (64, 4096)
        value = parse_number(given.value)
        if value is not None and value == 0 and name != "resolution":
            scope.ignore(given, "it is off")
        else:
            number(name, name, note, low=low, high=high).apply(scope, given)

    return custom(name, apply, "honoured", name, note, **more)


def _downsample(scope: Scope, given: Given) -> None:
    """Maximum and target go together; a target below the resolution would enlarge pictures again."""
    other = "target_downsample_size" if given.name == "maximum_image_size" else "maximum_image_size"
    resolution = parse_number(scope.value("resolution", 1024)) or 0
    maximum, target = (
        parse_number(scope.value(name, 0)) or 0 for name in ("maximum_image_size", "target_downsample_size")
    )
    if parse_number(given.value) == 0:
        scope.ignore(given, "it is off")
    elif not (maximum and target):
        scope.refuse(given, f"{other} is missing, without which it has no meaning", "give both or none")
    elif target < resolution:
        scope.refuse(
            given,
            f"target_downsample_size {target:g} is below resolution {resolution:g}",
            f"the nearest that works is {resolution:g}",
        )
    elif target > maximum:
        scope.refuse(
            given,
            f"target_downsample_size {target:g} is above maximum_image_size {maximum:g}",
            f"the nearest that works is {maximum:g}",
        )
    else:
        _size(
            given.name,
            "compared with each picture; SimpleTuner resizes every one" if given.name == "maximum_image_size" else "",
        ).apply(scope, given)


def _crop_aspects(scope: Scope, given: Given) -> None:
    entries = given.value if isinstance(given.value, list) else []
    aspects = [entry if isinstance(entry, dict) else {"aspect": entry} for entry in entries]
    if is_off(given.value) or scope.value("crop_aspect", "square") not in LISTED:
        scope.ignore(given, "crop_aspect does not read it")
    elif not all(parse_number(each.get("aspect")) for each in aspects):
        scope.refuse(given, "it is no list of width / height", "write [0.75, 1.0, 1.5]")
    else:
        scope.honour(
            given,
            "crop_aspect_buckets",
            [{key: parse_number(value) for key, value in each.items()} for each in aspects],
        )


def _upscale(scope: Scope, given: Given) -> None:
    value = parse_number(given.value)
    if value is not None and 0 < value < 1:
        scope.refuse(
            given,
            "here it is the factor by which a picture's area may grow, at least 1",
            f"for {value:.0%} write {1 + value:g}",
        )
    else:
        number("max_upscale_threshold", "max_upscale_threshold", low=0.0).apply(scope, given)


def _regularisation(scope: Scope, given: Given) -> None:
    if parse_flag(given.value) is None:
        scope.refuse(given, "it is neither true nor false")
    elif not scope.is_on("is_regularisation_data"):
        scope.honour(given, "role", UNSET, "")
    elif scope.value("dataset_type") == "eval":
        scope.ignore(given, "an evaluation dataset is never trained on")
    else:
        scope.honour(given, "role", "regularisation", "the base model's own prediction is the target")


def _dataset_type(scope: Scope, given: Given) -> None:
    if given.value == "eval":
        scope.honour(given, "role", "evaluation")
    else:
        scope.honour(given, "role", UNSET)


def _batch(scope: Scope, given: Given) -> None:
    scope.refuse(given, "all datasets of a job share one batch size", "use train_batch_size in config.json")


def _epochs(name: str) -> Option:
    nearest = f"use {name.replace('epoch', 'step')}"
    return refused(name, "datasets come and go by steps", nearest, off=(None, 0, 1, "0", "1", ""))


DATASET: tuple[Option, ...] = (
    custom("id", _id, "honoured", "datasets[].dataset", "made of a-z, 0-9 and - where it is not"),
    custom(
        "dataset_type",
        _dataset_type,
        "honoured",
        "datasets[].role",
        "image, eval, conditioning (masks), text_embeds, image_embeds; others are refused",
    ),
    ignored("disabled", "the entry is used", aliases=("disable",)),
    number("repeats", "repeats", "extra passes, as there", low=0, high=1_000_000, is_whole=True),
    number("probability", "probability", low=1e-9, high=1e6),
    _size("resolution"),
    choice("resolution_type", "resolution_type", ("pixel_area", "area", "pixel")),
    _size("minimum_image_size", "smaller pictures are left out"),
    custom(
        "maximum_image_size",
        _downsample,
        "honoured",
        "maximum_image_size",
        "compared with each picture; SimpleTuner resizes every one",
    ),
    custom("target_downsample_size", _downsample, "honoured", "target_downsample_size"),
    number("minimum_aspect_ratio", "minimum_aspect_ratio", low=0.0, high=100.0),
    number("maximum_aspect_ratio", "maximum_aspect_ratio", low=0.0, high=100.0),
    custom("max_upscale_threshold", _upscale, "honoured", "max_upscale_threshold", "a factor of the area, at least 1"),
    number("max_num_samples", "max_num_samples", "chosen by the job's seed", low=0, high=2**31, is_whole=True),
    flag("crop", "crop"),
    *when(
        _is_cropped,
        CLIPPED_CROP,
        (
            choice("crop_aspect", "crop_aspect", ("square", "preserve", "random", "closest")),
            custom("crop_aspect_buckets", _crop_aspects, "honoured", "crop_aspect_buckets"),
            choice(
                "crop_style",
                "crop_style",
                {"center": "center", "centre": "center", "corner": "corner", "random": "random"},
                "",
                refused={
                    "face": "it needs a face detector, which is not carried; the nearest that works is center",
                },
                default="random",
            ),
        ),
    ),
    custom(
        "caption_strategy",
        _strategy,
        "honoured",
        "caption_strategy",
        "`captions` for textfile, parquet, csv and huggingface: read at upload",
        default="filename",
    ),
    custom("instance_prompt", _instance_prompt, "honoured", "instance_prompt"),
    custom("only_instance_prompt", _only_instance, "honoured", "caption_strategy"),
    custom("prepend_instance_prompt", _prepend, "honoured", "prepend_instance_prompt"),
    flag("caption_shuffle", "caption_shuffle"),
    refused("caption_filter_list", "captions are not edited on the way", "edit them before uploading"),
    custom("is_regularisation_data", _regularisation, "honoured", "role"),
    number("start_step", "start_step", low=0, high=1_000_000, is_whole=True),
    number("end_step", "end_step", low=0, high=1_000_000, is_whole=True),
    _epochs("start_epoch"),
    _epochs("end_epoch"),
    refused("train_batch_size", "all datasets of a job share one batch size", "use train_batch_size in config.json"),
    number("timestep_sampling_offset", "timestep_sampling_offset", low=-10.0, high=10.0),
    ignored("cache_dir_vae", CONTENT),
    ignored("cache_dir", CONTENT),
    ignored("skip_file_discovery", CONTENT),
    ignored("preserve_data_backend_cache", CONTENT),
    ignored("vae_cache_clear_each_epoch", "a crop is drawn once for each picture, by its name and the seed"),
    ignored("vae_cache_ondemand", CONTENT),
    ignored("vae_cache_disable", CONTENT),
    ignored("text_cache_ondemand", "text_cache_ondemand of config.json holds for the whole job"),
    ignored("text_cache_disable", "text_cache_ondemand of config.json holds for the whole job"),
    ignored("text_embeds", CONTENT),
    ignored("image_embeds", CONTENT),
    ignored("hash_filenames", CONTENT),
    ignored("write_batch_size", CONTENT),
    ignored("metadata_update_interval", CONTENT),
)
"""Fields of an entry of the job's datasets."""


def _planned(name: str, note: str) -> Option:
    """A key that says where pictures are; what it leads to stands in the plan."""
    return custom(name, lambda scope, given: scope.honour(given, "", UNSET, note), "honoured", "", note)


def _type(scope: Scope, given: Given) -> None:
    notes = {
        "local": "uploaded by --upload",
        "aws": "read where it is: the trainer's store must be that server",
        "huggingface": "read through the library datasets",
        "csv": "read from its URLs by the trainer",
    }
    if given.value in notes:
        scope.honour(given, "", UNSET, notes[str(given.value)])
    else:
        scope.refuse(given, f"pictures cannot be read from {given.value!r}", "download them, and use local")


def _masks(scope: Scope, given: Given) -> None:
    if is_off(given.value):
        scope.ignore(given, "it is empty")
    elif scope.value("type", "local") != "local":
        scope.refuse(given, "masks are uploaded with their pictures", "use type local for both")
    elif scope.fields is not None and "mask_type" in scope.fields:
        scope.honour(given, "mask_type", scope.fields["mask_type"], "the masks are uploaded with the pictures")
    else:
        scope.refuse(given, "it names no entry of masks that is used", "see conditioning_type of that entry")


def _region(scope: Scope, given: Given) -> None:
    scope.ignore(given, "the trainer reads buckets of its own store, with its own key")


BACKEND_KEYS: tuple[Option, ...] = (
    custom("type", _type, "honoured", note="local is uploaded, aws read where it is, csv and huggingface by a command"),
    _planned("instance_data_dir", "the folder of pictures, below --dataset-root"),
    _planned("metadata_backend", "pictures are looked at when they are added; captions of parquet are read then"),
    _planned("parquet", "captions are read when the pictures are uploaded"),
    custom("conditioning_data", _masks, "honoured", "mask_type", "the masks of the pictures, uploaded with them"),
    _planned("conditioning_type", "`mask` or `segmentation`; others are refused"),
    _planned("aws_bucket_name", "the bucket"),
    _planned("aws_data_prefix", "the folder in the bucket"),
    custom("aws_region_name", _region, "ignored", note="the trainer reads buckets of its own store, with its own key"),
    custom("aws_endpoint_url", _region, "ignored", note="the trainer reads buckets of its own store, with its own key"),
    custom(
        "aws_access_key_id", _region, "ignored", note="the trainer reads buckets of its own store, with its own key"
    ),
    custom(
        "aws_secret_access_key", _region, "ignored", note="the trainer reads buckets of its own store, with its own key"
    ),
    _planned("csv_file", "the list of URLs and captions"),
    _planned("csv_url_column", "the column with the URLs"),
    _planned("csv_caption_column", "the column with the captions"),
    ignored("csv_cache_dir", CONTENT),
    _planned("dataset_name", "the dataset on the Hub"),
    _planned("split", "its split"),
    _planned("revision", "its revision"),
    _planned("image_column", "the column with the pictures"),
    _planned("caption_column", "the column with the captions"),
    _planned("huggingface", "its columns, in one object"),
    refused("composite_image_config", "pictures are taken as they are", "compose them before uploading"),
)
"""Keys that say where the pictures are."""

_KEPT = "embeddings lie in the store by their content, without a cache of their own"

CACHE_BACKEND: tuple[Option, ...] = tuple(
    ignored(name, _KEPT)
    for name in (
        "id",
        "type",
        "dataset_type",
        "default",
        "disabled",
        "cache_dir",
        "write_batch_size",
        "instance_data_dir",
        "aws_bucket_name",
        "aws_data_prefix",
        "aws_region_name",
        "aws_endpoint_url",
        "aws_access_key_id",
        "aws_secret_access_key",
        "compress_cache",
    )
)
"""Keys of entries whose dataset_type is text_embeds or image_embeds."""
