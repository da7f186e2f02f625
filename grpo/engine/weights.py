"""Weights: from safetensors files into a model, whole or sharded, that was built without memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grpo.engine.model_files import find_model, reading
from grpo.errors import ModelError

STORED = ("BF16", "F16", "F32", "F64")  # safetensors' names; a number of any other form is quantised: it needs a scale

# Files on the hub have older names: visual.X -> model.visual.X, and model.X -> model.language_model.X.
RENAMED = (
    (r"^(visual|language_model)\.", r"model.\1."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Gives a model on the meta device memory on `device`, in place. Parameters are uninitialised, tied ones still
    tied. Buffers (rotary frequencies, which no file holds) are computed as transformers does, on the CPU."""
    made = {}  # parameter on the meta device -> parameter with memory
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if old not in made:
                    made[old] = nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
                module._parameters[name] = made[old]
        if any(buffer.is_meta for buffer in module._buffers.values()):
            module._buffers |= {name: torch.empty_like(b, device="cpu") for name, b in module._buffers.items()}
            model._init_weights(module)
            module.to(device)


@torch.no_grad()
def load_weights(model: PreTrainedModel, path: str | Path) -> None:
    """Fills a materialised model from safetensors files; of a sharded parameter each rank reads its own rows alone.

    (`from_pretrained` on rank 0 and torch's `set_model_state_dict` would hold the whole model in rank 0's memory, 16.6
    GB for 7B, and send it to all ranks.) Raises ModelError for a weight that is missing, of another shape, quantised,
    not finite, or that the model has no place for.
    """
    folder = find_model(path)
    targets = {name.replace(".base_layer", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    filled, unknown = {}, []  # {parameter: its name in the files}, names that the model has no place for
    for file, name, source in _stored(weight_files(folder)):
        target = targets.get(name_in_model(name))
        if target is None:
            unknown.append(name)
            continue
        if source.get_dtype() not in STORED:
            raise ModelError(f"{file}: {name} is stored as {source.get_dtype()}, quantised; take the model in bf16")
        if source.get_shape() != list(target.shape):
            shape = list(target.shape)
            raise ModelError(f"{file}: {name} is of shape {source.get_shape()}, config.json says {shape}")
        before = own_rows(target)[0].clone() if target in filled else None
        rows = fill(target, source)
        if before is not None and not torch.equal(before, rows):
            raise ModelError(f"{file}: {name} is not {filled[target]}, but config.json has tie_word_embeddings")
        # A NaN shows in the least and largest: 7 s for 7B on one thread, where isfinite takes minutes.
        if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
            raise ModelError(f"{file}: {name} holds NaN or infinity; take an earlier checkpoint")
        filled[target] = name
    missing = [name for name, p in targets.items() if p not in filled and ".lora_" not in name]
    if missing:
        raise ModelError(f"--model {folder}: its safetensors lack {len(missing)} weights, {missing[0]} among them")
    if unknown:
        raise ModelError(
            f"--model {folder}: its safetensors hold {len(unknown)} weights that its config.json has no place for, "
            f"{unknown[0]} among them: quantised, or another model's"
        )


def name_in_model(name: str) -> str:
    """The model's name of a weight in a file: "model.norm.weight" -> "model.language_model.norm.weight"."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def own_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """(what this rank holds of a parameter, which rows these are): all, or for FSDP2 one part of equal parts.

    10 rows on 4 ranks: rows 0 to 2, 3 to 5, 6 to 8, and 9.
    """
    if not isinstance(parameter, DTensor):
        return parameter, slice(None)
    mesh, shards = parameter.device_mesh, parameter.device_mesh.ndim - 1  # the mesh's last dimension; see `distributed`
    first = mesh.get_local_rank(shards) * -(-len(parameter) // mesh.size(shards))
    local = parameter.to_local()
    return local, slice(first, first + len(local))


def fill(parameter: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copies a source of the parameter's whole shape (a tensor, or a safetensors slice) into what this rank holds of
    it. Only these rows are read, and cast on the device. Returns them."""
    local, rows = own_rows(parameter)
    return local.copy_(source[rows].to(local.device))


def _stored(files: list[Path]) -> Iterator[tuple[Path, str, object]]:
    """Yields (file, name, safetensors slice) of each weight; not of rotary buffers, which old libraries saved too."""
    for file in files:
        try:
            opened = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: is no whole safetensors file ({error}); download it again") from error
        with opened:
            for name in opened.keys():
                if not name.endswith(".inv_freq"):
                    yield file, name, opened.get_slice(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one. Raises ModelError if one of them is missing."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        with reading("--model", folder, index.name, "download it again"):
            names = sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"--model {folder}: {name} is missing (weights are read from safetensors only)")
    return [folder / name for name in names]
