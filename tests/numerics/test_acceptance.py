"""What a trainer of HiDream has to get right, row by row (spec 12.2), with the guide's LyCORIS files as they are.

Each test quotes its row. Other tests look closer; this is the table that a reader can check off.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import create_lycoris_from_weights
from optimum.quanto import QLinear, qint8, quantize
from reverie_common.storage import MemoryStore, put_tensor
from reverie_hidream.adapters import LokrConfig, attach_lokr, count_selected
from reverie_hidream.adapters.lokr import count_modules, create_branches
from reverie_hidream.conditioning import collate
from reverie_hidream.flow import automatic_shift, shift_sigma, timesteps_of
from reverie_hidream.moe import moe_forward
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.text import ENCODER_NAMES, load_text_encoder
from reverie_hidream.tiny_weights import draw_weights
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.evaluation import EvaluationBatch, evaluation_noise
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.transformer import (
    build_meta_transformer,
    load_transformer,
    predict_velocity,
    prepare_transformer,
)
from reverie_trainer.jobs.preparing.buckets import Bucket, steps_per_epoch
from reverie_trainer.jobs.preparing.geometry import Geometry, ImageSize, target_size
from reverie_trainer.jobs.spec import Optimization
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.data import BatchMaker
from reverie_trainer.worker.engine import TrainingEngine
from reverie_trainer.worker.samples import Caption, PreparedData, PreparedSample, Source
from reverie_trainer.worker.schedule import SampleGroup, Schedule, ScheduledDataset, Visit
from reverie_trainer.worker.tensor_cache import TensorCache
from torch import nn

Make = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

REFERENCE = Path(__file__).parent / "reference"


def guide(file: str, *more_classes: str) -> dict[str, Any]:
    """A file of the guide as it is, trailing commas included; `more_classes` as the guide's text adds them."""
    config: dict[str, Any] = json.loads(re.sub(r",(\s*[}\]])", r"\1", (REFERENCE / file).read_text()))
    if more_classes:
        config["apply_preset"]["target_module"] += more_classes
    return config


CFG1 = guide("lycoris_config.json")
CFG2 = guide("lycoris_config.json", "FeedForward")
CFG3 = guide("lycoris_config.names.json")
SELECTIONS = [
    pytest.param(CFG1, 256, 6_619_136, id="cfg1"),
    pytest.param(CFG2, 1024, 55_107_584, id="cfg2"),
    pytest.param(CFG3, 448, 15_147_008, id="cfg3"),
]


def test_parameter_total_of_the_loaded_transformer() -> None:
    """17,105,733,184; 1128 Linear."""
    transformer = build_meta_transformer()
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 17_105_733_184
    assert sum(isinstance(module, nn.Linear) for module in transformer.modules()) == 1128
    assert len(transformer.state_dict()) == 1615


@pytest.mark.parametrize(("config", "num_modules", "num_parameters"), SELECTIONS)
def test_sizes_on_the_plain_base(config: dict[str, Any], num_modules: int, num_parameters: int) -> None:
    """256 / 1024 / 448 modules; 6,619,136 / 55,107,584 / 15,147,008 parameters (+ modules for scalars)."""
    with_scalar = count_selected(LokrConfig.from_dict({**config, "use_scalar": True}))
    without = count_selected(LokrConfig.from_dict({**config, "use_scalar": False}))
    assert with_scalar == (num_modules, num_parameters + num_modules)
    assert without == (num_modules, num_parameters)


def test_sizes_on_the_quantised_base() -> None:
    """Identical on quantised and unquantised base."""
    transformer = build_meta_transformer()
    quantize(transformer, weights=qint8)
    assert sum(isinstance(module, QLinear) for module in transformer.modules()) == 1128
    counted = [count_modules(transformer, LokrConfig.from_dict(config)) for config in (CFG1, CFG2, CFG3)]
    expected = [(256, 6_619_136), (1024, 55_107_584), (448, 15_147_008)]
    assert counted == [(modules, parameters + modules) for modules, parameters in expected]


def test_first_saved_keys() -> None:
    """lycoris_double_stream_blocks_0_block_attn1_to_q.{alpha,lokr_w1,lokr_w2}, shapes (), [16,16], [160,160]."""
    branches = create_branches(build_meta_transformer(), LokrConfig.from_dict(CFG1), seed=0)
    first = next(iter(branches.values()))
    saved = {f"{first.name}.{name}": tuple(tensor.shape) for name, tensor in first.exported().items()}
    name = "lycoris_double_stream_blocks_0_block_attn1_to_q"
    assert saved == {f"{name}.alpha": (), f"{name}.lokr_w1": (16, 16), f"{name}.lokr_w2": (160, 160)}


@pytest.mark.parametrize("config", [CFG1, CFG2, CFG3], ids=["cfg1", "cfg2", "cfg3"])
def test_the_file_applied_equals_the_file_merged(
    config: dict[str, Any],
    tmp_path: Path,
    tiny_checkpoint: Path,
    make_batch: Make,
    load_reference: Callable[[torch.dtype], Any],
    relative_error: Error,
) -> None:
    """File loads with `create_lycoris_from_weights`, apply == merge: max abs diff ~ dtype eps."""
    adapter = attach_lokr(load_transformer(tiny_checkpoint, dtype=torch.float32), LokrConfig.from_dict(config))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(adapter.export())
    made = make_batch(12, 20, batch_size=1)
    base, applied, merged = (_draw_with(load_reference, file, how, made) for how in ("base", "apply_to", "merge_to"))
    assert float((applied - merged).abs().max()) < 1e-12 * float(applied.abs().max())
    assert relative_error(applied, base) > 1e-2


@torch.no_grad()
def _draw_with(load_reference: Callable[[torch.dtype], Any], file: Path, how: str, made: Any) -> torch.Tensor:
    model = load_reference(torch.float64).eval()
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    network.to(torch.float64)
    if how != "base":
        getattr(network, how)()
    timesteps = timesteps_of(made.sigmas)
    text = made.text
    output: torch.Tensor = model(made.noise, timesteps, text.t5, text.llama, text.pooled, return_dict=False)[0]
    return output


def test_gradient_reaches_the_inputs_of_the_experts(
    tiny_checkpoint: Path, make_trainee: Make, make_training_reference: Make, make_batch: Make, relative_error: Error
) -> None:
    """Gradient reaches `ff_i.experts.*` inputs: compare with finite differences or with the DF training path."""
    moe = load_transformer(tiny_checkpoint, dtype=torch.float64).double_stream_blocks[0].block.ff_i
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 6, 64, generator=draw, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda hidden: moe_forward(moe, hidden), (inputs,), fast_mode=True)

    made, reference, trainee = make_batch(8, 12), make_training_reference(), make_trainee()
    level = made.sigmas.view(-1, 1, 1, 1)
    velocity = reference.velocity((1 - level) * made.latents + level * made.noise, made.sigmas, made.text)
    expected = reference.gradient((velocity - (made.noise - made.latents)).square().mean())
    trainee.step.train_step(1, [_batch(made)])
    assert relative_error(trainee.gradient(), expected) < 1e-6


@pytest.mark.parametrize(("sign", "num_outputs"), [(1.0, 0.0), (-1.0, 4.0)], ids=["right", "wrong"])
def test_sign(
    sign: float, num_outputs: float, make_trainee: Make, make_batch: Make, load_reference: Callable[[torch.dtype], Any]
) -> None:
    """With pred := eps - x0 exact the loss is 0 using target eps - x0 and net output x0 - eps.

    A network that answers every input alike, and an image that is as far from its noise as the answer says. The other
    sign misses the target by two answers, so by 4 times their square.
    """
    made, trainee, model = make_batch(8, 12), make_trainee(), load_reference(torch.float64).eval()
    answer = torch.randn(model.final_layer.linear.bias.shape, generator=torch.Generator().manual_seed(2)).double()
    for transformer in (model, trainee.model):
        with torch.no_grad():
            transformer.final_layer.linear.weight.zero_()
            transformer.final_layer.linear.bias.copy_(answer)
    text = made.text
    with torch.no_grad():
        output = model(made.noise, 1000 * made.sigmas, text.t5, text.llama, text.pooled, return_dict=False)[0]
    latents = made.noise + sign * output
    draws = BatchDraws(noise=made.noise, sigmas=made.sigmas)
    result = trainee.step.train_step(1, [Batch(latents=latents, draws=draws, conditioning=text)])
    assert result.loss == pytest.approx(num_outputs * float(output.square().mean()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("edge", "shift"), [(512, 1.878), (768, 2.332), (1024, 3.158)])
def test_shift(edge: int, shift: float) -> None:
    """s(512^2) = 1.878, s(768^2) = 2.332, s(1024^2) = 3.158; sigma .5 with s = 3 -> .75."""
    assert automatic_shift(edge // 8, edge // 8) == pytest.approx(shift, abs=5e-4)
    assert shift_sigma(torch.tensor(0.5), 3.0).item() == 0.75


# The released canvas of 4096 tokens, around a model that is small in every other respect.
FULL_CANVAS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [32, 48],
    "text_emb_dim": 16,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [128, 128],
    "llama_layers": [0, 1],
}


@torch.no_grad()
def test_non_square_latents(relative_error: Error) -> None:
    """Non-square 640x448 latents: forward equals DF with padded 4096 tokens."""
    models = [HiDreamImageTransformer2DModel(**FULL_CANVAS) for _ in range(2)]
    for model in models:
        draw_weights(model, seed=0, component="transformer")
        nn.Module.to(model, torch.float64)
    reference, ours = models[0].eval(), models[1]
    prepare_transformer(ours)
    assert reference.max_seq == 4096
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    latents, level = normal(1, 16, 448 // 8, 640 // 8), torch.tensor([400.0], dtype=torch.float64)
    text = collate([{"t5": normal(4, 32), "llama": normal(2, 4, 48), "clip_l": normal(6), "clip_g": normal(10)}])
    found = predict_velocity(ours, latents, level, text)
    expected = reference(latents, level, text.t5.double(), text.llama.double(), text.pooled.double(), return_dict=False)
    assert relative_error(found, -expected[0]) < 1e-12


def test_repeats() -> None:
    """Repeats 1000 on 20 images, batch 1: 20 * 1001 = 20,020 steps per epoch."""
    bucket = Bucket(source=0, dataset="cats", repeats=1000, width=512, height=512, num_images=20)
    assert steps_per_epoch([bucket], 1, 1) == 20_020
    group = SampleGroup(members=tuple(range(20)), num_passes=1001)
    schedule = Schedule([ScheduledDataset(groups=(group,))], seed=1, batch_size=1)
    shown = Counter(batch[0].sample for step in range(1, 20_021) for batch in schedule.micro_batches(step))
    assert shown == dict.fromkeys(range(20), 1001)
    assert schedule.epoch_at(20_020) == 1.0


SAMPLES, STEPS, STOPPED = 5, 5, 2


@pytest.fixture
def data(tiny_checkpoint: Path, make_batch: Make, memory_store: MemoryStore) -> PreparedData:
    """Five pictures of two sizes in a store, each with a caption, as preparation leaves them."""

    def put(key: str, tensor: torch.Tensor) -> Any:
        return put_tensor(memory_store, key, "t", to_raw(tensor.contiguous()), compressed=False)

    def caption(name: str, made: Any) -> Caption:
        parts = {"t5": made.text.t5[0], "llama": made.text.llama[:, 0]}
        parts |= {"clip_l": made.text.pooled[0, :32], "clip_g": made.text.pooled[0, 32:]}
        return Caption(text=name, embeddings={part: put(f"{name}/{part}", tensor) for part, tensor in parts.items()})

    samples = []
    for index in range(SAMPLES):
        height, width = (8, 8) if index % 2 else (8, 12)
        made = make_batch(height, width, batch_size=1, dtype=torch.float32)
        posterior = torch.stack([made.latents[0] + index, made.noise[0].abs()])
        samples.append(
            PreparedSample(
                dataset="cats",
                name=f"{index}.jpg",
                width=8 * width,
                height=8 * height,
                image_sha256=f"{index:x}" * 64,
                latents=put(f"latents/{index}", posterior),
                captions=((caption(f"cat {index}", made),),),
            )
        )
    empty = caption("empty", make_batch(4, 4, batch_size=1, dtype=torch.float32))
    return PreparedData(sources=(Source(dataset="cats"),), samples=tuple(samples), empty_caption=empty)


class _Run:
    """A job in training, as the worker puts it together, with everything that can be random."""

    def __init__(self, checkpoint: Path, data: PreparedData, store: MemoryStore) -> None:
        optimization = Optimization(max_steps=STEPS, learning_rate=0.01, batch_size=2, gradient_accumulation_steps=2)
        transformer = load_transformer(checkpoint, dtype=torch.float32)
        self.adapter = attach_lokr(transformer, LokrConfig.from_dict({**CFG1, "rank_dropout": 0.2}), seed=3)
        self.engine = TrainingEngine(transformer, self.adapter, optimization)
        draws = SampleDraws(seed=3, settings=ObjectiveSettings(), samples_per_step=4)
        chance = Chance(seed=3, caption_dropout_probability=0.3)
        self.maker = BatchMaker(data, TensorCache(store, max_bytes=1 << 24), chance, draws)
        groups = tuple(SampleGroup(members=members, num_passes=1) for members in ((0, 2, 4), (1, 3)))
        self._schedule = Schedule([ScheduledDataset(groups=groups)], seed=3, batch_size=2, num_accumulated=2)

    def step(self, number: int) -> dict[str, Any]:
        """Train one step; returns what it was trained on and what came of it, the scalars included."""
        visits: list[list[Visit]] = self._schedule.micro_batches(number)
        batches = [self.maker.make(some) for some in visits]
        result = self.engine.train_step(number, batches)
        state = self.adapter.raw_state()
        return {
            "ids": [[visit.sample for visit in some] for some in visits],
            "sigmas": [batch.draws.sigmas.tolist() for batch in batches],
            "noise": [batch.noise.tolist() for batch in batches],
            "loss": result.loss,
            "scalars": [float(tensor) for name, tensor in state.items() if name.endswith("scalar")],
            "adapter": {name: tensor.tolist() for name, tensor in state.items()},
        }


def test_resume_at_step_k(tiny_checkpoint: Path, data: PreparedData, memory_store: MemoryStore) -> None:
    """Next batch ids, sigmas, RNG and loss equal an uninterrupted run (scalar included)."""
    through = _Run(tiny_checkpoint, data, memory_store)
    begun = [through.step(number) for number in range(1, STOPPED + 1)]
    state = through.engine.state()
    expected = [through.step(number) for number in range(STOPPED + 1, STEPS + 1)]

    torch.rand(7)
    resumed = _Run(tiny_checkpoint, data, memory_store)
    resumed.engine.load_state(state)

    assert [resumed.step(number) for number in range(STOPPED + 1, STEPS + 1)] == expected
    assert len(expected[-1]["scalars"]) == 32
    assert all(scalar != 0 for scalar in begun[-1]["scalars"])
    assert expected[0]["noise"] != begun[0]["noise"]


def test_eval_loss(tiny_checkpoint: Path, make_batch: Make, data: PreparedData, memory_store: MemoryStore) -> None:
    """Eval loss twice in a row: identical to all digits; unchanged by training order."""
    run = _Run(tiny_checkpoint, data, memory_store)
    made = make_batch(8, 12, batch_size=1, dtype=torch.float32)
    noise = evaluation_noise("ab" * 32, made.latents.shape[1:])[None]
    images = [EvaluationBatch(latents=made.latents, noise=noise, conditioning=made.text)]
    run.step(1)
    state = run.engine.state()
    first = run.engine.evaluate(images, num_timesteps=4)
    assert run.engine.evaluate(images, num_timesteps=4) == first
    for order in ((2, 3), (3, 2)):
        for number in order:
            run.step(number)
        assert run.engine.evaluate(images, num_timesteps=4) != first
        run.engine.load_state(state)
        assert run.engine.evaluate(images, num_timesteps=4) == first


@pytest.mark.parametrize(("size", "expected"), [((1010, 1000), (1024, 1024)), ((1500, 1000), (1216, 832))])
def test_sizes_of_images(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """1010x1000 and 1500x1000 images at 1024: 1024x1024 and 1216x832."""
    geometry = Geometry(resolution=1024, resolution_type="pixel_area", max_pixels=1024 * 1024, seed=42)
    assert target_size(ImageSize(key="a", width=size[0], height=size[1]), geometry) == expected


def test_regularisation(tiny_checkpoint: Path, make_batch: Make) -> None:
    """Regularisation batch at step 0 with zero-init adapter: loss 0."""
    transformer = load_transformer(tiny_checkpoint, dtype=torch.bfloat16)
    adapter = attach_lokr(transformer, LokrConfig.from_dict(CFG1), seed=3)
    engine = TrainingEngine(transformer, adapter, Optimization(max_steps=2, learning_rate=0.01))
    made = make_batch(8, 12, dtype=torch.float32)
    kept = engine.train_step(1, [_batch(made, is_regularisation=True)])
    assert (kept.loss, kept.gradient_norm) == (0.0, 0.0)
    assert engine.train_step(2, [_batch(made)]).loss > 0.1


def _batch(made: Any, **fields: Any) -> Batch:
    draws = BatchDraws(noise=made.noise, sigmas=made.sigmas)
    return Batch(latents=made.latents, draws=draws, conditioning=made.text, **fields)


def test_caption_dropout(tiny_checkpoint: Path, memory_store: MemoryStore) -> None:
    """T5, Llama and pooled all equal the encoding of ""."""
    encoders = {name: load_text_encoder(tiny_checkpoint, name, dtype=torch.float32) for name in ENCODER_NAMES}

    def encode(text: str) -> dict[str, torch.Tensor]:
        return {name: encoder.encode([text])[0].tensor for name, encoder in encoders.items()}

    def caption(text: str) -> Caption:
        refs = {
            name: put_tensor(memory_store, f"text-{text}/{name}", "t", to_raw(tensor), compressed=False)
            for name, tensor in encode(text).items()
        }
        return Caption(text=text, embeddings=refs)

    latents = put_tensor(memory_store, "latents", "t", to_raw(torch.ones(2, 16, 4, 6)), compressed=False)
    sample = PreparedSample(
        dataset="cats",
        name="cat.jpg",
        width=48,
        height=32,
        image_sha256="ab" * 32,
        latents=latents,
        captions=((caption("a cat"),),),
    )
    data = PreparedData(sources=(Source(dataset="cats"),), samples=(sample,), empty_caption=caption(""))
    visits = [Visit(sample=0, step=1, position=0)]
    found = {}
    for probability, text in ((1.0, ""), (0.0, "a cat")):
        chance = Chance(seed=1, caption_dropout_probability=probability)
        cache = TensorCache(memory_store, max_bytes=1 << 24)
        maker = BatchMaker(data, cache, chance, SampleDraws(seed=1, settings=ObjectiveSettings()))
        found[text] = maker.make(visits).conditioning
        expected = collate([encode(text)])
        assert all(
            torch.equal(getattr(found[text], part), getattr(expected, part)) for part in ("t5", "llama", "pooled")
        )
    for part in ("t5", "llama", "pooled"):
        assert not torch.equal(getattr(found[""], part), getattr(found["a cat"], part))
