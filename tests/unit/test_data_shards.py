"""Shards: same source and options, same bytes; readable by WebDataset; refusals are one clear line."""

import gc
import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from jobs.make_shards import main
from orchestrator.data import fashion
from orchestrator.data.errors import IntegrityError, ManifestError, SourceError
from orchestrator.data.index import ShardIndex, scan_tar
from orchestrator.data.manifest import Manifest
from orchestrator.data.shards import ShardOptions, make_shards
from orchestrator.data.sources import UnreadableError, checked


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 JPEG and 10 PNG images in 4 classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee", "cat", "dog"]):
        (root / name).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 255, (24 + label, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.{'png' if number > 7 else 'jpg'}")
    return root


def build(source, dest, **options):
    lines = []
    return make_shards(str(source), str(dest), ShardOptions(**options), cache=Path("unused"), say=lines.append), lines


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # WebDataset leaves the tars to the garbage collector
def test_same_bytes_each_time_and_unmodified_webdataset_reads_them(photos, tmp_path):
    first, _ = build(photos, tmp_path / "a", shard_samples=7)
    second, _ = build(photos, tmp_path / "b", shard_samples=7)
    assert first.fingerprint == second.fingerprint
    for shard in (s for shards in first.splits.values() for s in shards):
        assert (tmp_path / "a" / shard.name).read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    assert {name: sum(s.samples for s in shards) for name, shards in first.splits.items()} == {"train": 36, "val": 4}

    names = [str(tmp_path / "a" / shard.name) for shard in first.splits["train"]]
    samples = list(webdataset.WebDataset(names, shardshuffle=False).decode("pil"))
    assert len(samples) == 36
    assert all(int(s["cls"]) in range(4) and ("jpg" in s or "png" in s) for s in samples)
    gc.collect()


def test_second_run_verifies(photos, tmp_path):
    first, _ = build(photos, tmp_path / "a")
    again, lines = build(photos, tmp_path / "a")
    assert again.fingerprint == first.fingerprint
    assert lines == [f"already there, verified: {tmp_path / 'a'}"]


def test_damage_is_found_when_verifying(photos, tmp_path):
    manifest, _ = build(photos, tmp_path / "a")
    shard = tmp_path / "a" / manifest.splits["train"][0].name
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ManifestError, match="another sha256"):
        build(photos, tmp_path / "a")
    shard.write_bytes(data[:-512])
    with pytest.raises(ManifestError, match=r"the manifest says"):
        build(photos, tmp_path / "a")


def test_other_options_are_refused(photos, tmp_path):
    build(photos, tmp_path / "a")
    with pytest.raises(ManifestError, match="made with other options"):
        build(photos, tmp_path / "a", seed=1)


def test_source_with_its_own_val_split(photos, tmp_path):
    root = tmp_path / "own"
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for path in list((photos / name).iterdir())[: 4 if split == "train" else 2]:
                (root / split / name / path.name).write_bytes(path.read_bytes())
    manifest, _ = build(root, tmp_path / "a")
    assert {name: sum(s.samples for s in shards) for name, shards in manifest.splits.items()} == {"train": 8, "val": 4}


def test_folders_of_splits_may_be_written_otherwise_but_not_mixed_or_empty(photos, tmp_path):
    root = tmp_path / "own"
    for split in ("Train", "Val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for path in list((photos / name).iterdir())[:3]:
                (root / split / name / path.name).write_bytes(path.read_bytes())
    manifest, _ = build(root, tmp_path / "a")
    assert {name: sum(s.samples for s in shards) for name, shards in manifest.splits.items()} == {"train": 6, "val": 6}
    (root / "meta").mkdir()
    with pytest.raises(SourceError, match=r"has folders of splits .* and others .meta.: move the others away"):
        build(root, tmp_path / "b")
    (root / "meta").rmdir()
    for path in list((root / "Val").rglob("*.*")):
        path.rename(root / "Val" / path.name)
    with pytest.raises(SourceError, match="Val: no images in class sub-folders"):
        build(root, tmp_path / "c")


def test_sixteen_bits_become_eight_without_clipping():
    """PIL's own conversion makes nearly all of a 16-bit picture white."""
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "TIFF")
    sample = checked("a.tif", 0, ".tif", file.getvalue())
    found = np.array(Image.open(io.BytesIO(sample.data)))
    assert np.array_equal(found, np.repeat((ramp >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_pixels_without_a_known_white_are_refused(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    with pytest.raises(UnreadableError, match="convert it to 8 or 16 bits"):
        checked("a.tif", 0, ".tif", file.getvalue())


def test_a_picture_beyond_all_measure_is_unreadable(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableError, match="decompression bomb"):
        checked("a.tif", 0, ".tif", file.getvalue())


def test_unreadable_images_are_skipped_listed_and_limited(photos, tmp_path):
    root = tmp_path / "some"
    for number in range(120):
        folder = root / "ant"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes((photos / "ant/0.jpg").read_bytes())
    (root / "ant" / "bad.jpg").write_bytes((photos / "ant/1.jpg").read_bytes()[:300])
    manifest, _ = build(root, tmp_path / "a", val_fraction=0.0)
    assert [name for name, _ in manifest.skipped] == ["ant/bad.jpg"]
    assert Manifest.load(str(tmp_path / "a")).skipped == manifest.skipped
    (root / "ant" / "empty.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"2 of 122 images cannot be read, more than 1%.*ant/bad\.jpg"):
        build(root, tmp_path / "b", val_fraction=0.0)
    assert not (tmp_path / "b" / "index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere", "DEST"], "no such folder"),
        (["torchvision:Cifar10", "DEST"], "Cifar10"),
        (["SOURCE", "DEST", "--val-fraction", "1.5"], "--val-fraction 1.5: allowed are"),
        (["SOURCE", "DEST", "--shard-samples", "0"], "at least 1"),
        (["SOURCE", "ftp://host/x"], "scheme 'ftp' is not known"),
        (["EMPTY", "DEST"], "no images found"),
    ],
)
def test_a_persons_mistakes_are_one_line_and_exit_2(arguments, text, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    known = {"SOURCE": str(photos), "DEST": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    assert main([known.get(a, a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def test_the_job_prints_a_summary(photos, tmp_path):
    done = subprocess.run(
        [sys.executable, "jobs/make_shards.py", str(photos), str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "train      36 images in 1 shards" in done.stdout
    assert done.stderr == ""


def test_fashion_mnist_rejects_other_bytes_and_names_both_routes(tmp_path, monkeypatch):
    def wrong(folder):
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(b"not the published file"))
        return [path]

    def away(folder):
        raise SourceError("apt-get not on this machine")

    monkeypatch.setattr(fashion, "_from_debian", away)
    monkeypatch.setattr(fashion, "_from_torchvision", wrong)
    with pytest.raises(SourceError, match=r"apt-get not on this machine.*another checksum"):
        fashion.load(tmp_path, lambda _: None)


def member(name, data=b"x", kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info, io.BytesIO(data)


def tar_of(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, body in members:
            tar.addfile(info, body)
    return out.getvalue()


def test_index_round_trip_and_damage():
    data = tar_of(member("a.jpg", b"123"), member("a.cls", b"4"), member("b.cls", b"5"), member("__note__", b"hi"))
    index = scan_tar(io.BytesIO(data), "t.tar")
    assert (index.samples, index.fields, index.nbytes) == (2, ("jpg", "cls"), len(data))
    assert [data[row["offset"] :][: row["length"]] for row in index.members] == [b"123", b"4", b"5"]
    assert index.incomplete((frozenset({"jpg"}), frozenset({"cls"}))).tolist() == [1]
    raw = index.to_bytes()
    again = ShardIndex.from_bytes(raw, "t.idx")
    assert (again.members == index.members).all()
    assert (again.sha256, again.fields, again.first.tolist()) == (index.sha256, index.fields, index.first.tolist())
    for broken in (raw[:-1], raw[:70], raw[:90] + b"?" + raw[91:], b"", b"ITPNIDX1"):
        with pytest.raises(IntegrityError):
            ShardIndex.from_bytes(broken, "t.idx")


def test_a_tar_cut_anywhere_is_refused():
    data = tar_of(*(member(f"{n}.{e}", b"y" * 700) for n in range(3) for e in ("cls", "jpg")))
    content = len(data.rstrip(b"\0"))
    end = -(-content // 512) * 512 + 1024  # members and the end mark; tarfile pads to 10,240 behind that
    for cut in {*range(0, end, 128), end - 1}:
        with pytest.raises(IntegrityError):
            scan_tar(io.BytesIO(data[:cut]), "t.tar")
    assert scan_tar(io.BytesIO(data[:end]), "t.tar").samples == 3


def test_a_damaged_header_in_the_middle_is_refused():
    """tarfile itself ends quietly there: a silent prefix."""
    data = bytearray(tar_of(*(member(f"{n}.cls", b"y") for n in range(5))))
    data[1024 * 2 + 10] ^= 255
    with pytest.raises(IntegrityError, match="header at offset 2048 is damaged"):
        scan_tar(io.BytesIO(data), "t.tar")


@pytest.mark.parametrize("name", ["/etc/passwd.cls", "../x.cls", "a/../../x.cls", "a\\..\\x.cls"])
def test_path_tricks_are_refused(name):
    with pytest.raises(IntegrityError, match="leaves the archive"):
        scan_tar(io.BytesIO(tar_of(member(name))), "t.tar")


def test_links_oversized_and_doubled_members_are_refused():
    with pytest.raises(IntegrityError, match="link or a device"):
        scan_tar(io.BytesIO(tar_of(member("a.cls", b"", tarfile.SYMTYPE))), "t.tar")
    with pytest.raises(IntegrityError, match="has 9 bytes, allowed are 8"):
        scan_tar(io.BytesIO(tar_of(member("a.cls", b"123456789"))), "t.tar", max_member=8)
    with pytest.raises(IntegrityError, match="twice"):
        scan_tar(io.BytesIO(tar_of(member("a.cls"), member("a.cls"))), "t.tar")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda raw: raw | {"version": 9}, "version 9 is not known"),
        (lambda raw: raw | {"format": "other"}, "format is 'other'"),
        (lambda raw: {k: v for k, v in raw.items() if k != "splits"}, "not a manifest"),
        (lambda raw: raw | {"splits": {"train": [{"name": "x"}]}}, "not a manifest"),
        (lambda raw: [1], "not a manifest"),
    ],
)
def test_manifests_that_are_not_ours(change, text, photos, tmp_path):
    manifest, _ = build(photos, tmp_path / "a")
    (tmp_path / "a/index.json").write_text(json.dumps(change(json.loads(manifest.to_bytes()))))
    with pytest.raises(ManifestError, match=text):
        Manifest.load(str(tmp_path / "a"))


def test_missing_manifest_and_missing_split(photos, tmp_path):
    with pytest.raises(ManifestError, match=r"no data set at .*make_shards"):
        Manifest.load(str(tmp_path))
    manifest, _ = build(photos, tmp_path / "a")
    with pytest.raises(ManifestError, match="has no split 'test'; it has: train, val"):
        manifest.split("test")
