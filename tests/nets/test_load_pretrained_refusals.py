# SPDX-License-Identifier: Apache-2.0
"""Tests the refusals of `load_pretrained`, each in a sentence and with the model unchanged, and their limits."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from torch import nn

from medaccel.nets import SwinUNETR, load_pretrained
from tests.nets.checkpoints import FLAT, State, assert_equal, bare_transformer, flat_net, quietly, renamed, saved


@pytest.mark.parametrize(
    "content",
    [
        # index and bias tables fit at any width, so they do not count
        pytest.param(lambda: MonaiSwinUNETR(1, 2, **{**FLAT, "feature_size": 24}).state_dict(), id="wider net"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(1, 12, 2), nn.Linear(12, 12)).state_dict(), id="another net"),
        pytest.param(lambda: {"layers.0.blocks.0.mlp.fc1.weight": torch.ones(48, 12)}, id="2-D Swin of 2021"),
    ],
)
def test_a_file_of_which_no_weight_fits_fails_and_changes_nothing(content: Callable[[], State], tmp_path: Path):
    path = saved(tmp_path, content())
    net = SwinUNETR(1, 2, **FLAT)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"no weight of .*weights\.pt fits the model, which is unchanged"
    ) as failure:
        load_pretrained(net, path)
    file, model = str(failure.value).splitlines()[1:]
    first = next(iter(content()))
    assert file.startswith(f"  the file has   {first} [")
    assert model.startswith("  the model has  swinViT.patch_embed.proj.weight [12, 1, 2, 2], ")
    assert_equal(net.state_dict(), before)


def test_a_missing_file_is_named(tmp_path: Path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no file {path}"):
            load_pretrained(SwinUNETR(1, 2, **FLAT), path)


def test_the_path_may_be_a_string(tmp_path: Path):
    source = flat_net().state_dict()
    net = SwinUNETR(1, 2, **FLAT)
    load_pretrained(net, str(saved(tmp_path, source)))
    assert_equal(net.state_dict(), source)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "format of 2019"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, zipped: bool, tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(flat_net().state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    net = SwinUNETR(1, 2, **FLAT)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"load_pretrained: .*weights\.pt is not a whole torch file of weights \(\w+"
    ):
        load_pretrained(net, path)
    assert_equal(net.state_dict(), before)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.write_text("<html>404: not found</html>")
    with pytest.raises(ValueError, match=r"weights\.pt (is not a whole torch file|holds pickled objects)"):
        load_pretrained(SwinUNETR(1, 2, **FLAT), path)


class RunsCode:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "format of 2019"])
def test_code_in_a_file_is_not_run(zipped: bool, tmp_path: Path):
    path = tmp_path / "weights.pt"
    content = {"state_dict": flat_net().state_dict(), "config": RunsCode(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"holds {os.mkdir.__module__}\.mkdir; expected tensors and plain values"):
        load_pretrained(SwinUNETR(1, 2, **FLAT), path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_pickled_module_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds .*\.SwinUNETR; .*save its state_dict alone"):
        load_pretrained(SwinUNETR(1, 2, **FLAT), saved(tmp_path, SwinUNETR(1, 2, **FLAT)))


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy 2", "numpy 1"])
def test_what_training_scripts_write_beside_the_weights_is_read(module: bytes, tmp_path: Path):
    source = flat_net().state_dict()
    content = {
        "epoch": 3,
        "best_acc": np.float32(0.75),
        "loss": np.float64(0.5),
        "steps": np.int64(9),
        "args": argparse.Namespace(lr=1e-4, roi=(96, 96, 96)),
        "state_dict": source,
    }
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(np.float64(0).__reduce__()[0].__module__.encode(), module))
    assert module in path.read_bytes()
    net = SwinUNETR(1, 2, **FLAT)
    quietly(net, path)
    assert_equal(net.state_dict(), source)


@pytest.mark.parametrize(
    ("content", "kind"), [({"epoch": 3}, "dict"), ({"state_dict": {}}, "dict"), ([torch.ones(3)], "list")], ids=str
)
def test_a_file_without_named_tensors_is_refused(content: Any, kind: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"holds no named tensors, at its top or under state_dict.*it is a {kind}"):
        load_pretrained(SwinUNETR(1, 2, **FLAT), saved(tmp_path, content))


def test_a_file_with_several_transformers_is_refused(tmp_path: Path):
    state = flat_net().state_dict()
    both = {**renamed(state, lambda key: f"student.{key}"), **renamed(state, lambda key: f"teacher.{key}")}
    with pytest.raises(ValueError, match=r"holds 2 transformers, under 'student\.swinViT', 'teacher\.swinViT'"):
        load_pretrained(SwinUNETR(1, 2, **FLAT), saved(tmp_path, both))


def test_a_patch_embedding_of_another_net_is_no_second_transformer(tmp_path: Path):
    source = flat_net().state_dict()
    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(net, saved(tmp_path, {**source, "mae.patch_embed.proj.weight": torch.ones(3)}))
    assert_equal(net.state_dict(), source)
    assert report.skipped == [("mae.patch_embed.proj.weight", "the model has no such tensor")]


def test_a_model_with_several_transformers_or_none_is_refused(tmp_path: Path):
    path = saved(tmp_path, bare_transformer().state_dict())
    two = nn.ModuleDict({"student": bare_transformer(), "teacher": bare_transformer()})
    with pytest.raises(ValueError, match=r"ModuleDict holds 2 of MONAI's SwinTransformers \('student', 'teacher'\)"):
        load_pretrained(two, path)
    load_pretrained(two["student"], path)
    with pytest.raises(ValueError, match=r"Linear holds 0 of MONAI's SwinTransformers \(none\)"):
        load_pretrained(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match=r"model is a OrderedDict; expected a torch\.nn\.Module"):
        load_pretrained(two.state_dict(), path)
