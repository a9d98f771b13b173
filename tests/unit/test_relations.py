"""Relation files, prompts, subject groups, and the published LRE files: read, checked, fetched."""

import csv
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moescope import relations
from moescope.relations import Fact, Relation, RelationError

REPOSITORY = Path(__file__).resolve().parents[2]
LETTERS = {"word_first_letter", "word_last_letter"}


def relation_json(**changes) -> dict:
    data = {
        "name": "plays instrument",
        "prompt_templates": ["{} is a player of the"],
        "prompt_templates_zs": ["{} plays the", "The instrument of {} is the"],
        "properties": {"relation_type": "music"},
        "samples": [{"subject": "Ann", "object": "lute"}, {"subject": "Bo", "object": "grand piano"}],
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}


def write_json(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def error_of(call, *arguments, **options) -> str:
    """The message of the RelationError that the call raises, which must be one line."""
    with pytest.raises(RelationError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def make(name: str, pairs, category: str = "c") -> Relation:
    return Relation(name, category, ("{} is",), (), tuple(Fact(*pair) for pair in pairs), f"{name}.json")


# JSON files ----------------------------------------------------------------------------------------------------------


def test_json_file_becomes_a_relation(tmp_path):
    (relation,) = relations.load([write_json(tmp_path / "anything" / "plays.json", relation_json())])
    assert (relation.name, relation.category) == ("plays", "music")
    assert relation.template == "{} plays the"
    assert relation.all_templates == ("{} plays the", "The instrument of {} is the", "{} is a player of the")
    assert relation.facts == (Fact("Ann", "lute"), Fact("Bo", "grand piano"))


def test_templates_of_both_lists_are_counted_once(tmp_path):
    data = relation_json(prompt_templates=["{} plays the", "{} bought a"])
    (relation,) = relations.load([write_json(tmp_path / "plays.json", data)])
    assert relation.all_templates == ("{} plays the", "The instrument of {} is the", "{} bought a")


def test_category_is_the_folder_where_the_file_names_none(tmp_path):
    data = relation_json(properties=None, prompt_templates=None)
    (relation,) = relations.load([write_json(tmp_path / "arts" / "plays.json", data)])
    assert relation.category == "arts"
    assert relation.templates == ()


def test_other_braces_are_only_text(tmp_path):
    data = relation_json(
        prompt_templates_zs=["{who}: {} plays the"], samples=[{"subject": "{} and {0} %s", "object": "{object}"}]
    )
    (row,) = relations.prompts(relations.load([write_json(tmp_path / "plays.json", data)]))
    assert row["text"] == "{who}: {} and {0} %s plays the"


@pytest.mark.parametrize(
    ("changes", "entry"),
    [
        ({"samples": None}, "samples is missing"),
        ({"samples": []}, "samples is empty"),
        ({"samples": {"Ann": "lute"}}, "samples must be a JSON array"),
        ({"samples": ["Ann"]}, "samples[0] must be an object"),
        ({"samples": [{"subject": "Ann", "object": "lute"}, {"subject": "Bo"}]}, "samples[1].object"),
        ({"samples": [{"subject": "  ", "object": "lute"}]}, "samples[0].subject"),
        ({"samples": [{"subject": "Ann", "object": ""}]}, "samples[0].object"),
        ({"samples": [{"subject": "Ann", "object": " lute"}]}, "samples[0].object"),
        ({"samples": [{"subject": "Ann", "object": 3}]}, "samples[0].object"),
        ({"prompt_templates_zs": None}, "prompt_templates_zs is missing"),
        ({"prompt_templates_zs": []}, "prompt_templates_zs is empty"),
        ({"prompt_templates_zs": "{} plays the"}, "prompt_templates_zs must be a JSON array"),
        ({"prompt_templates_zs": ["plays the"]}, "prompt_templates_zs[0]"),
        ({"prompt_templates_zs": ["{} plays the", "{} and {} play the"]}, "prompt_templates_zs[1]"),
        ({"prompt_templates_zs": ["{} plays the "]}, "prompt_templates_zs[0]"),
        ({"prompt_templates": ["{subject} plays the"]}, "prompt_templates[0]"),
        ({"properties": "music"}, "properties must be a JSON object"),
        ({"properties": {"relation_type": ""}}, "properties.relation_type"),
    ],
)
def test_a_malformed_json_file_is_named_with_its_entry(tmp_path, changes, entry):
    path = write_json(tmp_path / "plays.json", relation_json(**changes))
    assert error_of(relations.load, [path]).startswith(f"{path}: {entry}")


def test_what_is_not_json_is_named_with_line_and_column(tmp_path):
    path = write_json(tmp_path / "plays.json", '{"samples": [\n  {"subject": "Ann",}\n]}')
    assert f"{path}: not valid JSON at line 2" in error_of(relations.load, [path])
    assert "one JSON object" in error_of(relations.load, [write_json(tmp_path / "plays.json", "[]")])


def test_unreadable_files_are_one_line(tmp_path):
    path = tmp_path / "plays.json"
    assert f"{path}: No such file" in error_of(relations.load, [path])
    path.write_bytes(b'{"name": "caf\xe9"}')
    assert f"{path}: byte 13 is not UTF-8" in error_of(relations.load, [path])


def test_a_name_that_cannot_name_a_column_is_refused(tmp_path):
    assert "'1st'" in error_of(relations.load, [write_json(tmp_path / "1st.json", relation_json())])


def test_two_relations_of_one_name_are_refused(tmp_path):
    paths = [write_json(tmp_path / folder / "plays.json", relation_json()) for folder in "ab"]
    message = error_of(relations.load, paths)
    assert str(paths[0]) in message
    assert str(paths[1]) in message


def test_repeated_facts_are_warned_about_and_kept(tmp_path, caplog):
    samples = [{"subject": "Ann", "object": o} for o in ("lute", "harp", "lute")]
    path = write_json(tmp_path / "plays.json", relation_json(samples=samples))
    with caplog.at_level(logging.WARNING):
        (relation,) = relations.load([path])
    assert len(relation.facts) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: samples[2] repeats samples[0] (Ann, lute); both are kept"
    ]


# CSV files -----------------------------------------------------------------------------------------------------------


def test_csv_rows_carry_their_own_template_and_count_per_relation(tmp_path):
    path = write_csv(
        tmp_path / "facts.csv",
        "object,relation,template,subject,category",
        "lute,plays,{} plays the,Ann,music",
        "Rome,born,{} was born in,Ann,people",
        '"piano, grand",plays,"The instrument of {}, played daily, is the",Bo,music',
        "",
        "Oslo,born,{} was born in,Bo,people",
    )
    plays, born = relations.load([path])
    assert plays.template == "{} plays the"
    assert plays.all_templates == ("{} plays the", "The instrument of {}, played daily, is the")
    assert born.category == "people"
    assert [(row["prompt_id"], row["text"], row["object"]) for row in relations.prompts([plays, born])] == [
        ("plays/0", "Ann plays the", "lute"),
        ("plays/1", "The instrument of Bo, played daily, is the", "piano, grand"),
        ("born/0", "Ann was born in", "Rome"),
        ("born/1", "Bo was born in", "Oslo"),
    ]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_without_category_is_the_users(tmp_path, mark):
    path = write_csv(tmp_path / "facts.csv", mark + "relation,subject,object,template", "plays,Ann,lute,{} plays the")
    (relation,) = relations.load([path])
    assert (relation.name, relation.category) == ("plays", "user")


def test_csv_written_by_the_csv_module_comes_back(tmp_path):
    facts = [("Anna-Lena", "l\u2028ute"), ("Bo, the 2nd", 'a "lute"'), ("C\nD", "harp")]
    with open(tmp_path / "facts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["relation", "subject", "object", "template"])
        writer.writerows(["plays", subject, right, "{} plays"] for subject, right in facts)
    (relation,) = relations.load([tmp_path / "facts.csv"])
    assert [(fact.subject, fact.object) for fact in relation.facts] == facts


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["relation,subject,object", "plays,Ann,lute"], "row 1: column template is missing"),
        (["relation;subject;object;template", "plays;Ann;lute;{} plays"], "row 1: column relation is missing"),
        (["relation,subject,object,template,Category"], "row 1: column 'Category' is unknown"),
        (["relation,subject,object,template,object"], "row 1: column 'object' is unknown or repeats"),
        (["relation,subject,object,template"], "no facts"),
        (["relation,subject,object,template", "plays,Ann,lute,harp,{} plays"], "row 2 has 5 fields, the header 4"),
        (["relation,subject,object,template", "plays,Ann,lute,{} plays", "plays,,lute,{} plays"], "row 3: subject"),
        (["relation,subject,object,template", "", "plays,Ann, lute,{} plays"], "row 3: object is ' lute'"),
        (["relation,subject,object,template", "plays,Ann,lute,plays"], "row 2: template"),
        (["relation,subject,object,template", "2 plays,Ann,lute,{} plays"], "row 2: relation is '2 plays'"),
        (
            ["relation,subject,object,template,category", "plays,Ann,lute,{} plays,a", "plays,Bo,lute,{} plays,"],
            "row 3: relation plays is in category a above and in user here",
        ),
    ],
)
def test_a_malformed_csv_is_named_with_its_row(tmp_path, rows, problem):
    path = write_csv(tmp_path / "facts.csv", *rows)
    assert error_of(relations.load, [path]).startswith(f"{path}: {problem}")


def test_csv_facts_repeat_only_in_the_same_template(tmp_path, caplog):
    rows = ["plays,Ann,lute,{} plays the", "plays,Ann,lute,{} owns a", "plays,Ann,lute,{} plays the"]
    relations.load([write_csv(tmp_path / "facts.csv", "relation,subject,object,template", *rows)])
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "row 4 repeats row 2 (Ann, lute); both are kept"
    ]


# Sources and selection -----------------------------------------------------------------------------------------------


def test_files_of_each_kind_of_source(tmp_path, monkeypatch):
    embedded = [write_json(tmp_path / f"resources/relations/{n}.json", relation_json()) for n in ("a/x", "b/w")]
    nested = [write_json(tmp_path / f"nested/{n}.json", relation_json()) for n in ("a/x", "b/w")]
    data = [write_json(tmp_path / f"clone/data/{n}.json", relation_json()) for n in ("a/x", "b/w")]
    flat = [write_json(tmp_path / f"flat/{n}.json", relation_json()) for n in ("w", "x")]
    write_json(tmp_path / "clone/other/settings.json", "{}")
    write_json(tmp_path / "flat/.123.w.json", "half a fi")
    write_json(tmp_path / "nested/.tool/cache.json", "{}")
    table = write_csv(tmp_path / "facts.csv", "relation,subject,object,template")
    assert relations.files_of("embedded", tmp_path) == embedded
    assert relations.files_of(str(tmp_path / "nested"), tmp_path) == nested
    assert relations.files_of(str(tmp_path / "clone"), tmp_path) == data
    assert relations.files_of(tmp_path / "flat", tmp_path) == flat
    assert relations.files_of(str(table), tmp_path) == [table]
    lre = relations.files_of("lre", tmp_path)
    assert len(lre) == 12
    assert not any(path.exists() for path in lre)
    assert tmp_path / "resources/lre/data/linguistic/adj_antonym.json" in lre
    monkeypatch.chdir(tmp_path)
    assert relations.files_of("facts.csv", "elsewhere") == [Path("facts.csv")]


def test_a_source_without_files_is_one_line(tmp_path):
    assert "no such file or directory" in error_of(relations.files_of, str(tmp_path / "none"), tmp_path)
    (tmp_path / "facts.txt").touch()
    assert "neither a directory nor a .csv" in error_of(relations.files_of, str(tmp_path / "facts.txt"), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no relation files" in error_of(relations.files_of, str(tmp_path / "empty"), tmp_path)
    assert "resources/relations: no such" in error_of(relations.files_of, "embedded", tmp_path)


def test_names_are_known_before_the_files_are_there(tmp_path):
    assert "country_capital_city" in relations.names(relations.files_of("lre", tmp_path))
    rows = ["plays,Ann,lute,{} plays", "born,Ann,Rome,{} is from", "plays,Bo,harp,{} plays"]
    table = write_csv(tmp_path / "facts.csv", "relation,subject,object,template", *rows)
    assert relations.names([table]) == ["plays", "born"]


def test_select_keeps_the_order_of_the_files_and_names_the_nearest():
    loaded = [make(name, [("Ann", "x")]) for name in ("country_capital_city", "country_language", "adj_antonym")]
    assert relations.select(loaded) == loaded == relations.select(loaded, "all")
    assert relations.select(loaded, ["adj_antonym", "country_capital_city"]) == [loaded[0], loaded[2]]
    message = error_of(relations.select, loaded, ["adj_antonym", "country_capitol"])
    assert "country_capitol: no such relation; did you mean country_capital_city" in message
    assert message.endswith("known are country_capital_city, country_language, adj_antonym")
    assert "did you mean" not in error_of(relations.select, loaded, ["zzz"])


def test_no_prompts_left_is_an_error():
    for empty in ([], [make("r", [])]):
        assert "no prompts are left" in error_of(relations.prompts, empty)
        assert "no prompts are left" in error_of(relations.prompt_table, empty)


def test_prompt_table_is_the_table_prompts():
    loaded = [make("r", [(f"s{i}", f"o{i}") for i in range(12)]), make("q", [("s1", "o")], category="d")]
    frame = relations.prompt_table(loaded, seed=3)
    rows = {row["prompt_id"]: row for row in relations.prompts(loaded, seed=3)}
    assert frame["prompt_id"].to_list() == sorted(rows)
    assert all(row == rows[row["prompt_id"]] for row in frame.iter_rows(named=True))
    assert rows["q/0"] == {
        "prompt_id": "q/0",
        "relation": "q",
        "category": "d",
        "subject": "s1",
        "object": "o",
        "template": "{} is",
        "text": "s1 is",
        "group": rows["r/1"]["group"],
    }


def test_import_needs_the_standard_library_only():
    code = (
        "import moescope.relations, moescope.targets, sys;"
        "found = {'polars', 'numpy', 'torch', 'transformers', 'tokenizers'} & set(sys.modules);"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], env=with_library(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def with_library() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow" / "scripts")}


# Groups --------------------------------------------------------------------------------------------------------------


def lre_like() -> list[Relation]:
    """Relations of the sizes and overlaps of the published set: shared words, shared countries, small ones alone."""
    words = [(f"word{i}", f"w{i % 26}") for i in range(241)]
    return [
        make("first_letter", words),
        make("last_letter", words),
        make("antonym", [(f"word{i}" if i % 9 == 0 else f"adjective{i}", "x") for i in range(100)]),
        make("capital", [(f"country{i}", f"city{i}") for i in range(24)]),
        make("language", [(f"country{i}", f"tongue{i}") for i in range(24)]),
        make("gender", [(f"job{i}", "they") for i in range(19)]),
        make("age", [(f"job{i}", "old") for i in range(10, 55)]),
        make("tiny", [("one", "x"), ("two", "x")]),
    ]


def groups_in(relation: Relation, groups: dict[str, int]) -> set[int]:
    return {groups[fact.subject] for fact in relation.facts}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_balanced_and_hold_every_relation(seed):
    loaded = lre_like()
    groups = relations.subject_groups(loaded, seed)
    subjects = {fact.subject for relation in loaded for fact in relation.facts}
    assert set(groups) == subjects
    sizes = Counter(groups.values())
    assert set(sizes) == set(range(10))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for relation in loaded:
        if len({fact.subject for fact in relation.facts}) >= 19:
            assert groups_in(relation, groups) == set(range(10)), relation.name
        assert {group // 5 for group in groups_in(relation, groups)} == {0, 1}, relation.name


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_balanced_among_subjects_of_the_same_relations(seed):
    loaded = lre_like()
    groups = relations.subject_groups(loaded, seed)
    occurs_in = defaultdict(set)
    for relation in loaded:
        for fact in relation.facts:
            occurs_in[fact.subject].add(relation.name)
    strata = defaultdict(list)
    for subject, where in occurs_in.items():
        strata[frozenset(where)].append(groups[subject])
    for members in strata.values():
        sizes = [members.count(group) for group in range(10)]
        assert max(sizes) - min(sizes) <= 1
        assert abs(sum(sizes[:5]) - sum(sizes[5:])) <= 1


def test_groups_depend_on_the_seed_and_not_on_the_order_of_rows_or_files():
    loaded = lre_like()
    groups = relations.subject_groups(loaded, 7)
    shuffled = [replace(r, facts=tuple(random.Random(1).sample(r.facts, len(r.facts)))) for r in reversed(loaded)]
    assert shuffled[0].facts != loaded[-1].facts or shuffled[1].facts != loaded[-2].facts
    assert relations.subject_groups(shuffled, 7) == groups
    assert relations.subject_groups(loaded, 8) != groups


def test_groups_are_the_same_in_every_process():
    """String hashes differ between processes; groups must not."""
    code = (
        "from moescope.relations import *;"
        "r = Relation('r', 'c', ('{}',), (), tuple(Fact(f's{i}', 'o') for i in range(40)), 'f');"
        "print(list(subject_groups([r], 0).items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**with_library(), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# The published LRE files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lre() -> Path:
    """The folder of the published files: MOESCOPE_LRE, what was fetched into resources/lre, or ../shared/lre."""
    given = [os.environ["MOESCOPE_LRE"]] if os.environ.get("MOESCOPE_LRE") else []
    for folder in [*map(Path, given), REPOSITORY / "resources" / "lre", REPOSITORY.parent / "shared" / "lre"]:
        if all(path.is_file() for path in relations.lre_files(folder)):
            return folder
    pytest.skip("the published LRE files are not here: name their folder in MOESCOPE_LRE")


def test_lre_counts(lre):
    loaded = relations.load(relations.lre_files(lre), pinned=True)
    rows = relations.prompts(loaded)
    assert {relation.name: len(relation.facts) for relation in loaded} == {
        "adj_antonym": 100,
        "word_first_letter": 241,
        "word_last_letter": 241,
        "object_superclass": 76,
        "fruit_inside_color": 36,
        "work_location": 38,
        "country_language": 24,
        "country_capital_city": 24,
        "name_religion": 31,
        "occupation_age": 45,
        "occupation_gender": 19,
        "name_birthplace": 31,
    }
    assert Counter(relation.category for relation in loaded) == {
        "bias": 4,
        "commonsense": 3,
        "factual": 2,
        "linguistic": 3,
    }
    assert len(rows) == 906
    assert len({(row["relation"], row["subject"], row["object"]) for row in rows}) == 900
    assert len({row["subject"] for row in rows}) == 603
    assert sum(row["relation"] in LETTERS for row in rows) == 482
    assert sum(" " in row["object"] for row in rows) == 9


def test_lre_groups_serve_both_folds(lre):
    loaded = relations.load(relations.lre_files(lre), pinned=True)
    groups = relations.subject_groups(loaded, 0)
    sizes = Counter(groups.values())
    assert sorted(sizes.values()) == [60] * 7 + [61] * 3
    for relation in loaded:
        assert {group // 5 for group in groups_in(relation, groups)} == {0, 1}, relation.name
        if len({fact.subject for fact in relation.facts}) >= 30:
            assert groups_in(relation, groups) == set(range(10)), relation.name


def test_lre_as_a_plain_directory_is_the_same(lre):
    directory = relations.load(relations.files_of(str(lre), "."))
    pinned = relations.load(relations.lre_files(lre), pinned=True)
    assert {relation.name: relation for relation in directory} == {relation.name: relation for relation in pinned}


def test_one_flipped_bit_in_an_lre_file_is_caught(lre, tmp_path):
    shutil.copytree(lre / "data", tmp_path / "data")
    path = tmp_path / "data" / "bias" / "occupation_age.json"
    content = bytearray(path.read_bytes())
    place = content.index(b"old")
    content[place] ^= 1
    path.write_bytes(content)
    assert len(relations.load([path])) == 1, "the file is still valid JSON, so only its hash can tell"
    assert error_of(relations.load, relations.lre_files(tmp_path), pinned=True).startswith(f"{path}: not the published")


def test_fetch_from_a_directory_that_has_the_files(lre, tmp_path):
    fetched = relations.fetch_lre(tmp_path / "got", base_url=str(lre))
    assert [path.read_bytes() for path in fetched] == [path.read_bytes() for path in relations.lre_files(lre)]
    relations.verify_lre(fetched)


# Fetching, from a server of our own and with files of our own --------------------------------------------------------


class Mirror(ThreadingHTTPServer):
    """Serves a few files on loopback; notes every request; answers with scripted statuses first."""

    daemon_threads = True

    def __init__(self, content: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.content = content
        self.requests: list[str] = []
        self.statuses: dict[str, list[int]] = defaultdict(list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/base"


class MirrorHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/base/")
        self.server.requests.append(name)
        scripted = self.server.statuses[name]
        status = scripted.pop(0) if scripted else 200 if name in self.server.content else 404
        body = self.server.content.get(name, b"")
        self.send_response(status)
        # A length that is not kept is a connection that breaks off.
        self.send_header("Content-Length", str(len(body) + (status == 206)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A mirror of two made-up files that are pinned in place of the published ones; retries without pauses."""
    content = {
        f"data/music/{name}.json": json.dumps(relation_json(name=name)).encode() for name in ("plays", "plays_too")
    }
    monkeypatch.setattr(relations, "LRE_SHA256", {n: hashlib.sha256(c).hexdigest() for n, c in content.items()})
    monkeypatch.setattr(relations, "_PAUSES", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MOESCOPE_LRE_URL", raising=False)
    server = Mirror(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fetch_gets_what_is_missing_or_wrong_and_nothing_else(mirror, tmp_path):
    paths = relations.fetch_lre(tmp_path, mirror.url)
    assert files_below(tmp_path) == mirror.content
    assert [relation.name for relation in relations.load(paths, pinned=True)] == ["plays", "plays_too"]
    relations.fetch_lre(tmp_path, mirror.url + "/")
    assert len(mirror.requests) == 2, "right files are not fetched again"
    paths[1].write_text("{}")
    relations.fetch_lre(tmp_path, mirror.url)
    assert mirror.requests[2:] == ["data/music/plays_too.json"]
    assert files_below(tmp_path) == mirror.content


def test_fetch_takes_the_mirror_of_the_environment(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESCOPE_LRE_URL", mirror.url)
    relations.fetch_lre(tmp_path / "first")
    assert len(mirror.requests) == 2
    monkeypatch.setenv("MOESCOPE_LRE_URL", (tmp_path / "first").as_uri())
    relations.fetch_lre(tmp_path / "second")
    assert files_below(tmp_path / "second") == mirror.content
    assert len(mirror.requests) == 2


@pytest.mark.parametrize("status", [429, 500, 503, 206])
def test_fetch_asks_a_busy_server_again(mirror, tmp_path, status):
    mirror.statuses["data/music/plays.json"] = [status, status]
    relations.fetch_lre(tmp_path, mirror.url)
    assert mirror.requests.count("data/music/plays.json") == 3
    assert files_below(tmp_path) == mirror.content


def test_fetch_gives_up_on_a_server_that_stays_busy(mirror, tmp_path):
    mirror.statuses["data/music/plays.json"] = [503] * 10
    message = error_of(relations.fetch_lre, tmp_path, mirror.url)
    assert "data/music/plays.json: cannot be fetched (HTTP Error 503" in message
    assert f"into {tmp_path} by hand" in message
    assert len(mirror.requests) == 3
    assert files_below(tmp_path) == {}


def test_fetch_does_not_ask_again_for_what_is_not_there(mirror, tmp_path):
    del mirror.content["data/music/plays.json"]
    assert "HTTP Error 404" in error_of(relations.fetch_lre, tmp_path, mirror.url)
    assert len(mirror.requests) == 1


def test_fetch_refuses_another_content_and_keeps_what_stood_there(mirror, tmp_path):
    mirror.content["data/music/plays_too.json"] += b" "
    mine = write_json(tmp_path / "data/music/plays_too.json", "mine")
    assert "plays_too.json: not the published file" in error_of(relations.fetch_lre, tmp_path, mirror.url)
    assert mine.read_text() == "mine"
    assert set(files_below(tmp_path)) == set(mirror.content), "no temporary file is left"


def test_fetch_without_a_network_is_one_line_with_the_cure(mirror, tmp_path):
    url = mirror.url
    mirror.shutdown()
    mirror.server_close()
    message = error_of(relations.fetch_lre, tmp_path, url)
    assert "cannot be fetched" in message
    assert f"into {tmp_path} by hand" in message
    assert "cannot be fetched" in error_of(relations.fetch_lre, tmp_path, str(tmp_path / "none"))
    assert "cannot be fetched" in error_of(relations.fetch_lre, tmp_path, "nowhere://at all")


def test_fetch_into_what_is_no_folder_is_one_line(mirror, tmp_path):
    (tmp_path / "lre").touch()
    assert "cannot be written" in error_of(relations.fetch_lre, tmp_path / "lre", mirror.url)


def test_a_silent_server_is_a_passing_failure(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(relations, "_TIMEOUT", 0.05)
    release, plain_get = threading.Event(), MirrorHandler.do_GET

    def slow_first(handler):
        if not handler.server.requests:
            handler.server.requests.append("silent")
            release.wait(10)
        else:
            plain_get(handler)

    monkeypatch.setattr(MirrorHandler, "do_GET", slow_first)
    relations.fetch_lre(tmp_path, mirror.url)
    release.set()
    assert mirror.requests[0] == "silent"
    assert files_below(tmp_path) == mirror.content


def test_pinned_files_must_be_there_and_be_the_published_ones(mirror, tmp_path):
    paths = relations.lre_files(tmp_path)
    assert f"{paths[0]}: the file is missing" in error_of(relations.verify_lre, paths)
    other = write_json(tmp_path / "data/music/mine.json", relation_json())
    assert f"{other}: not one of the published" in error_of(relations.load, [other], pinned=True)
