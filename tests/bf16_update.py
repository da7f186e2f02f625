"""One GRPO update of given completions in the precision of a GPU, bf16 from fp32 masters, on torchrun's ranks.

The first moments, which are linear in the gradient, are saved by rank 0: python -m torch.distributed.run … MODEL FILE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import make_prompt, random_completions
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from grpo.batch import RolloutGroup
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy, build_reference
from grpo.engine.optimizer import make_optimizer
from grpo.update import add_reference, mini_batches, update

PROMPTS = 4


def first_moments(folder, device, mesh=None):
    """({metric: value}, {name: whole first moment}) of an update of PROMPTS prompts, shared out over the ranks."""
    config = parse_config(
        ["--preset", "demo", "--model", str(folder), "--prompts_per_step", str(PROMPTS), "--prompts_per_forward", "1",
         "--kl_coef", "0.1", "--activation_checkpointing", "full", "--grad_clip", "1e9"]
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(folder)
    policy = build_policy(folder, config, processor, device, mesh)
    reference = build_reference(folder, policy, config, processor, device, mesh)
    groups = []
    for seed in range(distributed.rank(), PROMPTS, distributed.world_size()):
        completions = random_completions(processor.tokenizer, (7, 3 + seed), seed)
        prompt = make_prompt(processor.tokenizer, [("video", (2 + 2 * seed, 4, 4))] if seed else [], seed)
        group = RolloutGroup(prompt, completions, [torch.full((len(t),), -6.0) for t in completions], [], [True] * 2)
        group.advantages = torch.tensor([1.0, -0.5])
        groups.append(group)
    (batches,) = mini_batches(groups, policy, config)
    add_reference(reference, batches, 1.0)
    optimizer = make_optimizer(policy, config)
    metrics = update(policy, optimizer, [batches], config)
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in policy.named_parameters()}
    return metrics, {name: m.full_tensor() if isinstance(m, DTensor) else m for name, m in moments.items()}


if __name__ == "__main__":
    model, file = sys.argv[1:]
    distributed.compute_dtype = lambda device: torch.bfloat16
    result = first_moments(model, *distributed.start("cpu"))
    if distributed.is_main():
        torch.save(result, file)
    distributed.stop()
