"""Policy and reference of a checkpoint folder: loaded, sharded, checkpointed, compiled, as the Config says."""

import gc
from dataclasses import replace

import torch

from grpo import distributed, lora
from grpo.model import (
    checkpoint_activations,
    compile_layers,
    empty_model,
    load_weights,
    materialise,
    model_spec,
    vision_tower,
)
from grpo.policy import Policy


def build_policy(path, config, processor, processes, trained=True, adapters=False):
    """The sharded Policy of a checkpoint folder, computed in bf16 on a GPU: its weights held as fp32 masters where they
    are trained, else, as beneath adapters, in what they are computed in."""
    gc.collect()  # FSDP ties modules into cycles: a policy that was let go would keep its weights beside the new ones
    model = empty_model(path, torch.float32 if trained and not adapters else processes.dtype)
    if config.freeze_vision:
        vision_tower(model).requires_grad_(False)
    if adapters:
        lora.add_adapters(model, config)
    if processes.world == 1 and (adapters or not trained):  # alone, gathering would only make a second copy of weights
        processes = replace(processes, mesh=None)
    if config.gradient_checkpointing and trained:
        checkpoint_activations(model, vision=not config.freeze_vision)
    policy = distributed.shard(Policy(model, model_spec(model, processor.tokenizer)), processes, processes.dtype)
    materialise(model, processes.device)
    load_weights(model, path)
    if adapters:
        lora.start_adapters(model, config.seed)
    if config.compile:
        for each in filter(None, (policy, policy.plain)):
            compile_layers(each.model)
    return policy.to(processes.device)


def build_reference(path, policy, config, processor, processes):
    """The frozen reference of a checkpoint folder, None where β = 0: nothing is loaded then, nor where the policy is
    the reference with adapters."""
    if config.kl_coef == 0:
        return None
    if config.lora_rank:
        return lora.without_adapters(policy)
    reference = build_policy(path, config, processor, processes, trained=False).requires_grad_(False)
    if reference.sharded:  # the root would stay gathered until a backward that never comes
        reference.set_reshard_after_forward(True, recurse=False)
    return reference
