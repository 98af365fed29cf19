"""environment.yml has what pyproject.toml needs to run, and what is installed satisfies pyproject.toml."""

import tomllib
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def wanted(extra: str | None = None) -> dict[str, Requirement]:
    """What trtlab needs to run, with an extra or without."""
    lines = [*project()["dependencies"], *(project()["optional-dependencies"][extra] if extra else ())]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def listed() -> dict[str, Requirement]:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = [entry for entry in entries if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    found = [Requirement(line) for line in [*conda, *pip]]
    return {CONDA_NAMES.get(requirement.name, requirement.name): requirement for requirement in found}


def test_both_list_the_same_packages():
    assert set(listed()) - {"python", "pip"} == set(wanted())


def test_both_give_the_same_bounds():
    theirs = listed()
    for name, requirement in wanted().items():
        assert theirs[name].specifier == requirement.specifier, name


def test_python_has_the_same_floor_and_ends_where_the_wheels_of_tensorrt_end():
    bounds = listed()["python"].specifier
    assert f">={min(str(bound.version) for bound in bounds)}" == project()["requires-python"]
    plans = [need.marker for need in wanted().values() if "tensorrt" in need.name]
    assert len(plans) == 2
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    for version_of_python in ("3.11", "3.13", "3.14"):
        has_wheels = all(marker.evaluate({**linux, "python_version": version_of_python}) for marker in plans if marker)
        assert bounds.contains(version_of_python) == has_wheels, version_of_python


def test_the_tools_of_the_tests_are_in_no_environment_but_ours():
    assert not set(listed()) & (set(wanted("dev")) - set(wanted()))


def test_what_is_installed_satisfies_them():
    """A machine may lack one, TensorRT for instance: what needs it says so, and its tests skip."""
    here = {distribution.name.lower().replace("_", "-") for distribution in distributions()}
    for name, requirement in wanted("dev").items():
        if (requirement.marker is None or requirement.marker.evaluate()) and name.lower().replace("_", "-") in here:
            assert requirement.specifier.contains(version(name), prereleases=True), name
