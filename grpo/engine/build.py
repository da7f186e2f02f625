"""Policy and reference of a model folder, built as the Config says: sharded, with activations recomputed, compiled."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import ProcessorMixin

from grpo.config import Config
from grpo.engine import distributed, lora
from grpo.engine.model import checkpoint_activations, compile_layers, empty_model, model_spec, vision_tower
from grpo.engine.weights import load_weights, materialise
from grpo.policy import Policy


def build_policy(
    path: str | Path, config: Config, processor: ProcessorMixin, device: torch.device, mesh: DeviceMesh | None = None,
    trained: bool = True, adapters: bool = False,
) -> Policy:  # fmt: skip
    """The Policy of a model folder, sharded over the mesh; it computes in bf16 on a GPU. Trained weights are fp32
    masters. Other weights, such as those beneath adapters, are kept in the precision that they are computed in."""
    gc.collect()  # FSDP ties modules into cycles: the weights of a policy that is no longer used would stay
    dtype = distributed.compute_dtype(device)
    model = empty_model(path, torch.float32 if trained and not adapters else dtype)
    if config.freeze_vision:
        vision_tower(model).requires_grad_(False)
    if adapters:
        lora.add_adapters(model, config)
    if config.activation_checkpointing != "none" and trained:
        selective = config.activation_checkpointing == "selective"
        checkpoint_activations(model, selective, vision=not config.freeze_vision)
    policy = Policy(model, model_spec(model, processor.tokenizer))
    # Gathering copies the weights: one process whose weights are in the computing precision needs no copy.
    if mesh is not None and (mesh.size() > 1 or trained and not adapters):
        distributed.shard(policy, mesh, dtype)
    materialise(model, device)
    load_weights(model, path)
    if adapters:
        lora.start_adapters(model, config.seed)
    if config.compile:
        for each in filter(None, (policy, policy.plain)):
            compile_layers(each.model)
    return policy.to(device)


def build_reference(
    path: str | Path, policy: Policy, config: Config, processor: ProcessorMixin, device: torch.device,
    mesh: DeviceMesh | None = None,
) -> Callable | None:  # fmt: skip
    """The frozen reference of a model folder. None if β = 0; with adapters it is the policy with the adapters off."""
    if config.kl_coef == 0:
        return None
    if config.lora_rank:
        return lora.without_adapters(policy)
    reference = build_policy(path, config, processor, device, mesh, trained=False).requires_grad_(False)
    if reference.sharded:  # the root would stay gathered until a backward that never comes
        reference.set_reshard_after_forward(True, recurse=False)
    return reference
