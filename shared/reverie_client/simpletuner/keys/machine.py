"""How the machine is used: distribution, offload, compilers, workers (spec 5.9, 10.1)."""

from reverie_client.simpletuner.rules import Option, ignored, refused

ONE_CARD = "one worker trains a job on one card"
OFFLOAD = "use memory.num_offloaded_blocks in the job file, which moves whole blocks of the frozen base"
SPEED = "it changes the speed, not what is computed; the worker decides"

_FSDP = (
    "fsdp_enable",
    "fsdp_version",
    "fsdp_reshard_after_forward",
    "fsdp_state_dict_type",
    "fsdp_auto_wrap_policy",
    "fsdp_transformer_layer_cls_to_wrap",
    "fsdp_cpu_offload",
    "fsdp_activation_checkpointing",
)
_GROUP_OFFLOAD = (
    "group_offload_type",
    "group_offload_blocks_per_group",
    "group_offload_use_stream",
    "group_offload_to_disk_path",
)
_SPEED = (
    "attention_mechanism",
    "fuse_qkv_projections",
    "fused_qkv_projections",
    "dynamo_backend",
    "dynamo_mode",
    "dynamo_fullgraph",
    "dynamo_dynamic",
    "dynamo_use_regional_compilation",
    "allow_tf32",
    "disable_tf32",
    "dataloader_prefetch",
    "dataloader_prefetch_qlen",
    "max_workers",
    "torch_num_threads",
    "image_processing_batch_size",
    "enable_multiprocessing",
    "aws_max_pool_connections",
)

MACHINE: tuple[Option, ...] = (
    refused("num_processes", ONE_CARD, "use 1; submit several jobs for several cards", off=(None, 0, 1, "1")),
    refused("num_machines", ONE_CARD, "use 1", off=(None, 0, 1, "1")),
    ignored("main_process_ip", ONE_CARD),
    ignored("main_process_port", ONE_CARD),
    ignored("machine_rank", ONE_CARD),
    ignored("accelerate_config", ONE_CARD),
    ignored("accelerate_extra_args", ONE_CARD),
    refused(
        "deepspeed_config",
        "DeepSpeed does not train adapters",
        "leave it out; a quantised base needs no more than one card",
    ),
    refused("fsdp_enable", ONE_CARD, "leave it out; a quantised base needs no more than one card"),
    *(ignored(name, "fsdp_enable decides") for name in _FSDP[1:]),
    refused("enable_group_offload", "diffusers' groups are not used", OFFLOAD),
    *(ignored(name, "enable_group_offload decides") for name in _GROUP_OFFLOAD),
    refused("ramtorch", "its layers do not quantise", OFFLOAD, aliases=("ramtorch_enable",)),
    ignored("ramtorch_target_modules", "ramtorch decides"),
    ignored("ramtorch_text_encoder", "the encoder service decides"),
    ignored("ramtorch_vae", "the VAE service decides"),
    refused("musubi_blocks_to_swap", "in SimpleTuner it does nothing for HiDream", OFFLOAD),
    ignored("musubi_block_swap_device", "musubi_blocks_to_swap decides"),
    refused("tread_config", "in SimpleTuner it fails for HiDream", "leave it out"),
    refused("crepa_enabled", "it is made for video", "leave it out"),
    *(ignored(name, SPEED) for name in _SPEED),
    ignored("disable_accelerator", "the worker's --device decides"),
    ignored("i_know_what_i_am_doing", "what is dangerous is refused, not hidden behind a switch"),
    ignored("ignore_final_epochs", "the length is exact"),
    ignored("print_filenames", "`reverie dataset scan` names what is wrong"),
    ignored("print_sampler_statistics", "the job's events have every figure"),
    ignored("log_level", "the services' --log-level decides"),
    ignored("hf_token", "the trainer's secret hf_token is used"),
)
