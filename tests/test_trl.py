"""Our loss against TRL's own: value and gradient of `GRPOTrainer._compute_loss`, called on a stub that hands it given
log-probabilities, for every loss, level, clip, normaliser and KL that TRL has. float64 throughout."""

from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from grpo.advantage import batch_moments, batch_std, group_advantages
from grpo.loss import TIS_MODES, policy_loss, token_weights

pytest.importorskip("trl", "1.16.0")
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

MAX_NEW_TOKENS = 9
NORMALISERS = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant"}  # the others: "token"
CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo")
# Name of the loss here for each (family, level) of TRL
LOSS = {
    ("ppo", "token"): "ppo", ("ppo", "sequence"): "gspo", ("cispo", "token"): "cispo",
    ("cispo", "sequence"): "cispo_sequence", ("sapo", "token"): "sapo", ("sapo", "sequence"): "sapo_sequence",
}  # fmt: skip
# (loss_type, importance_sampling_level, (clip below, clip above, TRL's delta: the dual clip))
CLIPS = [
    *product(CLIPPED, ("token", "sequence"), [(0.2, 0.2, None), (0.2, 0.28, None), (0.2, 0.28, 1.4)]),
    *product(("cispo",), ("token", "sequence"), [(1.0, 0.2, None), (1.0, 0.5, None)]),
    *product(("sapo",), ("token", "sequence"), [(0.2, 0.2, None)]),
]
# The same without its last bound
UNCLIPPED = {clip: (*clip[:2], None) if clip[2] else (clip[0], 99.0, None) for _, _, clip in CLIPS}
# (beta, use_bias_correction_kl), truncated completions masked, old log-probabilities of other weights
REST = [*product([(0.0, True), (0.04, False), (0.04, True)], (False, True), (False, True))]
SETTINGS = [*product(CLIPS, REST)]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_batch(seed, off_policy=True):
    """Padded as TRL pads: (B, T) tensors, the real tokens first. The old log-probabilities differ by a part that is the
    completion's and a part that is the token's, so that ratios of both levels reach beyond every clip."""
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_NEW_TOKENS + 1, (8,), generator=gen)
    shape = (len(lengths), int(lengths.max()))
    logprobs = -2 * torch.rand(shape, generator=gen)
    old = logprobs + 0.4 * torch.randn(len(lengths), 1, generator=gen) + 0.2 * torch.randn(shape, generator=gen)
    return SimpleNamespace(
        lengths=lengths,
        real=torch.arange(shape[1]) < lengths[:, None],
        logprobs=logprobs.requires_grad_(),
        old=old if off_policy else logprobs.detach(),
        sampler=old + 0.5 * torch.randn(shape, generator=gen),
        ref=-2 * torch.rand(shape, generator=gen),
        entropy=torch.rand(shape, generator=gen).requires_grad_(),
        advantages=torch.randn(len(lengths), generator=gen),
        truncated=torch.rand(len(lengths), generator=gen) < 0.4,
        completion=torch.arange(len(lengths)).repeat_interleave(lengths),
    )


def trl_loss(batch, loss_type, level, clip, beta=0.0, correction=True, mask=False, old=True, ratio=None, coef=0.0):
    """TRL's loss. ratio: its vLLM importance weights; coef: its entropy_coef. TRL's CISPO takes the bound of the ratio
    itself, ours the distance of the bound from 1, as the paper does."""
    low, high, delta = clip
    completion_mask = (batch.real & ~(batch.truncated[:, None] & mask)).int()
    tokens = completion_mask.sum()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (batch.logprobs, batch.entropy, None),
        args=SimpleNamespace(
            use_bias_correction_kl=correction, delta=delta, steps_per_generation=1,
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=low,
        epsilon_high=1 + high if loss_type == "cispo" else high, max_completion_length=MAX_NEW_TOKENS,
        use_vllm=ratio is not None, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True), top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        aux_loss_enabled=False, _entropy_bonus_enabled=coef != 0, entropy_coef=coef, use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    prompt = torch.ones(len(batch.lengths), 3, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": batch.real.long(),
        "completion_mask": completion_mask, "advantages": batch.advantages, "num_items_in_batch": tokens,
        "ref_per_token_logps": batch.ref, "importance_sampling_ratio": ratio,
    }  # fmt: skip
    if old:
        inputs["old_per_token_logps"] = batch.old
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def our_loss(batch, loss_type, level, clip, beta=0.0, correction=True, mask=False, **options):
    low, high, dual_clip = clip
    trained = ~(batch.truncated & mask)
    lengths, real = batch.lengths, batch.real
    totals = {"tokens": int((lengths * trained).sum()), "completions": len(lengths)}
    weights = token_weights(lengths, NORMALISERS.get(loss_type, "token"), totals, MAX_NEW_TOKENS, trained)
    family = "ppo" if loss_type in CLIPPED else loss_type
    return policy_loss(
        batch.logprobs[real], batch.old[real], batch.advantages.repeat_interleave(lengths), weights, low, high,
        batch.ref[real] if beta else None, beta, loss=LOSS[family, level], completion=batch.completion,
        dual_clip=dual_clip, kl_correction=correction, **options,
    )  # fmt: skip


def assert_equal(ours, theirs, *inputs):
    """Values and gradients agree to 1e-9, and the gradient is not 0 throughout."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for own, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert own.abs().max() > 1e-6
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_number_of_settings():
    assert len(SETTINGS) >= 300


@pytest.mark.parametrize("loss_type, level, clip", CLIPS, ids=str)
def test_equals_trl(loss_type, level, clip):
    """12 settings for each loss, level and clip: KL, masked truncations, on and off the old policy."""
    reached = 0
    for seed, ((beta, correction), mask, off_policy) in enumerate(REST):
        batch = random_batch(seed, off_policy)
        theirs = trl_loss(batch, loss_type, level, clip, beta, correction, mask, old=off_policy)
        ours, sums = our_loss(batch, loss_type, level, clip, beta, correction, mask)
        assert_equal(ours, theirs, batch.logprobs)
        unclipped, _ = our_loss(batch, loss_type, level, UNCLIPPED[clip], beta, correction, mask)
        reached += int(unclipped != ours)
    assert reached > 0 or loss_type == "sapo"  # else the comparison would say nothing about the clip


@pytest.mark.parametrize("loss_type, level", [*product((*CLIPPED, "cispo", "sapo"), ("token", "sequence"))])
@pytest.mark.parametrize("mode", TIS_MODES)
def test_truncated_importance_sampling_equals_trl(loss_type, level, mode):
    """TRL computes the weights of `vllm_importance_sampling_mode` where it samples: written out here, used there."""
    batch, cap = random_batch(1), 1.5
    difference = (batch.old - batch.sampler) * batch.real
    if mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = difference.exp()
    assert (ratio > cap).any() and (ratio < cap).any()
    ratio = ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
    clip = (1.0, 0.5, None) if loss_type == "cispo" else (0.2, 0.28, None)
    theirs = trl_loss(batch, loss_type, level, clip, 0.04, mask=True, ratio=ratio)
    ours, _ = our_loss(
        batch, loss_type, level, clip, 0.04, mask=True, sampler_logprobs=batch.sampler[batch.real], tis_cap=cap,
        tis_mode=mode,
    )  # fmt: skip
    assert_equal(ours, theirs, batch.logprobs)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "cispo"])
def test_entropy_bonus_equals_trl(loss_type):
    """TRL always averages the entropy over tokens, which is what the normaliser "token" does; see docs/algorithms.md
    for the others."""
    batch, clip = random_batch(2), (1.0, 0.5, None)
    theirs = trl_loss(batch, loss_type, "token", clip, 0.04, mask=True, coef=0.01)
    entropy = batch.entropy[batch.real]
    ours, _ = our_loss(batch, loss_type, "token", clip, 0.04, mask=True, entropy=entropy, entropy_coef=0.01)
    assert_equal(ours, theirs, batch.logprobs, batch.entropy)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_advantages_equal_trl(scale):
    """The lines of TRL 1.16's `_generate_and_score_completions`, whose tensors cannot be reached without sampling."""
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    expected = rewards - rewards.mean(dim=1, keepdim=True)
    if scale != "none":
        deviation = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
        expected = expected / (deviation + 1e-4)
    deviation = batch_std(batch_moments(rewards, scale)) if scale == "batch" else None
    ours = torch.stack([group_advantages(row, scale, deviation) for row in rewards])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)  # ours are float32
