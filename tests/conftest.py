"""The tiers of the tests: a test's folder is its marker."""

from pathlib import Path

import pytest

from tests.examples import ROOT, write_facts

TIERS = {
    "unit": "seconds, no model",
    "model": "tiny models of the real classes",
    "workflow": "real Snakemake runs in a temporary folder",
    "soak": "kills and faults at length (make test-soak)",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, what in TIERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test, and run the tiers in order: a broken model is told by its own tests, not by the workflow's."""
    for item in items:
        item.add_marker(_tier(item))
    items.sort(key=lambda item: list(TIERS).index(_tier(item)))


def _tier(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


@pytest.fixture
def facts_csv(tmp_path: Path) -> Path:
    """A small CSV file of facts."""
    return write_facts(tmp_path / "facts.csv")
