"""Recipes and assets travel inside the wheel and are found there, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from synthkit.config import recipes


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what an installed wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    [wheel] = folder.glob("synthkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, cwd: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "synthkit", *words], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_recipes_and_assets_are_found_in_the_wheel(installed, tmp_path):
    assert (installed / "synthkit" / "py.typed").is_file()
    checked = run(installed, tmp_path, "recipes", "check").splitlines()
    assert checked == [f"{name}: ok" for name in recipes.names()]
    shipped = {p.relative_to(ROOT / "assets") for p in (ROOT / "assets").rglob("*") if p.is_file()}
    inside = installed / "synthkit" / "_assets"
    assert shipped == {p.relative_to(inside) for p in inside.rglob("*") if p.is_file()}


def test_nothing_else_is_in_the_wheel(installed):
    tops = {p.name for p in installed.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"synthkit"}
    licences = list(installed.glob("synthkit-*.dist-info/licenses/LICENSE"))
    assert len(licences) == 1 and "Apache License" in licences[0].read_text()
