# SPDX-License-Identifier: Apache-2.0
"""The phantoms: plausible, varied, reproducible; the shifted generator differs from the standard one."""

import numpy as np
import pytest

from medaccel.phantoms.pet import Phantom, make_phantom
from medaccel.phantoms.pet_anatomy import ORGANS

SEEDS = range(6)


@pytest.fixture(scope="module")
def standard() -> list[Phantom]:
    return [make_phantom(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def shifted() -> list[Phantom]:
    return [make_phantom(seed, "shifted") for seed in SEEDS]


def test_the_same_seed_gives_the_same_bits_and_others_another_person(standard: list[Phantom]):
    again = make_phantom(0)
    for name in ("activity", "attenuation", "ct", "organs", "lesions"):
        assert np.array_equal(getattr(again, name), getattr(standard[0], name))
    assert not np.array_equal(standard[0].activity, standard[1].activity)


@pytest.mark.slow
def test_every_person_has_a_liver_and_lesions_inside_the_body(standard: list[Phantom], shifted: list[Phantom]):
    for phantom in standard + shifted:
        millilitres = np.prod(phantom.spacing) / 1000
        assert 100 < (phantom.organs == ORGANS["liver"]).sum() * millilitres < 2500
        assert phantom.lesions.max() == len(phantom.lesion_table) >= 1
        assert (phantom.activity[phantom.lesions > 0] > 0).all()
        assert (phantom.organs[phantom.lesions > 0] > 0).all()


def test_lesions_have_the_size_and_uptake_that_the_table_states(standard: list[Phantom]):
    for phantom in standard:
        for number, lesion in enumerate(phantom.lesion_table, start=1):
            assert 5 <= lesion["diameter_mm"] <= 42
            voxels = phantom.lesions == number
            assert voxels.any()
            if lesion["kind"] == "hot" and lesion["diameter_mm"] > 15:
                assert np.median(phantom.activity[voxels]) == pytest.approx(lesion["suv"], rel=0.5)


def test_uptake_is_lumpy_but_the_liver_nearly_even(standard: list[Phantom]):
    for phantom in standard:
        plain = phantom.lesions == 0
        liver = phantom.activity[(phantom.organs == ORGANS["liver"]) & plain]
        muscle = phantom.activity[(phantom.organs == ORGANS["muscle"]) & plain]
        assert 1.5 < np.median(liver) < 2.8
        assert 0 < liver.std() / liver.mean() < 0.3
        assert muscle.std() / muscle.mean() > 0.03


def test_air_holds_no_activity_and_tissue_attenuates(standard: list[Phantom]):
    phantom = standard[0]
    outside = phantom.organs == ORGANS.get("background", 0)
    assert phantom.activity[outside].max() < 0.5
    soft = phantom.attenuation[phantom.organs == ORGANS["liver"]]
    assert np.median(soft) == pytest.approx(0.096, abs=0.01)


def test_the_shifted_generator_makes_other_people(standard: list[Phantom], shifted: list[Phantom]):
    fat = [
        np.mean([(p.organs == ORGANS["fat"]).sum() / (p.organs > 0).sum() for p in group])
        for group in (standard, shifted)
    ]
    assert abs(fat[0] - fat[1]) > 0.02
    assert not np.array_equal(standard[0].activity, shifted[0].activity)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"generator": "other"}, "generator is 'other'"),
        ({"shape": (20, 20, 20)}, "expected at least"),
        ({"spacing": (4.0, -4.0, 4.0)}, "expected three of each"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make_phantom(0, **arguments)
