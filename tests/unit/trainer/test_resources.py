"""What `job check` says of the reference configuration: 10,000 captions at 1024 pixels, LoKr on the attention, int8."""

from dataclasses import replace

import pytest
from reverie.encoder.v1 import encoder_pb2
from reverie_client.cli.job_text import estimate_lines
from reverie_hidream.transformer import REAL_CONFIG
from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig, select_adapter
from reverie_trainer.jobs.admission.resources import Demand, Resources
from reverie_trainer.jobs.preparing.buckets import Bucket
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec, LokrAdapter, LokrPreset, ModelChoice, Optimization

CONFIG = TransformerConfig.from_json(REAL_CONFIG)
RESOURCES = Resources(config=CONFIG, encoder_configs={})
ADAPTER = LokrAdapter(factor=16, use_scalar=True, apply_preset=LokrPreset(target_module=("Attention",)))
SPEC = JobSpec(
    adapter=ADAPTER,
    datasets=(DatasetChoice(dataset="pseudo-camera-10k", resolution=1024),),
    model=ModelChoice(base_precision="int8-quanto"),
    optimization=Optimization(max_steps=10_000, optimizer="optimi-lion"),
)


def demand(spec: JobSpec = SPEC) -> Demand:
    return Demand(
        spec=spec,
        selection=select_adapter(CONFIG, ADAPTER),
        buckets=[Bucket(source=0, dataset="pseudo-camera-10k", repeats=0, width=1024, height=1024, num_images=10_000)],
        num_prompts=10_000,
        num_pixels=10_000 * 1024 * 1024,
        encoders=[],
    )


def test_says_what_the_reference_configuration_needs() -> None:
    lines = "\n".join(estimate_lines(RESOURCES.estimate(demand())))
    assert lines.startswith("the worker needs 20.3 GB of accelerator memory:\n     17.1 GB  transformer weights")
    assert "      9.5 GB  t5 (no_change)\n     15.0 GB  llama (no_change)" in lines
    assert "the store needs 367.0 GB for embeddings and latents:\n     21.0 GB  latents" in lines
    assert "     10.5 GB  T5 embeddings" in lines
    assert "    335.5 GB  Llama embeddings, compressed 209.7 GB at best" in lines
    assert "    367.0 GB  exact, compressed 237.3 GB at best" in lines
    assert "    204.8 GB  compact\n     23.2 GB  on_demand" in lines


def test_the_estimate_follows_the_policy_and_what_the_encoders_say() -> None:
    compact = RESOURCES.estimate(demand(replace(SPEC, embedding_storage="compact")))
    assert compact.storage_bytes == pytest.approx(204.8e9, rel=0.001)
    assert sum(part.size_bytes for part in compact.storage_parts) == compact.storage_bytes
    held = encoder_pb2.EncoderDescription(encoder=encoder_pb2.ENCODER_LLAMA, precision="int8-quanto", dtype="BF16")
    described = RESOURCES.estimate(replace(demand(), encoders=[held]))
    assert {part.name: part.size_bytes for part in described.encoder_memory}["llama (int8-quanto)"] == pytest.approx(
        8.0e9, rel=0.01
    )
    demanded = replace(SPEC, model=replace(SPEC.model, text_encoder_precision={"llama": "nf4-bnb"}))
    assert [part.name for part in RESOURCES.estimate(demand(demanded)).encoder_memory][-1] == "llama (nf4-bnb)"


def test_names_the_precision_that_would_save_memory_only_where_it_does() -> None:
    plain = replace(SPEC, model=ModelChoice())
    assert RESOURCES.hints(demand(plain)) == [
        "with model.base_precision int8-quanto the worker needs 20.3 GB of memory"
    ]
    assert RESOURCES.hints(demand()) == []
