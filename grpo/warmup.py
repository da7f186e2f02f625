"""A supervised pass before GRPO, through the same packed forward: several target completions share their prompt.

Rows carry `completions`. It ends at `sft_steps`, or as soon as the model predicts what can be predicted: of each prompt
the least likely token among those that are determined (all tokens where there is one completion; where there are
several, which differ in their thoughts, what stands between <answer> and </answer>) has a mean probability above
`sft_until` over the last ten steps.
"""

from collections import deque

import torch

from grpo.update import learning_rate, make_optimizer, set_learning_rate, supervised_step
from video.dataset import DataError

RAMP = 20  # steps of linear warm-up of the learning rate, which then stays


def target_tokens(tokenizer, text):
    """((C,) tokens of a completion with its EOS, (C,) bool marks of the tokens between <answer> and </answer>)."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    start, stop = text.find("<answer>") + len("<answer>"), text.find("</answer>")
    marks = [a < stop and b > start and a >= start for a, b in encoded["offset_mapping"]]
    return torch.tensor([*encoded["input_ids"], tokenizer.eos_token_id]), torch.tensor([*marks, False])


def check_targets(prompts, targets, spec, longest):
    """Raises DataError, naming the row, for a completion that holds a vision token, which would have no features, or
    one of more than `longest` tokens, which would take all memory."""
    forbidden = torch.tensor(spec.never_sampled)
    for prompt, group in zip(prompts, targets):
        if any(bool(torch.isin(tokens, forbidden).any()) for tokens, _ in group):
            raise DataError(f"{prompt.sample.key}: a completion holds a vision token such as <|video_pad|>; remove it")
        if (most := max(len(tokens) for tokens, _ in group)) > longest:
            raise DataError(
                f"{prompt.sample.key}: a completion of {most} tokens is over --max_prompt_tokens {longest}; shorten it"
            )


def determined(probabilities, marks, completions):
    """The least of a completion's (C,) probabilities of tokens that are determined; see the top of this file."""
    chosen = probabilities if completions == 1 else probabilities[marks]
    return chosen.min().item() if len(chosen) else 1.0


def warm_up(policy, run):
    """Trains on the `completions` of run.data.warmup; see the top of this file for when it ends. Nothing of it is saved
    before: a run that is stopped in it begins it again."""
    config, tokenizer, processes = run.config, run.processor.tokenizer, run.processes
    optimizer, recent = make_optimizer(policy, config), deque(maxlen=10)
    batches = run.batches(
        run.data.warmup, 0, config.sft_steps, config.sft_prompts_per_step, config.seed + 1, flag="--sft_data"
    )
    run.log.start("warm-up", config.sft_steps)
    for step, (prompts, _) in enumerate(batches):
        rate = learning_rate(step, config.sft_steps, config.sft_learning_rate, "constant", RAMP)
        set_learning_rate(optimizer, rate)
        targets = [[target_tokens(tokenizer, text) for text in prompt.sample.completions] for prompt in prompts]
        check_targets(prompts, targets, policy.spec, config.max_prompt_tokens)
        loss, probabilities = supervised_step(
            policy, optimizer, prompts, [[tokens for tokens, _ in group] for group in targets], config, processes
        )
        flat = iter(probabilities)
        least = [min(determined(next(flat), marks, len(group)) for _, marks in group) for group in targets]
        sums = processes.sum({"probability": sum(least), "prompts": len(least)})
        recent.append(sums["probability"] / max(sums["prompts"], 1))
        run.log.step("warmup", step, {"loss": loss, "probability": recent[-1]}, shown=("loss", "probability"))
        if len(recent) == recent.maxlen and sum(recent) / len(recent) > config.sft_until:
            break
    run.log.stop()
    run.prompts = []  # what runs out of memory from here on is not these
