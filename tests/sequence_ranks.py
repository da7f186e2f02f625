"""Scores, gradients and samples of one policy, on torchrun's ranks that share each prompt or on one process.

Rank 0 saves what `outcomes` returns: python -m torch.distributed.run … S FILE MODEL …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from conftest import PROMPT_KINDS, make_prompt, random_completions
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from grpo import sequence
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy
from grpo.policy import features_of
from grpo.sampler import SamplingSettings, generate

# name -> (kinds of the prompts of a row, completion lengths of each)
ROWS = {
    "one video": (["video"], (1, 7, 3, 4)),
    "text": (["text"], (2,)),
    "an image": (["image"], (3, 2)),
    "several prompts": (["two videos", "text", "image and video", "long small video"], (4, 1)),
}

# completions of each prompt, kinds of the prompts, whether the features are made before
SAMPLES = (
    (5, ["video"], False),
    (1, ["two videos", "text", "image"], True),
    (1, ["two videos", "image"], False),
    (1, ["video"], False),
    (3, ["text"], False),
)


class Sent(dict):
    """Counts, while it is entered, the bytes that this rank sends to others of its sequence group, by collective; of
    all-to-alls it also knows features (n, width) from heads (S, l, heads, D)."""

    def __enter__(self):
        self.real = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather_into_tensor")}
        dist.all_to_all_single, dist.all_gather_into_tensor = self.exchange, self.gather
        return self

    def __exit__(self, *_):
        for name, real in self.real.items():
            setattr(dist, name, real)

    def exchange(self, out, x, received, sent, group):
        self.add(
            "heads" if x.dim() == 4 else "features", x[0].nbytes * (len(x) - sent[sequence.rank()]) if len(x) else 0
        )
        return self.real["all_to_all_single"](out, x, received, sent, group=group)

    def gather(self, *given, **named):
        if len(given) > 1 and given[1].dim() == 3:  # keys or values (l, K, D), not the flat weights of a sharded model
            self.add("prompt", given[1].nbytes * (sequence.size() - 1))
        return self.real["all_gather_into_tensor"](*given, **named)

    def add(self, name, count):
        self[name] = self.get(name, 0) + count


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def scored(policy, tokenizer, kinds, lengths):
    """{"length" of the row, "logprobs", "entropy", "gradients" of a weighted sum of both} of one row."""
    prompts = [make_prompt(tokenizer, PROMPT_KINDS[kind], seed=i) for i, kind in enumerate(kinds)]
    completions = [random_completions(tokenizer, lengths, seed=i) for i in range(len(kinds))]
    batch = pack(prompts, completions, policy.spec)
    with Sent() as sent:
        logprobs, entropy = policy(batch, 0.8, entropy_gradient=True)
        loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum() + 0.1 * entropy.sum()
        (loss * distributed.world_size()).backward()  # as grpo.update does
    missing = [n for n, p in policy.named_parameters() if p.grad is None]
    gradients = {n: whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    values = {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "gradients": gradients}
    more = {"length": batch.input_ids.shape[1], "missing": missing, "patches": patches_of(batch), "sent": dict(sent)}
    return values | more


def patches_of(batch):
    return 0 if batch.pixels is None else len(batch.pixels)


def sampled(policy, tokenizer, count, kinds, frozen):
    """[(tokens, log-probabilities) of each of `count` completions of each prompt]; frozen: on features made before."""
    prompts = [make_prompt(tokenizer, PROMPT_KINDS[kind], seed=i) for i, kind in enumerate(kinds)]
    with distributed.unsharded(policy) as plain:
        features = torch.cat(features_of(plain, prompts)) if frozen else None
        seeds = [40 + i for i in range(len(prompts))]
        with Sent() as sent:
            groups = generate(plain, prompts, count, SamplingSettings(max_new_tokens=9), seeds, tokenizer, features)
    rows = [(tokens, logprobs) for group in groups for tokens, logprobs in zip(group.tokens, group.logprobs)]
    return {"rows": rows, "length": sum(len(prompt.input_ids) for prompt in prompts), "sent": dict(sent)}


def outcome(folder, device, mesh=None):
    config, processor = (
        parse_config(["--preset", "demo", "--activation_checkpointing", "full"]),
        AutoProcessor.from_pretrained(folder),
    )
    policy, tokenizer = build_policy(folder, config, processor, device, mesh), processor.tokenizer
    rows = {name: scored(policy, tokenizer, *row) for name, row in ROWS.items()}
    samples = {
        (count, *kinds, frozen): sampled(policy, tokenizer, count, kinds, frozen) for count, kinds, frozen in SAMPLES
    }
    return {"rows": rows, "samples": samples}


def outcomes(folders, device, mesh=None):
    """{folder: `outcome` of its model}"""
    return {str(folder): outcome(folder, device, mesh) for folder in folders}


if __name__ == "__main__":
    count, file, *folders = sys.argv[1:]
    results = outcomes(folders, *distributed.start("cpu", sequence_parallel=int(count)))
    patches = {f: {n: row["patches"] for n, row in results[f]["rows"].items()} for f in folders}
    shares = sequence.gather_items(patches)
    if distributed.is_main():
        torch.save({"results": results, "patches": shares}, file)
    distributed.stop()
