"""Completions of this rank's prompts, with rewards; and new prompts in place of groups without signal."""

from functools import partial
from statistics import fmean

import torch

from grpo import sequence
from grpo.advantage import has_signal
from grpo.batch import chunked
from grpo.engine.distributed import reduce_sum, unsharded
from grpo.policy import features_of
from grpo.sampler import SamplingSettings, generate, prompt_seed
from rewards import score_groups
from rewards.temporal import temporal_bonus
from video.prompt import shuffle_frames


def rollout(policy, prompts, tokenizer, rewards, config, step):
    """Returns one scored `RolloutGroup` for each prompt: config.group_size completions and their rewards.

    With config.temporal_bonus (see `rewards.temporal`) each prompt with a video gets a second group, half as large, on
    shuffled frames. Only the accuracy of that group is used: it is not trained on.
    """
    timed = [p for p in prompts if config.temporal_bonus and p.video_grid_thw is not None]
    with unsharded(policy) as plain:
        groups = sample_groups(plain, prompts, config.group_size, tokenizer, config, step)
        shuffled = sample_groups(plain, timed, config.group_size // 2, tokenizer, config, step, shuffle=True)
    only_accuracy = [reward for reward in rewards if reward.name == "accuracy"]
    without = {g.prompt.sample.key: s for g, s in zip(shuffled, score(only_accuracy, shuffled, config))}
    for group, scores in zip(groups, score(rewards, groups, config)):
        group.rewards, group.parts, group.errors, group.logs = scores
        if other := without.get(group.prompt.sample.key):
            accuracies = group.parts["accuracy"], other.parts["accuracy"]
            bonus = temporal_bonus(*accuracies, config.temporal_threshold, config.temporal_bonus)
            group.rewards = [reward + more for reward, more in zip(group.rewards, bonus)]
            group.parts |= {"shuffled_accuracy": [fmean(accuracies[1])] * len(bonus), "temporal_bonus": bonus}
            group.errors |= {n: group.errors.get(n, []) + messages for n, messages in other.failures.items()}
    return groups


def score(rewards, groups, config):
    """The `rewards.Scores` of each group; of ranks that share their prompts, the first one asks for them."""
    texts, samples = [group.texts for group in groups], [group.prompt.sample for group in groups]
    lengths = [group.lengths for group in groups]
    given = rewards, texts, samples, lengths, config.reward_timeout, config.max_new_tokens
    return sequence.from_first(partial(score_groups, *given))


def resample(groups, more, config):
    """Adds groups of new prompts until config.prompts_per_step groups of all ranks have signal, or until the step has
    drawn config.dynamic_sampling times as many prompts (dynamic sampling, DAPO, arXiv 2503.14476, eq. 11).

    more: count -> this rank's groups of the next `count` prompts of the data. Returns (groups, prompts drawn).
    """
    drawn, budget = config.prompts_per_step, config.prompts_per_step * config.dynamic_sampling
    while True:
        kept = sum(has_signal(group.parts["accuracy"]) for group in groups)
        missing = config.prompts_per_step - int(reduce_sum({"kept": kept})["kept"])
        count = min(missing, budget - drawn)
        if count <= 0:
            return groups, drawn
        groups, drawn = groups + more(count), drawn + count


def sample_groups(policy, prompts, group_size, tokenizer, config, step, shuffle=False):
    """One `RolloutGroup` for each prompt; shuffle: with the frames out of order. The run's seed, the step and the
    prompt's key fix both draws."""
    settings, groups = SamplingSettings.of(config), []
    for batch in chunked(prompts, config.prompts_per_rollout):
        seeds = [prompt_seed(config.seed, step, prompt.sample.key + "/shuffled" * shuffle) for prompt in batch]
        if shuffle:
            batch = [shuffle_frames(prompt, str(seed)) for prompt, seed in zip(batch, seeds)]
        features = features_of(policy, batch, keep=not shuffle) if config.freeze_vision else None
        joined = torch.cat(features) if features else None
        made = generate(policy, batch, group_size, settings, seeds, tokenizer, joined)
        for group, own in zip(made, features or []):
            group.features = own
        groups += made
    return groups
