"""What arrives: the right images, once each, verified; holes stay holes; threads and processes give the same."""

import io
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from itpn_core.errors import ConfigError
from orchestrator.data.config import AugmentConfig, DataConfig
from orchestrator.data.decode import decode_rgb
from orchestrator.data.device import augment
from orchestrator.data.errors import DataError, IntegrityError, QuarantineError, StoreError
from orchestrator.data.fetch import Prefetcher
from orchestrator.data.index import ShardIndex
from orchestrator.data.loader import make_order, open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.shards import ShardOptions, make_shards
from orchestrator.data.views import EvalView, TrainView, render

CLASSES = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """203 PNG images whose pixels all equal their number, in 5 classes; shards of 41."""
    root = tmp_path_factory.mktemp("source")
    for number in range(203):
        folder = root / f"class{number % CLASSES}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9), number, np.uint8)).save(folder / f"{number:03d}.png")
    dest = tmp_path_factory.mktemp("shards")
    options = ShardOptions(val_fraction=0.0, shard_samples=41)
    return make_shards(str(root), str(dest), options, cache=dest, say=lambda _: None)


def config(manifest, **changes):
    return DataConfig(source=manifest.uri, **({"streams": 4, "run": 8, "block_runs": 3, "prefetch": 2} | changes))


def run(cfg, split, view=None, **changes):
    """All batches of one rank, and the counters."""
    settings = {"seed": 1, "epoch": 0, "first_batch": 0, "global_batch": 16, "rank": 0, "world": 1} | changes
    with open_loader(cfg, split, view=view or TrainView(8), **settings) as loader:
        return list(loader), loader.counters


def pixel_of(split):
    """Number that is painted on each sample id, from an evaluation pass."""
    cfg = DataConfig(source=split.uri)
    batches, _ = run(cfg, split, EvalView(9, crop=1.0), global_batch=50)
    ids = torch.cat([b.ids for b in batches])
    assert ids.tolist() == list(range(split.samples))
    return torch.cat([b.images[:, 0, 0, 0] for b in batches])


def test_every_image_arrives_once_with_its_label(made):
    split = made.split("train")
    pixels = pixel_of(split)
    assert sorted(pixels.tolist()) == list(range(203))
    batches, counters = run(config(made, last_batch="short"), split)
    ids = torch.cat([b.ids for b in batches])
    images = torch.cat([b.images for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert sorted(ids.tolist()) == list(range(203))
    assert (images == pixels[ids][:, None, None, None]).all()
    assert (labels == pixels[ids].long() % CLASSES).all()
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 8, 8)
    assert counters.samples == 203
    assert counters.retries == 0


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 9), st.sampled_from(["drop", "short"]), st.integers(0, 1))
@settings(max_examples=8)
def test_ranks_together_are_the_global_batch(made, world, global_batch, first, last, memory):
    split = made.split("train")
    cfg = config(made, last_batch=last, **({} if memory else {"memory_mb": 1}))
    whole, _ = run(cfg, split, global_batch=global_batch)
    per_rank = [
        run(cfg, split, global_batch=global_batch, rank=rank, world=world, first_batch=first)[0]
        for rank in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    for parts, expected in zip(zip(*per_rank, strict=True), whole[first:], strict=True):
        assert torch.cat([p.ids for p in parts]).equal(expected.ids)
        assert torch.cat([p.images for p in parts]).equal(expected.images)
        sizes = [len(p.ids) for p in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {p.index for p in parts} == {expected.index}


def test_processes_give_the_same_and_leave_nothing_behind(made):
    split = made.split("train")
    expected, _ = run(config(made), split, TrainView(8))
    children = threads()
    got, counters = run(config(made, workers=2), split, TrainView(8))
    assert [b.ids.tolist() for b in got] == [b.ids.tolist() for b in expected]
    assert all(a.images.equal(b.images) and a.labels.equal(b.labels) for a, b in zip(got, expected, strict=True))
    assert counters.samples == 192
    assert threads() == children


def threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("data-")}


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_threads_and_processes(made, workers):
    before = threads()
    with open_loader(
        config(made, workers=workers), made.split("train"), seed=0, epoch=0, first_batch=0, global_batch=16, rank=0,
        world=1, view=TrainView(8),
    ) as loader:  # fmt: skip
        next(loader)
    assert threads() == before
    assert multiprocessing.active_children() == []


class Spy:
    """Stands in for the store: remembers what was asked for and returns nothing."""

    def __init__(self):
        self.asked = []

    def read(self, ids):
        self.asked.append(ids.tolist())
        return dict.fromkeys(ids.tolist())

    def close(self):
        """Nothing is held."""


def prefetcher(manifest, spy, mean_bytes=1.0, **changes):
    cfg = config(manifest, **changes)
    order = make_order(cfg, manifest.split("train"), 1, TrainView(8))
    return Prefetcher(
        spy, order, cfg, samples=203, mean_bytes=mean_bytes, epoch=0, global_batch=16, stop_batch=12,
        owned=lambda _: (0, 16), skip=lambda _: False,
    )  # fmt: skip


def test_memory_budget_bounds_what_is_held_ahead(made):
    """Samples of 1 MiB: unbounded, whole blocks are held; with 40 MiB little more than the batches that are due."""
    peaks = {}
    for budget in (1000, 40):
        spied = prefetcher(made, Spy(), 2.0**20, memory_mb=budget, block_runs=25, prefetch=1)
        peaks[budget] = 0
        for index in range(12):
            ids, _ = spied.take(index)
            assert len(ids) == 16
            peaks[budget] = max(peaks[budget], len(spied._coming))
        spied.close()
    assert peaks[1000] > 80
    assert peaks[40] <= 40 + 16


def test_each_byte_is_read_once(made):
    """A reader takes what it needs of a run with one request: no run is read twice."""
    split = made.split("train")
    _, counters = run(config(made, last_batch="short"), split)
    assert counters.requests <= 26 + 4 + 32  # 26 runs of 8, some in two shards; one by one in the first batch
    assert counters.bytes <= sum(shard.bytes for shard in split.shards)


def test_the_first_batch_waits_for_no_whole_block(made):
    """Its samples are asked for alone, so that a start or a resume does not read a block of every stream first."""
    spy = Spy()
    spied = prefetcher(made, spy)
    ids, _ = spied.take(5)
    spied.close()
    first = [i for group in spy.asked for i in group if i in ids.tolist()]
    assert sorted(first) == sorted(ids.tolist())
    assert all(set(group) <= set(ids.tolist()) for group in spy.asked[: len({i // 8 for i in ids.tolist()})])
    everything = [i for group in spy.asked for i in group]
    assert len(everything) == len(set(everything))


def test_oversized_members_are_refused(made, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (800, 800, 3), dtype=np.uint8)
    (tmp_path / "in/a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "in/a/big.png")
    options = ShardOptions(val_fraction=0.0)
    big = make_shards(str(tmp_path / "in"), str(tmp_path / "out"), options, cache=tmp_path, say=lambda _: None)
    with pytest.raises(QuarantineError, match=r"data\.max_member_mb"):
        run(config(big, last_batch="short", max_member_mb=1), big.split("train"))


def damaged(made, tmp_path, change):
    """A copy of the data set in which `change(path)` was done to the second shard."""
    for path in os.scandir(made.uri):
        (tmp_path / path.name).write_bytes(Path(path).read_bytes())
    change(tmp_path / made.splits["train"][1].name)
    return Manifest.load(str(tmp_path))


def flip_byte(offset):
    def change(path):
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return change


def member_offset(made, sample, field):
    shard = made.splits["train"][1]
    index = ShardIndex.from_bytes(Path(made.uri, shard.index).read_bytes(), shard.index)
    return next(int(r["offset"]) for r in index.rows(sample) if index.fields[r["field"]] == field)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("image", "its bytes are not"), ("label", "its bytes are not"), ("zeros", "its bytes are not"), ("cut", "cut")],
)
def test_damage_is_an_error_by_default_and_a_hole_within_the_budget(made, tmp_path, kind, reason, caplog):
    sample = 40 if kind == "cut" else 7
    offset = member_offset(made, sample, "cls" if kind == "label" else "png")

    def change(path):
        data = bytearray(path.read_bytes())
        if kind == "cut":
            data = data[: offset + 5]
        elif kind == "zeros":
            data[offset : offset + 20] = bytes(20)
        else:
            data[offset] ^= 1
        path.write_bytes(data)

    broken = damaged(made, tmp_path, change)
    split = broken.split("train")
    name = split.shards[1].name
    with pytest.raises(QuarantineError, match=rf"{name}, offset \d+ \(sample {41 + sample}\): .*{reason}") as caught:
        run(config(broken, last_batch="short"), split)
    assert "data.quarantine_budget allows 0" in str(caught.value)

    with caplog.at_level(logging.WARNING):
        batches, counters = run(config(broken, last_batch="short", quarantine_budget=1), split)
    clean, _ = run(config(made, last_batch="short"), made.split("train"))
    assert [b.ids.tolist() for b in batches] == [b.ids.tolist() for b in clean]  # nobody moved
    assert counters.quarantined == [41 + sample]
    assert "1 of 1 allowed" in caplog.text
    ids, valid = torch.cat([b.ids for b in batches]), torch.cat([b.valid for b in batches])
    assert ids[~valid].tolist() == [41 + sample]
    hole = torch.cat([b.images for b in batches])[~valid]
    assert (hole == 0).all()
    assert torch.cat([b.labels for b in batches])[~valid].tolist() == [-1]

    again, counters = run(config(broken, last_batch="short", quarantine_budget=1), split, quarantined=[41 + sample])
    assert counters.damaged == []  # a known hole is not read again
    assert counters.retries == 0
    assert torch.cat([b.valid for b in again]).equal(valid)


def test_errors_cross_the_process_border(made, tmp_path):
    broken = damaged(made, tmp_path, flip_byte(member_offset(made, 3, "png")))
    with pytest.raises(QuarantineError, match="its bytes are not") as caught:
        run(config(broken, workers=1), broken.split("train"))
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_index_is_named(made, tmp_path):
    broken = damaged(made, tmp_path, lambda path: flip_byte(100)(path.with_suffix(".idx")))
    with pytest.raises(QuarantineError, match=r"its index cannot be used.*index_shards"):
        run(config(broken), broken.split("train"))
    (tmp_path / "b").mkdir()
    broken = damaged(made, tmp_path / "b", lambda path: path.with_suffix(".idx").unlink())
    with pytest.raises(QuarantineError, match=r"no such file"):
        run(config(broken), broken.split("train"))


def test_empty_epoch_and_bad_numbers_are_explained(made):
    with pytest.raises(DataError, match="203 samples fill no global batch of 500"):
        run(config(made), made.split("train"), global_batch=500)
    with pytest.raises(DataError, match="rank 2 of 2"):
        run(config(made), made.split("train"), rank=2, world=2)
    with pytest.raises(ConfigError, match=r"data\.streams = 0"):
        DataConfig(streams=0)
    with pytest.raises(ConfigError, match=r"data\.crop_scale"):
        DataConfig(crop_scale=(0.0, 1.0))


def encoded(pixels, kind, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "field"), [("PNG", "png"), ("WEBP", "webp")])
def test_lossless_formats_are_exact(kind, field):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert (decode_rgb(encoded(pixels, kind, lossless=True), field) == pixels).all()


def test_jpeg_is_what_pil_decodes():
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (8, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    data = encoded(smooth, "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_rgb(data, "jpg").astype(int) - reference).mean() < 0.5


def test_odd_modes():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert decode_rgb(encoded(grey, "JPEG"), "jpg").shape == (8, 8, 1)
    assert (decode_rgb(encoded(grey, "PNG"), "png")[:, :, 0] == grey).all()
    assert (decode_rgb(encoded(grey.astype(np.uint16) * 256, "PNG"), "png")[:, :, 0] == grey).all()
    rgba = np.dstack([grey] * 4)
    assert decode_rgb(encoded(rgba, "PNG"), "png").shape == (8, 8, 3)
    out = io.BytesIO()
    Image.fromarray(np.dstack([grey] * 3)).convert("CMYK").save(out, format="JPEG")
    assert decode_rgb(out.getvalue(), "jpg").shape == (8, 8, 3)
    out = io.BytesIO()
    Image.fromarray(grey).convert("P").save(out, format="PNG", transparency=b"\0\1")
    assert decode_rgb(out.getvalue(), "png").shape == (8, 8, 3)


@pytest.mark.parametrize("field", ["jpg", "png", "webp"])
def test_cut_and_foreign_images_are_refused(field):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    data = encoded(pixels, {"jpg": "JPEG"}.get(field, field.upper()))
    for broken in (data[: len(data) // 2], b"", b"GIF89a", data[:20]):
        with pytest.raises(IntegrityError, match="no whole"):
            decode_rgb(broken, field)
    with pytest.raises(IntegrityError, match="no whole"):
        decode_rgb(encoded(pixels, "BMP"), field)


@pytest.mark.parametrize(("kind", "field"), [("JPEG", "jpg"), ("PNG", "png")])
def test_decompression_bombs_are_refused_from_the_header(kind, field):
    data = encoded(np.zeros((3000, 3000), np.uint8), kind)
    began = time.process_time()
    with pytest.raises(IntegrityError, match="3000x3000 pixels refused"):
        decode_rgb(data, field, max_pixels=1_000_000)
    assert time.process_time() - began < 5  # a hang, not a timing


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
@settings(max_examples=40)
def test_crops_lie_inside_and_depend_on_the_sample_alone(height, width, sample):
    view = TrainView(8, scale=(0.05, 1.0))
    alone = view.draws(3, 1, np.array([sample]))[0]
    among = view.draws(3, 1, np.arange(1001))[sample]
    assert (alone == among).all()
    top, left, h, w = view.box(height, width, alone)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0 < w


def test_crop_statistics():
    view = TrainView(8, scale=(0.25, 1.0), ratio=(1.0, 1.0))
    boxes = [view.box(100, 100, row) for row in view.draws(0, 0, np.arange(4000))]
    area = np.array([h * w for _, _, h, w in boxes]) / 1e4
    assert 0.24 < area.min() < 0.27
    assert abs(area.mean() - 0.625) < 0.02
    assert all(h == w for _, _, h, w in boxes)


def test_render_matches_torchvision_and_repeats_grey():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    rgb = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    out = torch.empty(3, 16, 16, dtype=torch.uint8)
    render(rgb, (5, 6, 30, 40), out)
    expected = tvf.resized_crop(
        torch.from_numpy(rgb).permute(2, 0, 1), 5, 6, 30, 40, [16, 16], InterpolationMode.BICUBIC, antialias=True
    )
    assert out.equal(expected)
    render(rgb[:, :, :1].copy(), (5, 6, 30, 40), out)
    assert out[0].equal(out[1])
    assert out[0].equal(out[2])


def test_augmentation_depends_on_the_sample_alone():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cfg = AugmentConfig(flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4)
    ids = torch.arange(6) + 100
    whole = augment(images, ids, 7, 2, cfg)
    alone = torch.cat([augment(images[i : i + 1], ids[i : i + 1], 7, 2, cfg) for i in range(6)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert not augment(images, ids, 7, 3, cfg).equal(whole)
    plain = augment(images, ids, 7, 2, AugmentConfig(flip=0.0))
    assert plain.equal(images.float() / 255)


def test_flip_is_a_flip_of_about_half():
    images = torch.arange(8, dtype=torch.uint8).expand(1000, 3, 8, 8)
    out = augment(images, torch.arange(1000), 0, 0, AugmentConfig()) * 255
    flipped = out[:, 0, 0, 0] > 3
    assert 430 < int(flipped.sum()) < 570
    assert out[flipped].flip(-1).allclose(images[flipped].float())


def test_unknown_scheme():
    with pytest.raises(StoreError, match="scheme 'gopher' is not known"):
        Manifest.load("gopher://x/y")
