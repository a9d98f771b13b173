"""The digest of code: it changes with everything that can change a result, and with nothing else."""

import os
import shutil
from pathlib import Path

import pytest

from moescope import digest
from tests.examples import ROOT

SCRIPTS = ROOT / "workflow" / "scripts"
ADAPTERS = sorted(SCRIPTS.glob("*.py"))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """An adapter whose module ``a`` imports ``b`` at its head and ``c`` inside a function; ``d`` is no part of it."""
    package = tmp_path / "moescope"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("import json\nfrom moescope.b import x\n\ndef f():\n    import moescope.c\n")
    (package / "b.py").write_text("from moescope import a\nx = 1\n")
    (package / "c.py").write_text("")
    (package / "d.py").write_text("")
    (tmp_path / "adapter.py").write_text("from moescope import a\n")
    return tmp_path


def test_follows_imports_through_modules_functions_and_circles(library: Path):
    assert set(digest.modules(library / "adapter.py")) == {"moescope.a", "moescope.b", "moescope.c"}


@pytest.mark.parametrize("edited", ["adapter.py", "moescope/a.py", "moescope/b.py", "moescope/c.py"])
def test_changes_with_each_file_behind_the_adapter(library: Path, edited: str):
    before = digest.code(library / "adapter.py")
    with open(library / edited, "a") as file:
        file.write("# edited\n")
    assert digest.code(library / "adapter.py") != before


@pytest.mark.parametrize("edited", ["moescope/d.py", "moescope/__init__.py", "other.py"])
def test_stays_where_another_file_changes(library: Path, edited: str):
    before = digest.code(library / "adapter.py")
    (library / edited).write_text("# edited\n")
    assert digest.code(library / "adapter.py") == before


def test_knows_neither_time_nor_place(library: Path, tmp_path_factory: pytest.TempPathFactory):
    before = digest.code(library / "adapter.py")
    os.utime(library / "moescope" / "a.py", (0, 0))
    clone = tmp_path_factory.mktemp("clone") / "library"
    shutil.copytree(library, clone)
    assert digest.code(clone / "adapter.py") == digest.code(library / "adapter.py") == before


def test_counts_data_files(library: Path):
    caption = library / "caption.rst"
    caption.write_text("one")
    before = digest.code(library / "adapter.py", caption)
    caption.write_text("two")
    assert digest.code(library / "adapter.py", caption) != before != digest.code(library / "adapter.py")


def test_moved_content_is_a_change(library: Path):
    """Lengths and names are hashed, so that text cannot move between files unseen."""
    (library / "moescope" / "b.py").write_text("x = 1\n")
    (library / "moescope" / "c.py").write_text("y = 1\n")
    before = digest.code(library / "adapter.py")
    (library / "moescope" / "b.py").write_text("x = 1\ny = 1\n")
    (library / "moescope" / "c.py").write_text("")
    assert digest.code(library / "adapter.py") != before


def test_refuses_what_it_cannot_follow(library: Path):
    (library / "adapter.py").write_text("from moescope import load\n")
    with pytest.raises(ImportError, match=r"moescope\.load is no module"):
        digest.code(library / "adapter.py")


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.stem)
def test_every_adapter_can_be_followed_and_uses_the_library(adapter: Path):
    assert "moescope.job" in digest.modules(adapter)


def test_what_each_stage_depends_on():
    """An edit of plots.py must reach the figures alone; one of lpi.py the scores, but no training and no figure."""
    behind = {path.stem: set(digest.modules(path)) for path in ADAPTERS}
    assert {name for name, modules in behind.items() if "moescope.plots" in modules} == {"attribution_figures"}
    assert {name for name, modules in behind.items() if "moescope.dynamics_plots" in modules} == {"dynamics_figures"}
    assert {name for name, modules in behind.items() if "moescope.ablation_plots" in modules} == {"ablation_figures"}
    overlaid = {"comparison_figure", "sparsity_figure"}
    assert {name for name, modules in behind.items() if "moescope.comparison_plots" in modules} == overlaid
    models = {"attribute", "ablate", "mask_dense", "intervene"}
    assert {name for name, modules in behind.items() if "moescope.lpi" in modules} == models
    assert {name for name, modules in behind.items() if "moescope.ablation" in modules} == {"ablate"}
    assert {name for name, modules in behind.items() if "moescope.dynamics" in modules} == {
        *("dynamics_neurons", "dynamics_comparison"),
    }
    assert {name for name, modules in behind.items() if "moescope.pretraining" in modules} == {"pretrain"}
    assert {name for name, modules in behind.items() if "moescope.overview" in modules} == {"overview"}
    assert {name for name, modules in behind.items() if "moescope.report" in modules} == {"report"}
    assert not any({"moescope.config", "moescope.plan"} & modules for modules in behind.values())


def test_no_module_is_imported_by_a_name_made_at_run_time():
    """Such an import would be invisible to the digest; the package's own lazy one only forwards to modules."""
    sources = [*ADAPTERS, *(SCRIPTS / "moescope").glob("*.py")]
    dynamic = [path.name for path in sources if "import_module" in path.read_text() or "__import__" in path.read_text()]
    assert dynamic == ["__init__.py"]
