"""Every family of the zoo: taken apart, scored, ablated and rerouted as independent code says; the others refused."""

import pytest

from tests.model import families, references, zoo

#: What a family cannot do, and says so: its router makes no choice of the top k.
IMPOSSIBLE = {("phimoe", "reroute")}
CASES = [(name, measure) for name in zoo.ZOO for measure in (*families.EVERYWHERE, *families.SEQUENTIAL)]
CASES += [(name, measure) for name in [*references.RULES, "phimoe"] for measure in families.WHERE_ROUTED]


@pytest.mark.parametrize(("name", "measure"), sorted(set(CASES) - IMPOSSIBLE))
def test_family(name: str, measure: str):
    case = families.Case.of(name)
    wanted = families.measures(case)
    if measure not in wanted:
        assert case.parallel
        assert measure == "telescoping"
        return
    measured, tolerance = wanted[measure]
    assert measured(case) <= tolerance
