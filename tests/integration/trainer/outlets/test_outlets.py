"""Jobs tell webhooks, trackers and the Hub what they do, and only those that the trainer allows."""

import asyncio
import base64
import email.parser
import hashlib
import json
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from reverie.training.v1 import job_pb2, outlets_pb2, training_pb2
from reverie_common.errors import InvalidArgumentError
from reverie_common.rpc.channel import translated
from reverie_trainer.app import make_server
from reverie_trainer.settings import TrainerSettings
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # chosen by protobuf's version

PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a4944415478da63a80700008100"
    "807e1c29c70000000049454e44ae426082"
)
"""A picture of one pixel."""
CATS = [("300x200", ["a cat"]), ("310x210", ["two cats"])]
VALIDATION = job_pb2.ValidationSpec(
    prompts=[job_pb2.ValidationPrompt(name="cat", prompt="a cat | on a mat")], resolutions=["64x64"]
)


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "secrets"
    directory.mkdir()
    (directory / "hf_token").write_text("hf_secret\n")
    (directory / "hook-key").write_text("swordfish\n")
    return directory


@pytest.fixture
async def trainer(start_trainer: Any, secrets_dir: Path, hub: Any, tmp_path: Path) -> Any:
    running = await start_trainer(
        secrets_dir=secrets_dir,
        webhook_hosts=("127.0.0.1",),
        hub_endpoint=hub.url,
        tracking_dir=tmp_path / "tracking",
    )
    await running.add_dataset("cats", CATS)
    for body in (PICTURE, b"adapter", b"{ }", b"1", b"2", b"3"):
        running.store.create(f"fake/{hashlib.sha256(body).hexdigest()}", body)
    return running


async def eventually(get: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
    """Ask again until there is an answer."""
    async with asyncio.timeout(seconds):
        while not (answer := await get()):  # noqa: ASYNC110 - what is waited for is in another task or process
            await asyncio.sleep(0.02)
    return answer


async def until(condition: Callable[[], Any]) -> None:
    async def is_so() -> Any:
        return condition()

    await eventually(is_so)


async def finish(trainer: Any, spec: job_pb2.TrainingJobSpec) -> job_pb2.TrainingJob:
    job: job_pb2.TrainingJob = await trainer.finish((await trainer.submit(spec)).job_id)
    assert job.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED, job.failure.message
    return job


def raw(listener: Any, **fields: Any) -> outlets_pb2.WebhookSpec:
    return outlets_pb2.WebhookSpec(kind="raw", url=f"{listener.url}/hook", **fields)


def stages(listener: Any) -> list[str]:
    return [request.json["stage"]["key"] for request in listener.requests if "stage" in request.json]


async def test_raw_webhook_is_told_the_whole_job_with_pictures_in_order(
    trainer: Any, make_spec: Any, listener: Any
) -> None:
    hook = raw(listener, token_secret="hook-key", log_level="debug", message_prefix="[box]")
    job = await finish(trainer, make_spec("cats", webhooks=[hook], validation=VALIDATION))
    await until(lambda: stages(listener)[-1:] == ["training_complete"])
    assert stages(listener) == ["preparation", "training", "training_complete"]
    messages = [request.json for request in listener.requests]
    assert {message["job_id"] for message in messages} == {job.job_id}
    assert {request.headers["X-API-Key"] for request in listener.requests} == {"swordfish"}
    assert all(message["title"].startswith("[box] ") for message in messages)
    pictures = [message for message in messages if message["type"] == "validation.image"]
    assert [picture["data"]["step"] for picture in pictures] == [1, 2, 3]
    assert [picture["data"]["validation_type"] for picture in pictures] == ["checkpoint", "checkpoint", "final"]
    assert {base64.b64decode(picture["images"][0]) for picture in pictures} == {PICTURE}
    assert pictures[0]["body"] == "a cat | on a mat"
    assert [message["type"] for message in messages].count("training.status") == 1  # one in five seconds


async def test_previews_say_which_sampling_step_they_show(trainer: Any, make_spec: Any, listener: Any) -> None:
    await finish(trainer, make_spec("cats", "previews", webhooks=[raw(listener)], validation=VALIDATION))
    await until(lambda: stages(listener)[-1:] == ["training_complete"])
    previews = [r.json for r in listener.requests if r.json["data"].get("validation_type") == "intermediary"]
    assert [preview["title"] for preview in previews] == ["Validation (step 5/20): cat"] * 3
    assert previews[0]["data"] == {
        "step": 5,
        "timestep": 640.5,
        "resolution": [64, 64],
        "validation_type": "intermediary",
        "prompt": "a cat | on a mat",
        "step_label": "5/20",
        "training_step": 1,
    }
    assert base64.b64decode(previews[0]["images"][0]) == PICTURE


async def test_log_level_leaves_out_what_is_below_it(trainer: Any, make_spec: Any, listener: Any) -> None:
    hook = raw(listener, log_level="error")
    job = await trainer.submit(make_spec("cats", "fail=2", webhooks=[hook], validation=VALIDATION))
    await trainer.finish(job.job_id)
    await until(lambda: listener.requests)
    assert stages(listener) == ["training_failed"]
    assert len(listener.requests) == 1
    assert listener.requests[0].json["body"] == "loss is nan"


async def test_discord_gets_the_picture_attached(
    trainer: Any, make_spec: Any, listener: Any, secrets_dir: Path
) -> None:
    (secrets_dir / "discord").write_text(f"{listener.url}/api/webhooks/1/very-secret")
    hook = outlets_pb2.WebhookSpec(kind="discord", url_secret="discord", message_prefix="box")
    job = await finish(trainer, make_spec("cats", webhooks=[hook], validation=VALIDATION))
    await until(lambda: any(b"Training complete" in request.body for request in listener.requests))
    parts = [part for part in map(form_of, listener.requests) if "file0" in part]
    assert len(parts) == 3
    content = json.loads(parts[0]["payload_json"])
    assert content["content"] == "`(box)` Validation (step 1): cat\na cat | on a mat"
    assert content["allowed_mentions"] == {"parse": []}
    assert parts[0]["file0"] == PICTURE
    assert "very-secret" not in str(await trainer.watch(job.job_id))


def form_of(request: Any) -> dict[str, bytes]:
    """The fields of a multipart form."""
    head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
    message: Any = email.parser.BytesParser().parsebytes(head + request.body)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.get_payload()
    }


async def test_receiver_that_is_away_is_tried_again_and_delays_no_training(
    trainer: Any, make_spec: Any, listener: Any
) -> None:
    listener.statuses[:] = [503, 429]
    await finish(trainer, make_spec("cats", webhooks=[raw(listener)]))
    await until(lambda: stages(listener)[-1:] == ["training_complete"])
    assert stages(listener) == ["preparation"] * 3 + ["training", "training_complete"]


async def test_refusal_is_a_notice_without_the_secret_url_and_the_rest_is_told(
    trainer: Any, make_spec: Any, listener: Any, secrets_dir: Path
) -> None:
    (secrets_dir / "hook").write_text(f"{listener.url}/very-secret")
    listener.statuses[:] = [404]
    hook = outlets_pb2.WebhookSpec(kind="raw", url_secret="hook")
    job = await finish(trainer, make_spec("cats", webhooks=[hook]))
    await until(lambda: stages(listener)[-1:] == ["training_complete"])
    events = await trainer.watch(job.job_id)
    failures = [event.notice for event in events if event.notice.reason == "OUTLET_FAILED"]
    assert [notice.message for notice in failures] == ["webhook-0: the answer was 404"]
    assert "very-secret" not in str(events)


async def test_redirect_is_not_followed(trainer: Any, make_spec: Any, listener: Any) -> None:
    listener.statuses[:] = [307]
    job = await finish(trainer, make_spec("cats", webhooks=[raw(listener)]))
    await until(lambda: stages(listener)[-1:] == ["training_complete"])
    events = await trainer.watch(job.job_id)
    assert any("the answer was 307" in event.notice.message for event in events)


@pytest.mark.parametrize(
    ("webhook", "field", "words"),
    [
        ({"kind": "raw", "url": "https://evil.example/x"}, "webhooks[0].url", "'evil.example' is not allowed"),
        ({"kind": "raw", "url": "http://evil.example/x"}, "webhooks[0].url", "use https"),
        ({"kind": "raw", "url": "https://user@127.0.0.1/x"}, "webhooks[0].url", "without a user"),
        ({"kind": "raw", "url_secret": "nowhere"}, "webhooks[0].url_secret", "'nowhere' is unknown"),
        ({"kind": "raw", "url": "http://127.0.0.1/", "token_secret": "../x"}, "webhooks[0].token_secret", "no name"),
        (
            {"kind": "raw", "url": "http://127.0.0.1/", "token_secret": "hf_token"},
            "webhooks[0].token_secret",
            "'hf_token' is an account of the trainer's",
        ),
        ({"kind": "raw"}, "webhooks[0].url", "either url"),
        ({"kind": "pigeon", "url": "http://127.0.0.1/"}, "webhooks[0].kind", "raw, discord"),
    ],
)
async def test_what_the_trainer_does_not_allow_is_refused_at_once(
    trainer: Any, make_spec: Any, webhook: dict[str, str], field: str, words: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await trainer.submit(make_spec("cats", webhooks=[outlets_pb2.WebhookSpec(**webhook)]))
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert list(found) == [field]
    assert words in found[field]


async def test_restarted_trainer_goes_on_telling_where_it_was(
    trainer_flags: dict[str, Any], connect_trainer: Any, worker_path: None, make_spec: Any, listener: Any
) -> None:
    settings = TrainerSettings(**trainer_flags, webhook_hosts=("127.0.0.1",))
    async with await make_server(settings) as server:
        first = await connect_trainer(server.target)
        await first.add_dataset("again", CATS)
        job = await first.submit(make_spec("again", "steps=900", "slow=0.05", webhooks=[raw(listener)]))
        await until(lambda: "training" in stages(listener))
        await first.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job.job_id))
        await until(lambda: "training_cancelled" in stages(listener))
    async with await make_server(settings) as server:
        second = await connect_trainer(server.target)
        await second.training.ResumeTrainingJob(training_pb2.ResumeTrainingJobRequest(job_id=job.job_id))
        await until(lambda: stages(listener).count("training") == 2)
        await second.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job.job_id))
        await until(lambda: stages(listener).count("training_cancelled") == 2)
    assert stages(listener) == ["preparation", "training", "training_cancelled"] * 2


def tensorboard_events(directory: Path) -> list[Any]:
    """Events of all files, by the framing of TFRecord: length, its checksum, bytes, their checksum."""
    events = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        body, offset = file.read_bytes(), 0
        while offset < len(body):
            (length,) = struct.unpack_from("<Q", body, offset)
            events.append(Event.FromString(body[offset + 12 : offset + 12 + length]))
            offset += 16 + length
    return events


async def test_tensorboard_files_hold_every_step_and_picture(trainer: Any, make_spec: Any, tmp_path: Path) -> None:
    tracking = outlets_pb2.TrackingSpec(tensorboard=True)
    job = await finish(trainer, make_spec("cats", tracking=tracking, validation=VALIDATION))
    artifacts = await until_artifact(trainer, job.job_id, "tracking/tensorboard/")
    directory = tmp_path / "tracking" / job.job_id / "tensorboard"
    assert [Path(path).name for path in artifacts] == [file.name for file in directory.iterdir()]
    events = tensorboard_events(directory)
    losses = {
        event.step: value.simple_value for event in events for value in event.summary.value if value.tag == "train_loss"
    }
    assert losses == {step: pytest.approx(1 / step) for step in (1, 2, 3)}
    pictures = {
        event.step: value.image.encoded_image_string
        for event in events
        for value in event.summary.value
        if value.tag.startswith("cat - (64, 64)")
    }
    assert pictures == dict.fromkeys((1, 2, 3), PICTURE)


async def until_artifact(trainer: Any, job_id: str, prefix: str) -> list[str]:
    async def paths() -> list[str]:
        request = training_pb2.ListArtifactsRequest(job_id=job_id, page_size=100)
        answer = await trainer.training.ListArtifacts(request)
        return [each.path for each in answer.artifacts if each.path.startswith(prefix)]

    found: list[str] = await eventually(paths)
    return found


async def test_wandb_run_is_written_offline(trainer: Any, make_spec: Any, tmp_path: Path) -> None:
    tracking = outlets_pb2.TrackingSpec(wandb=True, wandb_mode="offline", run_name="my run", project="cats")
    job = await finish(trainer, make_spec("cats", tracking=tracking))
    directory = tmp_path / "tracking" / job.job_id / "wandb"
    await until(lambda: list(directory.glob("wandb/offline-run-*/run-*.wandb")))
    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    records = await until_ended(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == (job.job_id, "my run", "cats")
    losses = {}
    for record in records:
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train_loss" in values:
            losses[values["step"]] = values["train_loss"]
    assert losses == {step: pytest.approx(1 / step) for step in (1, 2, 3)}


async def until_ended(file: Path) -> list[Any]:
    """The records of a W&B file once it holds the end of the run."""

    async def records() -> list[Any] | None:
        body = await asyncio.to_thread(file.read_bytes)
        found = [Record.FromString(record) for record in wandb_records(body)]
        return found if any(record.HasField("exit") for record in found) else None

    found: list[Any] = await eventually(records)
    return found


def wandb_records(body: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, in them records with checksum, length and kind."""
    offset, begun = 7, b""
    while offset + 7 <= len(body):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", body, offset)
        begun += body[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


async def test_success_is_published_with_a_model_card(trainer: Any, make_spec: Any, hub: Any) -> None:
    publishing = outlets_pb2.PublishingSpec(hub_model_id="me/cats", push_checkpoints=True, license="apache-2.0")
    spec = make_spec("cats", publishing=publishing, validation=VALIDATION, webhooks=[])
    spec.trigger_words.append("zorp")
    await finish(trainer, spec)
    await until(lambda: len(hub.commits) == 4)
    assert hub.problems == []
    assert hub.repositories == {"me/cats": True}
    assert hub.messages == [*(f"Checkpoint at step {step}" for step in (1, 2, 3)), "cats: 3 steps"]
    assert hub.commits[1] == {"checkpoint-2/pytorch_lora_weights.safetensors": b"2"}
    final = hub.commits[-1]
    assert final["pytorch_lora_weights.safetensors"] == b"adapter"
    assert final["lycoris_config.json"] == b"{ }"
    assert final["assets/step_3_cat_0_64x64.png"] == PICTURE
    card = final["README.md"].decode()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["license"] == "apache-2.0"
    assert matter["base_model"] == "HiDream-ai/HiDream-I1-Full"
    assert matter["instance_prompt"].endswith("zorp")
    assert matter["widget"] == [{"text": "a cat | on a mat", "output": {"url": "assets/step_3_cat_0_64x64.png"}}]
    assert "| a cat \\| on a mat | ![](assets/step_3_cat_0_64x64.png) |" in card
    assert '"max_steps": 3' in card
    assert "network.apply_to()" in card
    assert "merge_to" not in card  # scales some adapters twice


async def test_failed_job_is_not_published(trainer: Any, make_spec: Any, hub: Any, listener: Any) -> None:
    publishing = outlets_pb2.PublishingSpec(hub_model_id="me/cats")
    spec = make_spec("cats", "fail=2", publishing=publishing, webhooks=[raw(listener)])
    job_id = (await trainer.submit(spec)).job_id
    await trainer.finish(job_id)
    await until(lambda: "training_failed" in stages(listener))
    assert hub.requests == []


async def test_hub_that_refuses_the_token_is_a_notice(trainer: Any, make_spec: Any, hub: Any) -> None:
    hub.token = "another"
    job = await finish(trainer, make_spec("cats", publishing=outlets_pb2.PublishingSpec(hub_model_id="me/cats")))

    async def notices() -> list[str]:
        return [e.notice.message for e in await trainer.watch(job.job_id) if e.notice.reason == "OUTLET_FAILED"]

    found = await eventually(notices)
    remedy = "the trainer's secret hf_token must be allowed to write there"
    assert found == [f"hub: me/cats was not published: the Hub answered 401; {remedy}"]


async def test_publishing_without_a_token_is_refused(start_trainer: Any, make_spec: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    trainer = await start_trainer()
    await trainer.add_dataset("tokenless", CATS)
    with pytest.raises(InvalidArgumentError, match="hf_token"), translated():
        await trainer.submit(make_spec("tokenless", publishing=outlets_pb2.PublishingSpec(hub_model_id="me/cats")))
