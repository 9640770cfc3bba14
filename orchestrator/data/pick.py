"""A few images by their place in an evaluation view's order: for pictures, not for training."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data.config import DataConfig
from orchestrator.data.decode import decode_rgb
from orchestrator.data.errors import IntegrityError
from orchestrator.data.fetch import Encoded, SampleReader
from orchestrator.data.loader import make_order
from orchestrator.data.manifest import Split
from orchestrator.data.views import EvalView, render


def read_images(config: DataConfig, split: Split, view: EvalView, places_N: npt.NDArray[np.int64]) -> Tensor:
    """Reads, checks, decodes and cuts single images.

    Args:
        config: how to read.
        split: which samples.
        view: which of them, and at which size.
        places_N: any places in the view's order, repeated or not.

    Returns:
        uint8 [N, 3, S, S]; a damaged sample is black.
    """
    order = make_order(config, split, 0, view)
    of_split_N = order.batch(0, 0, min(view.samples or split.samples, split.samples))[places_N]
    ids_U, back_N = np.unique(of_split_N, return_inverse=True)
    reader = SampleReader(split, config)
    images = torch.zeros((len(ids_U), 3, view.image_size, view.image_size), dtype=torch.uint8)
    no_draws = np.empty(0, dtype=np.float32)
    for slot, sample_id in enumerate(ids_U):
        sample = reader.read(ids_U[slot : slot + 1])[int(sample_id)]
        with suppress(IntegrityError):
            if isinstance(sample, Encoded):
                pixels = decode_rgb(sample.data, sample.field, config.max_pixels)
                render(pixels, view.box(pixels.shape[0], pixels.shape[1], no_draws), images[slot])
    return images[torch.from_numpy(back_N)]
