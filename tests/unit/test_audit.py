"""What the manifests of a series say of one another."""

import pytest

from moescope import audit
from moescope.audit import AuditError

SHAPE = {"layers": 2, "d": 8, "heads": 2, "experts": 0, "K": 0, "I": 16, "shared_I": 0, "parameters": 100}


def entry(step, weights="aa", commit=None, shape=SHAPE, tokenizer="tt", **files):
    """The manifest of a checkpoint whose weights have this hash."""
    listed = {
        "config.json": {"bytes": 5, "git_sha1": "cc"},
        "tokenizer.json": {"bytes": 5, "sha256": tokenizer},
        "model.safetensors": {"bytes": 400, "sha256": weights},
    }
    revision = None if commit is None else f"step{step}"
    return {
        "series": "s",
        "step": step,
        "shape": shape,
        "revision": revision,
        "commit": commit,
        "files": listed | files,
    }


def test_different_checkpoints_of_one_model_pass():
    found = audit.audit([entry(0, "a"), entry(1, "b"), entry(None, "c")], {}, [[1, 5]], ["Beware."])
    assert found == {
        "series": "s",
        "steps": ["0", "1", "main"],
        "duplicates": [],
        "gaps": [[1, 5]],
        "remarks": ["Beware."],
    }


def test_two_steps_with_the_same_weights_are_named():
    entries = [entry(0, "a"), entry(10, "b"), entry(20, "b"), entry(30, "a")]
    with pytest.raises(
        AuditError, match=r"s: steps 0 and 30 have the same weights, .*; leave one out, or write allow_d"
    ):
        audit.audit(entries, {})
    found = audit.audit(entries, {}, allow_duplicates=True)
    assert found["duplicates"] == [["0", "30"], ["10", "20"]]


def test_the_same_weights_in_other_names_of_shards_are_found():
    """Shards are compared by content, whatever they are called."""
    one = entry(
        0, "a", **{"model.safetensors": {"bytes": 1, "sha256": "a"}, "b.safetensors": {"bytes": 1, "sha256": "b"}}
    )
    two = entry(
        1, "b", **{"model.safetensors": {"bytes": 1, "sha256": "b"}, "c.safetensors": {"bytes": 1, "sha256": "a"}}
    )
    with pytest.raises(AuditError, match="steps 0 and 1 have the same weights"):
        audit.audit([one, two], {})


def test_other_side_files_make_no_other_weights():
    with pytest.raises(AuditError, match="same weights"):
        audit.audit([entry(0), entry(1, **{"config.json": {"bytes": 6, "git_sha1": "dd"}})], {})


def test_a_revision_that_moved_is_told():
    with pytest.raises(AuditError, match=r"step1 was commit 1111 .* is 2222 in the catalog; run make catalog, and if"):
        audit.audit([entry(0, "a", "0000"), entry(1, "b", "1111")], {"step0": "0000", "step1": "2222"})
    audit.audit([entry(0, "a", "0000"), entry(1, "b", "1111")], {"step0": "0000"})


def test_another_model_in_the_series_is_told():
    with pytest.raises(AuditError, match=r"the shape of step 1 is not that of step 0; one of them is another model"):
        audit.audit([entry(0, "a"), entry(1, "b", shape={**SHAPE, "layers": 3})], {})


def test_another_tokenizer_in_the_series_is_told():
    with pytest.raises(AuditError, match=r"the tokenizer \(tokenizer.json\) of step 1 is not that of step 0"):
        audit.audit([entry(0, "a"), entry(1, "b", tokenizer="uu")], {})


def test_fingerprints_of_loaded_models_are_compared_too():
    entries = [entry(0), entry(1), entry(None)]
    assert audit.duplicated(entries, ["a", "b", "c"], False) == []
    assert audit.duplicated(entries, ["a", "b", "a"], True) == [["0", "main"]]
    with pytest.raises(AuditError, match="s: steps 0 and main have the same weights"):
        audit.duplicated(entries, ["a", "b", "a"], False)


def test_what_was_found_of_loaded_models_is_compared():
    own = {"step": "5", "fingerprint": "a", "prompts": "p", "tokens": "t"}
    others = [own, {**own, "step": "1", "fingerprint": "b"}]
    assert audit.require_apart(entry(5), own, others, False) == []
    others.append({**own, "step": "2"})
    assert audit.require_apart(entry(5), own, others, True) == ["2"]
    with pytest.raises(AuditError, match="s: steps 2 and 5 have the same weights"):
        audit.require_apart(entry(5), own, others, False)
    with pytest.raises(
        AuditError, match="the tokenizer of step 5 makes other tokens of the prompts than that of step 2"
    ):
        audit.require_apart(entry(5), {**own, "fingerprint": "c", "tokens": "u"}, [others[-1]], True)
    asked_anew = {**own, "fingerprint": "c", "prompts": "q", "tokens": "u"}
    assert audit.require_apart(entry(5), asked_anew, [others[-1]], True) == [], "other facts are other tokens"


def test_a_tokenizer_that_moved_out_of_git_is_the_same():
    kept = {"tokenizer.json": {"bytes": 5, "git_sha1": "gg"}}
    audit.audit([entry(0, "a"), entry(1, "b", **kept), entry(2, "c")], {})
    with pytest.raises(AuditError, match="the tokenizer"):
        audit.audit([entry(0, "a", **kept), entry(1, "b", **{"tokenizer.json": {"bytes": 5, "git_sha1": "hh"}})], {})
