"""Which of several outputs decides whether an exported file is the trained adapter."""

import pytest
import torch
from reverie_trainer.worker.proof import FILE_TOLERANCE, ExportRefutedError, Proof, _closest, _require

BASE = torch.ones(3, 2, 4)
TRAINED = 1.1 * BASE


def test_one_output_that_an_expert_flip_moved_spoils_nothing() -> None:
    loaded = TRAINED.clone()
    loaded[:2] *= 1.05
    difference, tolerance = _closest(loaded, TRAINED, BASE, 1e-4)
    assert difference == 0.0
    assert tolerance == pytest.approx(1e-4 + FILE_TOLERANCE * 0.1)


def test_file_that_is_wrong_everywhere_is_refuted() -> None:
    difference, tolerance = _closest(1.05 * BASE, TRAINED, BASE, 1e-4)
    assert difference == pytest.approx(0.05 / 1.1, rel=1e-4)
    with pytest.raises(ExportRefutedError, match="differs from the trained one"):
        _require(Proof(change=0.05, difference=difference, tolerance=tolerance, picture_change=0.1))
