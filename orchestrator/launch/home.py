"""Where things are when nobody says otherwise: resolved once, by the driver, into absolute places."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from orchestrator.config.tree import FinetuneConfig, JobConfig
from orchestrator.data.store import StoreConfig
from orchestrator.track.config import resolve as resolve_tracking

C = TypeVar("C", bound=JobConfig)
T = TypeVar("T")


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """`$ITPN_HOME`, by default `~/itpn`: holds `data/` and `runs/` for this account.

    It is not the repository, because a submitted job runs in a temporary copy of that.
    """
    return Path(environment.get("ITPN_HOME", "~/itpn")).expanduser().absolute()


def resolve(config: C, environment: Mapping[str, str] = os.environ) -> C:
    """The same configuration with every place absolute, so that it means the same on every host.

    Empty places are below `$ITPN_HOME`, relative ones below the working directory; environment variables are read here
    and nowhere below.
    """
    base = home(environment)
    storage = _absolute(config.run.storage or f"{base}/runs")
    local = "://" not in storage
    track = resolve_tracking(
        config.track, Path(storage) if local else base / "runs", environment.get("MLFLOW_TRACKING_URI", "")
    )
    store = config.data.store
    if not store.endpoint and environment.get("AWS_ENDPOINT_URL"):
        store = replace(store, endpoint=environment["AWS_ENDPOINT_URL"])
    data = replace(
        config.data,
        source=_absolute(config.data.source or f"{base}/data/fashion-mnist"),
        image_size=config.data.image_size or config.model.img_size,
        store=store,
    )
    config = replace(config, data=data, track=track, run=replace(config.run, storage=storage))
    if isinstance(config, FinetuneConfig) and config.init.checkpoint:
        return replace(config, init=replace(config.init, checkpoint=_absolute(config.init.checkpoint)))
    return config


def _absolute(place: str) -> str:
    return place.rstrip("/") if "://" in place else str(Path(place).expanduser().absolute())


def absolute(config: T, *fields: str) -> T:
    """A flat configuration with the named places absolute; URIs and empty places stay."""
    places = {name: str(getattr(config, name)) for name in fields}
    changes: dict[str, Any] = {name: _absolute(place) for name, place in places.items() if place}
    return replace(config, **changes)  # type: ignore[type-var]


def resolve_run(config: T, environment: Mapping[str, str] = os.environ) -> T:
    """A configuration with `run` and `track` (but no shards) with both places absolute."""
    base = home(environment)
    run, track = cast("Any", config).run, cast("Any", config).track
    storage = _absolute(run.storage or f"{base}/runs")
    local = Path(storage) if "://" not in storage else base / "runs"
    track = resolve_tracking(track, local, environment.get("MLFLOW_TRACKING_URI", ""))
    changes: dict[str, Any] = {"run": replace(run, storage=storage), "track": track}
    return replace(config, **changes)  # type: ignore[type-var]


def object_store(environment: Mapping[str, str] = os.environ) -> StoreConfig:
    """Object-store settings of a job that has no section for them: the standard variable names the endpoint."""
    return StoreConfig(endpoint=environment.get("AWS_ENDPOINT_URL", ""))
