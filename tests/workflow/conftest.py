"""One real run of a seconds-small configuration, which the tests of this tier look at, copy and disturb."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples import ROOT, write_facts
from tests.workflow.running import CONFIG, Finished, clone, succeeds


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The small configuration, built from a folder that is not the workflow's. Read it, copy it, never change it."""
    folder = tmp_path_factory.mktemp("finished")
    write_facts(folder / "facts.csv")
    result = succeeds(folder, "--cores", "2", config=CONFIG)
    return Finished(folder, result.stdout + result.stderr)


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """The finished folder, to be changed at will; times are kept."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copied"))


@pytest.fixture
def fresh_clone(finished: Finished, tmp_path: Path) -> Path:
    """A fresh clone that holds the finished results and their metadata; every file has a new time."""
    target = tmp_path / "clone"
    clone(target)
    shutil.copytree(finished.folder, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return target


@pytest.fixture(params=sorted(path.name for path in (ROOT / "profiles").iterdir() if path.is_dir()))
def profile(request: pytest.FixtureRequest) -> Callable[[Path], list[str]]:
    """Every profile in turn: the arguments that choose it in a clone."""
    return lambda root: ["--workflow-profile", str(root / "profiles" / request.param)]
