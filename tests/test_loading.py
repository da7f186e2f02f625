"""Weights that go from files to shards: any layout of files, old and new names, tied and untied, and right buffers."""

import json
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from conftest import FAMILIES, load_model, load_pair, make_prompt, naive_logprobs, random_completions
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from demo.tiny import build_tiny_model
from grpo.batch import pack
from grpo.engine.model import empty_model
from grpo.engine.model_files import read_processor
from grpo.engine.weights import fill, materialise
from grpo.errors import ModelError
from video.frames import VideoSettings
from video.prompt import PromptEncoder


def rewritten(folder, target, rename, files):
    """A copy of a checkpoint folder whose weights have other names and lie in so many files."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    weights = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    names = sorted(weights)
    if files == 1:
        save_file(weights, target / "model.safetensors")
        return target
    index = {}
    for number in range(files):
        own, file = names[number::files], f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({name: weights[name] for name in own}, target / file)
        index |= dict.fromkeys(own, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def new_name(name):
    """transformers 5's own name of a weight whose name on the hub is `name`."""
    if name.startswith(("model.visual.", "model.language_model.")):  # those of Qwen3-VL are the same
        return name
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("rename", [str, new_name], ids=["hub names", "new names"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_from_pretrained(tmp_path, family, tie, rename, files):
    made = build_tiny_model(tmp_path / "made", family, tie=tie)
    stem = "visual." if family in ("qwen2_vl", "qwen2_5_vl") else "model.visual."
    assert any(name.startswith(stem) for name in load_file(made / "model.safetensors")), "the hub's own names"
    folder = rewritten(made, tmp_path / "folder", rename, files)
    policy, naive, tokenizer = load_pair(folder)
    assert (policy.model.lm_head.weight is policy.model.get_input_embeddings().weight) == tie
    prompt = make_prompt(tokenizer, [("video", (4, 4, 6))])
    completions = random_completions(tokenizer, (5, 3))
    with torch.no_grad():
        ours, _ = policy(pack([prompt], [completions], policy.spec))
        theirs = naive_logprobs(naive, policy.spec, prompt, completions)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    for (name, ours), (_, theirs) in zip(policy.model.named_parameters(), naive.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, ours), (_, theirs) in zip(policy.model.named_buffers(), naive.named_buffers(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name


def test_bf16_keeps_rotary_frequencies_in_fp32(checkpoints):
    model = load_model(checkpoints["qwen2_vl"], torch.bfloat16)
    naive = type(model).from_pretrained(checkpoints["qwen2_vl"], dtype=torch.bfloat16)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), naive.named_buffers(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs), name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_tied_model_materialises_one_embedding(tmp_path):
    model = empty_model(build_tiny_model(tmp_path / "tied", tie=True))
    assert all(p.is_meta for p in model.parameters())
    materialise(model, "cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_missing_and_wrong_weights_are_one_line(tmp_path):
    made = build_tiny_model(tmp_path / "made")
    weights = load_file(made / "model.safetensors")
    for change, words in (
        ({"lm_head.weight": None}, "lack 1 weights, lm_head.weight"),
        ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is of shape \[3\], config.json says \[64\]"),
    ):
        save_file({k: v for k, v in (weights | change).items() if v is not None}, made / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            load_model(made)
    (made / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors is missing"):
        load_model(made)


def test_each_process_reads_its_own_rows_alone():
    """As rank 0 to 3 of four: of 7 to 10 rows, and of 2, where two ranks get none."""

    class Source:
        def __init__(self, rows):
            self.whole, self.read = torch.arange(rows * 3.0).view(rows, 3), []

        def __getitem__(self, rows):
            self.read.extend(range(rows.start, rows.stop))
            return self.whole[rows]

    # torch keeps offsets by shape, not by rank, so within this one process every rank gets a shape of its own.
    for rank, rows, expected in ((0, 7, [0, 1]), (1, 8, [2, 3]), (2, 9, [6, 7, 8]), (3, 10, [9]), (3, 2, [])):
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        module, source = torch.nn.Linear(3, rows, bias=False, device="meta"), Source(rows)
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
        materialise(module, "cpu")
        with torch.no_grad():
            fill(module.weight, source)
        dist.destroy_process_group()
        assert source.read == expected
        assert torch.equal(module.weight.to_local(), source.whole[expected])


def test_rotary_buffers_of_old_files_are_left_out(tmp_path):
    made = build_tiny_model(tmp_path / "made")
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)}
    weights = load_file(made / "model.safetensors")
    expected = load_model(made).state_dict()
    save_file(weights | old | {"visual.rotary_pos_emb.inv_freq": torch.ones(4)}, made / "model.safetensors")
    for name, value in load_model(made).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_head_stored_beside_the_embedding_that_it_is_tied_to(tmp_path):
    """Some libraries store it again: the same numbers load, other numbers are refused."""
    made = build_tiny_model(tmp_path / "made", tie=True)
    weights = load_file(made / "model.safetensors")
    again = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | again, made / "model.safetensors")
    model = load_model(made)
    assert torch.equal(model.lm_head.weight, again["lm_head.weight"])
    again["lm_head.weight"][3, 4] += 1
    save_file(weights | again, made / "model.safetensors")
    with pytest.raises(ModelError, match="model.embed_tokens.weight is not lm_head.weight, .* tie_word_embeddings"):
        load_model(made)


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"auto_map": {"AutoConfig": "planted.Planted"}, "model_type": "planted"}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "planted.Planted"}, "processor_class": "Planted"}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["planted.Planted", None]}, "tokenizer_class": "Planted"},
        ),
    ],
)
def test_code_that_comes_with_a_model_never_runs(tmp_path, monkeypatch, file, change):
    """Not even where a terminal would be asked, and answers y."""
    made, mark = build_tiny_model(tmp_path / "made"), tmp_path / "ran"
    (made / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Planted: pass\n")
    (made / file).write_text(json.dumps(json.loads((made / file).read_text()) | change))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(ModelError):
        read_processor(made)
    with suppress(ValueError):
        PromptEncoder(made, VideoSettings())
    assert not mark.exists()


def test_a_folder_of_adapters_says_what_to_take(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="--lora_merge"):
        empty_model(tmp_path)
