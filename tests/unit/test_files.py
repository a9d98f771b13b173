"""Files are whole or absent, whatever stops their writer."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moescope import files
from tests.examples import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "not" / "there" / "table.parquet"
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, or the move would be a copy
        assert temporary.suffix == ".parquet"
        assert temporary.name.startswith(".")  # no pattern for results matches it
    assert path.read_text() == "new"
    assert names(path.parent) == ["table.parquet"]


def test_who_reads_meanwhile_reads_the_old_file(tmp_path: Path):
    path = tmp_path / "table"
    path.write_text("old")
    with open(path) as reader, files.atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", ["old", None])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: type[BaseException], old: str | None):
    path = tmp_path / "table"
    if old is not None:
        path.write_text(old)

    def write() -> None:
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert names(tmp_path) == (["table"] if old else [])
    assert old is None or path.read_text() == old


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path):
    for name in (".17.table", ".4194304.table", ".17.other", ".hidden.table", "17.table"):
        (tmp_path / name).write_text("half")
    with files.atomic(tmp_path / "table") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == [".17.other", ".hidden.table", "17.table", "table"]


@pytest.mark.parametrize("name", ["a", "a.txt", "..a", "a..b", ".hidden"])
def test_names_that_stay_in_their_folder(name: str):
    assert files.require_inside(name, "it") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/../../b", "a/../b", "./a", "a//b", "a/", "a\0b", None, 7]
)
def test_names_that_lead_out_of_their_folder_are_refused(name: object):
    with pytest.raises(files.UnsafeNameError, match=r"it: the file name .* leads out of its folder"):
        files.require_inside(name, "it")


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "table"
    path.write_text("old")
    code = (
        "import os, sys; from moescope import files\n"
        "with files.atomic(sys.argv[1]) as temporary: temporary.write_text('half'); os._exit(9)"
    )
    environment = {"PYTHONPATH": str(ROOT / "workflow" / "scripts")}
    result = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert result.returncode == 9
    assert path.read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path):
    path = tmp_path / "table"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), files.atomic(path):
        pass
    assert path.read_text() == "old"


def test_a_folder_in_the_place_of_the_file(tmp_path: Path):
    (tmp_path / "table").mkdir()
    with pytest.raises(OSError), files.atomic(tmp_path / "table") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["table"]


def test_json_is_whole_readable_and_equal_for_equal_data(tmp_path: Path):
    data = {"step": 700, "name": "Curaçao", "tokens": None, "files": {"b": [1, 2.5], "a": True}}
    path = tmp_path / "manifest.json"
    files.write_json(data, path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == data
    assert list(json.loads(text)) == list(data)  # the order of the writer, not of the alphabet
    assert "Curaçao" in text
    assert text.endswith("}\n")
    files.write_json(data, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_data_that_json_cannot_hold_leave_the_old_file(tmp_path: Path):
    path = tmp_path / "manifest.json"
    files.write_json({"step": 1}, path)
    with pytest.raises(TypeError):
        files.write_json({"step": {1, 2}}, path)
    assert json.loads(path.read_text()) == {"step": 1}
    assert names(tmp_path) == ["manifest.json"]


def test_sha256_of_known_bytes(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")  # the first example of FIPS 180-2
    assert files.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    large = bytes(range(256)) * 5_000
    path.write_bytes(large)
    assert files.sha256(path) == hashlib.sha256(large).hexdigest()
