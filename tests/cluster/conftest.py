"""One cluster for the tests of a module: starting it costs half a minute."""

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.hosts import Wire, missing


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    """A bridge for hosts; what they print is kept with the test's files."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with Wire(tmp_path_factory.mktemp("hosts")) as wire:
        yield wire


@pytest.fixture(scope="module")
def cluster(wire):
    """Storage, a head and three workers, running."""
    cluster = Cluster(wire)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.close()
