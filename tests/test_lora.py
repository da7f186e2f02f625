"""Adapters: the reference is the same weights with them off, nothing else changes, others can read what is saved."""

import json
import shutil

import pytest
import torch
from conftest import FAMILIES, ONE_FAST, load_model, make_prompt, random_completions
from processes import assert_same_run, command, launch, metrics_of, run_here
from safetensors.torch import load_file
from transformers import AutoProcessor

import train
from grpo import update
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine.build import build_policy, build_reference
from grpo.engine.checkpoint import checkpoints
from grpo.engine.lora import adapters, merge
from grpo.engine.model import model_spec
from grpo.engine.optimizer import make_optimizer, set_learning_rate
from grpo.policy import Policy

peft = pytest.importorskip("peft")
FLAGS = ("--lora_rank", "4", "--steps", "4", "--save_every", "2", "--keep_checkpoints", "9", "--learning_rate", "1e-2")


@pytest.fixture(params=FAMILIES)
def built(request, checkpoints):
    """(policy with adapters, reference, its base alone, a packed group, config)."""
    folder = checkpoints[request.param]
    config = parse_config(["--preset", "demo", "--model", str(folder), "--lora_rank", "4"])
    processor, device = AutoProcessor.from_pretrained(folder), torch.device("cpu")
    policy = build_policy(folder, config, processor, device, adapters=True)
    reference = build_reference(folder, policy, config, processor, device)
    base = load_model(folder)
    base = Policy(base, model_spec(base, processor.tokenizer))
    prompt = make_prompt(processor.tokenizer, [("video", (4, 4, 6))])
    packed = pack([prompt], [random_completions(processor.tokenizer, (5, 3))], policy.spec)
    return policy, reference, base, packed, config


def test_the_reference_is_the_base_whatever_the_adapters_hold(built):
    policy, reference, base, packed, _ = built
    with torch.no_grad():
        expected = base(packed)[0]
        assert torch.equal(policy(packed)[0], expected), "B is zero: the policy starts as its reference"
        for _, parameter in adapters(policy.model):
            parameter.normal_(std=0.3)
        assert torch.equal(reference(packed)[0], expected)
        assert (policy(packed)[0] - expected).abs().max() > 0.01


def test_checkpointing_changes_no_bit_of_the_adapters_gradients(built):
    policy, _, _, packed, config = built
    processor = AutoProcessor.from_pretrained(config.model)

    def gradients(setting):
        config.activation_checkpointing = setting
        policy = build_policy(config.model, config, processor, torch.device("cpu"), adapters=True)
        for _, parameter in adapters(policy.model):
            torch.nn.init.constant_(parameter, 0.01)
        policy(packed)[0].square().sum().backward()
        return [parameter.grad for _, parameter in adapters(policy.model)]

    expected = gradients("none")
    for setting in ("full", "selective"):
        assert all(map(torch.equal, gradients(setting), expected)), setting


def test_only_adapters_are_trained(built):
    policy, _, _, packed, config = built
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert len(names) == 2 * 7 * len(policy.model.model.language_model.layers)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, 1e-2)
    for _ in range(2):  # the first moves B alone, for B is zero
        policy(packed)[0].sum().backward()
        update.apply_gradients(policy, optimizer, 1.0)
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_merge_by_hand():
    weights = {
        "q.base_layer.weight": torch.eye(2), "q.base_layer.bias": torch.ones(2), "k.weight": torch.zeros(1),
        "q.lora_A.default.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.default.weight": torch.tensor([[3.0], [0.0]]),
    }  # fmt: skip
    merged = merge(weights, 2.0, torch.float32)
    assert sorted(merged) == ["k.weight", "q.bias", "q.weight"]
    assert merged["q.weight"].tolist() == [[7.0, 12.0], [0.0, 1.0]]


def merged_by_peft(base, adapters):
    """The transformers model of a folder with the adapters of another merged in by peft."""
    naive = type(load_model(base)).from_pretrained(base)
    return peft.PeftModel.from_pretrained(naive, adapters).merge_and_unload()


@pytest.mark.parametrize("family", ONE_FAST)
def test_a_run_with_adapters(worlds, family, tmp_path):
    """KL 0 at step 1, adapters that peft reads, merged weights that agree with them, and resume bit for bit."""
    data, models = worlds[family]
    flags = command(1, tmp_path / "run", worlds[family], *FLAGS, "--lora_merge")[2:]
    assert train.main(flags) == 0
    whole = metrics_of(tmp_path / "run")
    steps = [row for row in whole if row["phase"] == "train"]
    assert abs(steps[0]["kl"]) < 1e-6 < steps[-1]["kl"]

    last = tmp_path / "run" / "checkpoint-4"
    saved = load_file(last / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved) and not list(last.glob("model*.safetensors"))
    assert json.loads((last / "adapter_config.json").read_text())["r"] == 4
    masters = [path for path in (last / "training").glob("*.safetensors")]
    assert all("lora_" in name for path in masters for name in load_file(path))

    theirs = merged_by_peft(models[False], last)
    ours = load_model(tmp_path / "run" / "merged")
    base = load_model(models[False])
    changed = 0
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
        changed += not torch.equal(a, c)
    assert changed == 7 * len(base.model.language_model.layers)

    for checkpoint in checkpoints(tmp_path / "run"):
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    assert train.main(flags) == 0
    assert metrics_of(tmp_path / "run") == whole
    again = load_file(last / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_equal_one(worlds, family, tmp_path):
    alone = run_here(tmp_path / "1", worlds[family], *FLAGS, "--lora_merge")
    together, _ = launch(2, tmp_path / "2", worlds[family], *FLAGS, "--lora_merge")
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1", step=4)
    _, models = worlds[family]
    ours, theirs = load_model(tmp_path / "2" / "merged"), merged_by_peft(models[False], tmp_path / "2" / "checkpoint-4")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
