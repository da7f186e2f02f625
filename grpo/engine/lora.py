"""Low-rank adapters (LoRA, arXiv 2106.09685) on the decoder's linear layers, by `peft`; the frozen weights are the
reference.

    y = W x + (alpha / rank) · B A x,   A uniform as peft draws it, B zero: the policy starts as the reference itself
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from grpo.config import Config
from grpo.engine.weights import fill
from grpo.sampler import prompt_seed

TARGETS = r".*language_model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"


def add_adapters(model: nn.Module, config: Config) -> None:
    """Adds fp32 adapters of config.lora_rank to a model on the meta device, in place, and freezes all else."""
    from peft import inject_adapter_in_model  # optional: `grpo.run.folder.check_inputs` says if it is missing

    inject_adapter_in_model(_peft_config(config), model)  # freezes all else
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _peft_config(config):
    from peft import LoraConfig

    sizes = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    return LoraConfig(**sizes, target_modules=TARGETS, base_model_name_or_path=config.model)


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """Fills materialised adapters, alike on any number of ranks: A from the seed and its name, B with zeros."""
    for name, parameter in adapters(model):
        values, bound = torch.zeros(parameter.shape), 1 / math.sqrt(parameter.shape[1])
        if ".lora_A." in name:
            values.uniform_(-bound, bound, generator=torch.Generator().manual_seed(prompt_seed(seed, "lora", name)))
        fill(parameter, values)


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]


def without_adapters(policy: nn.Module) -> Callable:
    """The reference: a function like the policy's forward, of the same weights with the adapters off."""

    def turn(off):
        for module in policy.modules():
            if hasattr(module, "lora_A"):
                module._disable_adapters = off

    def reference(*given, **options):
        turn(off=True)
        try:
            return policy(*given, **options)
        finally:
            turn(off=False)

    return reference


def save_adapters(weights: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    """Writes {name: tensor} of the adapters as `peft.PeftModel.from_pretrained` reads them: adapter_config.json and
    adapter_model.safetensors."""
    _peft_config(config).save_pretrained(folder)
    named = {f"base_model.model.{name.replace('.default', '')}": w.contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def merge(weights: dict[str, torch.Tensor], scale: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """{name: tensor} of a model with adapters -> {name: tensor} of the plain model: W + scale · B A, added in fp32."""
    merged = {}
    for name, value in weights.items():
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            a, b = (weights[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
            value = (value.float() + scale * (b @ a)).to(dtype)
        if ".lora_" not in name:
            merged[name.replace(".base_layer", "")] = value
    return merged
