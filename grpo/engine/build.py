"""Policy and reference of a checkpoint folder: loaded, sharded, checkpointed, compiled, as the Config says."""

import gc

import torch

from grpo.engine import distributed, lora
from grpo.engine.model import (
    checkpoint_activations,
    compile_layers,
    empty_model,
    load_weights,
    materialise,
    model_spec,
    vision_tower,
)
from grpo.policy import Policy


def build_policy(path, config, processor, device, mesh=None, trained=True, adapters=False):
    """The sharded Policy of a checkpoint folder, computed in bf16 on a GPU. Trained weights are fp32 masters; others,
    such as those beneath adapters, are held in what they are computed in."""
    gc.collect()  # FSDP ties modules into cycles: the weights of a policy that was let go would stay
    dtype = distributed.compute_dtype(device)
    model = empty_model(path, torch.float32 if trained and not adapters else dtype)
    if config.freeze_vision:
        vision_tower(model).requires_grad_(False)
    if adapters:
        lora.add_adapters(model, config)
    if config.gradient_checkpointing and trained:
        checkpoint_activations(model, vision=not config.freeze_vision)
    policy = Policy(model, model_spec(model, processor.tokenizer))
    alone = mesh is not None and mesh.size() == 1 and (adapters or not trained)  # gathering would copy all weights
    if mesh is not None and not alone:
        distributed.shard(policy, mesh, dtype)
    materialise(model, device)
    load_weights(model, path)
    if adapters:
        lora.start_adapters(model, config.seed)
    if config.compile:
        for each in filter(None, (policy, policy.plain)):
            compile_layers(each.model)
    return policy.to(device)


def build_reference(path, policy, config, processor, device, mesh=None):
    """The frozen reference of a checkpoint folder. None if β = 0; with adapters it is the policy with them off."""
    if config.kl_coef == 0:
        return None
    if config.lora_rank:
        return lora.without_adapters(policy)
    reference = build_policy(path, config, processor, device, mesh, trained=False).requires_grad_(False)
    if reference.sharded:  # the root would stay gathered until a backward that never comes
        reference.set_reshard_after_forward(True, recurse=False)
    return reference
