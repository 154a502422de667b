"""Full rank over two ranks with FSDP2, on the CPU: the same weights as one process with the whole batch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_common.storage.tensors import unpack_tensors
from reverie_hidream.tensor_io import from_raw

RANK = """
import sys
import torch
from pathlib import Path
from torch import distributed
from reverie_hidream.adapters import FullRankConfig, attach_adapter
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import enable_gradient_checkpointing, load_transformer, predict_velocity

checkpoint, directory, rank, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if size > 1:
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
transformer = load_transformer(checkpoint, dtype=torch.float32)
adapter = attach_adapter(transformer, FullRankConfig())
enable_gradient_checkpointing(transformer, True)
transformer.train()
data = torch.load(directory / "data.pt", weights_only=True)
mine = slice(rank * 2 // size, (rank + 1) * 2 // size)
text = TextConditioning(t5=data["t5"][mine], llama=data["llama"][:, mine], pooled=data["pooled"][mine])
optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
held = sum(tensor.to_local().numel() if size > 1 else tensor.numel() for tensor in transformer.parameters())
for _ in range(2):
    optimizer.zero_grad()
    output = predict_velocity(transformer, data["latents"][mine], data["timesteps"][mine], text)
    (output - data["target"][mine]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    optimizer.step()
body = adapter.export({"held": str(held)})
adapter.set_strength(0.0)
base = adapter.raw_state()
reference = load_transformer(checkpoint, dtype=torch.float32).state_dict()
assert all(torch.equal(tensor, reference[name]) for name, tensor in base.items())
adapter.set_strength(1.0)
adapter.load_raw_state(base)
if rank == 0:
    (directory / f"weights-{size}").write_bytes(body)
    (directory / f"held-{size}").write_text(str(held))
if size > 1:
    distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, make_batch: Callable[..., Any]
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Trains on so many ranks and returns the weights."""
    directory = tmp_path_factory.mktemp("ranks")
    batch = make_batch(8, 12, batch_size=2, dtype=torch.float32)
    torch.save(
        {
            "t5": batch.text.t5,
            "llama": batch.text.llama,
            "pooled": batch.text.pooled,
            "latents": batch.noise,
            "target": batch.latents,
            "timesteps": torch.tensor([700.0, 200.0]),
        },
        directory / "data.pt",
    )

    def run(num_ranks: int) -> dict[str, torch.Tensor]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-c", RANK, str(tiny_checkpoint), str(directory)]
        ranks = [
            subprocess.Popen(
                [*arguments, str(rank), str(num_ranks)], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(num_ranks)
        ]
        ends = [process.communicate(timeout=240)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * num_ranks, ends[0][-3000:]
        tensors = unpack_tensors((directory / f"weights-{num_ranks}").read_bytes())
        held = torch.tensor(int((directory / f"held-{num_ranks}").read_text()))
        return {**{name: from_raw(raw) for name, raw in tensors.items()}, "held": held}

    return run


def test_two_ranks_train_the_weights_of_one(trained: Callable[[int], dict[str, torch.Tensor]]) -> None:
    one, two = trained(1), trained(2)
    held = float(two.pop("held")) / float(one.pop("held"))

    assert one.keys() == two.keys()
    # A shard is rounded up to whole rows, so a little more than a half.
    assert held < 0.55
    largest = max(float((two[name] - tensor).norm() / tensor.norm()) for name, tensor in one.items())
    assert largest < 1e-5
