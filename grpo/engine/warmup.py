"""A supervised pass before GRPO, through the same packed forward: several target completions share their prompt.

Rows carry `completions`. The pass ends after `sft_steps`, or as soon as the model predicts the determined tokens: all
but those at which two completions of a prompt part. Of "left, B" and "up, C" all tokens are determined but the words
"left" and "up". "Predicts" means: the least probability of a prompt's determined tokens is above `sft_until`, as a mean
over the prompts of the last ten steps.
"""

from collections import deque
from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from grpo.batch import RolloutGroup
from grpo.config import Config
from grpo.engine.distributed import reduce_sum, world_size
from grpo.engine.model import ModelSpec
from grpo.engine.optimizer import learning_rate, make_optimizer, set_learning_rate
from grpo.policy import Policy
from grpo.update import apply_gradients, make_micro_batches
from video.formats import DataError
from video.prompt import Prompt

RAMP = 20  # steps of linear warm-up of the learning rate, which then stays constant


def determined(completions: list[torch.Tensor]) -> list[torch.Tensor]:
    """[(C,) bool, True for each token that follows from the prompt and the tokens before it], for each completion.

    The completions [a b e], [a c e] have the marks [T F T], [T F T].
    """
    marks = [torch.ones(len(own), dtype=torch.bool) for own in completions]
    for own, mark in zip(completions, marks):
        for other in completions:
            parted = [a != b for a, b in zip(own.tolist(), other.tolist())]
            if any(parted):
                mark[parted.index(True)] = False
    return marks


def target_groups(
    prompts: list[Prompt], tokenizer: Tokenizer, spec: ModelSpec, max_tokens: int
) -> tuple[list[RolloutGroup], list[list[torch.Tensor]]]:
    """(`RolloutGroup`s whose completions are the prompts' targets, for each group its completions' (C,) bool marks of
    the determined tokens).

    Every prompt weighs the same, however many targets it has. Raises DataError, naming the row, for a completion of
    more than max_tokens, which would take all memory, or with a vision token, which would have no features.
    """
    groups, marks, forbidden = [], [], torch.tensor(spec.never_sampled)
    for prompt in prompts:
        texts = tokenizer(list(prompt.sample.completions), add_special_tokens=False)["input_ids"]
        tokens = [torch.tensor([*own, tokenizer.eos_token_id]) for own in texts]
        if any(bool(torch.isin(own, forbidden).any()) for own in tokens):
            raise DataError(f"{prompt.sample.key}: a completion holds a vision token such as <|video_pad|>; remove it")
        if (longest := max(map(len, tokens))) > max_tokens:
            raise DataError(
                f"{prompt.sample.key}: a completion of {longest} tokens is over --max_prompt_tokens {max_tokens}; "
                "shorten it"
            )
        groups.append(RolloutGroup(prompt, tokens, [torch.zeros(len(own)) for own in tokens], [], []))
        marks.append(determined(tokens))
    return groups, marks


def supervised_step(
    policy: Policy, optimizer: Optimizer, groups: list[RolloutGroup], config: Config
) -> tuple[float, list[torch.Tensor]]:
    """One step of maximum likelihood. Returns (loss, [(C,) probabilities of the tokens of each completion])."""
    count = max(reduce_sum({"prompts": len(groups)})["prompts"], 1)
    total, probabilities = 0.0, []
    for batch in make_micro_batches(groups, policy, config.prompts_per_forward):
        logprobs, _ = policy(batch, entropy=False)
        loss = 0 * logprobs.sum()  # of a dummy
        if batch.rollouts:
            shares = torch.cat([torch.full((len(g.tokens),), 1.0 / sum(g.lengths)) for g in batch.rollouts])
            loss = -(logprobs * shares.to(policy.device)[batch.completion]).sum() / count
            probabilities += logprobs.detach().exp().cpu().split(batch.lengths)
        (loss * world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
        total += loss.item()
    apply_gradients(policy, optimizer, config.grad_clip)
    return reduce_sum({"loss": total})["loss"], probabilities


def warm_up(policy: Policy, batches: Iterable, tokenizer: Tokenizer, config: Config, log) -> None:
    """Trains on batches of prompts with `completions`, until the end that the top of this file describes. Saves
    nothing: a run that is stopped in this pass begins it again."""
    optimizer, recent = make_optimizer(policy, config), deque(maxlen=10)
    log.start("warm-up", config.sft_steps)
    for step, (prompts, _) in enumerate(batches):
        set_learning_rate(optimizer, learning_rate(step, config.sft_steps, config.sft_learning_rate, "constant", RAMP))
        groups, marks = target_groups(prompts, tokenizer, policy.spec, config.max_prompt_tokens)
        loss, probabilities = supervised_step(policy, optimizer, groups, config)
        flat = iter(probabilities)
        sure = torch.ones(1)  # if the completions of a prompt have no determined token
        least = [torch.cat([sure, *(next(flat)[own] for own in answers)]).min().item() for answers in marks]
        sums = reduce_sum({"probability": sum(least), "prompts": len(least)})
        recent.append(sums["probability"] / max(sums["prompts"], 1))
        log.step("warmup", step, {"loss": loss, "probability": recent[-1]}, shown=("loss", "probability"))
        if len(recent) == recent.maxlen and sum(recent) / len(recent) > config.sft_until:
            break
    log.stop()
