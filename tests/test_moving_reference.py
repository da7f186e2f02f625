"""The moving reference (TR-DPO): how it is mixed, sharded or not, and that a resumed run goes on from where it was."""

import pytest
import torch
from processes import back_to, run_here, training_of
from test_memory import one_process_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy, build_reference
from grpo.engine.checkpoint import Saver, load_training
from grpo.engine.optimizer import make_optimizer
from grpo.update import sync_reference


def linear(*weights):
    layer = torch.nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return layer


def test_mixing_by_hand():
    """0.6 · 4 + 0.4 · 1 = 2.8; the policy stays as it is."""
    reference, policy = linear(1.0, -2.0).requires_grad_(False), linear(4.0, 3.0)
    sync_reference(reference, policy, 0.6)
    assert reference.weight.tolist() == [pytest.approx([2.8, 1.0])] and policy.weight.tolist() == [[4.0, 3.0]]
    sync_reference(reference, policy, 1.0)
    assert reference.weight.tolist() == [[4.0, 3.0]]


def test_a_reference_in_bf16_takes_weights_in_fp32():
    reference, policy = linear(1.0, -2.0).bfloat16(), linear(4.0, 3.0)
    sync_reference(reference, policy, 0.5)
    assert reference.weight.dtype == torch.bfloat16 and reference.weight.tolist() == [[2.5, 0.5]]


def test_on_one_gpu_the_policy_is_sharded_and_the_reference_is_not(checkpoints, tmp_path):
    """On the CPU in its place: mixed by hand, saved, and loaded into a reference that begins anew."""
    folder, config = checkpoints["qwen2_vl"], parse_config(["--preset", "demo", "--output", str(tmp_path)])
    config.model, config.ref_sync_steps = str(folder), 1
    processor, (device, mesh) = AutoProcessor.from_pretrained(folder), one_process_mesh()
    try:
        policy = build_policy(folder, config, processor, device, mesh)
        moving, anew = (build_reference(folder, policy, config, processor, device, mesh) for _ in range(2))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(1.0)
        sync_reference(moving, policy, 0.25)
        optimizer, saver = make_optimizer(policy, config), Saver(device, processor, config)
        checkpoint = saver.save(1, policy, optimizer, {}, moving)
        saver.wait()
        for own, start, moved in zip(policy.parameters(), anew.parameters(), moving.parameters(), strict=True):
            assert isinstance(own, DTensor) and not isinstance(moved, DTensor)
            torch.testing.assert_close(moved, start + 0.25)
        load_training(checkpoint, policy, optimizer, anew)
        assert all(torch.equal(a, b) for a, b in zip(anew.parameters(), moving.parameters(), strict=True))
    finally:
        distributed.stop()


@pytest.mark.slow
def test_resumed_after_the_reference_moved_equals_uninterrupted(world, tmp_path):
    """It moves after steps 2 and 4; the run that stopped after 3 has a policy, a start and a reference that differ."""
    more = ("--steps", "5", "--save_every", "1", "--keep_checkpoints", "9", "--eval_samples", "0", "--ref_sync_steps",
            "2", "--ref_mixup_alpha", "0.5", "--learning_rate", "1e-3", "--lr_schedule", "constant")  # fmt: skip
    whole = run_here(tmp_path / "whole", world, *more)
    states = [training_of(tmp_path / "whole", step) for step in (1, 2, 3)]
    names = [name for name in states[0] if name.startswith("reference.")]
    assert {f"master.{name.removeprefix('reference.')}" for name in names} == {n for n in states[0] if "master" in n}
    for name in names:
        start, moved, kept = (state[name] for state in states)
        policy = states[1][f"master.{name.removeprefix('reference.')}"]
        torch.testing.assert_close(moved, (start + policy) / 2)
        assert torch.equal(kept, moved)
    assert not any(torch.equal(states[0][name], states[1][name]) for name in names if name.endswith("q_proj.weight"))
    assert run_here(back_to(tmp_path / "whole", 3, tmp_path / "resumed"), world, *more) == whole
    ours, theirs = training_of(tmp_path / "resumed", 5), training_of(tmp_path / "whole", 5)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
