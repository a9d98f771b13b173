"""The report: self-contained, well-formed, and saying what it must say."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from moescope import overview, report, sample, tables
from tests.examples import ROOT

FOLDER = ROOT / "workflow" / "report"
VOID = {"meta", "img", "br", "hr", "link", "input", "col"}
ALL = tuple(report.FIGURES)


def png(shade):
    """A real PNG image, another one for every shade."""
    file = io.BytesIO()
    Figure(figsize=(0.2, 0.2), facecolor=str(shade)).savefig(file, format="png")
    return file.getvalue()


def facts():
    names = {"capital": "factual", "language": "factual", "a<b": "sense & <more>"}
    rows = [
        (f"{relation}/{i}", relation, category, f"subject {i}", "o", "{} is", "s is", i % 10)
        for relation, category in names.items()
        for i in range(6)
    ]
    return tables.check(pl.DataFrame(rows, schema=list(tables.SCHEMAS["prompts"].columns), orient="row"), "prompts")


def series(name="tiny-olmoe", source="pretrain", experts=32, steps=(0, 700), exposure=True, **changes):
    """One series whose layers obey the accounting identity."""
    prompts, random = facts(), np.random.default_rng(0)
    count = len(prompts)
    met = prompts.select("prompt_id", exposures=pl.int_range(1, count + 1), held_out=pl.int_range(count) % 5 == 0)
    predictions, layers = [], []
    for step in steps:
        gains = random.normal(1.0, 0.3, size=(count, 2, 2)).astype(np.float32)
        given = {"target_id": 3, "single_token": True, "leaked": pl.int_range(count) == 4, "boundary_merge": False}
        score = prompts.select("prompt_id", "relation", "category", "subject", "object").with_columns(
            **{key: pl.lit(value) if not isinstance(value, pl.Expr) else value for key, value in given.items()},
            rank=pl.Series(random.integers(1, 20, size=count)),
            rank_filtered=pl.lit(1),
            log_prob=pl.Series(gains.sum(axis=(1, 2)) - 9),
            log_prob_h0=pl.lit(-9.0),
            argmax_id=pl.lit(3),
        )
        predictions.append(sample.Checkpoint(step, 2048 * (step or 0), tables.check(score, "predictions")))
        place = np.indices(gains.shape).reshape(3, -1)
        rows = {
            "prompt_id": prompts["prompt_id"].gather(place[0]),
            "layer": place[1],
            "component": pl.Series(["attn", "ffn"]).gather(place[2]),
            "lpi": gains.ravel(),
        }
        layers.append(sample.Checkpoint(step, 2048 * (step or 0), tables.check(pl.DataFrame(rows), "layers")))
    shape = {"layers": 2, "d": 128, "heads": 8, "experts": experts, "K": 4, "I": 32, "parameters": 2_345_678}
    provenance = {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "git": "0123abc",
        "dtype": "bfloat16",
        "device": "cpu",
        "cfg": {"target": "object"},
        "seconds": 61.0,
        "peak_memory_bytes": 812_000_000,
        "certificate": {"direct": 0.01},
    }
    given = {
        "name": name,
        "source": source,
        "architecture": "olmoe",
        "steps": list(steps),
        "manifest": {
            "series": name,
            "step": steps[-1],
            "tokens": 1_433_600,
            "shape": shape,
            "files": {"model.safetensors": {"bytes": 9_382_712, "sha256": "ab" * 32}},
        },
        "provenance": [
            {
                **provenance,
                "decomposition_error": 1e-7 * (1 + 2 * (step == 0)),
                "checkpoint": {"step": str(step), "fingerprint": f"weights of {step}"},
            }
            for step in steps
        ],
        "predictions": predictions[-1].frame,
        "accuracy": overview.accuracy(predictions, prompts, met if exposure else None),
        "layer_importance": overview.layer_importance(layers, prompts),
        "figures": {figure: png(0.1 * i) for i, figure in enumerate(ALL if experts else ALL[:3])},
        "audit": {"gaps": [], "duplicates": [], "remarks": []},
    }
    return report.Series(**(given | changes))


class Page(HTMLParser):
    """Reads the page, checking that every tag is closed where it must be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def row(self, label):
        """Cells of the first row with this heading."""
        return next([" ".join(cell.split()) for cell in row[1:]] for row in self.rows if row[0] == label)


@pytest.fixture(scope="module")
def shown():
    return [series(), series("tiny-olmo", experts=None), series("mine", "local", None, steps=(0,), exposure=False)]


@pytest.fixture(scope="module")
def page(shown):
    return Page(report.build(shown, FOLDER))


def test_every_figure_is_embedded(shown, page):
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    expected = [one.figures[figure] for figure in ALL for one in shown if figure in one.figures]
    assert len(expected) == 4 + 3 + 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == expected


def test_images_have_descriptions(page):
    described = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(described) == len(set(described)) == 10
    assert "Layer profiles, series tiny-olmo" in described


def test_nothing_is_fetched_and_nothing_is_run(shown, page):
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#"))
        assert not name.startswith("on")
    html = report.build(shown, FOLDER)
    assert "@import" not in html
    assert "url(" not in html


def test_links_lead_somewhere(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        if (tag, name) == ("a", "href"):
            assert value[1:] in ids


def test_captions_become_text(page):
    assert "mailto" not in report.build([series()], FOLDER)
    for leftover in ("**", "``", "system-message", "HIT\\@10"):
        assert leftover not in page.text
    assert "HIT@10 is the share of prompts" in page.text


@pytest.mark.parametrize("figure", ALL)
def test_every_caption_holds_its_caveats(figure):
    text = " ".join((FOLDER / f"{figure}.rst").read_text(encoding="utf-8").split())
    assert "**Caveats.**" in text
    assert "intervals cover prompts, not seeds" in text
    assert "tiny" in text
    if figure.startswith("layer"):
        assert "by accounting" in text
    if figure == "top_experts":
        assert "optimistic" in text
    assert "{{" not in text  # the same file is a caption of Snakemake's own report


def test_the_page_warns(page):
    for sentence in (
        "tiny-olmoe, tiny-olmo : tiny models trained here (source pretrain )",
        "not those of any published model",
        "mine : weights found on disk (source local ); this workflow did not train it",
        "Attention and FFN totals are complementary by accounting",
        "One run per architecture: all intervals cover the choice of prompts",
        "selected and estimated on the same prompts, which is optimistic",
    ):
        assert sentence in page.text


def test_dense_series_say_that_they_have_no_experts(page):
    assert "tiny-olmo is dense: it has no experts" in page.text
    assert "mine is dense" in page.text
    assert "tiny-olmoe is dense" not in page.text


def test_only_what_is_there_is_warned_of():
    text = Page(report.build([series("mine", "local")], FOLDER)).text
    assert "trained here (source" not in text
    text = Page(report.build([series()], FOLDER)).text
    assert "weights found on disk" not in text
    assert "a tiny model trained here" in text


def test_what_was_run(page):
    assert page.row("series") == ["tiny-olmoe", "tiny-olmo", "mine"]
    assert page.row("source") == ["pretrain", "pretrain", "local"]
    assert page.row("parameters") == ["2,345,678"] * 3
    assert page.row("checkpoints") == ["2", "2", "1"]
    assert page.row("steps") == ["0 to 700", "0 to 700", "0"]
    assert page.row("shape")[0] == "2 layers, 128 wide, 8 heads, 32 experts of 32, top 4"
    assert page.row("shape")[1] == "2 layers, 128 wide, 8 heads, FFN 32"
    assert page.row("weights stored as")[0] == "bfloat16"
    assert page.row("largest decomposition error")[0] == "3.0e-07"  # the worst of the two checkpoints
    assert page.row("attribution, all checkpoints")[:3:2] == ["2.0 min", "61.0 s"]
    assert page.row("peak memory")[0] == "0.81 GB"
    assert page.row("versions")[0] == "torch 2.13.0, transformers 5.23.0"
    assert page.row("model.safetensors") == ["9,382,712", "ab" * 32]
    assert '"direct": 0.01' in page.text


def test_what_is_not_known_is_left_open():
    bare = series(provenance=[{}, {}], manifest={"shape": {"experts": 32}})
    page = Page(report.build([bare], FOLDER))
    for label in (
        "parameters",
        "tokens at the last step",
        "weights stored as",
        "largest decomposition error",
        "peak memory",
    ):
        assert page.row(label) == [report.UNKNOWN]


def value_and_interval(row):
    interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{interval}"


def test_accuracy_table_holds_the_last_step(shown, page):
    table = shown[0].accuracy.filter(pl.col("step") == 700)

    def expected(scope, name, average, subsets):
        rows = table.filter(
            pl.col("scope") == scope,
            pl.col("name").eq_missing(pl.lit(name, dtype=pl.String)),
            pl.col("average") == average,
        )
        rows = {(row["metric"], row["subset"]): row for row in rows.iter_rows(named=True)}
        return [value_and_interval(rows[metric, subset]) for metric in ("hit@10", "mrr") for subset in subsets]

    parts = ("all", "seen", "held_out")
    assert page.row("all, micro average") == ["18", *expected("all", None, "micro", parts)]
    assert page.row("all, macro average") == ["18", *expected("all", None, "macro", parts)]
    assert page.row("factual") == ["12", *expected("category", "factual", "micro", parts)]
    assert page.row("capital") == ["6", *expected("relation", "capital", "micro", parts)]
    alone = expected("all", None, "micro", ("unflagged",))
    gap = [report.UNKNOWN] * 2
    assert page.row("not flagged, micro") == ["17", alone[0], *gap, alone[1], *gap]
    assert page.row("flagged, micro")[0] == "1"
    assert "[" not in page.row("flagged, micro")[1]  # one subject: a value without an interval


def test_a_series_without_exposure_has_no_columns_for_it():
    page = Page(report.build([series("mine", "local", exposure=False)], FOLDER))
    assert len(page.row("capital")) == 1 + 2


def test_total_gain_and_its_identity(shown, page):
    total = shown[0].layer_importance.filter(pl.col("step") == 700, pl.col("aggregate") == "total")
    gain = {row["component"]: row for row in total.iter_rows(named=True)}
    whole = gain["ffn"]["value"] + gain["attn"]["value"]
    cells = page.row("tiny-olmoe, step 700")
    assert cells[:2] == [value_and_interval(gain["ffn"]), value_and_interval(gain["attn"])]
    own = (shown[0].predictions["log_prob"] - shown[0].predictions["log_prob_h0"]).mean()
    assert cells[2:4] == [f"{whole:.3f}", f"{own:.3f}"]
    assert abs(float(cells[4])) < 1e-5
    assert cells[5] == f"{gain['ffn']['value'] / whole:.1%}"


def test_a_broken_identity_shows():
    off = series()
    shifted = series(predictions=off.predictions.with_columns(pl.col("log_prob") + 0.5))
    cells = Page(report.build([shifted], FOLDER)).row("tiny-olmoe, step 700")
    assert float(cells[4]) == pytest.approx(-0.5, abs=1e-3)


def test_names_are_escaped(page):
    assert "more" not in page.tags
    assert page.row("sense & <more>")[0] == "6"
    assert page.row("a<b")[0] == "6"


def test_a_checkpoint_without_a_step_is_called_main():
    page = Page(report.build([series(steps=(None,))], FOLDER))
    assert page.row("steps") == ["main"]
    assert page.row("tiny-olmoe, main")


def test_missing_figures_and_series_are_named():
    with pytest.raises(report.ReportError, match="tiny-olmoe: figure top_experts is missing"):
        report.build([series(figures={figure: png(0) for figure in ALL[:3]})], FOLDER)
    with pytest.raises(report.ReportError, match="mine: figure accuracy is missing"):
        report.build([series("mine", figures={})], FOLDER)
    with pytest.raises(report.ReportError, match="no series"):
        report.build([], FOLDER)


def test_equal_input_gives_equal_pages_written_whole(shown, tmp_path):
    page = report.build(shown, FOLDER)
    assert page == report.build(shown, FOLDER)
    report.write(page, tmp_path / "results" / "report.html")
    assert (tmp_path / "results" / "report.html").read_text(encoding="utf-8") == page
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["report.html"]


def alone(**changes):
    """The text of a report on one series."""
    return Page(report.build([series(**changes)], FOLDER)).text


def test_what_cannot_be_trusted_stands_first():
    found = {
        "gaps": [[step, step + 20] for step in range(0, 1400, 200)],
        "duplicates": [],
        "remarks": ["Step 7 stands for step 8."],
    }
    shown = series(steps=(500, 510))
    twice = [one | {"checkpoint": {**one["checkpoint"], "fingerprint": "the same"}} for one in shown.provenance]
    text = alone(audit=found, steps=(500, 510), provenance=twice)
    assert text.index("the series has gaps") < text.index("What was run", text.index("Read this first"))
    assert "between steps 0 to 20, 200 to 220, 400 to 420, 600 to 620, 800 to 820 and 2 more." in text
    assert "steps 500 and 510 have the same weights" in text
    assert "Step 7 stands for step 8." in text
    assert "gaps" not in alone()


def test_a_series_of_the_hub_is_named_with_repository_and_commit():
    manifest = {**series().manifest, "repo": "lab/model", "commit": "0123456789abcdef" * 2}
    manifest["files"] = {**manifest["files"], "config.json": {"bytes": 7, "git_sha1": "cd" * 20}}
    text = alone(source="hub", manifest=manifest)
    assert "lab/model" in text
    assert "0123456789ab" in text
    assert f"{'cd' * 20} (git)" in text
