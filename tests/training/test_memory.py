# SPDX-License-Identifier: Apache-2.0
"""Memory estimates are near the use, are stated before the work, and are refused if they can't fit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medaccel.data import make_nifti, save_nifti
from medaccel.training import memory
from medaccel.training.memory import Part, expect

GIB = 2**30


# --- estimates against the operating system's count -----------------------------------------------------------------
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
MEASURED = """
import json, sys
import lightning, monai, torch
from medaccel.training import memory

def most():  # ru_maxrss is handed down from the process that starts this one
    return memory._status("VmHWM")

kind, roi, batch, width, training = json.loads(sys.argv[1])
if kind == "swin":
    from medaccel.nets import SwinUNETR
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=width)
    parts = memory.swin_unetr(roi, batch, width, training=training, classes=2)
    call = network
else:
    from medaccel.diffusion import small_unet
    network = small_unet(spatial_dims=3, channels=width)
    parts = memory.diffusion_unet(roi, batch, width, 1, training=training)
    call = lambda x: network(x, torch.zeros(batch))
weights = sum(p.numel() for p in network.parameters()) * 4
before, x = most() - weights, torch.rand(batch, 1, *roi)
if training:
    optimizer = torch.optim.AdamW(network.parameters())
    call(x).square().mean().backward()
    optimizer.step()
else:
    with torch.inference_mode():
        call(x)
print(json.dumps([most() - before, sum(part.bytes for part in parts)]))
"""


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize(
    "case",
    [
        '["swin", [64, 64, 64], 1, 12, true]',
        '["swin", [64, 32, 64], 2, 24, true]',
        '["swin", [96, 64, 64], 1, 24, false]',
        '["unet", [32, 32, 32], 2, [16, 32, 64], true]',
        '["unet", [64, 64, 64], 1, [16, 32, 32], false]',
    ],
)
def test_a_networks_estimate_is_within_a_factor_of_two(case: str):
    result = subprocess.run([sys.executable, "-c", MEASURED, case], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    used, expected = (float(n) for n in result.stdout.strip().splitlines()[-1].strip("[]").split(","))
    assert 0.5 < expected / used < 2


SEGMENTED = """
import json, sys
import lightning, nibabel, numpy as np, torch
from medaccel.segmentation.model.inference import segment
from medaccel.segmentation.memory import Size, expected_of_scan
from medaccel.segmentation.model.presets import make_settings
from medaccel.training import memory

shape, classes = json.loads(sys.argv[1])
settings = make_settings({"spacing": [2.0, 2.0, 2.0], "window": [0.0, 100.0], "roi_size": [64, 32, 32]})
scan = nibabel.Nifti1Image(np.full(shape, 50, np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
parts = expected_of_scan(Size.of(scan, settings["spacing"]), settings, classes)
segment(torch.nn.Conv3d(1, classes, 1), scan, settings, keep_largest=0)
print(json.dumps([memory._status("VmHWM"), memory.expect("it", [part for part in parts if not part.network]).bytes]))
"""


# The second would need 2.2 GB for two copies of its probabilities.
@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("case", ["[[140, 100, 100], 104]", "[[280, 100, 100], 104]", "[[256, 200, 200], 3]"])
def test_a_segmentations_estimate_is_within_a_factor_of_one_and_a_half(case: str):
    result = subprocess.run([sys.executable, "-c", SEGMENTED, case], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    used, expected = (float(n) for n in result.stdout.strip().splitlines()[-1].strip("[]").split(","))
    assert 2 / 3 < expected / used < 1.5
    assert used < 2e9


# --- what is said, and refused --------------------------------------------------------------------------------------
STAGES = (
    [Part("a small thing", 1 * GIB, "reduce it")],
    [Part("a large thing", 40 * GIB, "reduce that"), Part("another", 2 * GIB, "reduce the other")],
)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv(memory.IGNORE, raising=False)
    monkeypatch.setattr(memory, "free_memory", lambda: 20 * GIB)
    return monkeypatch


def test_the_largest_stage_is_said_beside_what_is_free(free: pytest.MonkeyPatch):
    found = expect("the run", [Part("less", GIB / 2, "")], *STAGES[:1])
    assert found == (memory.BASE + GIB, "the run expects about 1.6 GiB of memory; 20.0 GiB are free")
    found = expect("the run", *STAGES[:1], processes=3)
    assert found.sentence == "the run expects about 4.7 GiB of memory; 20.0 GiB are free"


def test_what_cannot_fit_is_refused_with_the_number_and_what_to_reduce(free: pytest.MonkeyPatch):
    sentence = (
        r"^the run expects about 42\.6 GiB of memory, but 20\.0 GiB are free; 40\.0 GiB are for a large thing: "
        r"reduce that \(MEDACCEL_IGNORE_MEMORY=1 tries it anyway\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        expect("the run", *STAGES)
    free.setenv(memory.IGNORE, "1")
    assert expect("the run", *STAGES).sentence == "the run expects about 42.6 GiB of memory; 20.0 GiB are free"


def test_on_a_gpu_networks_count_there_and_the_rest_here(free: pytest.MonkeyPatch):
    free.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 80 * GIB))
    network = Part("the network", 8 * GIB, "reduce it", network=True)
    scans = Part("scans", 3 * GIB, "keep fewer")
    here, there = expect("the run", [network, scans], gpu=True).sentence.split(", and ")
    assert here == "the run expects about 3.6 GiB of memory; 20.0 GiB are free"
    assert there == "8.0 GiB of the GPU's, of which 10.0 GiB are free"
    with pytest.raises(
        ValueError, match=r"expects about 16\.0 GiB of GPU memory, but 10\.0 GiB are free; 8\.0 GiB are"
    ):
        expect("the run", [network, network, scans], gpu=True)


# --- what is free ---------------------------------------------------------------------------------------------------
def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_control_groups_of_version_2_limit_it(tmp_path: Path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/jobs/mine\n")
    group(root / "jobs" / "mine", memory__max="max", memory__current="100", memory__stat="anon 1")
    assert memory._group_memory(root, membership) is None
    group(root / "jobs", memory__max="5000", memory__current="3000", memory__stat="anon 9\ninactive_file 500")
    assert memory._group_memory(root, membership) == 2500
    group(root / "jobs" / "mine", memory__max="400")
    assert memory._group_memory(root, membership) == 300


def test_control_groups_of_version_1_limit_it(tmp_path: Path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("4:cpu,cpuacct:/\n3:memory:/docker/abc\n")
    # A container sees its own group as the top one.
    group(
        root / "memory",
        memory__limit_in_bytes="7000",
        memory__usage_in_bytes="6500",
        memory__stat="total_inactive_file 250",
    )
    assert memory._group_memory(root, membership) == 750


def test_nothing_is_known_where_the_system_says_nothing(tmp_path: Path):
    assert memory._group_memory(tmp_path, tmp_path / "none") is None


@needs_linux
def test_a_limit_of_the_address_space_counts():
    code = (
        "import resource; from medaccel.training import memory; free = memory.free_memory(); "
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); assert memory.free_memory() < min(free, 2**32)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert 0 < memory.free_memory() <= memory._meminfo("MemTotal")
    assert memory.resident() > 1e7


# --- the commands ---------------------------------------------------------------------------------------------------
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory.IGNORE, raising=False)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 * GIB)
    monkeypatch.setattr(memory, "resident", lambda: 0)


def test_a_restoration_is_refused_before_its_folder_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from medaccel.restoration.config import RestorationConfig
    from medaccel.restoration.pipeline import run

    refused(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    config = RestorationConfig(
        output=tmp_path / "run",
        methods=("gaussian1", "swin_unetr"),
        settings={"swin_unetr": {"roi_size": [96, 96, 96], "batch_size": 4}},
    )
    with pytest.raises(
        ValueError, match=r"the run expects about \d+\.\d GiB of memory, but 1\.0 GiB are free.*batch_size"
    ):
        run(config, force=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_pretraining_is_refused_before_its_folder_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from medaccel.pretraining.config import PretrainingConfig
    from medaccel.pretraining.pipeline import run

    refused(monkeypatch)
    with pytest.raises(ValueError, match=r"pretraining.* expects about \d+\.\d GiB of memory, but 1\.0 GiB are free"):
        run(PretrainingConfig(output=tmp_path / "run", network={"feature_size": 12}))
    assert not (tmp_path / "run").exists()


def test_a_segmentation_study_is_refused_before_its_folder_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from medaccel.segmentation.config import SegmentationConfig
    from medaccel.segmentation.pipeline import run

    refused(monkeypatch)
    config = SegmentationConfig(
        output=tmp_path / "run", inits=("random",), settings={"batch_size": 16}, primary={"none": True}
    )
    with pytest.raises(ValueError, match=r"the study expects about \d+\.\d GiB of memory, but 1\.0 GiB are free"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_restoration_of_one_image_says_what_it_expects_and_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from medaccel.restoration.apply import apply
    from medaccel.restoration.methods import make_method
    from medaccel.restoration.methods.base import RestorationTask

    make_method("gaussian1", RestorationTask((60,), 90)).save(tmp_path / "gaussian1.pt")
    rng = np.random.default_rng(0)
    save_nifti(tmp_path / "pet.nii.gz", make_nifti(rng.random((20, 20, 20), dtype=np.float32), np.eye(4)))
    arguments = tmp_path / "gaussian1.pt", tmp_path / "pet.nii.gz", tmp_path / "out.nii.gz"
    unlike = "doesn't say what images it was fitted on"
    with pytest.warns(UserWarning, match=unlike):
        apply(*arguments)
    assert "pet.nii.gz: restoring it expects about 0.6 GiB of memory; " in capsys.readouterr().err
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(memory, "resident", lambda: 0)
    with pytest.raises(ValueError, match=r"expects about 0\.6 GiB of memory"), pytest.warns(match=unlike):
        apply(*arguments, force=True)


# --- where windows are added up -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "size", "free", "place", "sentence"),
    [
        ("cpu", 1 * GIB, 0, "cpu", "windows are added up on the CPU"),
        ("cuda:1", 1 * GIB, 2 * GIB, "cuda:1", "windows are added up on cuda:1 (1.0 GiB of cuda:1's 2.0 GiB free)"),
        (
            "cuda:0", 1 * GIB + 1, 2 * GIB, "cpu",
            "windows are added up on the CPU (it would take 1.0 GiB of cuda:0's 2.0 GiB free)",
        ),
        (
            "cuda:0", 1 * GIB, 0, "cpu",
            "windows are added up on the CPU (it would take 1.0 GiB of cuda:0's 0.0 GiB free)",
        ),
    ],
)  # fmt: skip
def test_windows_are_added_up_on_the_gpu_where_half_of_its_free_memory_suffices(
    monkeypatch: pytest.MonkeyPatch, device: str, size: float, free: int, place: str, sentence: str
):
    asked = []

    def mem_get_info(of: torch.device) -> tuple[int, int]:
        asked.append(of)
        return free, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert memory.place_of_sums(torch.device(device), size) == (torch.device(place), sentence)
    assert asked == ([torch.device(device)] if device != "cpu" else [])
