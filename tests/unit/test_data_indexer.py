"""Tars that were there before us: indexed, resumed, selected by patterns, verified; what is wrong in them is named."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from jobs.index_shards import main
from orchestrator.data.config import DataConfig
from orchestrator.data.errors import IntegrityError, ManifestError, QuarantineError
from orchestrator.data.indexer import index_shards, verify
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.views import TrainView


def png(value=7):
    out = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(out, format="PNG")
    return out.getvalue()


def write_tar(path, samples):
    """Samples are dicts of extension to bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for field, data in sample.items():
                info = tarfile.TarInfo(f"{number:04d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def good(count, label=b"1"):
    return [{"png": png(n), "json": b"{}", "cls": label} for n in range(count)]


def read(split, **changes):
    config = DataConfig(source=split.uri, run=4, block_runs=2, streams=1, last_batch="short", **changes)
    with open_loader(
        config, split, seed=0, epoch=0, first_batch=0, global_batch=4, rank=0, world=1, view=TrainView(4)
    ) as loader:
        return list(loader), loader.counters


def test_splits_by_name_and_resume(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "deep/validation-1.tar"):
        write_tar(tmp_path / name, good(5))
    report = index_shards(str(tmp_path))
    assert {n: len(s) for n, s in report.manifest.splits.items()} == {"train": 2, "val": 2}
    assert report.manifest.classes == ("0", "1")
    assert index_shards(str(tmp_path)).reused == 4
    write_tar(tmp_path / "val-0.tar", good(6))
    again = index_shards(str(tmp_path))
    assert again.reused == 3
    assert Manifest.load(str(tmp_path)).split("val").samples == 11
    assert sum(len(b.ids) for b in read(again.manifest.split("val"))[0]) == 11


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-validation-00.tar", "val"),
        ("imagenet-val-000000.tar", "val"),
        ("my-test-set-train-000.tar", "train"),
        ("val/cars-train-0.tar", "val"),
        ("trainer-0.tar", "train"),
        ("evaluation-0.tar", "train"),
    ],
)
def test_a_split_s_name_may_stand_within(tmp_path, name, split):
    write_tar(tmp_path / name, good(2))
    assert list(index_shards(str(tmp_path)).manifest.splits) == [split]


def test_a_folder_may_look_like_a_pattern(tmp_path):
    write_tar(tmp_path / "a[1]" / "train-0.tar", good(3))
    assert index_shards(str(tmp_path / "a[1]")).manifest.split("train").samples == 3
    assert Manifest.load(str(tmp_path / "a[1]")).split("train").samples == 3


def test_patterns_select_shards(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"s-{number}.tar", good(3))
    index_shards(str(tmp_path))
    assert Manifest.load(f"{tmp_path}/s-{{0..2}}.tar").split("train").samples == 9
    assert Manifest.load(f"{tmp_path}/s-[13].tar").split("train").samples == 6
    with pytest.raises(ManifestError, match=r"no shard matches 's-4\.tar'; there are 4 shards"):
        Manifest.load(f"{tmp_path}/s-{{0..4}}.tar")
    chosen = index_shards(f"{tmp_path}/s-{{0..1}}.tar", to=str(tmp_path / "other"), splits={"train": "s-0.tar"})
    assert chosen.manifest.split("train").samples == 3
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["index.json", "s-0.idx"]
    assert sum(len(b.ids) for b in read(Manifest.load(str(tmp_path / "other")).split("train"))[0]) == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"png": png()}, "has no cls member"),
        ({"cls": b"1"}, "has no image member"),
        ({"png": png(), "cls": b"cat"}, "its label b'cat' is no number"),
        ({"png": png()[:40], "cls": b"1"}, "no whole png image"),
        ({"jpg": b"not a jpeg", "cls": b"1"}, "no whole jpg image"),
    ],
)
def test_whole_but_useless_samples_are_damaged(tmp_path, bad, reason):
    write_tar(tmp_path / "train-0.tar", [*good(3), bad, *good(3)])
    report = index_shards(str(tmp_path))
    split = report.manifest.split("train")
    assert sum(report.incomplete.values()) == (1 if "member" in reason else 0)
    with pytest.raises(QuarantineError, match=rf"train-0\.tar, offset [1-9]\d+ \(sample 3\): .*{reason}"):
        read(split)
    batches, counters = read(split, quarantine_budget=1)
    assert counters.quarantined == [3]
    assert sum(int(b.valid.sum()) for b in batches) == 6


def test_labels_beyond_the_classes(tmp_path):
    write_tar(tmp_path / "train-0.tar", good(2, b"5"))
    with pytest.raises(ManifestError, match="a label is 5, but only 2 class names"):
        index_shards(str(tmp_path), classes=("a", "b"))


def test_cut_and_empty(tmp_path):
    with pytest.raises(ManifestError, match="no tars here"):
        index_shards(str(tmp_path))
    write_tar(tmp_path / "train-0.tar", good(5))
    data = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(data[: len(data.rstrip(b"\0")) // 512 * 512])
    with pytest.raises(IntegrityError, match=r"train-0\.tar"):
        index_shards(str(tmp_path))
    assert not (tmp_path / "index.json").exists()


def test_verify_lists_the_damage(tmp_path, capsys):
    write_tar(tmp_path / "train-0.tar", good(5))
    write_tar(tmp_path / "train-1.tar", good(5))
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--verify"]) == 0
    assert "verified, nothing is damaged" in capsys.readouterr().out
    path = tmp_path / "train-1.tar"
    data = bytearray(path.read_bytes())
    data[data.index(png(2))] ^= 1
    path.write_bytes(data)
    assert [entry.id for entry in verify(str(tmp_path))] == [7]
    assert main([str(tmp_path), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "damaged: " in out
    assert "sample 7: member .png at offset" in out
    path.unlink()
    assert {entry.id for entry in verify(str(tmp_path))} == {5, 6, 7, 8, 9}


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, text in (
        ([str(tmp_path)], "no tars here"),
        ([str(tmp_path / "none")], "no tars here"),
        ([str(tmp_path), "--split", "val"], "expected NAME=PATTERN"),
        ([str(tmp_path), "--verify"], "nor any tar"),
        ([str(tmp_path), "--classes", str(tmp_path / "nofile")], "No such file"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
