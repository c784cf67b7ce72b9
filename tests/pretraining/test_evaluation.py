# SPDX-License-Identifier: Apache-2.0
"""Held-out figures: perfect for a network that knows, chance for one that doesn't; the harmonic fill is harmonic."""

from typing import Any

import numpy as np
import pytest
import torch

from medaccel.losses import pixel_centres
from medaccel.pretraining import evaluation
from medaccel.pretraining.data import Volumes
from medaccel.pretraining.harmonic import harmonic_fill
from medaccel.pretraining.items import Items
from medaccel.pretraining.network import PretrainingNet
from medaccel.pretraining.tasks import PretextTask, make_tasks
from tests.pretraining.made import ROI, WINDOW, prepared

SQUARE = (64, 64, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    scans = prepared(tmp_path_factory.mktemp("evaluation"))
    return Volumes([*scans.training, *scans.held_out])


def test_a_linear_image_is_harmonic_and_comes_back_as_it_was():
    i, j, k = np.indices((14, 12, 10)).astype(float)
    image = 3 * i - 2 * j + 0.5 * k + 7
    mask = np.zeros(image.shape, dtype=bool)
    mask[4:9, 3:8, 2:7] = True
    hidden = np.where(mask, 99.0, image)
    np.testing.assert_allclose(harmonic_fill(hidden, mask), image, atol=1e-5)


def test_every_voxel_of_the_fill_is_the_mean_of_its_neighbours_also_at_the_images_border():
    rng = np.random.default_rng(0)
    image, mask = rng.normal(size=(12, 11)), np.zeros((12, 11), dtype=bool)
    mask[0:6, 3:8] = True
    filled = harmonic_fill(image, mask)
    np.testing.assert_array_equal(filled[~mask], image[~mask])
    for i, j in np.argwhere(mask):
        around = [filled[a, b] for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if a >= 0]
        assert filled[i, j] == pytest.approx(np.mean(around), abs=1e-6)


def test_holes_that_make_no_sense_are_refused():
    image = np.ones((4, 4))
    np.testing.assert_array_equal(harmonic_fill(image, np.zeros((4, 4), dtype=bool)), image)
    with pytest.raises(ValueError, match="the hole is the whole image"):
        harmonic_fill(image, np.ones((4, 4), dtype=bool))
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); expected the image's, \(4, 4\)"):
        harmonic_fill(image, np.ones(4, dtype=bool))


class _Knows:
    """A network that gives back, at every level, what `answer` makes of its input."""

    def __init__(self, task: PretextTask, answer: Any) -> None:
        self.heads, self.answer = {task.name: lambda x: x}, answer

    def features(self, x: torch.Tensor, levels: Any) -> dict[str, torch.Tensor]:
        return {level: self.answer(x) for level in levels}


def test_a_network_that_restores_everything_has_no_error_and_beats_the_harmonic_fill(
    volumes: Volumes, monkeypatch: pytest.MonkeyPatch
):
    task: Any = make_tasks(["inpainting"], {}, ROI)[0]
    missing: list[torch.Tensor] = []
    hide = task.hide

    def watched(view: torch.Tensor, rng: np.random.Generator) -> Any:
        mask, seen = hide(view, rng)
        missing.append(view[None] - task.fill(seen[None], mask[None]))
        return mask, seen

    monkeypatch.setattr(task, "hide", watched)
    knows: Any = _Knows(task, lambda x: missing[-1])
    figure, pictures = evaluation.inpainting_error(knows, task, volumes, WINDOW, 0, CPU)
    assert figure["error_hu"] == pytest.approx(0, abs=1e-3)
    assert figure["reached"]
    assert 10 < figure["harmonic_hu"] < 400
    assert figure["better_in"] == figure["scans"] == 4
    assert set(pictures) == {f"inpainting: {name}" for name in ("input", "network", "harmonic", "truth")}
    blank: Any = _Knows(task, torch.zeros_like)
    untrained = evaluation.inpainting_error(blank, task, volumes, WINDOW, 0, CPU)[0]
    assert untrained["error_hu"] == untrained["chance"] > untrained["harmonic_hu"]
    assert not untrained["reached"]


def _drawn(task: PretextTask, volumes: Volumes, count: int) -> list[dict[str, torch.Tensor]]:
    items = Items(volumes, [task], windows=[WINDOW], roi_size=ROI)
    return [items.item(n % len(volumes), np.random.default_rng([5, n])) for n in range(count)]


def test_pixels_that_say_where_they_are_find_each_other(volumes: Volumes, monkeypatch: pytest.MonkeyPatch):
    task: Any = make_tasks(["pixel"], {}, ROI)[0]
    drawn = _drawn(task, volumes, 3)

    def places(net: Any, maps: Any) -> torch.Tensor:
        """Returns features of the places in mm that are most alike where these are nearest."""
        item = drawn[next(counter)]
        found = []
        for number in (1, 2):
            affine = evaluation_affine(task, item[f"affine{number}"])
            at = pixel_centres((16, 8, 8), affine[None])[0] / 400.0
            # On a sphere: the angle between two of these grows with the distance of the places.
            rows = torch.cat([at, torch.ones(len(at), 1)], dim=1)
            found.append(rows.T.reshape(4, 16, 8, 8))
        return torch.stack(found)

    def evaluation_affine(task: Any, affine: torch.Tensor) -> torch.Tensor:
        return task.affines({"affine1": affine[None], "affine2": affine[None]}, torch.empty(1, 1, 16, 8, 8))[0][0]

    counter = iter(range(3))
    monkeypatch.setattr(task, "project", places)
    figure = evaluation.pixel_retrieval(_Knows(task, lambda x: x), task, drawn, WINDOW, CPU)  # type: ignore[arg-type]
    assert figure["share"] > 0.9
    assert figure["share_in_body"] > 0.9
    assert figure["reached"]
    monkeypatch.setattr(task, "project", lambda net, maps: torch.ones(2, 4, 16, 8, 8))
    blind = evaluation.pixel_retrieval(_Knows(task, lambda x: x), task, drawn, WINDOW, CPU)  # type: ignore[arg-type]
    assert blind["share"] < 0.1
    assert not blind["reached"]
    assert 0 < blind["chance"] < 0.02


def test_a_view_finds_its_own_or_by_chance(volumes: Volumes, monkeypatch: pytest.MonkeyPatch):
    task: Any = make_tasks(["instance"], {}, ROI)[0]
    drawn = _drawn(task, volumes, 8)
    numbers = iter(range(2))

    def knows(net: Any, maps: Any) -> torch.Tensor:
        """In the first window; in the second one everything looks alike."""
        assert maps["encoder4"].shape[0] == 16
        one = torch.ones(8, 8) if next(numbers) else torch.eye(8)
        return torch.stack([one, 0.9 * one + 0.1], dim=1).flatten(0, 1)

    monkeypatch.setattr(task, "embed", knows)
    net: Any = _Knows(task, lambda x: x)
    figure = evaluation.instance_retrieval(net, task, [drawn], 4, CPU)
    assert (figure["top1"], figure["chance"], figure["reached"]) == (1.0, 1 / 8, True)
    numbers = iter(range(2))
    figure = evaluation.instance_retrieval(net, task, [drawn, drawn], 4, CPU)
    assert (figure["top1_by_window"], figure["top1"], figure["reached"]) == ([1.0, 1 / 8], 9 / 16, False)
    monkeypatch.setattr(task, "embed", lambda net, maps: torch.ones(16, 3))
    assert evaluation.instance_retrieval(net, task, [drawn], 4, CPU)["top1"] == 1 / 8


def test_a_network_that_sees_which_side_is_heavier_tells_the_rotation(volumes: Volumes):
    task: Any = make_tasks(["rotation"], {}, SQUARE)[0]

    class Fixed:
        """Says the same of everything."""

        def logits(self, net: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(len(x), 4)

    class Sighted:
        """Compares with what it was shown unturned: the first of the four."""

        def logits(self, net: Any, x: torch.Tensor) -> torch.Tensor:
            turned = torch.stack([torch.rot90(x[0], n, (1, 2)) for n in range(4)])
            return -(x[:, None] - turned[None]).abs().flatten(2).mean(dim=2)

    for kind, expected in ((Fixed, 0.25), (Sighted, 1.0)):
        fake: Any = task
        fake.logits = kind().logits
        figure = evaluation.rotation_accuracy(None, fake, volumes, WINDOW, 0, CPU)  # type: ignore[arg-type]
        assert figure["accuracy"] == expected
        assert figure["crops"] == 16


def test_the_figures_are_the_same_whenever_they_are_taken_and_leave_the_network_as_it_was(volumes: Volumes):
    tasks = make_tasks(["instance", "pixel"], {}, ROI)
    torch.manual_seed(0)
    net = PretrainingNet(tasks, feature_size=12).train()
    options: dict[str, Any] = {"windows": [WINDOW], "roi_size": ROI, "views": {}, "pairs": 4}
    first = evaluation.evaluate(net, tasks, volumes, **options)
    assert evaluation.evaluate(net, tasks, volumes, **options).figures == first.figures
    assert net.training
    assert set(first.figures) == {"instance", "pixel"}
    assert set(first.pictures) == {"view1", "view2"}
