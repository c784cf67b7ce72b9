# SPDX-License-Identifier: Apache-2.0
"""Tests `load_pretrained`: every dialect of published weights into every model, and its report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer, filter_swinunetr
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from torch import Tensor, nn

import medaccel
from medaccel.nets import LoadReport, PatchMergingV090, SSLHead, SwinUNETR, load_pretrained
from tests.nets.checkpoints import (
    DIALECTS,
    FLAT,
    SMALL,
    as_nested_encoder,
    as_nvidia,
    assert_equal,
    bare_transformer,
    filled,
    flat_net,
    quietly,
    renamed,
    saved,
)


@pytest.mark.parametrize("build", [SwinUNETR, MonaiSwinUNETR], ids=["ours", "MONAI's"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_fills_ours_and_monais(dialect: str, build: type[nn.Module], tmp_path: Path):
    write, whole = DIALECTS[dialect]
    source = flat_net().state_dict()
    net = build(1, 2, **FLAT)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    report = quietly(net, saved(tmp_path, write(source)))
    expected = {key: value if whole or key.startswith("swinViT.") else before[key] for key, value in source.items()}
    assert_equal(net.state_dict(), expected)
    assert set(report.loaded) == {key for key in source if whole or key.startswith("swinViT.")}
    assert set(report.missing) == set(source) - set(report.loaded)


def test_second_version_with_its_convolutions(tmp_path: Path):
    source = flat_net(use_v2=True).state_dict()
    ours = SwinUNETR(1, 2, **FLAT, use_v2=True)
    assert not quietly(ours, saved(tmp_path, DIALECTS["DDP"][0](source))).missing
    assert_equal(ours.state_dict(), source)
    first = SwinUNETR(1, 2, **FLAT)
    report = quietly(first, saved(tmp_path, source))
    assert not report.missing
    assert {key.split(".")[1] for key, _ in report.skipped} == {f"layers{stage}c" for stage in range(1, 5)}


@pytest.mark.filterwarnings("ignore:load_pretrained.*dialect of 2022")
def test_nvidias_file_gives_what_monais_load_from_gives(tmp_path: Path):
    content = as_nvidia(filled(MonaiSwinUNETR(1, 2, **SMALL)).state_dict())
    ours, monais = SwinUNETR(1, 2, **SMALL), MonaiSwinUNETR(1, 2, **SMALL)
    monais.load_state_dict(ours.state_dict())
    monais.load_from(content)
    report = load_pretrained(ours, saved(tmp_path, content))
    assert_equal(ours.state_dict(), monais.state_dict())
    assert report.skipped == [(f"module.norm.{name}", "the model has no such tensor") for name in ("weight", "bias")]


@pytest.mark.filterwarnings("ignore:load_pretrained.*dialect of 2022")
def test_the_nested_encoder_gives_what_monais_filter_gives(tmp_path: Path):
    content = as_nested_encoder(filled(MonaiSwinUNETR(1, 2, **SMALL)).state_dict())
    ours, monais = SwinUNETR(1, 2, **SMALL), MonaiSwinUNETR(1, 2, **SMALL)
    monais.load_state_dict(ours.state_dict())
    kept = [filter_swinunetr(key, value) for key, value in content["model"].items()]
    monais.load_state_dict(dict(pair for pair in kept if pair is not None), strict=False)
    report = load_pretrained(ours, saved(tmp_path, content))
    assert_equal(ours.state_dict(), monais.state_dict())
    assert ("out.conv.conv.bias", "of this dialect only the encoder is taken") in report.skipped


def test_a_file_of_either_makes_the_other_compute_the_same(tmp_path: Path):
    x = torch.randn(1, 1, 64, 64)
    for source, net in (
        (SwinUNETR(1, 2, **FLAT), MonaiSwinUNETR(1, 2, **FLAT)),
        (MonaiSwinUNETR(1, 2, **FLAT), SwinUNETR(1, 2, **FLAT)),
    ):
        load_pretrained(net, saved(tmp_path, source.state_dict()))
        torch.testing.assert_close(net.double()(x.double()), source.double()(x.double()), rtol=1e-10, atol=1e-10)


# --- the models -----------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """Is a user's training module: the net under a name of the user's, and something else with tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 1e-4, "roi": [96, 96, 96]})
        self.segmenter = SwinUNETR(1, 2, **FLAT)
        self.loss_weights = nn.Parameter(torch.ones(2))

    def training_step(self, batch: Tensor) -> Tensor:
        return self.segmenter(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_a_lightning_checkpoint_goes_into_a_net_and_back_into_its_module(tmp_path: Path):
    source = Module()
    filled(source)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, **quiet)
    trainer.fit(source, torch.utils.data.DataLoader([torch.randn(1, 64, 64)]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(net, tmp_path / "last.ckpt")
    assert_equal(net.state_dict(), source.segmenter.state_dict())
    assert report.skipped == [("loss_weights", "it is outside the net that holds the transformer")]
    module = Module()
    report = quietly(module, tmp_path / "last.ckpt")
    assert_equal(module.segmenter.state_dict(), source.segmenter.state_dict())
    assert report.missing == ["loss_weights"]  # what is outside the net is the trainer's to restore


@pytest.fixture
def process_group() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        nn.DataParallel,
        torch.compile,
        lambda net: nn.DataParallel(net.swinViT),
        lambda net: net.swinViT,
        lambda net: nn.ModuleDict({"model": nn.ModuleDict({"net": net})}),
    ],
    ids=["DDP", "DataParallel", "compiled", "DataParallel of the transformer", "the transformer", "deep inside"],
)
def test_a_wrapped_model_is_filled(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path):
    source = flat_net().state_dict()
    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(wrap(net), saved(tmp_path, source))
    assert report.missing == []
    assert_equal(net.swinViT.state_dict(), renamed(source, lambda key: key[len("swinViT.") :], only="swinViT."))
    if len(report.loaded) == len(source):
        assert_equal(net.state_dict(), source)


def test_a_monai_model_before_and_after_accelerate(tmp_path: Path):
    source = flat_net().state_dict()
    path = saved(tmp_path, source)
    for change in (lambda net: None, medaccel.accelerate):
        net = MonaiSwinUNETR(1, 2, **FLAT)
        change(net)
        quietly(net, path)
        assert_equal(net.state_dict(), source)


class Regressor(nn.Module):
    """A user's net: MONAI's transformer under a name of the user's, with a head, and names like the transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = bare_transformer()
        self.patch_embed = nn.Conv2d(1, 12, 2)
        self.head = nn.Linear(192, 1)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_users_net_takes_its_own_file_whole(prefix: str, tmp_path: Path):
    source = filled(Regressor()).state_dict()
    net = Regressor()
    report = quietly(net, saved(tmp_path, renamed(source, lambda key: prefix + key)))
    assert (report.missing, report.skipped) == ([], [])
    assert_equal(net.state_dict(), source)


def test_a_users_net_takes_the_transformer_alone_from_others(tmp_path: Path):
    source = flat_net().state_dict()
    net = Regressor()
    patch_embed, head = net.patch_embed.weight.clone(), net.head.weight.clone()
    report = quietly(net, saved(tmp_path, source))
    assert_equal(net.vit.state_dict(), renamed(source, lambda key: key[len("swinViT.") :], only="swinViT."))
    assert torch.equal(net.patch_embed.weight, patch_embed)
    assert torch.equal(net.head.weight, head)
    assert report.missing == ["patch_embed.weight", "patch_embed.bias", "head.weight", "head.bias"]


class Classifier(SwinTransformer):
    """A user's net that is a transformer itself, with a head beside the stages."""

    def __init__(self) -> None:
        super().__init__(1, 12, (2, 2), (2, 2), (1, 1, 1, 1), (3, 6, 12, 24), spatial_dims=2)
        self.head = nn.Linear(192, 3)


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_heads_beside_the_stages_are_not_the_transformers(prefix: str, tmp_path: Path):
    source = filled(Classifier()).state_dict()
    path = saved(tmp_path, renamed(source, lambda key: prefix + key))
    net = Classifier()
    report = quietly(net, path)
    assert (report.missing, report.skipped) == ([], [])
    assert_equal(net.state_dict(), source)


@pytest.mark.parametrize("name", ["swinViT.", "swin_vit.", ""])
def test_the_pretraining_model_and_its_checkpoints(name: str, tmp_path: Path):
    options = {"feature_size": 12, "spatial_dims": 2, "depths": (1, 1, 1, 1), "window_size": 2}
    source = filled(SSLHead(**options)).state_dict()
    path = saved(tmp_path, {"state_dict": renamed(source, lambda key: "module." + key.replace("swinViT.", name))})
    head = SSLHead(**options)
    report = quietly(head, path)
    assert (report.missing, report.skipped) == ([], [])
    assert_equal(head.state_dict(), source)

    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(net, path)
    assert_equal(net.swinViT.state_dict(), head.swinViT.state_dict())
    assert {key.split(".")[1] for key, _ in report.skipped} == {"rotation_head", "contrastive_head", "conv"}
    assert not any(key.startswith("swinViT.") for key in report.missing)

    again = SSLHead(**options)
    report = quietly(again, saved(tmp_path, net.state_dict()))
    assert_equal(again.swinViT.state_dict(), net.swinViT.state_dict())
    assert {key.split(".")[0] for key in report.missing} == {"rotation_head", "contrastive_head", "conv"}


# --- partial matches, and the report --------------------------------------------------------------------------------


def test_what_differs_in_shape_is_left_and_reported(tmp_path: Path):
    source = flat_net().state_dict()
    net = SwinUNETR(4, 3, **FLAT)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    report = quietly(net, saved(tmp_path, source))
    assert dict(report.skipped) == {
        "swinViT.patch_embed.proj.weight": "its shape is [12, 1, 2, 2], the model's [12, 4, 2, 2]",
        "encoder1.layer.conv1.conv.weight": "its shape is [12, 1, 3, 3], the model's [12, 4, 3, 3]",
        "encoder1.layer.conv3.conv.weight": "its shape is [12, 1, 1, 1], the model's [12, 4, 1, 1]",
        "out.conv.conv.weight": "its shape is [2, 12, 1, 1], the model's [3, 12, 1, 1]",
        "out.conv.conv.bias": "its shape is [2], the model's [3]",
    }
    assert report.missing == [key for key, _ in report.skipped]
    assert_equal(net.state_dict(), {key: before[key] if key in report.missing else source[key] for key in source})


def test_a_deeper_file_fills_the_blocks_that_both_have(tmp_path: Path):
    source = filled(MonaiSwinUNETR(1, 2, **{**FLAT, "depths": (2, 1, 1, 1)})).state_dict()
    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(net, saved(tmp_path, source))
    assert not report.missing
    assert all(key.startswith("swinViT.layers1.0.blocks.1.") for key, _ in report.skipped)
    assert len(report.skipped) == 14


def test_the_report_reads(tmp_path: Path):
    source = as_nvidia(flat_net().state_dict())
    net = SwinUNETR(3, 2, **FLAT)
    report = load_pretrained(net, saved(tmp_path, source))
    total = len(net.state_dict())
    assert str(report).splitlines() == [
        f"medaccel: {len(report.loaded)} of the model's {total} tensors loaded "
        "(NVIDIA 2022, mlp.fc1; transformer under 'module'; merging order of MONAI before 1.5)",
        "  skipped  module.patch_embed.proj.weight: its shape is [12, 1, 2, 2], the model's [12, 3, 2, 2]",
        "  skipped  module.norm.weight, module.norm.bias: the model has no such tensor",
        "  missing  swinViT, encoder1 (3), encoder2 (2), encoder3 (2), encoder4 (2), encoder10 (2), decoder5 (4), "
        "decoder4 (4), decoder3 (4), decoder2 (4), decoder1 (4), out (2)",
    ]
    assert len(report.loaded) + len(report.missing) == total


def test_a_report_of_many_reasons_is_cut(tmp_path: Path):
    report = LoadReport("MONAI", loaded=["a.weight"])
    report.skipped = [(f"layer{i}.weight", f"its shape is [{i}], the model's [99]") for i in range(11)]
    lines = str(report).splitlines()
    assert lines[0] == "medaccel: 1 of the model's 1 tensors loaded (MONAI)"
    assert len(lines) == 10
    assert lines[-1] == "  skipped  … for 3 more reasons"


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("NVIDIA", "NVIDIA 2022, mlp.fc1; transformer under 'module'; merging order of MONAI before 1.5"),
        (
            "layers1.0.0",
            "encoder of 2022, layers1.0.0; transformer under 'encoder'; merging order of MONAI before 1.5",
        ),
        (
            "module.swin_vit",
            "pretraining code of 2022, swin_vit; transformer under 'module.swin_vit'; "
            "merging order of MONAI before 1.5",
        ),
        ("DDP", "MONAI; transformer under 'module.swinViT'; its names do not tell the merging order"),
        ("a bare transformer", "MONAI; no prefix; its names do not tell the merging order"),
    ],
)
def test_the_dialect_says_which_merging_order_it_implies(dialect: str, words: str, tmp_path: Path):
    content = DIALECTS[dialect][0](flat_net().state_dict())
    assert load_pretrained(SwinUNETR(1, 2, **FLAT), saved(tmp_path, content)).dialect == words


# --- the merging order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["NVIDIA", "layers1.0.0", "swin_vit"])
def test_a_dialect_of_2022_warns_where_the_model_merges_in_todays_order(dialect: str, tmp_path: Path):
    path = saved(tmp_path, DIALECTS[dialect][0](filled(MonaiSwinUNETR(1, 2, **SMALL)).state_dict()))
    todays = [
        SwinUNETR(1, 2, **SMALL),
        SwinUNETR(1, 2, **SMALL, downsample="mergingv2"),
        MonaiSwinUNETR(1, 2, **SMALL),
        SSLHead(**SMALL).swinViT,
    ]
    for net in todays:
        with pytest.warns(
            UserWarning, match=r'weights\.pt is of a dialect of 2022.*downsample="merging_v090"'
        ) as seen:
            load_pretrained(net, path)
        assert [warning.filename for warning in seen] == [__file__]
    for old in (
        SwinUNETR(1, 2, **SMALL, downsample="merging_v090"),
        MonaiSwinUNETR(1, 2, **SMALL, downsample=PatchMergingV090),
        SSLHead(**SMALL, downsample="merging_v090"),
    ):
        quietly(old, path)


def test_monais_own_names_warn_of_nothing(tmp_path: Path):
    quietly(SwinUNETR(1, 2, **SMALL), saved(tmp_path, MonaiSwinUNETR(1, 2, **SMALL).state_dict()))


@pytest.mark.parametrize("dialect", ["NVIDIA", "layers1.0.0", "swin_vit"])
def test_in_two_dimensions_the_order_never_changed(dialect: str, tmp_path: Path):
    quietly(SwinUNETR(1, 2, **FLAT), saved(tmp_path, DIALECTS[dialect][0](flat_net().state_dict())))


def test_names_outside_the_transformer_imply_nothing(tmp_path: Path):
    content = {**MonaiSwinUNETR(1, 2, **SMALL).state_dict(), "decoder.mlp.fc1.weight": torch.ones(3)}
    report = quietly(SwinUNETR(1, 2, **SMALL), saved(tmp_path, content))
    assert report.dialect.startswith("MONAI; ")


def test_a_warning_that_is_an_error_leaves_the_model_unchanged(tmp_path: Path):
    net = SwinUNETR(1, 2, **SMALL)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    path = saved(tmp_path, as_nvidia(filled(MonaiSwinUNETR(1, 2, **SMALL)).state_dict()))
    with pytest.raises(UserWarning, match="dialect of 2022"):
        quietly(net, path)
    assert_equal(net.state_dict(), before)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_model", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("of_file", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_files_floats_are_cast_to_the_models(of_file: torch.dtype, of_model: torch.dtype, tmp_path: Path):
    source = flat_net().to(of_file).state_dict()
    source = {key: value / 3 if value.is_floating_point() else value for key, value in source.items()}
    net = SwinUNETR(1, 2, **FLAT).to(of_model)
    assert not quietly(net, saved(tmp_path, source)).missing
    index = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    assert net.state_dict()[index].dtype == torch.int64
    assert_equal(
        net.state_dict(),
        {key: value if key.endswith("index") else value.to(of_model) for key, value in source.items()},
    )


def test_integers_do_not_become_weights(tmp_path: Path):
    source = flat_net().state_dict()
    source["out.conv.conv.bias"] = torch.tensor([1, 2])
    net = SwinUNETR(1, 2, **FLAT)
    report = quietly(net, saved(tmp_path, source))
    assert report.skipped == [("out.conv.conv.bias", "its dtype is torch.int64, the model's torch.float32")]
    assert report.missing == ["out.conv.conv.bias"]
