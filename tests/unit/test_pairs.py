"""Pairs of a head and an expert and their labels."""

import re

import pytest

from moescope.pairs import Pair, PairError


@pytest.mark.parametrize(
    ("label", "pair"),
    [
        ("H(19,12)-E(20,59)", (19, 12, 20, 59)),
        ("H(0,0)-E(0,0)", (0, 0, 0, 0)),
        ("H(7,0)-E(3,11)", (7, 0, 3, 11)),  # which no head can do, and was published all the same
    ],
)
def test_a_label_is_its_pair_and_back(label, pair):
    found = Pair.of(label)
    assert found == pair
    assert (found.head_layer, found.head, found.layer, found.expert) == pair
    assert found.label == label


NONE = ["", "H(19,12)", "E(20,59)-E(21,3)", "H(1,2)-E(3,4) ", "H(19,12)-E(20,-1)", "H(19, 12)-E(2,5)", "h(1,2)-e(3,4)"]


@pytest.mark.parametrize("label", NONE)
def test_what_names_no_pair_is_an_error(label):
    with pytest.raises(PairError, match=re.escape(f"{label!r} names no pair; write it as in H(19,12)-E(20,59)")):
        Pair.of(label)


def test_pairs_are_sorted_by_number_not_by_name():
    labels = ["H(10,0)-E(11,0)", "H(9,2)-E(9,1)", "H(9,11)-E(9,0)"]
    assert [pair.label for pair in sorted(map(Pair.of, labels))] == [labels[1], labels[2], labels[0]]


@pytest.mark.parametrize("pair", [(3, 1, 3, 0), (3, 1, 4, 0), (0, 0, 15, 9)])
def test_a_head_may_drive_experts_of_its_layer_and_later(pair):
    Pair(*pair).require_causal()


def test_a_head_that_comes_after_its_expert_is_an_error():
    with pytest.raises(PairError, match=r"head 1 of layer 4 lies after expert 7 of layer 3, .* 3 or before") as told:
        Pair(4, 1, 3, 7).require_causal()
    assert "\n" not in str(told.value)
