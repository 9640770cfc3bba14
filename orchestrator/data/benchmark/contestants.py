"""One loader measured in its own process: `python -m orchestrator.data.benchmark.contestants NAME SETTINGS`.

All of them read the same images from the same store, cut the same kind of crop with the same decoder into uint8
[3, 224, 224], in batches of 32, in one process; only "usual" decodes its own way. Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from orchestrator.data.benchmark.decode import SIZE, pil_usual
from orchestrator.data.config import DataConfig
from orchestrator.data.decode import decode_rgb
from orchestrator.data.loader import open_loader
from orchestrator.data.manifest import Manifest
from orchestrator.data.store import StoreConfig, open_store
from orchestrator.data.views import TrainView, render

BATCH = 32
_VIEW = TrainView(SIZE)
Settings = dict[str, Any]
_counter = itertools.count()


def cut(data: bytes) -> Tensor:
    """Decode and crop as the product does, seeded by a running number."""
    out = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
    pixels = decode_rgb(data, "jpg")
    draws = _VIEW.draws(0, 0, np.array([next(_counter)]))[0]
    render(pixels, _VIEW.box(pixels.shape[0], pixels.shape[1], draws), out)
    return out


def cut_usual(data: bytes) -> Tensor:
    """Decode and crop as most scripts do: float32, normalised."""
    size = Image.open(io.BytesIO(data)).size
    draws = _VIEW.draws(0, 0, np.array([next(_counter)]))[0]
    return pil_usual(data, _VIEW.box(size[1], size[0], draws))


def batches(samples: Iterable[Tensor]) -> Iterator[Tensor]:
    """Stacks full batches."""
    iterator = iter(samples)
    while len(chunk := list(itertools.islice(iterator, BATCH))) == BATCH:
        yield torch.stack(chunk)


def ours(settings: Settings, skip: int) -> Iterator[Tensor]:
    """The product: ranged reads from S3, checksums of every member, one decoding thread."""
    store = StoreConfig(endpoint=settings["endpoint"])
    manifest = Manifest.load(settings["s3"], store)
    config = DataConfig(source=settings["s3"], store=store)
    with open_loader(
        config, manifest.split("train"), seed=0, epoch=0, first_batch=skip // BATCH, global_batch=BATCH, rank=0,
        world=1, view=_VIEW,
    ) as loader:  # fmt: skip
        for batch in loader:
            yield batch.images


def _webdataset(urls: list[str], skip: int, decode: Callable[[bytes], Tensor]) -> Iterator[Tensor]:
    data = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(500)
    return batches(decode(sample["jpg"]) for sample in itertools.islice(iter(data), skip, None))


def webdataset_http(settings: Settings, skip: int) -> Iterator[Tensor]:
    """WebDataset, http addresses (it calls curl)."""
    return _webdataset(settings["http"], skip, cut)


def webdataset_pipe(settings: Settings, skip: int) -> Iterator[Tensor]:
    """WebDataset, pipe:curl."""
    return _webdataset([f"pipe:curl -s -f {url}" for url in settings["http"]], skip, cut)


def usual(settings: Settings, skip: int) -> Iterator[Tensor]:
    """WebDataset over http with PIL, ToTensor and Normalize."""
    return _webdataset(settings["http"], skip, cut_usual)


def webdataset_opener(settings: Settings, skip: int) -> Iterator[Tensor]:
    """WebDataset with our store as its opener."""
    return _webdataset(_with_our_opener(settings), skip, cut)


def _with_our_opener(settings: Settings) -> list[str]:
    store = open_store(settings["s3"], StoreConfig(endpoint=settings["endpoint"]))
    schemes = cast(Any, sys.modules["webdataset.gopen"]).gopen_schemes
    schemes["itpn"] = lambda url, *_args, **_more: store.stream(url.removeprefix("itpn://x/"))
    return [f"itpn://x/{name}" for name in settings["names"]]


def torchdata(settings: Settings, skip: int) -> Iterator[Tensor]:
    """torchdata.nodes over WebDataset's tar reader with our opener; resumes by its own state."""
    nodes = importlib.import_module("torchdata.nodes")  # optional: only in the environment of --python

    urls = _with_our_opener(settings)
    raw = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(500)

    def build() -> Any:
        source = nodes.IterableWrapper(raw)
        decoded = nodes.ParallelMapper(source, lambda sample: cut(sample["jpg"]), num_workers=1, method="thread")
        return nodes.Loader(nodes.Batcher(decoded, BATCH, drop_last=True))

    if not skip:
        return (torch.stack(chunk) for chunk in build())
    first = build()
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    state = first.state_dict()
    _set_everywhere(state, {"_num_yielded": skip, "num_yielded": skip // BATCH, "steps_since_snapshot": 0})
    del iterator, first
    second = build()
    second.load_state_dict(state)
    return (torch.stack(chunk) for chunk in second)


def _set_everywhere(state: Any, values: dict[str, object]) -> None:
    if isinstance(state, dict):
        for key in state:
            if key in values:
                state[key] = values[key]
            _set_everywhere(state[key], values)


def streaming(settings: Settings, skip: int) -> Iterator[Tensor]:
    """MosaicML Streaming from its own format in the same bucket, empty local cache."""
    base: Any = importlib.import_module("streaming").StreamingDataset  # optional, as torchdata

    class Photos(base):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Tensor:
            return cut(super().__getitem__(at)["jpg"])

    local = tempfile.mkdtemp()
    data = Photos(remote=settings["mds"], local=local, shuffle=True, batch_size=BATCH)
    if skip:
        data.load_state_dict(data.state_dict(skip, from_beginning=True))
    return batches(iter(data))


def bare(settings: Settings, skip: int) -> Iterator[Tensor]:
    """Decode and crop of bytes that are in memory already: what no loader can beat."""
    images = _in_memory(settings)
    return batches(cut(data) for data in itertools.islice(itertools.cycle(images), skip, settings["samples"]))


def _in_memory(settings: Settings) -> list[bytes]:
    if "images" not in settings:
        settings["images"] = [s["jpg"] for s in wds.WebDataset(_with_our_opener(settings), shardshuffle=False)][:500]
    return cast(list[bytes], settings["images"])


CONTESTANTS: dict[str, Callable[[Settings, int], Iterator[Tensor]]] = {
    "bare": bare,
    "ours": ours,
    "webdataset-http": webdataset_http,
    "webdataset-pipe": webdataset_pipe,
    "webdataset-opener": webdataset_opener,
    "torchdata": torchdata,
    "streaming": streaming,
    "usual": usual,
}


_PACKAGES = {"torchdata": "torchdata.nodes", "streaming": "streaming"}


def _cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def main(name: str, settings: Settings) -> dict[str, float]:
    """Runs one contestant over one epoch, then again from 80% of it to its first batch."""
    torch.set_num_threads(1)
    run = CONTESTANTS[name]
    if name == "bare":
        _in_memory(settings)
    if name in _PACKAGES:
        importlib.import_module(_PACKAGES[name])
    cut(settings["warm"].encode("latin-1"))  # first calls load code; every contestant has paid for them before
    began, cpu = time.perf_counter(), _cpu()
    iterator = run(settings, 0)
    images = len(next(iterator))
    first = time.perf_counter() - began
    for batch in iterator:
        images += len(batch)
    wall, cpu = time.perf_counter() - began, _cpu() - cpu
    skip = int(0.8 * settings["samples"]) // BATCH * BATCH
    began = time.perf_counter()
    iterator = run(settings, skip)
    next(iterator)
    resumed = time.perf_counter() - began
    cast(Any, iterator).close()
    return {"images": images, "wall": wall, "cpu": cpu, "first": first, "resume": resumed}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.stdin.read()))), flush=True)
    os._exit(0)  # some contestants leave threads behind that abort the interpreter's ending
