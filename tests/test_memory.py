"""Memory that a GPU would run out of, counted on a CPU: weights that are let go, weights that are held twice."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import load_model, make_prompt
from processes import command
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoProcessor

import eval as eval_script
import train
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import build, distributed
from grpo.engine.build import build_policy
from grpo.engine.model import model_spec


def one_process_mesh(*_, **named):
    """What `distributed.start` returns on one GPU, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cpu"), init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))


@pytest.fixture
def alive(monkeypatch):
    """[how many policies still hold weights when the next one's are made]; nothing is collected by chance."""
    weights, counts, materialise = [], [], build.materialise

    def counting(model, device):
        counts.append(sum(weight() is not None for weight in weights))
        materialise(model, device)
        weight = next(model.parameters())
        weights.append(weakref.ref(getattr(weight, "_local_tensor", weight).untyped_storage()))

    monkeypatch.setattr(build, "materialise", counting)
    monkeypatch.setattr(distributed, "start", one_process_mesh)
    gc.disable()
    yield counts
    gc.enable()
    distributed.stop()


def test_weights_of_the_warm_up_are_gone_before_those_of_the_run_are_made(world, tmp_path, alive):
    """FSDP ties modules into cycles: only a collection frees them. The third policy is the reference."""
    data, _ = world
    flags = command(1, tmp_path, world, "--steps", "1", "--sft_steps", "1", "--sft_data", str(data["warmup"]))[2:]
    assert train.main(flags) == 0
    assert alive == [0, 0, 1]


def test_weights_of_one_checkpoint_are_gone_before_those_of_the_other_are_made(world, tmp_path, alive):
    data, models = world
    flags = ["--ckpt", str(models[False]), "--against", str(models[True]), "--data", str(data["val"]), "--samples", "2",
             "--max_new_tokens", "2", "--workers", "0", "--output", str(tmp_path)]  # fmt: skip
    assert eval_script.main(flags) == 0
    assert alive == [0, 0]


def test_one_process_holds_what_is_not_trained_once(checkpoints):
    """Sharded over itself alone, a rollout would gather a second copy of it."""
    folder, config = checkpoints["qwen2_vl"], parse_config(["--preset", "demo"])
    processor, (device, mesh) = AutoProcessor.from_pretrained(folder), one_process_mesh()
    try:
        for trained in (True, False):
            assert build_policy(folder, config, processor, device, mesh, trained).sharded == trained
    finally:
        distributed.stop()


def test_a_step_moves_the_pixels_of_one_forward_at_a_time(checkpoints):
    """Those of all micro-batches together are 31 GB of 64 prompts of 20,000 video tokens."""
    processor = AutoProcessor.from_pretrained(checkpoints["qwen2_vl"])
    spec = model_spec(load_model(checkpoints["qwen2_vl"]), processor.tokenizer)
    batch = pack([make_prompt(processor.tokenizer, [("video", (4, 4, 6))])], [[]], spec).to("meta")
    assert batch.input_ids.is_meta and batch.placeholders.is_meta and not batch.pixels.is_meta
