"""Whole updates of given completions, in mini-batches and several passes, on torchrun's ranks or on one process.

Rank 0 saves what `all_updates` returns: python -m torch.distributed.run … MODEL REFERENCE FILE
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import PROMPT_KINDS, make_prompt, random_completions
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from grpo import update
from grpo.batch import RolloutGroup
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy, build_reference
from grpo.engine.optimizer import make_optimizer

RATE, SEED, MIX = 0.004, "42/7", 0.25
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [0.2, 0.2, 0.2], [3.0, 1.0, 0.0], [0.0, 0.7, 0.1]]  # of slots 0 to 4
TRUNCATED = (3, 1)  # slot and number of the completion that the length limit truncated
COMMON = ("--preset", "demo", "--prompts_per_step", "5", "--prompts_per_forward", "1", "--grad_clip", "1e9",
          "--temperature", "0.9", "--clip_eps_low", "0.02", "--clip_eps_high", "0.03", "--ppo_epochs", "1")  # fmt: skip
SETTINGS = {  # name -> (flags, slots of the mini-batches)
    "token clip": (
        ("--mini_batch_size", "2", "--ppo_epochs", "2", "--kl_coef", "0.1", "--advantage", "batch", "--mask_truncated",
         "--entropy_coef", "0.05"), [[0, 1], [2, 3], [4]],
    ),
    "gspo, filtered, KL in the reward": (
        ("--loss", "gspo", "--loss_normaliser", "sequence", "--mini_batch_size", "3", "--ppo_epochs", "2",
         "--dynamic_filter", "--kl_coef", "0.1", "--kl_in", "reward", "--kl_estimator", "k1",
         "--clip_eps_low", "0.3", "--clip_eps_high", "0.3"), [[0, 1, 3], [4]],
    ),
    "one mini-batch": (("--ppo_epochs", "2", "--kl_coef", "0.1", "--advantage", "none"), [[0, 1, 2, 3, 4]]),
}  # fmt: skip


def config_of(name):
    return parse_config([*COMMON, *SETTINGS[name][0]])


def groups_of(tokenizer, slots):
    """The groups of these slots: prompts of several kinds, completions of 1 to 6 random tokens, rewards as above."""
    groups = []
    for slot in slots:
        prompt = make_prompt(tokenizer, list(PROMPT_KINDS.values())[slot], seed=slot)
        prompt.sample = replace(prompt.sample, slot=slot)
        tokens = random_completions(tokenizer, (2 + slot % 3, 5 - slot, 6), slot)
        sampler = [torch.full((len(row),), -5.5 - 0.1 * slot) for row in tokens]
        finished = [(slot, number) != TRUNCATED for number in range(3)]
        accuracy = [float(reward > 0.2) for reward in REWARDS[slot]]
        rewards, parts = [*REWARDS[slot]], {"accuracy": accuracy}
        groups.append(RolloutGroup(prompt, tokens, sampler, [], finished, rewards=rewards, parts=parts))
    return groups


def one_update(name, folder, other, device, mesh=None):
    """What an update by the flags of SETTINGS[name] does, the same on every rank.

    {"metrics", "order": slots of each optimizer step, "old": [(slot, log-probabilities)], "groups": [(slot, rewards,
    advantages)], "exp_avg", "exp_avg_sq", "before", "after": {name: whole tensor}, "mixed": {name: (reference after
    `sync_reference`, what it should be)}}.
    """
    config, processor = config_of(name), AutoProcessor.from_pretrained(folder)
    policy = build_policy(folder, config, processor, device, mesh)
    reference = build_reference(other, policy, config, processor, device, mesh)
    own = groups_of(processor.tokenizer, range(distributed.rank(), 5, distributed.world_size()))
    before, fixed = whole(policy), whole(reference)

    # 1) The step as train.py makes it
    steps = update.mini_batches(own, policy, config)
    batches = [batch for batches in steps for batch in batches]
    update.add_reference(reference, batches, config.temperature)
    update.add_advantages(batches, config)
    optimizer = make_optimizer(policy, config)
    for group in optimizer.param_groups:
        group |= {"eps": 1.0, "lr": RATE}  # so that a step is almost linear in the gradient, without its rounding
    order, step = [], update.optimizer_step
    slots = lambda batches: [group.prompt.sample.slot for batch in batches for group in batch.rollouts]
    gathered = lambda batches: sorted(sum(distributed.gather(slots(batches)), []))
    update.optimizer_step = lambda *given: order.append(gathered(given[2])) or step(*given)
    try:
        metrics = update.update(policy, optimizer, steps, config, SEED)
    finally:
        update.optimizer_step = step

    # 2) What came of it
    moment = lambda key: {n: full(optimizer.state[p][key]) for n, p in policy.named_parameters()}
    after = whole(policy)
    result = {"metrics": metrics, "order": order, "exp_avg": moment("exp_avg"), "exp_avg_sq": moment("exp_avg_sq")}
    result |= {"before": before, "after": after}
    old = [(batch.rollouts[0].prompt.sample.slot, batch.old_logprobs) for batch in batches if batch.rollouts]
    result["old"] = sorted(sum(distributed.gather(old), []))
    kept = [(g.prompt.sample.slot, g.rewards, g.advantages) for g in own if g.advantages is not None]
    result["groups"] = sorted(sum(distributed.gather(kept), []))
    update.sync_reference(reference, policy, MIX)
    result["mixed"] = {n: (value, MIX * after[n] + (1 - MIX) * fixed[n]) for n, value in whole(reference).items()}
    return result


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole(policy):
    """{name: whole parameter} of a sharded or plain policy."""
    return {name: full(parameter) for name, parameter in policy.named_parameters()}


def all_updates(folder, other, device, mesh=None):
    return {name: one_update(name, folder, other, device, mesh) for name in SETTINGS}


if __name__ == "__main__":
    model, other, file = sys.argv[1:]
    results = all_updates(model, other, *distributed.start("cpu"))
    if distributed.is_main():
        torch.save(results, file)
    distributed.stop()
