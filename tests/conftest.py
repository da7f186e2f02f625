"""Tiny models, prompts of every kind, and the naive forward that is the oracle of the packed one."""

import json
import math
import os
import sys
from contextlib import contextmanager
from functools import cache

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: threads of each would wait for the others'
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    # So told, torch's attention in bf16 still packs for AMX if oneDNN finds it: "pack_vnni2 is only supported when ..."
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest
import torch
from transformers import AutoProcessor

from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import build_tiny_model
from evaluation.predictions import Predictions
from grpo.engine.model import empty_model, model_spec
from grpo.engine.model_files import read_config
from grpo.engine.weights import load_weights, materialise
from grpo.families import family_names, load_family
from grpo.policy import Policy
from grpo.positions import prompt_positions
from video.dataset import Sample
from video.prompt import Prompt

if "softgpu" in sys.modules:  # the GPU that is not there
    import null_train  # noqa: F401

FAMILIES = family_names()
ONE_FAST = [name if name == "qwen2_vl" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
PIXEL_FIELDS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{family: folder} of one tiny checkpoint each."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: build_tiny_model(root / family, family, seed=1) for family in FAMILIES}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(demo set, {tied: checkpoint}) of the tests that start processes."""
    root = tmp_path_factory.mktemp("world")
    models = {tie: build_tiny_model(root / f"tie{tie}", tie=tie, seed=3) for tie in (False, True)}
    return make_demo_set(root / "data", DemoSpec(train=24, val=8, warmup=8)), models


@pytest.fixture(scope="session")
def worlds(world, tmp_path_factory):
    """{family: its `world`}, of the same videos."""
    root, (data, models) = tmp_path_factory.mktemp("worlds"), world
    build = lambda family, tie: build_tiny_model(root / f"{family}{tie}", family, tie=tie, seed=3)
    others = {name: {tie: build(name, tie) for tie in models} for name in FAMILIES if name != "qwen2_vl"}
    return {name: (data, folders) for name, folders in {"qwen2_vl": models, **others}.items()}


@pytest.fixture(params=FAMILIES)
def tiny(request, checkpoints):
    """(policy through this project's attention, naive model through transformers' own, tokenizer) of equal weights."""
    return load_pair(checkpoints[request.param])


@pytest.fixture
def tiny_vl(checkpoints):
    return load_pair(checkpoints["qwen2_vl"])


def load_model(path, dtype=torch.float32):
    """The model of a folder on the CPU, whole."""
    model = empty_model(path, dtype)
    materialise(model, "cpu")
    load_weights(model, path)
    return model


def load_pair(folder, dtype=torch.float32):
    processor = AutoProcessor.from_pretrained(folder)
    model = load_model(folder, dtype)
    naive = type(model).from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    return Policy(model, model_spec(model, processor.tokenizer)), naive, processor.tokenizer


@cache
def config_of(folder):
    return read_config(folder)


def make_prompt(tokenizer, media, seed=0, words="Which direction does the shape move?", key=None):
    """A prompt with random patches; media: e.g. [("video", (t, h, w))], grids in patches, in order. It has the form of
    the family whose checkpoint the tokenizer is of; a video has two frames a second."""
    config = config_of(tokenizer.name_or_path)
    family, patch = load_family(config.model_type), 6 * config.vision_config.patch_size**2
    gen = torch.Generator().manual_seed(seed)
    pad = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
    text, pixels, grids = "<|im_start|>user\n", {"video": [], "image": []}, {"video": [], "image": []}
    for name, grid in media:
        marked, runs = f"<|vision_start|>{pad[name]}<|vision_end|>", [grid]
        if name == "video":
            marked, runs = family.mark_videos(marked, [times_of(grid)]), family.span_grids(grid)
        text += marked.replace(pad[name], pad[name] * (math.prod(runs[0]) // 4))
        pixels[name].append(torch.randn(math.prod(grid), patch, generator=gen))
        grids[name].append(grid)
    text += words + "<|im_end|>\n<|im_start|>assistant\n"
    join = lambda name: (torch.cat(pixels[name]), torch.tensor(grids[name])) if grids[name] else (None, None)
    images, videos = join("image"), join("video")
    return Prompt(
        sample=Sample(key=key or f"test:{seed}", problem=words, answer="A"),
        input_ids=torch.tensor(tokenizer.encode(text)),
        pixel_values=images[0], image_grid_thw=images[1],
        pixel_values_videos=videos[0], video_grid_thw=videos[1],
        seconds_per_grid=[1.0] * len(grids["video"]), frame_times=[times_of(grid) for grid in grids["video"]],
    )  # fmt: skip


def times_of(grid):
    return [number / 2 for number in range(2 * grid[0])]


def assert_close_to_scale(ours, theirs, tolerance, name=""):
    """Equal to `tolerance` of the largest value of `theirs`: sums that cancel, as gradients do, leave rounding of that
    size in every entry, however small the entry is."""
    gap, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert gap <= tolerance * scale, f"{name}: off by {gap:.1e}, the largest value is {scale:.1e}"


PROMPT_KINDS = {
    "video": [("video", (4, 4, 6))],
    "long small video": [("video", (9, 2, 2))],
    "image": [("image", (1, 4, 4))],
    "two videos": [("video", (3, 4, 4)), ("video", (2, 6, 4))],
    "image and video": [("image", (1, 6, 4)), ("video", (2, 4, 4))],
    "text": [],
}


def random_completions(tokenizer, lengths, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 390, (n,), generator=gen) for n in lengths]


def naive_logprobs(model, spec, prompt, completions, temperature=1.0):
    """Flat (N,) log-probabilities by the model's own forward on each [prompt | completion], the prompt repeated."""
    rows = []
    for tokens in completions:
        logits = naive_logits(model, spec, prompt, tokens)
        rows.append((logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return torch.cat(rows)


def naive_logits(model, spec, prompt, tokens):
    """(C, V) logits of each token of one completion by the model's own forward on [prompt | completion], given the same
    explicit positions as the packed forward."""
    own, first = prompt_positions(prompt, spec)
    logits = model(
        input_ids=torch.cat([prompt.input_ids, tokens])[None],
        position_ids=torch.cat([own, (first + torch.arange(len(tokens))).expand(3, -1)], dim=1)[:, None],
        **{name: value for name in PIXEL_FIELDS if (value := getattr(prompt, name)) is not None},
        use_cache=False,
    ).logits[0, len(prompt.input_ids) - 1 : -1].clone()  # fmt: skip
    logits[:, list(spec.never_sampled)] = float("-inf")
    return logits


class Killed(Exception):
    pass


@contextmanager
def killed_while_saving(number):
    """An evaluation inside ends when it saves its batch of that number, of which half of a line is on the disk."""
    add, left = Predictions.add, number

    def die(self, variant, records):
        nonlocal left
        left -= 1
        if left == 0:
            with open(self.part_path, "a") as file:
                file.write(json.dumps(records[0])[:20])
            raise Killed
        add(self, variant, records)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Predictions, "add", die)
        yield
