"""Catalogs of branches: which are steps, where the gaps are, and what a damaged one is answered."""

from pathlib import Path

import pytest

from moescope import catalog, steps
from moescope.catalog import CatalogError
from tests.examples import ROOT


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def listed(*revisions: str, repo: str = "lab/model") -> str:
    """A catalog of these branches, as listing them would write it."""
    named = {revision: catalog.named(revision) for revision in revisions}
    rows = [{"step": s, "tokens_b": t, "revision": r, "commit": "ab" * 20, "bytes": 7} for r, (s, t) in named.items()]
    catalog.write(rows, Path(catalog.FOLDER) / catalog.file_name(repo))
    return repo


@pytest.mark.parametrize(
    ("repo", "count", "first", "last", "spacing"),
    [
        ("allenai/OLMoE-1B-7B-0924", 244, (5_000, 20), (1_220_000, 5117), 5_000),
        ("allenai/OLMo-7B-hf", 558, (0, 0), (557_000, 2464), 1_000),
    ],
)
def test_the_shipped_catalogs(repo: str, count: int, first: tuple, last: tuple, spacing: int):
    found = catalog.series(repo, ROOT)
    assert len(found) == count
    ends = [found[min(found)], found[max(found)]]
    assert [(end.step, end.tokens_b) for end in ends] == [first, last]
    assert ends[1].revision == f"step{last[0]}-tokens{last[1]}B"
    assert ends[1].tokens == last[1] * 10**9
    assert catalog.gaps(list(found)) == []
    assert list(found) == list(range(first[0], last[0] + 1, spacing))
    chosen = steps.select(repo, found, "paper", catalog.PAPER[repo])
    assert len(chosen) == {244: 19, 558: 13}[count]
    assert catalog.model(repo, ROOT)["vocab_size"] == 50304


def test_the_last_point_of_the_paper_is_its_own_step_and_the_report_says_so():
    assert catalog.PAPER["allenai/OLMo-7B-hf"][-1] == 557_000
    assert "557,000, stands for it" in catalog.remarks("allenai/OLMo-7B-hf", [10_000, 557_000])[0]
    assert catalog.remarks("allenai/OLMo-7B-hf", [10_000]) == []
    assert catalog.remarks("lab/model", [557_000]) == catalog.remarks(None, [557_000]) == []


@pytest.mark.parametrize(
    ("revision", "named"),
    [
        ("step5000-tokens20B", (5000, 20)),
        ("step512", (512, None)),
        ("stage1-step1000-tokens5B", (1000, 5)),
        ("stage2-ingredient3-step9000-tokens38B", (9000, 38)),
        ("main", (None, None)),
        ("my-step5", (None, None)),
        ("step5-old", (None, None)),
    ],
)
def test_names_of_branches(revision: str, named: tuple):
    assert catalog.named(revision) == named


def test_a_fresh_catalog_is_preferred(tmp_path: Path):
    repo = listed("step7", "main", repo="allenai/OLMo-7B-hf")
    found = catalog.series(repo, ROOT)
    assert list(found) == [7]
    assert (found[7].commit, found[7].bytes) == ("ab" * 20, 7)


def test_a_stage_is_a_series():
    repo = listed("stage1-step0-tokens0B", "stage1-step10-tokens1B", "stage2-ingredient1-step10-tokens2B", "main")
    assert list(catalog.series(repo, ROOT, stage="stage1")) == [0, 10]
    assert catalog.series(repo, ROOT, stage="stage2-ingredient1")[10].tokens_b == 2
    with pytest.raises(CatalogError, match="has the stages stage1, stage2-ingredient1; name one in stage"):
        catalog.series(repo, ROOT)


def test_a_pattern_of_the_user():
    repo = listed("ckpt_0010_12B", "ckpt_0020_25B", "main")
    with pytest.raises(CatalogError, match=r"no branch of lab/model is a training step by its name; write pattern"):
        catalog.series(repo, ROOT)
    found = catalog.series(repo, ROOT, pattern=r"ckpt_(?P<step>\d+)_(?P<tokens_b>\d+)B")
    assert [(r.step, r.tokens_b) for r in found.values()] == [(10, 12), (20, 25)]
    with pytest.raises(CatalogError, match="ckpt_0010_12B and ckpt_0020_25B are both step 0; write a narrower pattern"):
        catalog.series(repo, ROOT, pattern=r"ckpt_(?P<step>0).*")
    with pytest.raises(CatalogError, match="correct pattern"):
        catalog.series(repo, ROOT, pattern=r"none(?P<step>\d+)")


def test_no_catalog_is_answered_by_the_command():
    with pytest.raises(CatalogError, match="lab/other has no catalog; run: make catalog"):
        catalog.series("lab/other", ROOT)


@pytest.mark.parametrize(
    "content", ["step\trevision\nx\tstep1\n", "revision\n\n\tb\n", "\0", "step\trevision\n1\ta\tb\tc\n"]
)
def test_a_damaged_catalog_is_refused(content: str):
    path = Path(catalog.FOLDER) / catalog.file_name("lab/model")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(CatalogError, match=r"run: make catalog|no branch"):
        catalog.series("lab/model", ROOT)


@pytest.mark.parametrize(
    ("series", "gaps"),
    [
        ([0, 10, 20, 40, 50, 80, 90, 100], [(20, 40), (50, 80)]),
        ([0, 1, 2, 4, 8, 16, *range(1000, 19_000, 1000)], []),  # as Pythia's: dense early, even later
        ([0, 1, 2, 4, 8, 16, *range(1000, 19_000, 1000), 20_000], [(18_000, 20_000)]),
        ([1, 3, 10, 30, 100], []),
        ([5], []),
        ([], []),
    ],
)
def test_gaps(series: list[int], gaps: list[tuple[int, int]]):
    assert catalog.gaps(series) == gaps


def test_a_written_catalog_reads_back_in_order():
    rows = [
        {"step": None, "tokens_b": None, "revision": "main", "commit": "c", "bytes": 3},
        {"step": 20, "tokens_b": 2, "revision": "step20-tokens2B", "commit": "b", "bytes": 2},
        {"step": 3, "tokens_b": 0, "revision": "step3-tokens0B", "commit": "a", "bytes": 0},
    ]
    catalog.write(rows, "c.tsv")
    assert [row["revision"] for row in catalog.read("c.tsv")] == ["step3-tokens0B", "step20-tokens2B", "main"]
    assert catalog.read("c.tsv")[0] == {
        "step": "3",
        "tokens_b": "0",
        "revision": "step3-tokens0B",
        "commit": "a",
        "bytes": "0",
    }
