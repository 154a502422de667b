"""Keys depend on everything that they are made from, and on nothing else."""

import inspect
import re

import pytest
from reverie_common.storage import keys
from reverie_common.storage.store import require_key

DIGEST = "ab" + "0" * 62


def test_digest_ignores_the_order_of_fields() -> None:
    assert keys.content_digest({"a": 1, "b": [1, 2]}) == keys.content_digest({"b": [1, 2], "a": 1})


def test_digest_is_sha256_of_canonical_json() -> None:
    # printf '{"a":1,"b":"\xc3\xa9"}' | sha256sum
    expected = "09ad9fd2fb648cb2f62141215828ea00a62c299db05d20aa9ade2f527a301cc6"
    digest = keys.content_digest({"b": "\u00e9", "a": 1})
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == expected


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": [1]}, {"a": None}, {"b": 1}, {"a": 1, "b": 1}, {}])
def test_digest_changes_with_any_change(other: dict[str, keys.JSON]) -> None:
    assert keys.content_digest(other) != keys.content_digest({"a": 1})


def test_digest_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        keys.content_digest({"a": float("nan")})


def test_derived_objects_lie_under_kind_fingerprint_and_two_hex_digits() -> None:
    assert keys.text_key("f1", DIGEST) == f"v1/text/f1/ab/{DIGEST}"
    assert keys.latent_key("f2", DIGEST) == f"v1/latent/f2/ab/{DIGEST}"


def test_checkpoints_of_a_job_sort_by_step() -> None:
    manifests = [keys.checkpoint_manifest_key("j", step) for step in (9, 10, 100, 2_000)]
    assert manifests == sorted(manifests)


def test_everything_of_a_job_lies_under_its_prefix() -> None:
    prefix = keys.job_prefix("job-1")
    assert keys.checkpoint_manifest_key("job-1", 3).startswith(prefix)
    assert keys.checkpoint_part_key("job-1", 3, "state", DIGEST).startswith(keys.checkpoint_prefix("job-1"))
    assert keys.artifact_key("job-1", "adapter/a.safetensors", DIGEST).startswith(prefix)


def test_the_prefix_of_a_job_is_not_that_of_another() -> None:
    assert not keys.job_prefix("job-10").startswith(keys.job_prefix("job-1"))


ALL_KEYS = [
    keys.image_key(DIGEST),
    keys.inspection_key(DIGEST, "v2"),
    keys.text_key("f", DIGEST),
    keys.on_demand_key("f", DIGEST),
    keys.latent_key("f", DIGEST),
    keys.mask_key(DIGEST),
    keys.sample_key(DIGEST),
    keys.adapter_snapshot_key(DIGEST),
    keys.dataset_manifest_key("d", 3),
    keys.prepared_key(DIGEST),
    keys.checkpoint_manifest_key("j", 1),
    keys.checkpoint_part_key("j", 1, "state", DIGEST),
    keys.artifact_key("j", "a/b.png", DIGEST),
    keys.reference_key(keys.text_key("f", DIGEST)),
]


def test_no_two_kinds_share_a_key() -> None:
    assert len(set(ALL_KEYS)) == len(ALL_KEYS)


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_key_is_one_that_a_store_takes(key: str) -> None:
    assert require_key(key) == key


def test_every_key_function_is_covered_here() -> None:
    functions = {name for name, _ in inspect.getmembers(keys, inspect.isfunction) if name.endswith("_key")}
    assert len(functions) == len(ALL_KEYS)
