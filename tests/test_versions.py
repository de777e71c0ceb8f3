import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.tiny import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]


def pinned(file):
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


@pytest.mark.parametrize("needed", REQUIRED, ids=lambda needed: needed.name)
def test_the_lowest_version_allowed_is_the_lowest_tested(needed):
    (bound,) = needed.specifier
    assert bound.operator == ">="
    lowest = pinned("constraints-min.txt")[canonicalize_name(needed.name)]
    floor = Version(bound.version)
    assert floor <= lowest < Version(f"{floor.major}.{floor.minor + 1}")
    assert pinned("constraints.txt")[canonicalize_name(needed.name)] >= lowest
