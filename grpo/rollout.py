"""Completions of this process's prompts, with rewards and advantages."""

from statistics import fmean

import torch

from grpo.advantage import group_advantages
from grpo.data import batched
from grpo.distributed import gathered
from grpo.policy import features_of
from grpo.sampler import SamplingSettings, prompt_seed, sample
from rewards import accuracy, score_group
from rewards.temporal import temporal_bonus
from video.prompt import shuffle_frames


def rollout(policy, prompts, tokenizer, rewards, config, step):
    """Returns one scored `Rollout` for each prompt: config.group_size completions, rewards, advantages.

    With config.temporal_bonus (see `rewards.temporal`) each prompt with a video gets a second group, half as large, on
    shuffled frames. Only the accuracy of that group is used: nothing of it is trained on.
    """
    timed = [p for p in prompts if config.temporal_bonus and p.video_grid_thw is not None]
    with gathered(policy) as plain:
        rollouts = sample_groups(plain, prompts, config.group_size, tokenizer, config, step)
        shuffled = sample_groups(plain, timed, config.group_size // 2, tokenizer, config, step, shuffle=True)
    shuffled = {prompt.sample.key: group.texts for prompt, group in zip(timed, shuffled)}
    for prompt, group in zip(prompts, rollouts):
        group.rewards, group.parts, failures = score_group(
            rewards, group.texts, prompt.sample, group.lengths, config.reward_timeout
        )
        group.failed = sum(len(messages) for messages in failures.values())
        group.errors = {name: messages[0] for name, messages in failures.items()}
        if prompt.sample.key in shuffled:
            without = [accuracy(text, prompt.sample) for text in shuffled[prompt.sample.key]]
            bonus = temporal_bonus(group.parts["accuracy"], without, config.temporal_threshold, config.temporal_bonus)
            group.rewards = [reward + more for reward, more in zip(group.rewards, bonus)]
            group.parts |= {"shuffled_accuracy": [fmean(without)] * len(bonus), "temporal_bonus": bonus}
        group.advantages = group_advantages(group.rewards, config.scale_advantages)
    return rollouts


def sample_groups(policy, prompts, size, tokenizer, config, step, shuffle=False):
    """One `Rollout` of `size` completions for each prompt; shuffle: with its frames out of order. Both draws are fixed
    by the run's seed, the step and the prompt's key."""
    settings = SamplingSettings(config.temperature, config.top_k, config.top_p, config.max_new_tokens)
    rollouts = []
    for batch in batched(prompts, config.prompts_per_rollout):
        seeds = [prompt_seed(config.seed, step, prompt.sample.key + "/shuffled" * shuffle) for prompt in batch]
        if shuffle:
            batch = [shuffle_frames(prompt, str(seed)) for prompt, seed in zip(batch, seeds)]
        features = features_of(policy, batch) if config.freeze_vision else None
        joined = torch.cat(features) if features else None
        made = sample(policy, batch, size, settings, seeds, tokenizer, joined)
        for group, own in zip(made, features or []):
            group.features = own
        rollouts += made
    return rollouts
