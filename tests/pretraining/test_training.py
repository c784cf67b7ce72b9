# SPDX-License-Identifier: Apache-2.0
"""Training: processes share a batch exactly, and a killed run ends with the weights of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medaccel.pretraining.data import Scans
from medaccel.training.fit import train
from tests.pretraining.made import prepared, training

PIXPRO = {"instance": 1.0, "pixel": 1.0, "pixpro": 1.0}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Scans:
    return prepared(tmp_path_factory.mktemp("training"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_with_the_same_weights_momentum_copies_included(scans: Scans, tmp_path: Path):
    whole, items = training(scans, PIXPRO)
    train(whole, items, tmp_path / "whole", progress=False)
    cut, items = training(scans, PIXPRO)
    count = 0

    def stop_after_three(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("cut off")

    cut.on_train_batch_start = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cut off"):
        train(cut, items, tmp_path / "part", progress=False)
    again, items = training(scans, PIXPRO)
    with torch.no_grad():  # another process would begin with other weights
        for parameter in again.network.parameters():
            parameter.add_(1.0)
    train(again, items, tmp_path / "part", progress=False)
    expected, state = whole.network.state_dict(), again.network.state_dict()
    for key, value in state.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)
    name = "swinViT.layers1.0.blocks.0.attn.qkv.weight"
    slow, fast = state[f"heads.pixpro.momentum_backbone.{name}"], state[f"backbone.{name}"]
    assert not torch.equal(slow, fast)


_RUN = """
import sys
from pathlib import Path
import torch
from medaccel.training.fit import train
from tests.pretraining.made import prepared, training
fit, items = training(prepared(Path(sys.argv[1])), {"instance": 1.0, "pixel": 1.0}, steps=12)
train(fit, items, Path(sys.argv[2]), progress=False)
torch.save(fit.network.trained_state(), Path(sys.argv[2]) / "weights.pt")
"""


@pytest.mark.slow
def test_killed_at_three_moments_it_goes_on_to_the_same_weights(scans: Scans, tmp_path: Path):
    command = [sys.executable, "-c", _RUN, str(scans.training[0].parents[1])]
    last = tmp_path / "part" / "last.ckpt"
    for delay in (0.05, 0.71, 0.33):  # s after a checkpoint: within a later step, or between two
        before = last.stat().st_mtime_ns if last.exists() else None
        killed = subprocess.Popen([*command, str(tmp_path / "part")], env=_environment())
        deadline = time.monotonic() + 240
        while (not last.exists() or last.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            assert killed.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    for folder in ("part", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], env=_environment(), check=True, timeout=480)
    part, whole = (torch.load(tmp_path / folder / "weights.pt", weights_only=True) for folder in ("part", "whole"))
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-7, msg=key)


_GRADIENTS = """
import sys
from pathlib import Path
import lightning, torch
from medaccel.training import fit as training_fit, ranks
from tests.pretraining.made import prepared, training

class Keep(lightning.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0 and ranks.rank() == 0:
            grads = {n: p.grad.clone() for n, p in pl_module.network.named_parameters() if p.grad is not None}
            torch.save(grads, sys.argv[2])

ranks.join("cpu")
weights = {"inpainting": 1.0, "instance": 1.0, "pixel": 1.0, "pixpro": 1.0}
fit, items = training(prepared(Path(sys.argv[1])), weights, steps=1, steps_per_epoch=1, gradient_clip=None)
losses, _, _ = training_fit.train(fit, items, Path(sys.argv[3]), progress=False, callbacks=[Keep()])
if ranks.rank() == 0:
    torch.save(losses, sys.argv[2] + ".losses")
ranks.leave()
"""


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradients_of_one_with_the_whole_batch(scans: Scans, tmp_path: Path):
    script = tmp_path / "gradients.py"
    script.write_text(_GRADIENTS)
    data = str(scans.training[0].parents[1])
    one = [sys.executable, str(script), data, str(tmp_path / "one.pt"), str(tmp_path / "one")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    two = [*launch, data, str(tmp_path / "two.pt"), str(tmp_path / "two")]
    for command in (one, two):
        subprocess.run(command, env=_environment(), check=True, timeout=480)
    losses = [torch.load(tmp_path / f"{name}.pt.losses", weights_only=True) for name in ("one", "two")]
    assert set(losses[0]) >= {"loss", "inpainting", "instance", "pixel", "pixpro", "mutual_information_bound"}
    for key, values in losses[0].items():
        assert losses[1][key] == pytest.approx(values, abs=1e-5), key
    single, shared = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert set(single) == set(shared)
    # As one vector: the patch embedding's bias alone is a sum over all voxels, which fp32 rounds by more than that.
    whole, other = (
        torch.cat([g.flatten().double() for g in (grads[n] for n in single)]) for grads in (single, shared)
    )
    assert float(whole.norm()) > 0.1
    assert float((other - whole).norm() / whole.norm()) < 1e-5
    assert float((other - whole).abs().max()) < 1e-4
