"""Several real processes over gloo against one: same batch, same loss, gradient and weights; nothing hangs."""

import json
import sys

import pytest
from conftest import FAMILIES
from processes import ROOT, assert_same_run, finish, free_port, launch, metrics_of, run_here, start, start_command

from grpo.engine.distributed import start as start_group
from grpo.errors import ConfigError
from video.files import read_rows


@pytest.mark.parametrize(
    "tie, counts", [(False, (2,)), pytest.param(False, (4,), marks=pytest.mark.slow),
                    pytest.param(True, (2, 4), marks=pytest.mark.slow)],
)  # fmt: skip
def test_several_processes_equal_one(world, tmp_path, tie, counts):
    """6 prompts over 4 processes are uneven, so some run a placeholder; some gradients are clipped, some are not."""
    norms = [row["grad_norm"] for row in run_here(tmp_path / "free", world, "--grad_clip", "1000", tie=tie)]
    limit = (min(norms) + max(norms)) / 2
    alone = run_here(tmp_path / "1", world, "--grad_clip", str(limit), tie=tie)
    assert min(row["grad_norm"] for row in alone) < limit < max(row["grad_norm"] for row in alone)
    for count in counts:
        together, _ = launch(count, tmp_path / str(count), world, "--grad_clip", str(limit), tie=tie)
        assert_same_run(together, alone, tmp_path / str(count), tmp_path / "1")
        theirs, ours = (read_rows(tmp_path / name / "rollouts.jsonl", ()) for name in (str(count), "1"))
        assert [{**row, "advantages": 0} for row in theirs] == [{**row, "advantages": 0} for row in ours]
        assert [row["slot"] for row in ours] == list(range(6)), "step 0, in the order of the draw"


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_vl"])
def test_two_processes_equal_one_in_the_other_families(worlds, family, tie, tmp_path):
    """With the tower trained, and frozen."""
    for frozen in ("--no-freeze_vision", "--freeze_vision"):
        alone = run_here(tmp_path / f"1{frozen}", worlds[family], frozen, tie=tie)
        together, _ = launch(2, tmp_path / f"2{frozen}", worlds[family], frozen, tie=tie)
        assert_same_run(together, alone, tmp_path / f"2{frozen}", tmp_path / f"1{frozen}")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["--no-freeze_vision", "--freeze_vision"])
def test_a_sample_skipped_in_one_process_does_not_hang(world, tmp_path, frozen):
    data, _ = world
    rows = [json.loads(line) for line in open(data["train"])]
    for row in rows:
        row["video"] = str(data["train"].parent / row["video"])
    for row in rows[::5]:
        row["video"] = str(tmp_path / "missing.mp4")
    for row in rows[1::5]:
        del row["video"]  # text alone: the sharded tower must run all the same
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--data", str(tmp_path / "data.jsonl"), frozen)
    alone = run_here(tmp_path / "1", world, *more)
    together, _ = launch(2, tmp_path / "2", world, *more)
    assert sum(row["skipped"] for row in alone) > 0
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1")
    assert [row["skipped"] for row in together] == [row["skipped"] for row in alone]


@pytest.mark.slow
def test_sharded_layers_may_recompute_all_or_some(world, tmp_path):
    """One process that keeps all activations, against two that recompute."""
    alone = run_here(tmp_path / "1", world)
    for setting in ("full", "selective"):
        together, _ = launch(2, tmp_path / setting, world, "--activation_checkpointing", setting)
        assert_same_run(together, alone, tmp_path / setting, tmp_path / "1")


def test_shards_must_divide_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ConfigError, match="--shard_size 3: must divide the number of processes, 4; `torchrun --nproc_per_node 3"
    ):
        start_group("cpu", shard_size=3)


@pytest.mark.slow
def test_two_nodes_equal_one_process(world, tmp_path):
    """Two torchrun agents: weights sharded within a node, replicated over both; then on, resumed, without shards."""
    alone = run_here(tmp_path / "1", world)
    for more in (("--prompts_per_forward", "1"), ("--shard_size", "4"), ("--shard_size", "1")):
        folder, port = tmp_path / f"2x2{''.join(more)}", free_port()
        agents = [start(2, folder, world, *more, nodes=(2, node, port)) for node in range(2)]
        for agent in agents:
            finish(agent)
        together = [row for row in metrics_of(folder) if row["phase"] == "train"]
        assert_same_run(together, alone, folder, tmp_path / "1")


def test_ranks_end_with_code_0_while_the_watch_is_inside_the_store(tmp_path):
    """Python aborts a process ("terminate called") if it ends while a thread of its own is inside a call of torch."""
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch.distributed as dist\n"
        "from grpo.engine import distributed\n"
        "class Busy(dist.TCPStore):\n"
        "    def check(self, keys):\n"
        "        return any(super(Busy, self).check(keys) for _ in range(3000))\n"
        "dist.TCPStore = Busy\n"
        "distributed.start('cpu'); distributed.stop()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish(start_command([*torchrun, tmp_path / "script.py"]))
