# SPDX-License-Identifier: Apache-2.0
"""Training: resuming gives the uninterrupted run's weights, processes share a batch, a bad loss stops it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medaccel.restoration.methods import load_method, make_method
from medaccel.restoration.methods.base import RestorationTask
from medaccel.restoration.methods.conditional import DiffusionConditional
from medaccel.restoration.methods.networks.patches import Patches
from medaccel.restoration.study import save_study
from medaccel.training.fit import train
from tests.restoration.test_gaussian_methods import make_study

TASK = RestorationTask((60,), 90)
# The smallest network that there is: what is tested here is what happens around it.
TINY: dict[str, Any] = {
    "channels": [8, 16],
    "shuffle": 1,
    "roi_size": [16, 16, 16],
    "steps": 8,
    "steps_per_epoch": 2,
    "batch_size": 2,
    "checkpoint_minutes": 1e-6,
    "accelerator": "cpu",
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    for seed in range(2):
        save_study(root / f"made_{seed}", make_study(seed))
    return sorted(root.iterdir())


def _patches(studies: list[Path]) -> Patches:
    return Patches(studies, TASK, roi_size=(16, 16, 16), seed=1)


def _method(**settings: Any) -> DiffusionConditional:
    torch.manual_seed(5)
    method = make_method("diffusion_conditional", TASK, TINY | settings)
    assert isinstance(method, DiffusionConditional)
    method.network = method.build()
    return method


def _weights(method: DiffusionConditional) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in method.network.state_dict().items()}


@pytest.mark.slow
def test_it_learns_and_writes_both_logs(studies: list[Path], tmp_path: Path):
    method = _method(steps=60, steps_per_epoch=4, learning_rate=5e-3, warm_up=5)
    losses, seconds, per_step = train(method.module(), _patches(studies), tmp_path, progress=False)
    assert len(losses["loss"]) == 15
    assert sum(losses["loss"][-5:]) / 5 < 0.8 * losses["loss"][0]
    assert per_step == pytest.approx(seconds / 60)
    assert (tmp_path / "csv" / "from_step_0" / "metrics.csv").read_text().count("\n") >= 3
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_with_the_same_weights(studies: list[Path], tmp_path: Path):
    whole = _method()
    train(whole.module(), _patches(studies), tmp_path / "whole", progress=False)
    part = _method()
    module = part.module()
    count = 0

    def stop_after_five(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("cut off")

    module.on_train_batch_start = stop_after_five  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cut off"):
        train(module, _patches(studies), tmp_path / "part", progress=False)
    again = _method()  # another process would begin with these weights
    train(again.module(), _patches(studies), tmp_path / "part", progress=False)
    expected = _weights(whole)
    for key, value in _weights(again).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)


_RUN = """
import sys
from pathlib import Path
from tests.restoration.test_training import _method, _patches
from medaccel.training.fit import train
method = _method(steps=40)
train(method.module(), _patches(sorted(Path(sys.argv[1]).iterdir())), Path(sys.argv[2]), progress=False)
method.save(Path(sys.argv[2]) / "method.pt")
"""


@pytest.mark.slow
def test_killed_at_a_random_moment_it_goes_on_to_the_same_weights(studies: list[Path], tmp_path: Path):
    command = [sys.executable, "-c", _RUN, str(studies[0].parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen([*command, str(tmp_path / "part")], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "part" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.37)  # somewhere within a later epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for folder in ("part", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], env=environment, check=True, timeout=240)
    part, whole = (load_method(tmp_path / folder / "method.pt") for folder in ("part", "whole"))
    assert isinstance(part, DiffusionConditional)
    assert isinstance(whole, DiffusionConditional)
    expected = _weights(whole)
    for key, value in _weights(part).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=key)


_GRADIENTS = """
import sys
from pathlib import Path
import lightning, torch
from tests.restoration.test_training import _method, _patches
from medaccel.training import fit, ranks

class Keep(lightning.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0 and ranks.rank() == 0:
            torch.save([p.grad.clone() for p in pl_module.network.parameters()], sys.argv[2])

class Recorded(lightning.Trainer):
    def __init__(self, callbacks, **options):
        super().__init__(callbacks=[*callbacks, Keep()], **options)

fit.lightning.Trainer = Recorded
ranks.join()
method = _method(steps=2, gradient_clip=None)
fit.train(method.module(), _patches(sorted(Path(sys.argv[1]).iterdir())), Path(sys.argv[3]), progress=False)
ranks.leave()
"""


@pytest.mark.slow
def test_two_processes_have_the_first_gradients_of_one_with_the_whole_batch(studies: list[Path], tmp_path: Path):
    script = tmp_path / "gradients.py"
    script.write_text(_GRADIENTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    data = str(studies[0].parent)
    one = [sys.executable, str(script), data, str(tmp_path / "one.pt"), str(tmp_path / "one")]
    subprocess.run(one, env=environment, check=True, timeout=240)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    two = [*launch, data, str(tmp_path / "two.pt"), str(tmp_path / "two")]
    subprocess.run(two, env=environment, check=True, timeout=240)
    single, shared = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert any(float(g.abs().max()) > 0 for g in single)
    for a, b in zip(single, shared, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_it_says_where_and_leaves_the_last_checkpoint(
    studies: list[Path], tmp_path: Path
):
    method = _method()
    module = method.module()
    good = module.losses

    def losses(batch: Any, index: int) -> dict[str, torch.Tensor]:
        terms = good(batch, index)
        return {"loss": terms["loss"] * float("nan")} if module.global_step == 5 else terms

    module.losses = losses  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 5: the loss is nan .*last checkpoint is from before"):
        train(module, _patches(studies), tmp_path, progress=False)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(bool(value.isfinite().all()) for value in kept["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops_it_before_it_is_in_the_weights(studies: list[Path], tmp_path: Path):
    method = _method()
    module = method.module()
    good = module.losses
    # The square root's gradient at zero is infinite, and times zero no number; the loss is as it was.
    spoilt = next(module.network.parameters())

    def losses(batch: Any, index: int) -> dict[str, torch.Tensor]:
        terms = good(batch, index)
        return {"loss": terms["loss"] + (0 * spoilt).sum().sqrt() * 0} if module.global_step == 5 else terms

    module.losses = losses  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 5: the gradient of .* is not finite"):
        train(module, _patches(studies), tmp_path, progress=False)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert all(bool(value.isfinite().all()) for value in kept["current_model_state"].values())


def test_a_finished_training_is_taken_up_with_its_running_average_and_record(studies: list[Path], tmp_path: Path):
    method = _method()
    losses, seconds, _ = train(method.module(), _patches(studies), tmp_path, progress=False)
    again = _method()
    assert train(again.module(), _patches(studies), tmp_path, progress=False)[1] == pytest.approx(seconds, rel=0.2)
    expected = _weights(method)
    for key, value in _weights(again).items():
        assert torch.equal(value, expected[key]), key
    assert len(losses["loss"]) == 4


def test_a_checkpoint_of_other_settings_or_damaged_is_refused(studies: list[Path], tmp_path: Path):
    train(_method().module(), _patches(studies), tmp_path, progress=False)
    with pytest.raises(ValueError, match="a checkpoint of other settings or another seed; delete it"):
        train(_method(learning_rate=1.0).module(), _patches(studies), tmp_path, progress=False)
    with pytest.raises(ValueError, match="a checkpoint of other settings or another seed; delete it"):
        train(_method().module(), _patches(studies), tmp_path, seed=9, progress=False)
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        train(_method().module(), _patches(studies), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; expected a whole number >= 1"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number >= 1"),
        ({"roi_size": 16}, "roi_size is \\[16\\]; expected three multiples"),
        ({"samples": "many"}, "samples is 'many'; expected a whole number"),
        ({"steps": 7}, "steps is 7; expected a multiple of steps_per_epoch, 2"),
        ({"roi_size": [20, 16, 16]}, "roi_size is .*expected three multiples of 8"),
        ({"samples": 0}, "samples is 0; expected a whole number >= 1"),
        ({"spread": 0.0}, "spread is 0.0; expected a number > 0"),
        ({"colour": 1}, r"settings \['colour'\] are unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], message: str, studies: list[Path], tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        train(_method(**settings).module(), _patches(studies), tmp_path, progress=False)


def test_a_batch_that_the_processes_can_not_share_is_refused(
    studies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size is 2; expected a multiple of the 3 processes"):
        train(_method().module(), _patches(studies), tmp_path, progress=False)


def test_a_checkpoint_holds_what_json_can(studies: list[Path], tmp_path: Path):
    method = _method(steps=2)
    method.fit(studies, [], folder=tmp_path, progress=False)
    method.save(tmp_path / "method.pt")
    loaded = load_method(tmp_path / "method.pt", "diffusion_conditional")
    assert json.loads(json.dumps(vars(loaded.fitted))) == vars(loaded.fitted)
    with pytest.raises(ValueError, match="a checkpoint of 'diffusion_conditional'; expected 'swin_unetr'"):
        load_method(tmp_path / "method.pt", "swin_unetr")
