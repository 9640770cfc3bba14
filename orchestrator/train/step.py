"""One optimizer step: micro-batches, global normalisation, guard, update. Nothing in here waits for the device."""

from __future__ import annotations

import contextlib
import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from itpn_core.random import stream_keys
from itpn_core.task import Examples
from orchestrator.data.config import DataConfig
from orchestrator.data.device import augment
from orchestrator.data.loader import Batch
from orchestrator.train.config import TrainConfig
from orchestrator.train.optimizer import Schedule, set_lr
from orchestrator.train.precision import autocast_dtype
from orchestrator.train.state import TrainState


def even_parts(count: int, parts: int) -> list[slice]:
    """Cuts `range(count)` into contiguous slices whose sizes differ by at most one, the larger ones last.

    The last slice must not be empty when any is: its backward pass carries the gradient all-reduce.
    """
    edges = [index * count // parts for index in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def micro_batches(global_batch: int, world: int, micro_batch: int) -> int:
    """Forward passes per step, the same on every rank (shares of the global batch differ by at most one image)."""
    share = -(-global_batch // world)
    return -(-share // micro_batch) if micro_batch else 1


def whole_pairs(part: slice, first: int, count: int) -> slice:
    """The slice widened to whole pairs (slots 2i and 2i+1 of the global batch) of a batch of `count` samples.

    Args:
        part: samples of the batch at hand.
        first: slot of that batch's first sample.
        count: samples at hand.
    """
    if part.start == part.stop:
        return part
    low = part.start - (first + part.start) % 2
    return slice(max(low, 0), min(part.stop + (first + part.stop) % 2, count))


class Step:
    """Applies one global batch to a training state.

    The loss is the sum over this rank's samples divided by the GLOBAL number of samples, so that gradients summed over
    ranks are those of the whole batch, whatever the world size. DDP and FSDP average over ranks, hence the
    factor `world`.

    Args:
        state: what is trained; its `step` advances by one per call.
        config: batch, precision, optimizer and guard.
        data: augmentation that runs on the device.
        schedule: learning rates, and the length of the run.
        device: where to compute.
        world: number of ranks.
    """

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        data: DataConfig,
        schedule: Schedule,
        device: torch.device,
        world: int,
    ) -> None:
        self.state = state
        self._config = config
        self._data = data
        self._schedule = schedule
        self._device = device
        self._world = world
        self._parts = micro_batches(config.global_batch, world, config.micro_batch)
        self._dtype = autocast_dtype(config.precision, device)
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: Batch, global_count: int) -> dict[str, Tensor]:
        """Runs forward, backward and update.

        Args:
            batch: this rank's part of the global batch; holes (quarantined samples) get no weight.
            global_count: samples of the whole batch over all ranks, holes included.

        Returns:
            This rank's summands of the global values: "loss", its parts, "grad_norm", "skipped" and, in fp16,
            "overflowed" and "loss_scale".
        """
        set_lr(self.state.optimizer, self._schedule.lr(self.state.step))
        sums: dict[str, Tensor] = {}
        first, last, _ = batch.own.indices(len(batch.ids))
        parts = [slice(first + p.start, first + p.stop) for p in even_parts(last - first, self._parts)]
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self.state.parallel.accumulating():
                for name, value in self._forward_backward(batch, part, global_count).items():
                    sums[name] = sums[name] + value if name in sums else value
        # Equal on all ranks; divided here because the window sums over ranks.
        return sums | {name: value / self._world for name, value in self._update(sums["loss"]).items()}

    def _forward_backward(self, batch: Batch, part: slice, global_count: int) -> dict[str, Tensor]:
        examples = self._examples(batch, part)
        weight_B, keys_B = examples.valid[examples.own], examples.keys[examples.own]
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            images_B3HW, targets = self.state.task.prepare(examples)
            output = self.state.parallel.forward(images_B3HW, targets, keys_B)
        losses = {"loss": output.loss_B, **output.parts}
        # `where`, not a product: a hole's loss may be anything, also not a number.
        kept = {name: torch.where(weight_B, value_B, 0) for name, value_B in losses.items()}
        mean = kept["loss"].sum() * (self._world / global_count)
        torch.autograd.backward(self.state.loss_scale.scaled(mean))
        return {name: value_B.detach().sum() / global_count for name, value_B in kept.items()}

    def _examples(self, batch: Batch, part: slice) -> Examples:
        """Samples of a part, on the device and augmented; with their partners, for a task that is `paired`."""
        wide = whole_pairs(part, batch.first, len(batch.ids)) if self.state.task.paired else part
        own = slice(part.start - wide.start, part.stop - wide.start)
        images_u8, ids_B, labels_B, valid_B = (
            t[wide].to(self._device, non_blocking=True) for t in (batch.images, batch.ids, batch.labels, batch.valid)
        )
        images_B3HW = augment(images_u8, ids_B, self._config.seed, batch.epoch, self._data.augment)
        if self._config.precision == "fp64":
            images_B3HW = images_B3HW.double()
        keys_B = stream_keys(self._config.seed, batch.epoch, ids_B, "objective")
        return Examples(images_B3HW, labels_B, valid_B, keys_B, own)

    def _update(self, loss: Tensor) -> dict[str, Tensor]:
        scale, parallel = self.state.loss_scale, self.state.parallel
        parallel.take_gradients()
        scale.unscale(self._parameters)
        limit = self._config.optimizer.clip_grad_norm or float("inf")
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = parallel.total_norm(torch.nn.utils.get_total_norm(gradients, foreach=True))
        torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm, foreach=True)
        overflowed = scale.update(norm)
        refused = self._refuse(norm, loss)
        optimizer = self.state.optimizer
        # Fused AdamW leaves weights and moments untouched when `found_inf` is 1: the decision stays on the device.
        optimizer.found_inf = refused  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        # The fused kernel writes without raising versions, by which models tell that what they cached is out of date.
        torch.autograd.graph.increment_version(self._parameters)
        parallel.drop_gradients()
        self.state.step += 1
        self.state.average.update(self.state.step)
        self.state.task.ema_update(self.state.step / self._schedule.total)
        # An overflow is how the right scale is found: it costs a step and no budget.
        values = {"grad_norm": norm, "skipped": refused - overflowed}
        return values | ({"overflowed": overflowed, "loss_scale": scale.tensor[0]} if scale.enabled else {})

    @torch.no_grad()
    def _refuse(self, norm: Tensor, loss: Tensor) -> Tensor:
        """1 where the update must not happen: gradient or loss is not finite or far above what it was.

        Args:
            norm: of the whole gradient, equal on all ranks.
            loss: this rank's summand of the global loss.
        """
        mean, history = self.state.grad_norm_mean, self.state.loss_history
        bad = ~torch.isfinite(norm)
        if self._config.guard.spike_factor:
            bad |= (mean > 0) & (norm > self._config.guard.spike_factor * mean)
        if history.sigmas:
            loss = loss.to(history.tensor.dtype, copy=True)
            if self._world > 1:
                dist.all_reduce(loss)
            bad |= history.stands_out(loss)
            history.take(loss, bad)
        kept = torch.where(mean > 0, 0.99 * mean + 0.01 * norm.to(mean.dtype), norm.to(mean.dtype))
        mean.copy_(torch.where(bad, mean, kept))
        return bad.to(torch.float32)
