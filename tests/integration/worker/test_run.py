"""A whole job through the worker, in this process: real sockets, a real store, the tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from reverie.training.v1.job_pb2 import TrainingJobEvent
from reverie.training.v1.training_pb2 import (
    WORKER_OUTCOME_FAILED,
    WORKER_OUTCOME_STOPPED,
    WORKER_OUTCOME_SUCCEEDED,
)
from reverie_common.storage import get_object, put_object, read_metadata, unpack_tensors
from reverie_common.storage.keys import checkpoint_manifest_key, checkpoint_prefix
from reverie_trainer.worker.run import EXIT_LEASE_LOST, EXIT_TRAINER_GONE

Work = Callable[..., int]


def test_trains_saves_and_hands_over_the_adapter(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer()
    assert work(trainer) == 0
    assert trainer.leases[0].worker_token == "secret"
    assert [figures.step for figures in trainer.of_kind("step")] == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.step for checkpoint in trainer.of_kind("checkpoint")] == [2, 4, 6]
    assert trainer.adapter_reports == [(32, 8736)]
    assert trainer.notices() == ["ADAPTER_PROVEN"]
    assert {"load_model", "train", "finish"} <= trainer.phases.keys()
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED


def test_the_adapter_file_says_what_it_is(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer()
    work(trainer)
    completion = trainer.completions[0]
    body = get_object(prepared.store, completion.adapter)
    metadata = read_metadata(body)
    assert json.loads(metadata["lycoris_config"]) == json.loads(get_object(prepared.store, completion.lycoris_config))
    assert json.loads(metadata["lycoris_config"])["linear_alpha"] == 1
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "hidream-full/lora"
    assert metadata["modelspec.title"] == "small"
    assert metadata["modelspec.resolution"] == "128x128"
    assert metadata["global_step"] == "6"
    assert json.loads(metadata["trained_words"]) == ["shape"]
    assert json.loads(metadata["ss_tag_frequency"]) == {"shapes": {"shape": 4}}
    assert "lycoris_double_stream_blocks_0_block_attn1_to_q.lokr_w1" in unpack_tensors(body)


@pytest.mark.parametrize(
    ("adapter", "path", "key"),
    [
        (
            {"lora": {"rank": 4, "dropout": 0.1}},
            "adapter/pytorch_lora_weights.safetensors",
            "transformer.double_stream_blocks.0.block.attn1.to_q.lora_A.weight",
        ),
        (
            {"lycoris": {"algo": "loha", "linear_dim": 2, "rank_dropout": 0.1}},
            "adapter/pytorch_lora_weights.safetensors",
            "lycoris_double_stream_blocks_0_block_attn1_to_q.hada_w1_a",
        ),
        (
            {"full_rank": {}},
            "transformer/diffusion_pytorch_model.safetensors",
            "double_stream_blocks.0.block.attn1.to_q.weight",
        ),
    ],
)
def test_every_kind_of_adapter_is_trained_and_proven(
    adapter: dict[str, Any], path: str, key: str, prepared: Any, work: Work
) -> None:
    trainer = prepared.trainer(
        name=f"job-{next(iter(adapter))}", adapter=adapter, optimization={"learning_rate": 0.001}
    )
    work(trainer)
    completion = trainer.completions[0]
    assert completion.outcome == WORKER_OUTCOME_SUCCEEDED
    assert trainer.notices() == ["ADAPTER_PROVEN"]
    assert completion.adapter.uri.endswith(path)
    assert key in unpack_tensors(get_object(prepared.store, completion.adapter))
    assert completion.HasField("lycoris_config") == ("lycoris" in adapter)


def test_the_metrics_file_has_every_step(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer()
    work(trainer)
    lines = get_object(prepared.store, trainer.completions[0].metrics).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(list(trainer.losses().values()))
    assert [json.loads(line)["learning_rate"] for line in lines[:3]] == pytest.approx([0.005, 0.01, 0.01])


def test_two_runs_give_the_same_bytes(prepared: Any, work: Work) -> None:
    first, second = prepared.trainer(name="job-first"), prepared.trainer(name="job-second")
    second.job.spec.name = first.job.spec.name
    work(first)
    work(second)
    assert first.completions[0].adapter.sha256 == second.completions[0].adapter.sha256
    assert first.losses() == second.losses()


@pytest.mark.parametrize(
    "optimization",
    [{"weight_decay": 0.1}, {"optimizer": "optimi-lion", "learning_rate": 1e-3}, {"gradient_accumulation_steps": 2}],
    ids=["adamw", "lion", "accumulated"],
)
def test_a_job_that_was_stopped_ends_in_the_same_bytes(prepared: Any, work: Work, optimization: dict[str, Any]) -> None:
    name = f"job-{next(iter(optimization))}"
    straight = prepared.trainer(name=f"{name}-straight", optimization=optimization)
    work(straight)
    stopped = prepared.trainer(name=f"{name}-stopped", optimization=optimization)
    stopped.job.spec.name = straight.job.spec.name
    stopped.on_event = _stop_after(stopped, step=3)
    assert work(stopped) == 0
    assert stopped.completions[0].outcome == WORKER_OUTCOME_STOPPED
    last = stopped.of_kind("checkpoint")[-1].step
    assert 3 <= last <= 6
    stopped.should_stop, stopped.checkpoint = False, _manifest(prepared, f"{name}-stopped", last)
    stopped.on_event = lambda _: None
    work(stopped)
    assert stopped.completions[1].outcome == WORKER_OUTCOME_SUCCEEDED
    assert stopped.completions[1].adapter.sha256 == straight.completions[0].adapter.sha256
    assert stopped.losses() == straight.losses()
    lines = get_object(prepared.store, stopped.completions[1].metrics).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_job_whose_worker_died_at_the_very_end_is_finished_without_a_step(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-nearly")
    work(trainer)
    trainer.checkpoint = _manifest(prepared, "job-nearly", 6)
    assert work(trainer) == 0
    first, second = trainer.completions
    assert second.outcome == WORKER_OUTCOME_SUCCEEDED
    assert second.adapter == first.adapter
    assert second.metrics == first.metrics
    assert len(trainer.of_kind("step")) == 6


def test_keeps_the_newest_checkpoints_only(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-pruned", checkpoints={"every_steps": 1, "keep": 2})
    work(trainer)
    keys = [item.key for item in prepared.store.list(checkpoint_prefix("job-pruned"))]
    manifests = [key for key in keys if key.endswith("manifest.json")]
    assert manifests == [checkpoint_manifest_key("job-pruned", step) for step in (5, 6)]
    assert len(keys) == 2 * 4


def test_saves_only_at_the_end_where_every_steps_is_0(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-end", checkpoints={"every_steps": 0})
    work(trainer)
    assert [checkpoint.step for checkpoint in trainer.of_kind("checkpoint")] == [6]


def test_a_lost_lease_leaves_everything_alone(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-lost", optimization={"max_steps": 1000})

    def lose(event: TrainingJobEvent) -> None:
        trainer.is_lost = event.step.step >= 2 or trainer.is_lost

    trainer.on_event = lose
    assert work(trainer) == EXIT_LEASE_LOST
    assert trainer.completions == []


def test_a_trainer_that_is_away_is_waited_for_and_told_everything(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-away")
    trainer.num_refusals = 5
    assert work(trainer) == 0
    assert [figures.step for figures in trainer.of_kind("step")] == [1, 2, 3, 4, 5, 6]
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED


def test_a_trainer_that_stays_away_ends_the_worker_after_it_saved(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-deserted", optimization={"max_steps": 1000}, checkpoints={"every_steps": 0})
    trainer.num_refusals = 10**6
    assert work(trainer, trainer_patience_seconds=0.5) == EXIT_TRAINER_GONE
    keys = [item.key for item in prepared.store.list(checkpoint_prefix("job-deserted"))]
    assert len([key for key in keys if key.endswith("manifest.json")]) == 1


def test_a_loss_that_is_no_number_fails_the_job(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(
        name="job-nan",
        optimization={
            "learning_rate": 1.0,
            "optimizer": "optimi-lion",
            "max_steps": 200,
            "lr_warmup_steps": 0,
            "max_grad_norm": 0,
        },
        checkpoints={"every_steps": 0},
        adapter={"lokr": {"factor": 4, "multiplier": 1e30, "apply_preset": {"target_module": ["Attention"]}}},
    )
    assert work(trainer) == 0
    (completion,) = trainer.completions
    assert (completion.outcome, completion.failure.reason) == (WORKER_OUTCOME_FAILED, "NON_FINITE_LOSS")
    assert "step" in completion.failure.message
    assert "learning_rate" in completion.failure.remedy


def test_an_adapter_that_matches_nothing_fails_the_job(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(
        name="job-nothing", adapter={"lokr": {"apply_preset": {"target_module": ["NoSuchClass"]}}}
    )
    assert work(trainer) == 0
    assert trainer.completions[0].failure.reason == "ADAPTER_MATCHES_NOTHING"


def test_a_checkpoint_without_a_transformer_fails_the_job(prepared: Any, work: Work, tmp_path: Any) -> None:
    trainer = prepared.trainer(name="job-bare")
    assert work(trainer, checkpoint=str(tmp_path)) == 0
    failure = trainer.completions[0].failure
    assert "transformer" in failure.message
    assert failure.remedy


def test_data_that_vanished_fail_the_job(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-vanished")
    manifest = json.loads(get_object(prepared.store, prepared.manifest))
    for sample in manifest["samples"]:
        sample["latents"]["uri"] += "-gone"
    trainer.prepared = put_object(prepared.store, "v1/prepared/00/vanished.json", json.dumps(manifest).encode())
    assert work(trainer) == 0
    assert trainer.completions[0].failure.reason == "OBJECT_NOT_FOUND"


def test_without_a_sampler_pictures_are_missed_and_training_is_not(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-blind", validation=VALIDATION)
    assert work(trainer) == 0
    assert trainer.notices() == ["NO_SAMPLER", "ADAPTER_PROVEN"]
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED


VALIDATION = {"prompts": [{"name": "cat", "prompt": "a cat"}], "resolutions": ["64x64"], "num_inference_steps": 1}


def _stop_after(trainer: Any, step: int) -> Callable[[TrainingJobEvent], None]:
    def on_event(event: TrainingJobEvent) -> None:
        trainer.should_stop = trainer.should_stop or event.step.step >= step

    return on_event


def _manifest(prepared: Any, job_id: str, step: int) -> Any:
    key = checkpoint_manifest_key(job_id, step)
    return put_object(prepared.store, key, prepared.store.get(key))


def test_steps_that_a_killed_worker_saved_but_never_told_are_told_by_the_next(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-untold")
    work(trainer)
    told = trainer.of_kind("step")
    trainer.checkpoint = _manifest(prepared, "job-untold", 6)
    trainer.events[:] = [event for event in trainer.events if not event.HasField("step") or event.step.step <= 4]
    assert work(trainer) == 0
    assert trainer.of_kind("step") == told
