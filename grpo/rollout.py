"""Completions of this process's prompts, with rewards and advantages."""

from grpo.advantage import group_advantages
from grpo.data import chunks
from grpo.distributed import gathered
from grpo.sampler import SamplingSettings, prompt_seed, sample
from rewards import score_group


def sampling_settings(config):
    return SamplingSettings(config.temperature, config.top_k, config.top_p, config.max_new_tokens)


def rollout(policy, prompts, tokenizer, rewards, config, step):
    """Returns one scored `Rollout` for each prompt: config.group_size completions, rewards, advantages."""
    rollouts = []
    with gathered(policy):
        for batch in chunks(prompts, config.prompts_per_rollout):
            seeds = [prompt_seed(config.seed, step, prompt.sample.key) for prompt in batch]
            rollouts += sample(policy, batch, config.group_size, sampling_settings(config), seeds, tokenizer)
    for prompt, group in zip(prompts, rollouts):
        score = score_group(rewards, group.texts, prompt.sample, group.lengths, config.reward_timeout)
        group.rewards, group.parts = score.total, score.parts
        group.failed, group.errors = score.failed, score.errors
        group.advantages = group_advantages(score.total, config.scale_advantages)
    return rollouts
