# SPDX-License-Identifier: Apache-2.0
"""Edits volumes by SDEdit: a guide is noised part of the way, and a diffusion model brings it back."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medaccel.data import atomic_path, write_text
from medaccel.data.tensors import load_tensors
from medaccel.diffusion.noising import noised
from medaccel.diffusion.samplers import START, Model, Sampler, State
from medaccel.diffusion.sde import VESDE, _Sde
from medaccel.ops import diffusion_step

CONVENTIONS = ("medaccel", "original")


@dataclass(frozen=True)
class SDEditResult:
    """Holds K samples (K, B, C, *spatial), and their mean and standard deviation (B, C, *spatial; 0 for K = 1)."""

    samples: Tensor
    mean: Tensor
    std: Tensor


class SDEdit:
    """Synthesises volumes from a guide (Meng et al., "SDEdit", ICLR 2022) with any network, schedule and volume size.

    Args:
        model: (x (B, C, *spatial), time (B,)) → the prediction: a `DiffusionModelUNet`, say.
        sde: `VPSDE` or `VESDE`.
        t0: how far the guide is noised: an int counts levels of the schedule, a float is a share of it.
            `suggest_t0` names one. (The paper's 400–500 of 1000 are for strokes and photographs; they erase small
            structures.)
        steps: denoising steps, at most t0; None: every level.
        method: the sampler's method; default "ancestral" for VP, "euler_maruyama" for VE, which are the paper's.
        roi_size: the window that the network sees; None: the whole volume. Windows overlap and are blended; the noise
            belongs to the volume, so neighbouring windows agree on it.
        overlap: share by which windows overlap.
        sw_batch_size: windows at a time.
        conventions: "medaccel": mask 1 = generate, kept voxels are re-noised afresh to the level that the step leads
            to. "original", the paper's code: mask 1 = keep, kept voxels get the level that the step comes from and
            the one noise that the guide was noised with.
        repeats: passes, each beginning at the last one's result ("original" has 3 in its examples).
        options: `Sampler`'s: prediction, eta, corrector_steps, snr, clip, check_finite.

    Raises:
        ValueError: t0 outside the schedule, or an option that makes no sense.
    """

    def __init__(
        self,
        model: Model,
        sde: _Sde,
        t0: int | float,
        steps: int | None = None,
        *,
        method: str | None = None,
        roi_size: Sequence[int] | int | None = None,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        conventions: str = "medaccel",
        repeats: int = 1,
        **options: Any,
    ):
        if conventions not in CONVENTIONS:
            raise ValueError(f"SDEdit: conventions is {conventions!r}; expected one of {list(CONVENTIONS)}")
        if repeats < 1:
            raise ValueError(f"SDEdit: repeats is {repeats}; expected at least 1")
        if not 0 <= overlap < 1:
            raise ValueError(f"SDEdit: overlap is {overlap}; expected a share in [0, 1)")
        default = "euler_maruyama" if isinstance(sde, VESDE) else "ancestral"
        self.sampler = Sampler(sde, method or default, **options)
        self.indices = sde.indices(t0, steps)
        self.sde, self.model, self.conventions, self.repeats = sde, model, conventions, repeats
        self.roi_size, self.overlap, self.sw_batch_size = roi_size, overlap, sw_batch_size

    def suggest_t0(self, noise_level: float) -> int:
        """Returns the level whose noise matches the guide's own, by the schedule's `suggest_t0`."""
        return self.sde.suggest_t0(noise_level)

    def __call__(
        self,
        guide: Tensor,
        mask: Tensor | None = None,
        *,
        seeds: int | Sequence[int] = 8,
        folder: str | Path | None = None,
        save_every: int = 50,
        progress: bool = True,
    ) -> SDEditResult:
        """Draws K samples of volumes that the guide may stand for.

        Args:
            guide: (B, C, *spatial) in the units that the network sees, 2-D or 3-D.
            mask: broadcastable to the guide; `conventions` says which value generates. Kept voxels end as the guide
                exactly.
            seeds: one per sample, or their number K for 0 … K − 1. A sample depends on its own seed alone.
            folder: keeps finished samples and, every `save_every` steps, the running one; after an interruption, the
                same call goes on from there, to the same bits.
            progress: show a progress bar.
        """
        if guide.dim() not in (4, 5) or not guide.is_floating_point():
            raise ValueError(
                f"SDEdit: guide is {guide.dtype} of shape {tuple(guide.shape)}; expected floating-point (B, C, "
                "*spatial) with 2 or 3 spatial axes"
            )
        chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"SDEdit: seeds is {seeds}; expected at least one, all different")
        store = None if folder is None else _Store(Path(folder), self._fingerprint(guide, mask), save_every)
        samples = []
        for number, seed in enumerate(chosen):
            sample = None if store is None else store.finished(seed)
            if sample is None:
                label = f"sample {number + 1} of {len(chosen)}" if progress else None
                sample = self._sample(guide, mask, seed, store, label)
                if store is not None:
                    store.finish(seed, sample)
            samples.append(sample.to(guide.device))
        stacked = torch.stack(samples)
        std = stacked.std(dim=0) if len(samples) > 1 else torch.zeros_like(guide)
        return SDEditResult(stacked, stacked.mean(dim=0), std)

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns the network's prediction for a whole volume, from blended windows where it is larger than
        `roi_size`."""
        if self.roi_size is None:
            return self.model(x, time)
        from monai.inferers import sliding_window_inference

        def window(patch: Tensor) -> Tensor:
            return self.model(patch, time[:1].expand(patch.shape[0]))

        rank = x.dim() - 2
        roi = (self.roi_size,) * rank if isinstance(self.roi_size, int) else tuple(self.roi_size)
        blended = sliding_window_inference(x, roi, self.sw_batch_size, window, self.overlap, mode="gaussian")
        assert isinstance(blended, Tensor)
        return blended

    @torch.no_grad()
    def _sample(
        self, guide: Tensor, mask: Tensor | None, seed: int, store: "_Store | None", label: str | None
    ) -> Tensor:
        from tqdm import tqdm

        per_pass = len(self.indices) - 1
        saved = None if store is None else store.running(seed)
        done = 0 if saved is None else saved.pop("steps")
        source = guide if saved is None else saved["source"].to(guide)
        with tqdm(total=self.repeats * per_pass, initial=done, disable=label is None, desc=label, leave=False) as bar:
            for repeat in range(done // per_pass, self.repeats):
                noise_seed = _seed_of_pass(seed, repeat)
                state = None
                if saved is not None:
                    state = State(saved["x"].to(guide), done % per_pass, _to(saved["previous"], guide))
                    saved = None
                reached = state
                for reached in self._pass(source, guide, mask, noise_seed, state):
                    bar.update(1)
                    if store is not None and store.is_time(reached.step) and reached.step < per_pass:
                        store.save(seed, repeat * per_pass + reached.step, reached, source)
                assert reached is not None
                source = reached.x
        return source

    def _pass(
        self, source: Tensor, guide: Tensor, mask: Tensor | None, seed: int, state: State | None
    ) -> Iterable[State]:
        level = self.sde.level(self.indices[0])
        noise = None
        if self.conventions == "original" and mask is not None:
            noise = noised(torch.zeros_like(source), 0.0, 1.0, seed=seed, offset=START)
        if state is None:
            state = State(noised(source, level.alpha, level.sigma, noise=noise, seed=seed, offset=START))
        guided = None
        if mask is not None and self.conventions == "medaccel":
            guided = {"mask": mask, "guide": guide}
        for reached in self.sampler.run(self.predict, state, self.indices, seed=seed, guided=guided):
            if noise is not None and mask is not None:
                self._keep_as_original(reached, guide, mask, noise)
            yield reached

    def _keep_as_original(self, state: State, guide: Tensor, mask: Tensor, noise: Tensor) -> None:
        """Keeps voxels as the paper's code does: those where the mask is 1, at the level that the step came from,
        with one fixed noise."""
        last = self.indices[state.step] == -1
        alpha, sigma = self.sde.level(-1 if last else self.indices[state.step - 1])
        x = state.x
        held = guide if last else noised(guide, alpha, sigma, noise=noise)
        identity: dict[str, Any] = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 0.0, "s": 0.0}
        diffusion_step(x, x, out=(x, None), mask=mask != 1, guide=held, guide_scale=1.0, guide_std=0.0, **identity)

    def _fingerprint(self, guide: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Describes everything that must agree for an interrupted call to go on."""
        parts = [guide] if mask is None else [guide, mask]
        content = hashlib.sha256()
        for part in parts:
            content.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        levels = [list(self.sde.level(i)) for i in self.indices]
        s = self.sampler
        return {
            "volumes": content.hexdigest(),
            "levels": hashlib.sha256(json.dumps(levels).encode()).hexdigest(),
            "sampler": [s.method, s.prediction, s.eta, s.corrector_steps, s.snr, s.clip and list(s.clip)],
            "windows": [self.roi_size if self.roi_size is None else str(self.roi_size), self.overlap],
            "conventions": self.conventions,
            "repeats": self.repeats,
        }


def _seed_of_pass(seed: int, repeat: int) -> int:
    """Returns the seed of a pass; passes have independent noise."""
    return (seed + repeat * 0x9E3779B97F4A7C15) % 2**64


def _to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like)


class _Store:
    """Keeps samples in a folder, each file written whole or not at all."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], save_every: int):
        if save_every < 1:
            raise ValueError(f"SDEdit: save_every is {save_every}; expected at least 1")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.save_every = folder, save_every
        settings, text = folder / "sdedit.json", json.dumps(fingerprint, indent=1) + "\n"
        if settings.exists():
            if settings.read_text() != text:
                raise ValueError(
                    f"SDEdit: folder {folder} holds samples of another guide, mask or setting (sdedit.json differs); "
                    "expected the same call, or another folder"
                )
        else:
            write_text(settings, text)

    def _path(self, seed: int) -> Path:
        return self.folder / f"sample_{seed}.pt"

    def _write(self, path: Path, content: Any) -> None:
        with atomic_path(path, force=True) as temporary:
            torch.save(content, temporary)

    def _read(self, path: Path) -> Any:
        """Reads a file; returns None for one that is missing or damaged, which is then made again."""
        try:
            return load_tensors(path) if path.exists() else None
        except ValueError:
            return None

    def finished(self, seed: int) -> Tensor | None:
        path = self._path(seed)
        return self._read(path)

    def finish(self, seed: int, sample: Tensor) -> None:
        self._write(self._path(seed), sample.cpu())
        (self.folder / "running.pt").unlink(missing_ok=True)

    def is_time(self, step: int) -> bool:
        return step % self.save_every == 0

    def running(self, seed: int) -> dict[str, Any] | None:
        path = self.folder / "running.pt"
        saved = self._read(path)
        return saved if saved is not None and saved.pop("seed") == seed else None

    def save(self, seed: int, steps: int, state: State, source: Tensor) -> None:
        content = {
            "seed": seed,
            "steps": steps,
            "x": state.x.cpu(),
            "previous": None if state.previous is None else state.previous.cpu(),
            "source": source.cpu(),
        }
        self._write(self.folder / "running.pt", content)
