"""The case of the tests of evidence."""

from __future__ import annotations

import pytest

from tests.support.evidence import Case, make_case


@pytest.fixture(scope="module", params=[False, True], ids=["", "BOS"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("model"), request.param)
