"""Metadata of the adapter file: a function of the job and its data, complete."""

import json

from reverie.common.v1.common_pb2 import TensorRef
from reverie_trainer.jobs.spec import (
    Checkpoints,
    JobSpec,
    LokrAdapter,
    LokrOverrides,
    LokrPreset,
    ModelChoice,
    Optimization,
)
from reverie_trainer.worker.adapter_file import adapter_metadata, lokr_config, lycoris_config_file
from reverie_trainer.worker.samples import Caption, PreparedData, PreparedSample, Source


def _spec(**changes: object) -> JobSpec:
    fields: dict[str, object] = {
        "name": "my-job",
        "model": ModelChoice(flavour="dev"),
        "datasets": (),
        "adapter": LokrAdapter(),
        "optimization": Optimization(max_steps=10),
        "checkpoints": Checkpoints(),
        "validation": None,
        "trigger_words": ("zorp", "blue"),
    }
    return JobSpec(**{**fields, **changes})  # type: ignore[arg-type]


def _data(*sizes: tuple[str, int, int]) -> PreparedData:
    samples = tuple(
        PreparedSample(
            dataset=dataset,
            name=f"{index}",
            width=width,
            height=height,
            image_sha256="00",
            latents=TensorRef(),
            captions=((Caption(text="a", embeddings={}),),),
        )
        for index, (dataset, width, height) in enumerate(sizes)
    )
    return PreparedData(
        sources=(Source(dataset="cats"),), samples=samples, empty_caption=Caption(text="", embeddings={})
    )


def test_says_what_the_readers_look_for() -> None:
    data = _data(("cats", 512, 512), ("cats", 640, 448), ("dogs", 640, 448))
    assert adapter_metadata(_spec(), data, 500) == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "hidream-dev/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my-job",
        "modelspec.resolution": "640x448",
        "modelspec.description": "LyCORIS LoKr for HiDream-I1-Dev, 500 steps",
        "modelspec.trigger_phrase": "zorp, blue",
        "global_step": "500",
        "trained_words": '["zorp", "blue"]',
        "ss_tag_frequency": '{"cats": {"blue": 2, "zorp": 2}, "dogs": {"blue": 1, "zorp": 1}}',
    }


def test_says_nothing_about_trigger_words_where_there_are_none() -> None:
    metadata = adapter_metadata(_spec(trigger_words=()), _data(("cats", 64, 64)), 1)
    assert not {"trained_words", "ss_tag_frequency"} & metadata.keys()


def test_the_configuration_is_complete_and_keeps_the_callers_names() -> None:
    preset = LokrPreset(
        target_module=("Attention",),
        module_algo_map={"Attention": LokrOverrides(factor=8)},
        name_algo_map={"double_stream_blocks.*.block.ff_t*": LokrOverrides(factor=4, linear_alpha=2.0)},
    )
    adapter = LokrAdapter(multiplier=0.5, use_scalar=True, apply_preset=preset)
    config = json.loads(lycoris_config_file(adapter) or b"")
    assert (config["algo"], config["multiplier"], config["linear_dim"], config["linear_alpha"]) == (
        "lokr",
        0.5,
        16384,
        1,
    )
    assert config["apply_preset"]["module_algo_map"] == {"Attention": {"factor": 8}}
    rules = config["apply_preset"]["name_algo_map"]
    assert rules == {"double_stream_blocks.*.block.ff_t*": {"factor": 4, "alpha": 2.0}}
    assert lokr_config(adapter).to_dict() == config
