"""Dynamic sampling: groups without signal, and samples that cannot be read, are replaced by the next prompts of the
data, within a budget, on any number of processes, and a resumed run draws what the uninterrupted one draws."""

from conftest import make_prompt

from grpo.batch import RolloutGroup
from grpo.run.log import completions_table


def test_a_group_that_the_filter_left_out_is_shown(tiny_vl):
    """It has no advantages: it does not train."""
    group = RolloutGroup(make_prompt(tiny_vl[2], []), [], [], ["a", "b"], [True, True], rewards=[0.5, 1.0])
    assert completions_table(group).splitlines()[-2:] == ["| 0.5 | 0 | a |", "| 1 | 0 | b |"]
