"""Fast paths of a GPU, each used only once it has shown, on this machine and model, that it is right and faster.

When a run starts, the first prompt that can be read is sampled and scored by the plain path, then with each fast path
added in turn. What the fast path samples and scores must have the log-probabilities that the plain path gives to the
same tokens. So a broken build of flash-attn, or a kernel that is wrong on a new GPU, costs a line and not a run.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from grpo import sequence
from grpo.attention import IN_USE
from grpo.batch import pack
from grpo.config import Config
from grpo.engine.distributed import gather, unsharded
from grpo.errors import RunError
from grpo.policy import Policy
from grpo.sampler import LOOK_EVERY, SamplingSettings, generate
from video.formats import Sample
from video.loader import PromptLoader
from video.prompt import Prompt, Skipped

TOKENS = 64  # the longest completion of a trial
SAMPLES = 8  # how many samples are tried, until one can be read
# The mean difference of log-probabilities may be TOLERANCE times the one between the plain path's sampler and scorer.
# That is rounding, and depends on the model: in bf16 0.009 and 0.040 on two tiny ones. There a right kernel differs
# from the plain path by 0.009 and 0.086, and a causal mask that is off by one token by 0.035 and 0.68.
TOLERANCE = 3
LEAST = 0.01  # a mean difference that is allowed on any model


# {name of a fast path, which is in `IN_USE` while the path is in use: what it must make faster}
FAST_PATHS = {"flash-attn": "scoring", "fused norms": "sampling", "decoding graph": "sampling"}


class Trial(NamedTuple):
    """A group that was sampled and scored."""

    tokens: list[torch.Tensor]  # (C,) of each completion
    logprobs: torch.Tensor  # (2, N) of all tokens, by the sampler and by the scorer
    seconds: dict[str, float]  # of "sampling" and "scoring"


def choose_fast_paths(
    policy: Policy, loader: PromptLoader, samples: list[Sample], config: Config, tokenizer: Tokenizer, say: Callable
) -> None:
    """Sets `IN_USE`, alike on all ranks: a path that fails on one rank is left out on all. Collective.

    say: takes a line for the user, such as why a path is left out.
    """
    IN_USE.clear()
    if policy.device.type == "cuda":
        with closing(loader.batches([sample] for sample in samples[:SAMPLES])) as batches:
            agreed = map(sequence.agreed, batches)
            prompt = next((prompt for (prompt,) in agreed if not isinstance(prompt, Skipped)), None)
        graph = config.decode_graph and config.max_new_tokens > 2 * LOOK_EVERY  # shorter ones are never recorded
        paths = [path for path in FAST_PATHS if graph or path != "decoding graph"]
        with unsharded(policy) as plain:
            faults = find_faults(paths, plain, prompt, config, tokenizer)
        for path, *reasons in zip(paths, *gather(faults)):
            if reason := next(filter(None, reasons), None):
                say(f"{path} is left out: {reason}")
            else:
                IN_USE.add(path)
    kernel = "flash-attn" if "flash-attn" in IN_USE else "torch's scaled_dot_product_attention"
    say(f"attention by {kernel}; fast paths in use: {', '.join(sorted(IN_USE)) or 'none'}")


@torch.no_grad()
def find_faults(
    paths: Sequence[str], policy: Policy, prompt: Prompt | None, config: Config, tokenizer: Tokenizer
) -> list[str | None]:
    """For each path of `FAST_PATHS` None, or in a few words why it is left out. Not collective: `policy` must not be
    sharded.

    Raises RunError if a path leaves the GPU in a state in which nothing runs any more.
    """
    if prompt is None:
        return [f"none of the first {SAMPLES} samples can be read, to try it on"] * len(paths)
    names, faults = [], []
    best = run_trial((), policy, prompt, config, tokenizer)
    allowed = max(LEAST, TOLERANCE * best.logprobs.diff(dim=0).abs().mean().item())
    for path in paths:
        try:
            trial = run_trial((*names, path), policy, prompt, config, tokenizer)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}".strip().partition("\n")[0])
            _refuse_a_broken_gpu(path, faults[-1])
            continue
        with using(()):
            expected = _score(policy, prompt, trial.tokens)
        difference = (trial.logprobs - expected).abs().mean(-1).max().item()
        ours, without = trial.seconds[FAST_PATHS[path]], best.seconds[FAST_PATHS[path]]
        if not difference <= allowed:  # NaN is a fault too
            faults.append(f"its log-probabilities are off by {difference:.2g} on average, {allowed:.2g} is allowed")
        elif ours >= without:
            faults.append(f"it is not faster, {ours:.3g} s against {without:.3g} s without it")
        else:
            faults.append(None)
            names, best = [*names, path], trial
    return faults


def run_trial(names: Iterable[str], policy: Policy, prompt: Prompt, config: Config, tokenizer: Tokenizer) -> Trial:
    """The `Trial` of the fast paths `names` and no other, timed at the second run: in the first one libraries set
    themselves up."""
    settings = SamplingSettings(max_new_tokens=min(TOKENS, config.max_new_tokens))
    with using(names):
        for _ in range(2):
            began = time.perf_counter()
            (group,) = generate(policy, [prompt], config.group_size, settings, [0], tokenizer)
            sampled = time.perf_counter()
            scored = _score(policy, prompt, group.tokens)
            seconds = {"sampling": sampled - began, "scoring": time.perf_counter() - sampled}
    return Trial(group.tokens, torch.stack([torch.cat(group.logprobs), scored]), seconds)


def _score(policy, prompt, completions):
    """(N,) log-probabilities of the completions' tokens by the packed forward, on the CPU."""
    return policy(pack([prompt], [completions], policy.spec).to(policy.device), entropy=False)[0].cpu()


@contextmanager
def using(names: Iterable[str]) -> Iterator[None]:
    """Has `IN_USE` hold these names and no other, for a while."""
    before = set(IN_USE)
    IN_USE.clear()
    IN_USE.update(names)
    try:
        yield
    finally:
        IN_USE.clear()
        IN_USE.update(before)


def _refuse_a_broken_gpu(path, reason):
    """Raises RunError if the error of a path is one that stays, such as an illegal memory access."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise RunError(
            f"{path} left the GPU unusable ({reason}); run without it: uninstall flash-attn, or --no-decode_graph"
        ) from error
