"""What tests of the plan share."""

from __future__ import annotations

import pytest

from lctrain.config.cluster import ClusterConfig
from tests.unit.plan.made import round_cluster


@pytest.fixture
def cluster() -> ClusterConfig:
    """See round_cluster."""
    return round_cluster()
