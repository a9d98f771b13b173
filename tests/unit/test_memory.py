"""Memory of a scoring job is planned before it starts."""

import psutil
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescope import memory

GB = 2**30
OLMOE = memory.Shape(vocabulary=50_304, hidden=2_048, neurons=2_048, layer=1_677_721_600, token=294_912)


def test_all_prompts_go_together_where_there_is_room():
    plan = memory.plan(OLMOE, 906, 6 * 1024)
    assert plan.prompts == 906
    assert plan.bytes <= 6 * GB


@given(prompts=st.integers(1, 20_000), mem_mb=st.integers(1, 64_000), vocabulary=st.integers(17, 300_000))
def test_a_plan_fits_or_says_so(prompts, mem_mb, vocabulary):
    shape = memory.Shape(vocabulary, 2_048, 1_024, GB, 300_000)
    try:
        plan = memory.plan(shape, prompts, mem_mb)
    except memory.MemoryPlanError as error:
        need = int(str(error).split("needs ")[1].split(" MB")[0].replace(",", ""))
        assert need > mem_mb
        assert memory.plan(shape, prompts, need).bytes <= need * 2**20
    else:
        assert 1 <= plan.prompts <= prompts
        assert plan.bytes <= mem_mb * 2**20


def test_little_memory_means_fewer_prompts_at_once_in_blocks_of_about_equal_size():
    need = memory.plan(OLMOE, 906, 64_000).bytes
    plan = memory.plan(OLMOE, 906, (need - 100 * 4 * 50_304) // 2**20)
    assert plan.prompts == 453


def test_what_is_free_is_planned_with_when_nothing_is_said():
    assert 0 < memory.available() <= psutil.virtual_memory().total
    assert memory.plan(memory.Shape(100, 8, 10, 1_000, 1_000), 10).prompts == 10


def test_keeping_pages_changes_no_number():
    before = torch.arange(10.0).sum()
    memory.keep_pages()
    assert torch.arange(10.0).sum() == before
