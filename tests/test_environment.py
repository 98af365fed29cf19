"""environment.yml says what pyproject.toml says, and what is installed satisfies both."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch"}


def wanted() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
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


def test_python_has_the_same_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(listed()["python"].specifier) == project["requires-python"]


def test_what_is_installed_satisfies_them():
    for name, requirement in wanted().items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(name), prereleases=True), name
