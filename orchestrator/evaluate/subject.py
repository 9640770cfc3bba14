"""A frozen backbone under measurement: its features and its cost under settings of token reduction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from itpn_core.benchmark.timing import Spread, interleaved_seconds, peak_bytes, ratios
from itpn_core.errors import ConfigError
from itpn_core.evaluation import count_flops
from itpn_core.models import Backbone, ModelConfig
from itpn_core.pretraining.teachers import ImageNorm
from itpn_core.reduction import TokenGathering, TokenMigration

Setting = tuple[TokenMigration, TokenGathering]
PLAIN = "unreduced"
AGAIN = "unreduced again"
OFF: Setting = (TokenMigration(), TokenGathering())


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs under a setting.

    Attributes:
        images_per_second: over the timed rounds.
        speedup: times faster than the unreduced model, from pairs of the same round.
        flops: floating point operations per image.
        peak_bytes: highest memory of activations per timed call; weights are not in it.
    """

    images_per_second: Spread
    speedup: Spread
    flops: int
    peak_bytes: int


class Subject:
    """A backbone at one image size on one device.

    Args:
        model: headless backbone; taken over (moved, resized, its settings changed).
        size: side of the images in pixels; positions are resampled to it.
        mean: per channel, of images in [0, 1].
        std: as `mean`.
        device: where to compute.
        dtype: reduced precision of matrix products, or None.

    Raises:
        ConfigError: the size does not fit the patch size.
    """

    def __init__(
        self,
        model: Backbone,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        try:
            model.set_input_size(size)
        except ValueError as error:
            raise ConfigError("data.image_size", size, "does not fit this model", str(error)) from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.size = size
        self.device = device
        self._norm = ImageNorm(mean, std).to(device)
        self._dtype = dtype

    def apply(self, setting: Setting) -> None:
        """Puts the model under a setting.

        Raises:
            ConfigError: this model or its grid cannot have it.
        """
        self.model.set_token_reduction(*setting)

    def normalise(self, images_u8_B3HW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to what the model takes, on the device."""
        out: Tensor = self._norm(images_u8_B3HW.to(self.device, non_blocking=True).float() / 255)
        return out

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features [B, E] of normalised images under the present setting."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            out: Tensor = self.model(images_B3HW)
        return out

    @torch.inference_mode()
    def features(self, images_u8_B3HW: Tensor) -> Tensor:
        """float32 [B, E] on the device under the present setting."""
        return self.forward(self.normalise(images_u8_B3HW)).float()

    @torch.inference_mode()
    def costs(
        self, settings: Mapping[str, Setting], images_u8_B3HW: Tensor, *, rounds: int, warmup: int
    ) -> dict[str, Cost]:
        """Speed, FLOPs and memory of settings, timed interleaved with each other; the settings are off afterwards.

        Args:
            settings: name -> setting; must hold `PLAIN`, whose speed is the unit.
            images_u8_B3HW: the batch that every call sees.
            rounds: timed rounds, at least 2.
            warmup: untimed rounds.

        Raises:
            ConfigError: a setting that this model cannot have.
        """
        for setting in settings.values():
            self.apply(setting)
        images_B3HW = self.normalise(images_u8_B3HW)

        def call(setting: Setting) -> Tensor:
            # Checked above; here only the switch is timed, as a person would set it once.
            self.model.migration, self.model.gathering = setting
            return self.forward(images_B3HW)

        calls = {name: partial(call, setting) for name, setting in settings.items()}
        seconds = interleaved_seconds(calls, self.device, rounds, warmup)
        memory = {name: peak_bytes(function, self.device) for name, function in calls.items()}
        flops = {name: self.flops(setting) for name, setting in settings.items()}
        faster, batch = ratios(seconds, PLAIN), len(images_B3HW)
        self.apply(OFF)
        return {
            name: Cost(Spread.of([batch / value for value in seconds[name]]), faster[name], flops[name], memory[name])
            for name in settings
        }

    def flops(self, setting: Setting) -> int:
        """Floating point operations of one image under a setting."""
        return flops_of(self.model.config, self.size, setting)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def flops_of(config: ModelConfig, size: int, setting: Setting) -> int:
    """Floating point operations of one image under a setting, counted on the meta device."""
    # The checkpoint's own reduction may not fit this size, and is not what is counted.
    whole = replace(config, migration=OFF[0], gathering=OFF[1])
    model = Backbone(whole, img_size=(size, size), device="meta").eval()
    model.set_token_reduction(*setting)
    return count_flops(model, torch.empty((1, config.in_chans, size, size), device="meta"))
