"""Options of config.json: each rule changes exactly what it should, and says so."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from reverie_client.job_text import job_text
from reverie_client.simpletuner import Imported, Outcome, ReportLine
from reverie_client.simpletuner.keys import CONFIG
from reverie_client.simpletuner.precisions import BASE_PRECISIONS, ENCODER_PRECISIONS, NEAREST
from reverie_client.specs import parse_job_spec
from reverie_common.optimizer_catalogue import CATALOGUE, REFUSED
from reverie_hidream import precisions
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto

Bring = Callable[..., Imported]
LineOf = Callable[[Imported, str], ReportLine]
ValueAt = Callable[[Imported, str], Any]

HONOURED: list[tuple[dict[str, Any], str, Any]] = [
    ({"max_train_steps": "1000"}, "optimization.max_steps", 1000),
    ({"train_batch_size": "3"}, "optimization.batch_size", 3),
    ({"gradient_accumulation_steps": 2}, "optimization.gradient_accumulation_steps", 2),
    ({"optimizer": "bnb-lion8bit-paged"}, "optimization.optimizer", "bnb-lion8bit-paged"),
    ({"optimizer_beta1": 0.8}, "optimization.beta1", 0.8),
    ({"adam_beta2": 0.95}, "optimization.beta2", 0.95),
    ({"adam_weight_decay": "0.1"}, "optimization.weight_decay", 0.1),
    (
        {"optimizer_config": "eps=1e-7,amsgrad=true"},
        "optimization.optimizer_config",
        {"eps": "1e-7", "amsgrad": "true"},
    ),
    ({"optimizer_release_gradients": "true"}, "optimization.gradient_release", True),
    ({"learning_rate": "4e-5"}, "optimization.learning_rate", 4e-5),
    ({"lr_scheduler": "linear", "lr_warmup_steps": "100"}, "optimization.lr_warmup_steps", 100),
    ({"lr_scheduler": "polynomial"}, "optimization.lr_end", 4e-7),
    ({"lr_scheduler": "polynomial", "lr_power": 2}, "optimization.lr_power", 2),
    ({"max_grad_norm": 0}, "optimization.max_grad_norm", 0),
    ({"grad_clip_method": "norm"}, "optimization.grad_clip_method", "norm"),
    ({"gradient_checkpointing": "false"}, "optimization.gradient_checkpointing", False),
    ({"gradient_checkpointing_interval": 2}, "memory.gradient_checkpointing_interval", 2),
    ({"use_ema": "true", "ema_decay": 0.99}, "ema.decay", 0.99),
    ({"use_ema": "true", "ema_validation": "ema_only"}, "ema.validation", "ema_only"),
    ({"ema_update_interval": 5, "use_ema": True}, "ema.update_interval", 5),
    ({"ema_warmup_steps": 5, "use_ema": True}, "ema.warmup_steps", 5),
    ({"use_ema": 1}, "ema", {}),
    ({"flow_schedule_shift": 1}, "optimization.flow_schedule_shift", 1),
    ({"flow_schedule_auto_shift": "true"}, "optimization.flow_schedule_auto_shift", True),
    ({"flow_sigmoid_scale": 0.5}, "optimization.flow_sigmoid_scale", 0.5),
    ({"flow_use_uniform_schedule": True}, "optimization.timestep_sampling", "uniform"),
    ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3}, "optimization.flow_beta_schedule_alpha", 3),
    ({"flux_fast_schedule": True}, "optimization.timestep_sampling", "fast"),
    ({"flow_custom_timesteps": "0.9,0.5"}, "optimization.flow_custom_timesteps", [0.9, 0.5]),
    ({"flow_custom_timesteps": [900, 500]}, "optimization.timestep_sampling", "custom"),
    (
        {"flow_custom_timesteps": "[0.9]", "flow_timesteps_mode": "fixed-list"},
        "optimization.flow_timesteps_mode",
        "random",
    ),
    ({"mixflow_enabled": True, "mixflow_gamma": 0.5}, "optimization.mixflow_gamma", 0.5),
    ({"loss_type": "huber", "huber_c": 0.2}, "optimization.huber_c", 0.2),
    ({"loss_type": "smooth_l1", "huber_schedule": "constant"}, "optimization.huber_schedule", "constant"),
    ({"input_perturbation": 0.1}, "optimization.input_perturbation", 0.1),
    ({"hidream_use_load_balancing_loss": "true"}, "optimization.use_load_balancing_loss", True),
    (
        {"hidream_use_load_balancing_loss": True, "hidream_load_balancing_loss_weight": "0.1"},
        "optimization.load_balancing_loss_weight",
        0.1,
    ),
    ({"report_to": "wandb"}, "tracking.wandb", True),
    ({"report_to": "all"}, "tracking", {"tensorboard": True, "wandb": True}),
    ({"report_to": "tensorboard,wandb"}, "tracking", {"tensorboard": True, "wandb": True}),
    ({"tracker_project_name": "cats"}, "tracking.project", "cats"),
    ({"tracker_run_name": "Run 1!"}, "name", "run-1"),
    ({"push_to_hub": True, "hub_model_id": "me/cat"}, "publishing.hub_model_id", "me/cat"),
    (
        {"push_to_hub": True, "hub_model_id": "me/cat", "push_checkpoints_to_hub": "1"},
        "publishing.push_checkpoints",
        True,
    ),
    ({"push_to_hub": True, "hub_model_id": "me/cat", "model_card_private": "false"}, "publishing.private", False),
    ({"checkpointing_steps": 7}, "checkpoints.every_steps", 7),
    ({"save_total_limit": 0}, "checkpoints.keep", 0),
    ({"checkpoint_epoch_interval": 0.5}, "checkpoints.every_epochs", 0.5),
    ({"validation_steps": 9}, "validation.every_steps", 9),
    ({"validation_epoch_interval": 2}, "validation.every_epochs", 2),
    (
        {"validation_resolution": "1024x1024, 1280X768,512"},
        "validation.resolutions",
        ["1024x1024", "1280x768", "512x512"],
    ),
    ({"validation_guidance_rescale": "0.7"}, "validation.guidance_rescale", 0.7),
    ({"validation_disable_unconditional": "true"}, "validation.unconditional", False),
    ({"num_validation_images": 2}, "validation.num_images", 2),
    ({"validation_lycoris_strength": 1.3}, "validation.adapter_strength", 1.3),
    ({"validation_preview": True}, "validation.preview_steps", 1),
    ({"validation_preview": True, "validation_preview_steps": 5}, "validation.preview_steps", 5),
    ({"validation_torch_compile": "true"}, "validation.compile", True),
    ({"validation_noise_scheduler": "flow_unipc"}, "validation.scheduler", "unipc"),
    ({"evaluation_type": "clip"}, "validation.clip_score", True),
    ({"mixed_precision": "no"}, "model.mixed_precision", "no"),
    ({"model_flavour": "dev"}, "model.flavour", "dev"),
    ({"quantize_via": "cpu"}, "model.quantize_via", "cpu"),
    ({"text_encoder_1_precision": "int4-torchao"}, "model.text_encoder_precision", {"clip_l": "int4-torchao"}),
    ({"data_backend_sampling": "uniform"}, "dataset_sampling", "uniform"),
    ({"allow_dataset_oversubscription": True}, "allow_dataset_oversubscription", True),
    ({"text_cache_ondemand": True}, "embedding_storage", "on_demand"),
    ({"init_lokr_norm": "1e-4"}, "adapter.lokr.init_lokr_norm", 1e-4),
    ({"resolution": 512}, "datasets.0.resolution", 512),
    ({"instance_prompt": "sks", "caption_strategy": "instanceprompt"}, "datasets.0.instance_prompt", None),
    ({"seed": 2**63 + 1}, "seed", 2**63 + 1),
]


@pytest.mark.parametrize(("config", "path", "expected"), HONOURED, ids=str)
def test_what_is_honoured_arrives(
    bring: Bring, value_at: ValueAt, config: dict[str, Any], path: str, expected: Any
) -> None:
    imported = bring(config)
    assert value_at(imported, path) == expected
    assert not imported.report.has_refusals


CHANGED: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 100}, "optimization.lr_scheduler", "cosine", "period"),
    ({"lr_scheduler": "cosine_with_warmup"}, "optimization.lr_scheduler", "cosine", "period"),
    ({"lr_scheduler": "sine"}, "optimization.lr_scheduler", "sine", "period"),
    (
        {"lr_scheduler": "constant", "lr_warmup_steps": 5},
        "optimization.lr_scheduler",
        "constant_with_warmup",
        "lr_warmup",
    ),
    ({"optimizer": "prodigy", "learning_rate": 1e-4}, "optimization.learning_rate", 1.0, "finds the rate"),
    ({"optimizer": "prodigy", "max_grad_norm": 1}, "optimization.max_grad_norm", 0.0, "no clipping"),
    ({"optimizer": "optimi-stableadamw", "max_grad_norm": 1}, "optimization.max_grad_norm", 0.0, "no clipping"),
    (
        {"lr_scale": True, "train_batch_size": 2, "gradient_accumulation_steps": 8},
        "optimization.learning_rate",
        16e-4,
        "16",
    ),
    (
        {"lr_scale": True, "lr_scale_sqrt": True, "train_batch_size": 2, "gradient_accumulation_steps": 8},
        "optimization.learning_rate",
        4e-4,
        "4",
    ),
    ({"optimizer_config": "weight_decay=0.1,kahan_sum=true"}, "optimization.weight_decay", 0.1, "kahan_sum"),
    ({"seed": 0}, "seed", 123456, "drawn"),
    ({"seed": "-1"}, "seed", 123456, "drawn"),
    ({"quantize_via": "pipeline"}, "model.quantize_via", "accelerator", "block by block"),
    ({"validation_resolution": "1000x1000"}, "validation.resolutions", ["992x992"], "multiple of 16"),
    ({"validation_prompt_library": True}, "validation.prompt_library", True, "own"),
    ({"offset_noise": True, "noise_offset": 0.05}, "optimization.offset_noise", 0.05, "flow"),
    ({"flow_schedule_shift": 0}, "optimization.flow_schedule_auto_shift", True, "automatic"),
    (
        {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 0.5},
        "optimization.scheduled_sampling",
        {"max_step_offset": 2, "probability": 0.5},
        "spacing",
    ),
    (
        {
            "scheduled_sampling_max_step_offset": 2,
            "scheduled_sampling_ramp_steps": 9,
            "scheduled_sampling_probability": 1,
        },
        "optimization.scheduled_sampling",
        {"max_step_offset": 2, "ramp_steps": 9},
        "spacing",
    ),
    (
        {
            "scheduled_sampling_max_step_offset": 2,
            "scheduled_sampling_probability": 0.5,
            "scheduled_sampling_sampler": "unipc",
        },
        "optimization.scheduled_sampling.sampler",
        "euler",
        "Euler",
    ),
]


@pytest.mark.parametrize(("config", "path", "expected", "reason"), CHANGED, ids=str)
def test_what_is_changed_arrives_with_the_reason(
    bring: Bring, value_at: ValueAt, config: dict[str, Any], path: str, expected: Any, reason: str
) -> None:
    imported = bring(config)
    assert value_at(imported, path) == pytest.approx(expected)
    assert any(reason in line.reason for line in imported.report.of(Outcome.CHANGED))
    assert not imported.report.has_refusals


REFUSALS: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"model_family": "sdxl"}, "model_family", "hidream", None),
    ({"mixed_precision": "fp16"}, "mixed_precision", "bf16", "model.mixed_precision"),
    ({"base_model_precision": "int8-sdnq"}, "base_model_precision", "int8-quanto", "model.base_precision"),
    ({"base_model_precision": "fp8-torchao"}, "base_model_precision", "fp8wo-torchao", "model.base_precision"),
    (
        {"text_encoder_4_precision": "fp8-native"},
        "text_encoder_4_precision",
        "fp8wo-torchao",
        "model.text_encoder_precision",
    ),
    ({"optimizer": "adamw8bit"}, "optimizer", "bnb-adamw8bit", "optimization.optimizer"),
    ({"optimizer_config": "nonsense=1"}, "optimizer_config", "no setting", "optimization.optimizer_config"),
    ({"optimizer_config": "betas=(0.9,0.99)"}, "optimizer_config", "optimizer_beta1", "optimization.optimizer_config"),
    ({"lr_scheduler": "cosin"}, "lr_scheduler", "constant", "optimization.lr_scheduler"),
    ({"num_train_epochs": 3}, "num_train_epochs", "set one of both to 0", "optimization.num_epochs"),
    ({"train_batch_size": 1000}, "train_batch_size", "128", "optimization.batch_size"),
    ({"learning_rate": "fast"}, "learning_rate", "number", "optimization.learning_rate"),
    ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing", "neither", "optimization.gradient_checkpointing"),
    ({"gradient_checkpointing_backend": "unsloth"}, "gradient_checkpointing_backend", "torch", None),
    (
        {"gradient_checkpointing_segment_stride": 4},
        "gradient_checkpointing_segment_stride",
        "gradient_checkpointing_interval",
        None,
    ),
    ({"report_to": "comet_ml"}, "report_to", "tensorboard", "tracking"),
    ({"report_to": "wandb,swanlab"}, "report_to", "swanlab", "tracking"),
    ({"push_to_hub": True}, "push_to_hub", "owner/name", "publishing"),
    ({"push_to_hub": True, "hub_model_id": "cat"}, "hub_model_id", "OWNER/cat", "publishing"),
    ({"resume_from_checkpoint": "checkpoint-500"}, "resume_from_checkpoint", "reverie job fork", None),
    ({"init_lora": "a.safetensors"}, "init_lora", "adapter_only", None),
    ({"deepspeed_config": "ds.json"}, "deepspeed_config", "one card", None),
    ({"fsdp_enable": True}, "fsdp_enable", "one card", None),
    ({"num_processes": 2}, "num_processes", "use 1", None),
    ({"musubi_blocks_to_swap": 12}, "musubi_blocks_to_swap", "num_offloaded_blocks", "memory"),
    ({"ramtorch": True}, "ramtorch", "num_offloaded_blocks", "memory"),
    ({"enable_group_offload": True}, "enable_group_offload", "num_offloaded_blocks", "memory"),
    ({"tread_config": {"routes": []}}, "tread_config", "leave it out", None),
    ({"validation_randomize": True}, "validation_randomize", "validation_seed", None),
    ({"validation_noise_scheduler": "ddim"}, "validation_noise_scheduler", "unipc", "validation.scheduler"),
    ({"validation_resolution": "huge"}, "validation_resolution", "1024x1024", "validation.resolutions"),
    ({"validation_method": "external-script"}, "validation_method", "simpletuner-local", None),
    (
        {"scheduled_sampling_max_step_offset": 20, "scheduled_sampling_ramp_steps": 9},
        "scheduled_sampling_max_step_offset",
        "10",
        "optimization.scheduled_sampling",
    ),
    ({"flow_custom_timesteps": "a,b"}, "flow_custom_timesteps", "commas", "optimization.flow_custom_timesteps"),
    ({"seed": -7}, "seed", "-1", "seed"),
    (
        {"optimizer_release_gradients": True, "gradient_accumulation_steps": 2},
        "optimizer_release_gradients",
        "gradient_accumulation_steps",
        "optimization.gradient_release",
    ),
    (
        {"optimizer_release_gradients": True, "grad_clip_method": "norm"},
        "optimizer_release_gradients",
        "norm",
        "optimization.gradient_release",
    ),
    (
        {"hidream_use_load_balancing_loss": True, "hidream_load_balancing_loss_weight": 0},
        "hidream_load_balancing_loss_weight",
        "above 0",
        "optimization.load_balancing_loss_weight",
    ),
    ({"tokenizer_max_length": 256}, "tokenizer_max_length", "128", None),
    ({"lerning_rate": 1}, "lerning_rate", "did you mean learning_rate?", None),
    ({"zzzzqqqq": 1}, "zzzzqqqq", "unknown option", None),
]


@pytest.mark.parametrize(("config", "key", "reason", "path"), REFUSALS, ids=str)
def test_what_is_refused_says_why_and_what_works_and_is_left_out(
    bring: Bring,
    line_of: LineOf,
    value_at: ValueAt,
    config: dict[str, Any],
    key: str,
    reason: str,
    path: str | None,
) -> None:
    imported = bring(config)
    line = line_of(imported, key)
    assert line.outcome == "refused"
    assert reason in line.reason
    assert path is None or value_at(imported, path) is None


IGNORED: list[tuple[dict[str, Any], str, str]] = [
    ({"masked_loss_probability": 0.5}, "masked_loss_probability", "segmentation"),
    ({"vae_batch_size": 4}, "vae_batch_size", "VAE service"),
    ({"cache_dir_vae": "cache"}, "cache_dir_vae", "content"),
    ({"attention_mechanism": "sageattention"}, "attention_mechanism", "speed"),
    ({"ema_decay": 0.9}, "ema_decay", "use_ema is off"),
    ({"use_ema": "false"}, "use_ema", "off"),
    ({"num_train_epochs": 0}, "num_train_epochs", "max_train_steps"),
    ({"hidream_load_balancing_loss_weight": 0.1}, "hidream_load_balancing_loss_weight", "is off"),
    ({"scheduled_sampling_probability": 0.5}, "scheduled_sampling_probability", "nothing is rolled out"),
    ({"validation_preview_steps": 5}, "validation_preview_steps", "validation_preview is off"),
    ({"hub_model_id": "me/cat"}, "hub_model_id", "push_to_hub is off"),
    ({"lora_rank": 8}, "lora_rank", "lora_type standard"),
    ({"deepspeed_config": ""}, "deepspeed_config", "off"),
    ({"ramtorch": "false"}, "ramtorch", "off"),
    ({"lr_power": 2}, "lr_power", "polynomial"),
    ({"seed": None}, "seed", "null"),
    ({"scheduled_sampling_max_step_offset": 2}, "scheduled_sampling_max_step_offset", "the probability is 0"),
    ({"optimizer": "muon", "optimizer_beta1": 0.9}, "optimizer_beta1", "has none"),
    ({"input_perturbation_steps": 10}, "input_perturbation_steps", "input_perturbation is 0"),
    (
        {"gradient_checkpointing": False, "gradient_checkpointing_interval": 2},
        "gradient_checkpointing_interval",
        "gradient_checkpointing is off",
    ),
    ({"validation_disable": True}, "validation_prompt", "validation_disable"),
    ({"flow_use_uniform_schedule": True, "mixflow_enabled": True}, "flow_use_uniform_schedule", "mixflow"),
    ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3}, "flow_schedule_shift", "auto_shift"),
    ({"eval_steps_interval": 100}, "eval_steps_interval", "dataset_type eval"),
]


@pytest.mark.parametrize(("config", "key", "reason"), IGNORED, ids=str)
def test_what_is_ignored_says_why_and_changes_nothing(
    bring: Bring, line_of: LineOf, config: dict[str, Any], key: str, reason: str
) -> None:
    imported = bring(config)
    line = line_of(imported, key)
    assert (line.outcome, line.field) == ("ignored", "")
    assert reason in line.reason
    without = bring({name: value for name, value in config.items() if name != key}, without=(key,))
    assert imported.document == without.document


def test_defaults_of_simpletuner_that_are_others_here_are_written_down(bring: Bring, value_at: ValueAt) -> None:
    imported = bring(without=("optimizer", "learning_rate", "train_batch_size", "validation_prompt"))
    expected: Mapping[str, Any] = {
        "optimization.optimizer": "adamw_bf16",
        "optimization.learning_rate": 4e-7,
        "optimization.batch_size": 4,
        "optimization.sample_latents_once": True,
        "validation.every_steps": 100,
        "validation.num_inference_steps": 30,
        "validation.guidance_scale": 7.5,
        "validation.negative_prompt": "blurry, cropped, ugly",
        "validation.resolutions": ["1024x1024"],
        "validation.unconditional": True,
        "adapter.lokr.full_matrix": False,
    }
    for path, value in expected.items():
        assert value_at(imported, path) == value, path
        assert path in imported.comments
    added = {line.field for line in imported.report.of(Outcome.ADDED)}
    assert added == set(expected)


def test_epochs_take_the_place_of_steps(bring: Bring, value_at: ValueAt) -> None:
    imported = bring({"max_train_steps": 0, "num_train_epochs": "5"})
    assert value_at(imported, "optimization.num_epochs") == 5
    assert value_at(imported, "optimization.max_steps") is None
    assert value_at(bring(without=("max_train_steps",)), "optimization.num_epochs") == 1
    assert bring({"max_train_steps": 0, "num_train_epochs": 0}).report.has_refusals


def test_reflexflow_is_on_only_when_asked_for(bring: Bring, value_at: ValueAt) -> None:
    rollout = {
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.5,
        "scheduled_sampling_reflexflow_alpha": 2.0,
    }
    assert value_at(bring(rollout), "optimization.scheduled_sampling.reflexflow") is None
    asked = bring({**rollout, "scheduled_sampling_reflexflow": "true"})
    assert value_at(asked, "optimization.scheduled_sampling.reflexflow") == {"alpha": 2.0}


def test_no_validation_is_no_validation(bring: Bring, value_at: ValueAt) -> None:
    assert value_at(bring({"validation_disable": "true"}), "validation") is None


def test_standard_lora_has_simpletuners_defaults_and_the_output_projections(bring: Bring, value_at: ValueAt) -> None:
    imported = bring({"lora_type": "standard", "lora_alpha": 1, "lora_format": "comfyui", "use_dora": True})
    assert value_at(imported, "adapter") == {
        "lora": {
            "rank": 16,
            "alpha": 1,
            "dropout": 0.1,
            "target_modules": ["to_q", "to_k", "to_v", "to_out"],
            "use_dora": True,
            "format": "comfyui",
        }
    }
    reasons = [line.reason for line in imported.report.of(Outcome.CHANGED)]
    assert any("to_out.0" in reason for reason in reasons)


def test_full_tuning_is_full_rank_and_not_quantised(bring: Bring, value_at: ValueAt, line_of: LineOf) -> None:
    imported = bring({"model_type": "full", "base_model_precision": "int8-quanto"})
    assert value_at(imported, "adapter") == {"full_rank": {}}
    assert line_of(imported, "base_model_precision").outcome == "refused"
    assert value_at(imported, "model.base_precision") is None


def test_secrets_are_named_not_written(bring: Bring, value_at: ValueAt) -> None:
    hooks = [
        {"webhook_type": "discord", "webhook_url": "https://discord.com/api/webhooks/1/hush", "log_level": "debug"},
        {"webhook_type": "raw", "callback_url": "https://host/x", "auth_token": "hush", "message_prefix": "cat"},
    ]
    for config, files in (
        ({"webhook_config": hooks}, {}),
        ({"webhook_config": "config/hook.json"}, {"hook.json": hooks}),
    ):
        imported = bring(config, files=files)
        assert value_at(imported, "webhooks") == [
            {"kind": "discord", "url_secret": "webhook-1-url", "log_level": "debug"},
            {"kind": "raw", "url": "https://host/x", "token_secret": "webhook-2-token", "message_prefix": "cat"},
        ]
        everything = job_text(imported.document, imported.comments) + str(imported.report.as_json())
        assert "hush" not in everything
        assert "secrets-dir" in everything
    assert "hush" not in str(bring({"hf_token": "hush"}).report.as_json())


def test_a_webhook_that_is_not_checked_is_refused(bring: Bring) -> None:
    hook = {"webhook_type": "raw", "callback_url": "https://host/x", "ssl_no_verify": True}
    assert [line.key for line in bring({"webhook_config": hook}).report.of(Outcome.REFUSED)] == [
        "webhook-1.ssl_no_verify"
    ]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_optimizer_that_is_offered_is_accepted(bring: Bring, name: str) -> None:
    imported = bring({"optimizer": name, "max_grad_norm": 1.0})
    assert not imported.report.has_refusals
    violations = check_spec(spec_from_proto(parse_job_spec(job_text(imported.document, {}))))
    assert [found for found in violations if found.field.startswith("optimization")] == []


@pytest.mark.parametrize("name", REFUSED)
def test_every_optimizer_that_is_not_offered_is_refused_with_the_nearest(
    bring: Bring, line_of: LineOf, name: str
) -> None:
    line = line_of(bring({"optimizer": name}), "optimizer")
    assert line.outcome == "refused"
    assert REFUSED[name][1] in line.reason


def test_precisions_are_those_of_the_trainer() -> None:
    assert set(BASE_PRECISIONS) == set(precisions.BASE_PRECISIONS)
    assert set(ENCODER_PRECISIONS) == set(precisions.ENCODER_PRECISIONS)
    for name, nearest in NEAREST.items():
        told = precisions.refusal(name, is_trained_on=True)
        assert told is not None
        known = precisions.REFUSED.get(name, ("", nearest))[1]
        assert nearest == known, name


def test_no_option_stands_twice() -> None:
    names = [name for option in CONFIG for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("config", [row[0] for row in (*HONOURED, *CHANGED)], ids=str)
def test_what_is_taken_is_accepted_by_the_trainer(bring: Bring, config: dict[str, Any]) -> None:
    imported = bring(config)
    assert check_spec(spec_from_proto(parse_job_spec(job_text(imported.document, imported.comments)))) == []
