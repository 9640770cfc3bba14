"""A few fixed validation images that are watched during a run: their picture, and the health of their features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from itpn_core.pretraining.base import PretrainTask
from itpn_core.random import stream_keys
from orchestrator.config.tree import PretrainConfig
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import EvalView
from orchestrator.track.figures import ColourBasis, feature_figure

WATCHED = 32


class Watched:
    """Images at equal distances over the val split, read once; used by rank 0.

    Args:
        config: resolved configuration.
        manifest: the data.
        device: where the task is.
    """

    def __init__(self, config: PretrainConfig, manifest: Manifest, device: torch.device) -> None:
        self._config = config
        self._split = manifest.split(config.data.val_split)
        self._device = device
        self._images: Tensor | None = None
        self._keys: Tensor | None = None
        self.basis: dict[str, ColourBasis] | None = None
        """Colours of the pictures so far; None before the first."""

    def health(self, task: PretrainTask) -> dict[str, float]:
        """Spread and effective rank of the features per level ("std/…", "rankme/…"); waits for the device."""
        return task.health(self._read()[0])

    def figure(self, task: PretrainTask, step: int, directory: Path) -> Path | None:
        """Draws input, mask and features; None when no picture is wanted."""
        count = self._config.eval.figure_images
        if not count:
            return None
        images, keys = self._read()
        path = directory / "figures" / f"features-{step:08d}.png"
        parts = task.figure(images[:count], keys[:count])
        # Colours are fitted on the first picture, so that the same feature keeps its colour over the run.
        self.basis = feature_figure(path, parts, step=step, title=self._config.run.name, basis=self.basis)
        return path

    def _read(self) -> tuple[Tensor, Tensor]:
        if self._images is None or self._keys is None:
            config = self._config
            count = min(max(WATCHED, config.eval.figure_images), self._split.samples)
            view = EvalView(config.data.image_size, config.eval.crop, count)
            with open_loader(
                config.data,
                self._split,
                seed=0,
                epoch=0,
                first_batch=0,
                global_batch=count,
                rank=0,
                world=1,
                view=view,
            ) as batches:
                batch = next(batches)
            images = batch.images.to(self._device).float() / 255
            self._images = images.double() if config.train.precision == "fp64" else images
            self._keys = stream_keys(0, 0, batch.ids.to(self._device), "figure")
        return self._images, self._keys
