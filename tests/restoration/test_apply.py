# SPDX-License-Identifier: Apache-2.0
"""A stored method restores what a user has: NIfTI, DICOM or a study folder; or says in a sentence why not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from scipy import ndimage

from medaccel.cli import main
from medaccel.data import open_series, read_dicom_series, read_nifti, read_pet_series
from medaccel.restoration.apply import apply
from medaccel.restoration.methods.base import Restoration
from medaccel.restoration.study import PETStudy, save_study
from tests.data.dicom_series import write_series
from tests.data.test_dicom_exchange import whole
from tests.data.validator import errors
from tests.restoration.made import AFFINE, SPACING, Broken, Drawer, Smoother, body, checkpoint, nifti, values

pytestmark = pytest.mark.usefixtures("known_methods")


# --- What comes out ---


def test_an_image_keeps_its_grid_and_is_the_methods_result(tmp_path: Path) -> None:
    source, out = nifti(tmp_path / "pet.nii.gz"), tmp_path / "out.nii.gz"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is unlike
        written = apply(checkpoint(tmp_path), source, out, progress=False)
    assert written == (out,)
    image = read_nifti(out)
    np.testing.assert_array_equal(image.affine, read_nifti(source).affine)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(image.dataobj), ndimage.gaussian_filter(body(), 1.0))
    assert bytes(image.header["descrip"].item()).startswith(b"research only: smoother, 60 s to 90 s")
    assert Smoother.handed["seconds"] == 60
    assert Smoother.handed["volume"].dtype == np.float32
    assert Smoother.handed["spacing"] == pytest.approx(SPACING)


def test_a_drawing_method_writes_the_deviation_of_the_image(tmp_path: Path) -> None:
    source = nifti(tmp_path / "pet.nii.gz")
    written = apply(
        checkpoint(tmp_path, Drawer), source, tmp_path / "out.nii", seconds=30, samples=5, seed=3, progress=False
    )
    assert written == (tmp_path / "out_std.nii.gz", tmp_path / "out.nii")
    assert Drawer.handed["samples"] == 5
    # A third of the target's time is measured, so the activity's deviation counts for two thirds.
    expected = 2 / 3 * np.random.default_rng(3).random(body().shape).astype(np.float32)
    np.testing.assert_allclose(values(written[0]), expected, rtol=1e-6)


def test_a_dicom_series_becomes_a_derived_one_or_nifti(tmp_path: Path) -> None:
    source, model = write_series(tmp_path / "dicom"), checkpoint(tmp_path, Drawer)
    with pytest.warns(UserWarning, match="fitted on"):
        written = apply(model, source, tmp_path / "derived", progress=False)
    assert written == (tmp_path / "derived_std.nii.gz", tmp_path / "derived")
    suv = np.asarray(read_pet_series(source).dataobj)
    expected = ndimage.gaussian_filter(suv, 1.0)
    np.testing.assert_allclose(np.asarray(read_pet_series(written[1]).dataobj), expected, rtol=2e-5, atol=1e-6)
    header = open_series(written[1]).headers[0]
    assert '"kind": "bw"' in (tmp_path / "derived.suv.json").read_text()
    assert header.SeriesDescription == "research only: drawer, 60 s to 90 s"
    assert "Checkpoint with SHA-256" in header.DerivationDescription
    with pytest.warns(UserWarning, match="fitted on"):
        apply(model, source, tmp_path / "suv.nii.gz", progress=False)
    np.testing.assert_allclose(values(tmp_path / "suv.nii.gz"), expected, rtol=1e-6)


def test_the_output_of_a_dicom_series_can_be_normalised_otherwise(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.PatientSize, ds.PatientSex = 1.75, "F"

    source, model = write_series(tmp_path / "dicom", edit), checkpoint(tmp_path)
    for name in ("bw", "lbm"):
        with pytest.warns(UserWarning, match="fitted on"):
            apply(model, source, tmp_path / f"{name}.nii", suv=name, progress=False)
    lean = 9270 / (8780 + 244 * 70 / 1.75**2)
    np.testing.assert_allclose(values(tmp_path / "lbm.nii"), lean * values(tmp_path / "bw.nii"), rtol=1e-5)
    assert '"kind": "lbm"' in (tmp_path / "lbm.suv.json").read_text()
    with pytest.raises(ValueError, match="a derived DICOM series has its source's unit; expected bw"):
        apply(model, source, tmp_path / "derived", suv="lbm", progress=False)
    with pytest.raises(ValueError, match="suv is lbm, which needs a DICOM series"):
        apply(model, tmp_path / "bw.nii", tmp_path / "x.nii", suv="lbm", progress=False)


def test_a_study_folder_gives_the_exposure_and_its_ct(tmp_path: Path) -> None:
    ct = np.full(body().shape, 40, dtype=np.float32)
    study = PETStudy("s", SPACING, AFFINE, {30: body(1), 60: body(2)}, ct=ct)  # no PET_90
    save_study(tmp_path / "s", study)
    apply(checkpoint(tmp_path), tmp_path / "s", tmp_path / "out.nii", seconds=30, progress=False)
    np.testing.assert_array_equal(Smoother.handed["volume"], body(1))
    np.testing.assert_array_equal(Smoother.handed["ct"], ct)
    (tmp_path / "s" / "PET_60.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"PET_60\.nii\.gz: missing exposure \(the study has PET_30"):
        apply(checkpoint(tmp_path), tmp_path / "s", tmp_path / "out2.nii", progress=False)


def test_a_ct_is_brought_to_the_grid_with_air_beyond_it(tmp_path: Path) -> None:
    # HU = 10·z - 300 in world mm, on a finer grid that ends before the PET does.
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = [60, -80, 0]
    z = affine[2, 3] + 2 * np.arange(25)
    ct = np.broadcast_to(10 * z - 300, (70, 80, 25)).astype(np.float32)
    pet = nifti(tmp_path / "pet.nii.gz")
    path = nifti(tmp_path / "ct.nii.gz", ct, affine)
    with pytest.warns(UserWarning, match=r"ct\.nii\.gz: the CT has no tissue in \d+% of the PET's body"):
        apply(checkpoint(tmp_path), pet, tmp_path / "out.nii", ct=path, progress=False)
    found = Smoother.handed["ct"]
    assert found.shape == body().shape
    assert found.dtype == np.float32
    inside = 7 + 3 * np.arange(20) <= 48
    np.testing.assert_allclose(found[12, 11, inside], 10 * (7 + 3 * np.arange(20)[inside]) - 300, rtol=1e-4)
    assert (found[12, 11, ~inside] == -1000).all()


@pytest.mark.filterwarnings("ignore")  # it warns of the voxel size and the noise
def test_a_ct_may_be_a_dicom_series(tmp_path: Path) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.Modality, ds.RescaleSlope, ds.RescaleIntercept = "CT", 1, -500

    ct = write_series(tmp_path / "ct", edit, series_uid="1.2.4")
    apply(checkpoint(tmp_path), write_series(tmp_path / "pet"), tmp_path / "o.nii", ct=ct, progress=False)
    np.testing.assert_array_equal(Smoother.handed["ct"], np.asarray(read_dicom_series(ct).dataobj))


def test_a_ct_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii.gz", np.full(body().shape, np.nan, np.float32))
    with pytest.raises(ValueError, match=r"ct\.nii\.gz: 10560 voxels are NaN or infinite; expected HU"):
        apply(checkpoint(tmp_path), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", ct=path, progress=False)


def test_a_ct_elsewhere_is_refused(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 5000
    path = nifti(tmp_path / "ct.nii.gz", np.zeros((9, 9, 9), np.float32), affine)
    with pytest.raises(ValueError, match=r"ct\.nii\.gz: the CT has no tissue where the PET lies"):
        apply(checkpoint(tmp_path), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", ct=path, progress=False)


# --- What a user is warned of ---


def test_departures_from_the_training_images_are_warned_of(tmp_path: Path) -> None:
    coarse = AFFINE @ np.diag([1, 1, 2, 1])
    source = nifti(tmp_path / "pet.nii", affine=coarse)
    with pytest.warns(UserWarning, match=r"pet\.nii: the voxel size along k is 6 mm.*fitted on 3 mm"):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)


@pytest.mark.parametrize("margin", [0, 60])
@pytest.mark.parametrize("factor", [5000, 100, 1 / 5000, 1 / 100])
def test_other_units_are_refused_however_much_air_is_in_view(tmp_path: Path, factor: float, margin: int) -> None:
    source = nifti(tmp_path / "pet.nii", np.pad(factor * body(), margin).astype(np.float32))
    expected = r"pet\.nii: the body's median is .*; expected SUV, and these look like .* \(check_units: false"
    with pytest.raises(ValueError, match=expected):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.parametrize("margin", [0, 60])
@pytest.mark.parametrize("factor", [5, 1 / 20])
def test_rare_uptakes_are_warned_of_however_much_air_is_in_view(tmp_path: Path, factor: float, margin: int) -> None:
    source = nifti(tmp_path / "pet.nii", np.pad(factor * body(), margin).astype(np.float32))
    with pytest.warns(
        UserWarning, match=r"pet\.nii: the body's median is .*, where SUV have 0\.15 to 2\.2 as a rule"
    ):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)


@pytest.mark.filterwarnings("ignore")
def test_another_unit_is_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    source, ct = (
        nifti(tmp_path / "pet.nii", 5000 * body()),
        nifti(tmp_path / "ct.nii", np.eye(4)[:, :, None].repeat(9, 2)),
    )
    with pytest.raises(ValueError, match=r"ct\.nii: looks like a label map: 2 integer values from 0 to 1"):
        apply(checkpoint(tmp_path), nifti(tmp_path / "suv.nii"), tmp_path / "out.nii", ct=ct, progress=False)
    apply(checkpoint(tmp_path), source, tmp_path / "out.nii", ct=ct, check_units=False, progress=False)
    assert Smoother.handed["volume"].max() > 5000


@pytest.mark.filterwarnings("ignore")  # it warns of the voxel size and the noise
def test_the_duration_in_the_header_is_compared(tmp_path: Path) -> None:
    source = write_series(tmp_path / "d", lambda ds, k: setattr(ds, "ActualFrameDuration", 240000))
    with pytest.warns(UserWarning, match="fitted on") as record:
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)
    expected = "ActualFrameDuration is 240 s, but the method takes the image for one of 60 s"
    assert len([w for w in record if expected in str(w.message)]) == 1


@pytest.mark.parametrize("duration", [60000, None])
def test_a_fitting_or_unknown_duration_is_passed_over(tmp_path: Path, duration: int | None) -> None:
    def edit(ds: Dataset, k: int) -> None:
        ds.ActualFrameDuration = duration

    with pytest.warns(UserWarning, match="fitted on") as record:
        apply(checkpoint(tmp_path), write_series(tmp_path / "d", edit), tmp_path / "out.nii", progress=False)
    assert not [w for w in record if "ActualFrameDuration" in str(w.message)]


def test_a_checkpoint_that_says_nothing_of_its_images_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="doesn't say what images it was fitted on"):
        apply(checkpoint(tmp_path, told=False), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", progress=False)


# --- What is refused, in a sentence ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v - 1, r"pet\.nii: volume has a least value of -.*expected SUV >= 0"),
        (lambda v: np.where(v > 2.5, np.nan, v), r"pet\.nii: volume has \d+ voxels that are NaN"),
        (lambda v: 0 * v, r"pet\.nii: volume is zero everywhere"),
        (lambda v: v[:, :, :1], r"pet\.nii: volume has shape \(24, 22, 1\)"),
        (lambda v: np.stack([v, v], axis=-1), r"pet\.nii: .*expected a 3-D image"),
    ],
)
def test_images_that_are_no_pet_are_refused(tmp_path: Path, change, message: str) -> None:
    source = nifti(tmp_path / "pet.nii", change(body()))
    with pytest.raises(ValueError, match=message):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)
    assert not (tmp_path / "out.nii").exists()


def test_output_names_and_kinds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source, model = nifti(tmp_path / "pet.nii"), checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"out\.mha: the output's name must end in \.nii or \.nii\.gz, or be a folder"
    ):
        apply(model, source, tmp_path / "out.mha", progress=False)
    with pytest.raises(ValueError, match=r"a DICOM series as output needs one as input, but .*pet\.nii is none"):
        apply(model, source, tmp_path / "folder", progress=False)
    other = tmp_path / "model.pth"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.pth: expected a \.nii or \.nii\.gz file, the folder of"):
        apply(model, other, tmp_path / "out.nii", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        apply(model, tmp_path / "nowhere", tmp_path / "out.nii", progress=False)
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_replaced_is_told_before_the_work(tmp_path: Path) -> None:
    source, model = write_series(tmp_path / "dicom"), checkpoint(tmp_path)
    Smoother.handed.clear()
    with pytest.raises(FileExistsError, match="not empty"):
        apply(model, source, tmp_path, progress=False)
    with pytest.raises(ValueError, match="is no DICOM file"):
        apply(model, source, tmp_path, force=True, progress=False)
    with pytest.raises(ValueError, match="dicom is the input itself"):
        apply(model, source, source, force=True, progress=False)
    assert not Smoother.handed
    assert read_pet_series(source).shape == (5, 4, 6)


def test_what_exists_is_kept_unless_forced(tmp_path: Path) -> None:
    source, model, out = nifti(tmp_path / "pet.nii"), checkpoint(tmp_path, Drawer), tmp_path / "out.nii"
    (tmp_path / "out_std.nii.gz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"out_std\.nii\.gz"):
        apply(model, source, out, progress=False)
    apply(model, source, out, force=True, progress=False)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"out\.nii"):
        apply(model, source, out, progress=False)
    assert out.read_bytes() == before


def test_exposures_and_samples_that_a_method_has_not_are_refused(tmp_path: Path) -> None:
    source, out = nifti(tmp_path / "pet.nii"), tmp_path / "out.nii"
    with pytest.raises(ValueError, match="smoother: seconds is 45; expected one of 60, 30"):
        apply(checkpoint(tmp_path), source, out, seconds=45, progress=False)
    with pytest.raises(ValueError, match=r"samples is 4; expected none, as smoother draws no samples"):
        apply(checkpoint(tmp_path), source, out, samples=4, progress=False)
    with pytest.raises(ValueError, match=r"samples is 0; expected 1 or more"):
        apply(checkpoint(tmp_path, Drawer), source, out, samples=0, progress=False)


def test_a_result_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"broken gave 10560 voxels that are NaN"):
        apply(checkpoint(tmp_path, Broken), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", progress=False)
    assert not (tmp_path / "out.nii").exists()


# --- The command ---


def test_the_command_restores_and_answers_with_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model, out = nifti(tmp_path / "pet.nii"), checkpoint(tmp_path), tmp_path / "out.nii"
    command = [
        "restoration",
        "apply",
        "--checkpoint",
        str(model),
        str(source),
        str(out),
        "--quiet",
        "--seconds",
        "30",
    ]
    assert main(command) == 0
    assert f"written: {out}" in capsys.readouterr().out
    assert Smoother.handed["seconds"] == 30
    assert main(command) == 1
    assert "the file exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    model.write_bytes(b"junk")
    assert main([*command, "--force"]) == 1
    assert "smoother.pt: not a checkpoint" in capsys.readouterr().err


# --- DICOM in, DICOM out ---


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the checkpoint of a method that changes nothing."""
    monkeypatch.setattr(Smoother, "restore", lambda self, request: Restoration(request.volume.copy()))
    return checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big"])
def test_the_identity_gives_the_series_back(tmp_path: Path, identity: Path, syntax: str, hidden: bool) -> None:
    source, out = write_series(tmp_path / "dicom", whole, syntax=syntax), tmp_path / "derived"
    command = ["restoration", "apply", "--checkpoint", str(identity), str(source), str(out), "--quiet"]
    assert main([*command, "--deidentify", str(hidden).lower()]) == 0
    before, after = read_pet_series(source), read_pet_series(out)
    np.testing.assert_array_equal(after.affine, before.affine)
    most = np.asarray(before.dataobj).max(axis=(0, 1))
    apart = np.abs(np.asarray(after.dataobj) - np.asarray(before.dataobj)).max(axis=(0, 1))
    assert (apart <= 1e-4 * most).all()
    for path in out.iterdir():
        assert errors(path) == []
        assert (b"Doe^Jane" in path.read_bytes()) != hidden


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_identity_gives_a_real_series_back(tmp_path: Path, identity: Path, data_dir: Path) -> None:
    source = data_dir / "pet" / "sts_001_fdg_pet_dicom"
    apply(identity, source, tmp_path / "derived", progress=False)
    before, after = read_pet_series(source), read_pet_series(tmp_path / "derived")
    np.testing.assert_array_equal(after.affine, before.affine)
    most = np.asarray(before.dataobj).max(axis=(0, 1))
    apart = np.abs(np.asarray(after.dataobj) - np.asarray(before.dataobj)).max(axis=(0, 1))
    assert (apart <= 1e-4 * most).all()
    assert errors(next((tmp_path / "derived").iterdir())) == []


def test_hiding_the_patient_is_for_dicom(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out\.nii: deidentify is for DICOM output"):
        apply(checkpoint(tmp_path), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", deidentify=True, progress=False)


# --- Other units ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [15, 5000, 1 / 5000])
def test_force_takes_what_is_no_suv_and_warns(tmp_path: Path, factor: float) -> None:
    source = nifti(tmp_path / "pet.nii", (factor * body()).astype(np.float32))
    with pytest.raises(ValueError, match=r"the body's median is .*expected SUV"):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", progress=False)
    with pytest.warns(UserWarning, match=r"pet\.nii: the body's median is .*expected SUV"):
        apply(checkpoint(tmp_path), source, tmp_path / "out.nii", force=True, progress=False)
    assert (tmp_path / "out.nii").exists()


def test_a_maximum_of_tens_of_thousands_is_no_suv(tmp_path: Path) -> None:
    hot = body()
    hot[10, 10, 10] = 30000
    with pytest.raises(ValueError, match=r"pet\.nii: its maximum is 3e\+04, where SUV have 10000 at most"):
        apply(checkpoint(tmp_path), nifti(tmp_path / "pet.nii", hot), tmp_path / "out.nii", progress=False)


def test_bqml_is_converted_by_weight_and_dose(tmp_path: Path) -> None:
    source = nifti(tmp_path / "pet.nii", (5000 * body()).astype(np.float32))
    command = [
        "restoration",
        "apply",
        "--checkpoint",
        str(checkpoint(tmp_path)),
        str(source),
        str(tmp_path / "o.nii"),
    ]
    assert main([*command, "--quiet", "--unit", "bqml", "--weight", "70", "--dose", "3.5e8"]) == 0
    np.testing.assert_allclose(Smoother.handed["volume"], body(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "bqml"}, "unit is bqml, and weight and dose is missing"),
        ({"unit": "bqml", "weight": 70.0}, "unit is bqml, and dose is missing"),
        ({"unit": "bqml", "weight": 70000.0, "dose": 3.5e8}, r"weight is 70000; expected 1 to 300 kg"),
        ({"unit": "bqml", "weight": 70.0, "dose": 350.0}, r"dose is 350; expected 10000 to 1e\+11 Bq"),
        ({"weight": 70.0}, "weight and dose are for unit bqml"),
        ({"unit": "kBq"}, "unit is 'kBq'; expected suv or bqml"),
    ],
)
def test_units_that_lack_something_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply(checkpoint(tmp_path), nifti(tmp_path / "p.nii"), tmp_path / "out.nii", progress=False, **options)
