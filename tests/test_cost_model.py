"""The cost model against independent counts: torch's own FLOP counter, bytes of the operators that run, by hand."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2VLForConditionalGeneration

from grpo.attention import DecodeLayout, PackedLayout
from grpo.batch import MicroBatch
from grpo.config import Config
from grpo.engine.distributed import shard, unsharded
from grpo.engine.model import ModelSpec, checkpoint_activations, use_own_kernels
from grpo.engine.weights import materialise
from grpo.families import load_family
from grpo.policy import Policy
from grpo.sampler import SamplingSettings, sample_next_token

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("cost_model", ROOT / "bench/cost_model.py")
cost_model = sys.modules["cost_model"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cost_model)
Cost = cost_model.Cost
LINEAR = ("mm", "addmm", "convolution", "convolution_backward")
# Moves next to nothing, beside what returns its input's own memory.
VIEWS = {"empty_like", "empty", "slice_backward", "select_backward", "index_fill_"}


@pytest.fixture
def small():
    """The published 7B, narrow and two layers deep."""
    config = cost_model.published_config(cost_model.MODELS["7B"])
    text, tower = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.vocab_size = 128, 320, 512
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.num_hidden_layers, text.layer_types = 2, text.layer_types[:2]
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    tower.embed_dim, tower.num_heads, tower.depth, tower.hidden_size = 64, 2, 2, 128
    return config


@pytest.fixture(scope="module")
def seven():
    config = cost_model.published_config(cost_model.MODELS["7B"])
    return config, cost_model.parameter_counts(config)


def build(config, dtype=torch.float32):
    model = use_own_kernels(Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype))
    checkpoint_activations(model)
    return model


@pytest.fixture
def no_attention(monkeypatch):
    """Linear layers alone: what torch's counter sees as matrix products and convolutions."""
    monkeypatch.setattr(cost_model, "attention", lambda *given: Cost())


def counted(run):
    """(run's value, FLOPs of its linear layers)."""
    with FlopCounterMode(display=False) as counter:
        value = run()
    totals = counter.get_flop_counts()["Global"]
    return value, sum(count for op, count in totals.items() if str(op).split(".")[-1] in LINEAR)


class Operators(TorchDispatchMode):
    """[(name, bytes of its tensors read and written)] of the operators that touch memory."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        read = {t.untyped_storage().data_ptr(): t for t in tensors((args, kwargs))}
        name = function._schema.name.split("::")[1]
        view = not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in read for t in tensors(out))
        if name not in VIEWS and not view:
            self.ran.append((name, sum(t.numel() * t.element_size() for t in [*read.values(), *tensors(out)])))
        return out

    def bytes_beside_linears(self):
        return sum(count for name, count in self.ran if name not in LINEAR)


@pytest.mark.parametrize("frozen", [False, True])
def test_decoder_flops_as_torch_counts_them(small, no_attention, frozen):
    """Checkpointed forward and backward; frozen weights have no gradient of their own."""
    model = build(small).requires_grad_(not frozen).model.language_model
    embeds = torch.randn(1, 40, 128, requires_grad=True)
    positions, layout = torch.arange(40).expand(3, 1, -1), PackedLayout([(40, ())])
    run = lambda: model(
        inputs_embeds=embeds, position_ids=positions, attention_mask={"full_attention": None}, use_cache=False,
        layout=layout,
    ).last_hidden_state  # fmt: skip
    out, forward = counted(run)
    _, backward = counted(lambda: out.sum().backward())
    planned = cost_model.decoder(small, 1, 8, 4, 8, frozen=frozen)
    assert (forward, backward) == (planned[0].flops, planned[1].flops)


def test_tower_flops_as_torch_counts_them(small, no_attention):
    tower = build(small).model.visual
    pixels, grid = torch.randn(2 * 4 * 6, 1176), torch.tensor([[2, 4, 6]])
    out, forward = counted(lambda: tower(pixels, grid_thw=grid).pooler_output)
    _, backward = counted(lambda: out.sum().backward())
    planned = cost_model.vision(small, 48, 24)
    assert (forward, backward) == (planned[0].flops, planned[1].flops)


@pytest.mark.parametrize("prompts", [1, 3])
def test_attention_counts_the_visible_pairs(small, monkeypatch, prompts):
    """3 completions of 5 tokens after 7 of prompt, computed once or for each: pairs counted in a mask.

    Keys: shared, those of 3 rows of 12 are read, put together and read again, beside the prompt's own."""
    seen = []
    monkeypatch.setattr(
        cost_model, "attention", lambda pairs, queries, keys, *_: seen.append((pairs, queries, keys)) or Cost()
    )
    cost_model.decoder(small, prompts, 7, 3, 5)
    whole = torch.ones(12, 12).tril()
    shared = whole[:7].sum() if prompts == 1 else 3 * whole[:7].sum()
    tokens, keys = (22, 7 + 3 * 36) if prompts == 1 else (36, 36)
    assert seen == [(int(shared + 3 * whole[7:].sum()), tokens, keys)]


def test_attention_flops_as_torch_counts_them(small, monkeypatch):
    """One head of 32 channels over a 9 x 9 square; backward is the forward again and torch's backward kernel."""
    shape = (1, 1, 9, 32)
    forward, backward = sdpa_flop_count(*3 * [shape]), sdpa_backward_flop_count(*4 * [shape])
    assert cost_model.attention(81, 9, 9, 32, 32).flops == forward
    monkeypatch.setattr(cost_model, "linears", lambda *given: Cost())
    for plan in (cost_model.decoder(small, 1, 9, 2, 3), cost_model.vision(small, 48, 24)):
        assert plan[1].flops / plan[0].flops == 1 + backward / forward


def test_adapters_are_products_of_their_own(seven, no_attention):
    """2 FLOPs a weight and token forward; again, and two gradients, backward."""
    with_them, without = (cost_model.decoder(seven[0], 1, 10, 2, 4, rank, frozen=True) for rank in (8, 0))
    adapters = 2 * 18 * 8 * seven[1]["adapters"]
    last = 2 * 18 * 28 * 18944 * 3584  # with adapters a layer's last product is theirs, so this one is computed again
    assert with_them[0].flops - without[0].flops == adapters
    assert with_them[1].flops - without[1].flops == 3 * adapters + last


def test_tower_attends_within_a_frame(small):
    with_pairs = cost_model.vision(small, 48, 24)[0].flops - cost_model.vision(small, 48, 0)[0].flops
    assert with_pairs == 2 * 4 * 64 * 2 * 24 * 24  # depth · 4 · width · frames · pairs of a frame


def test_decode_token_by_token(seven):
    """7B, G 2, P 10, C 4: three tokens after the first, each against 2-byte weights and keys and values."""
    text = seven[0].text_config
    layer = 3584 * (3584 + 512 + 512 + 3584 + 3 * 18944)
    ends = 9 * 3584 + 2 * 512 + 3 * 18944  # inputs of q, k, v, o, gate, up, down, and their outputs
    flops = size = 0
    for own in (1, 2, 3):
        flops += 2 * 2 * (28 * layer + 3584 * 152064) + 28 * 4 * 2 * (10 + own) * 3584
        size += 2 * (28 * layer + 3584 * 152064) + 2 * 2 * (28 * ends + 3584 + 152064)
        size += 28 * (4 * (10 + 2 * own) * 512 + 4 * 2 * 3584)
    size += cost_model.CHOOSE_BYTES * 4 * 2 * text.vocab_size
    cost = cost_model.decode(seven[0], 1, 10, 2, 4)
    assert (cost.flops, cost.bytes) == (flops, size)
    buffers = cost_model.decode(seven[0], 1, 10, 2, 4, graph=True)
    assert buffers.bytes - cost.bytes == 28 * 4 * 2 * (3 * 4 - (1 + 2 + 3)) * 512 and not buffers.kernels
    more = cost_model.decode(seven[0], 2, 10, 2, 4).bytes - cost.bytes
    assert more == 3 * 28 * 4 * 10 * 512, "repeated, the prompt's keys and values are read once more a row"


def test_bytes_of_a_logit_as_operators_move_them():
    """lm_head's own are counted with the linear layers; vocabulary 4096, 64 tokens.

    Within a fifth: an operation in place or not is no matter."""
    hidden = torch.randn(1, 64, 32, dtype=torch.bfloat16, requires_grad=True)

    class Decoder(torch.nn.Module):
        """Returns `hidden`, whatever the row."""

        embed_tokens = torch.nn.Embedding(1, 1)

        def forward(self, **given):
            return SimpleNamespace(last_hidden_state=hidden)

    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(32, 4096, bias=False, dtype=torch.bfloat16)
    model.model = torch.nn.Module()
    model.model.language_model = Decoder()
    policy = Policy(model, SimpleNamespace(never_sampled=(1, 2), family=load_family("qwen2_vl")))
    at = torch.arange(64)  # 64 prompts of one token
    ids = torch.zeros(1, 64, dtype=torch.long)
    batch = MicroBatch(ids, at.expand(3, 1, -1), at, at, torch.randint(4096, (64,)), [(1, ())] * 64)
    with torch.no_grad(), Operators() as whole:
        policy(batch)
    with Operators() as forward:
        logprobs, _ = policy(batch, entropy=False)
    with Operators() as backward:
        logprobs.sum().backward()
    uniform = torch.rand(64, dtype=torch.float64)
    with torch.no_grad(), Operators() as chosen:
        sample_next_token(policy.prefill(batch)[0], uniform, SamplingSettings())
    plain, *moved = [run.bytes_beside_linears() / (64 * 4096) for run in (forward, whole, backward, chosen)]
    moved = [plain, moved[0] - plain, *moved[1:]]
    names = ("SCORE_BYTES", "ENTROPY_BYTES", "SCORE_BACKWARD_BYTES", "CHOOSE_BYTES")
    assert moved == pytest.approx([getattr(cost_model, name) for name in names], rel=0.2)


@pytest.mark.parametrize("chunks", (1, 2))
def test_score_flops_as_torch_counts_them(small, chunks, monkeypatch):
    """lm_head and its softmax: forward, and backward, with the forward again where there are several chunks."""
    monkeypatch.setattr(cost_model, "LOGITS_PER_CHUNK", 512 * 24 // chunks)
    head = torch.nn.Linear(128, 512, bias=False)
    hidden = torch.randn(24, 128, requires_grad=True)
    run = lambda h: head(h).log_softmax(-1)
    out, forward = counted(lambda: checkpoint(run, hidden, use_reentrant=False) if chunks > 1 else run(hidden))
    _, backward = counted(lambda: out.sum().backward())
    plain, with_entropy, planned = cost_model.score(small, 24)
    assert (forward, forward, backward) == (plain.flops, with_entropy.flops, planned.flops)


def test_kernels_of_a_layer_as_torch_dispatches_them(small):
    """Within a third: a kernel more or less in another version is no matter."""
    model = build(small, torch.bfloat16)
    model.requires_grad_(True)
    layer, block = model.model.language_model.layers[0], model.model.visual.blocks[0]
    layer.forward, block.forward = (module.forward.args[0] for module in (layer, block))  # without checkpointing
    narrow = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)
    keys_and_values = torch.randn(2, 6, 32), torch.randn(2, 6, 32).bfloat16()
    prompt = DecodeLayout({0: [keys_and_values]}, torch.zeros(4, dtype=torch.long), 8)
    token, turned = narrow(4, 1, 128), torch.randn(4, 1, 32).bfloat16()
    row, angles, patches = narrow(1, 9, 128), torch.randn(1, 9, 32).bfloat16(), narrow(48, 64)
    bounds, turns = torch.tensor([0, 24, 48]), (torch.randn(48, 32),) * 2
    with torch.no_grad(), Operators() as decoding:
        layer(token, position_embeddings=(turned,) * 2, attention_mask=None, layout=prompt)
    out = layer(row, position_embeddings=(angles,) * 2, attention_mask=None, layout=PackedLayout([(9, ())]))
    with Operators() as layer_backward:
        out.sum().backward()
    with Operators() as seeing:
        out = block(patches, cu_seqlens=bounds, position_embeddings=turns)
    with Operators() as block_backward:
        out.sum().backward()
    runs = {"layer": decoding, "layer backward": layer_backward, "block": seeing, "block backward": block_backward}
    shares = {name: len(run.ran) / cost_model.KERNELS[name] for name, run in runs.items()}
    assert all(2 / 3 < share < 3 / 2 for share in shares.values()), shares


def test_prompt_once_factor():
    """22,400 against 4,900 tokens by hand; G in the limit of a long prompt, 1 in that of long completions."""
    factor = cost_model.token_factor
    assert factor(2500, 8, 300) == 22_400 / 4_900
    assert factor(10**9, 8, 256) == pytest.approx(8, rel=1e-4) and factor(1, 8, 10**9) == pytest.approx(1)


def test_decoder_flops_follow_the_factor(seven, no_attention):
    shared, repeated = (cost_model.decoder(seven[0], copies, 1824, 8, 256)[1].flops for copies in (1, 8))
    assert repeated / shared == cost_model.token_factor(1824, 8, 256)


def flops(steps):
    return sum(cost.flops for phases in steps for cost in phases.values())


def test_vision_passes(seven):
    """Three forwards and a backward while the tower is trained; frozen, one forward; repeated, G of each."""
    config, counts = seven
    tower = lambda copies: [part.flops for part in cost_model.vision(config, copies * 4 * 1568, 784)]
    step = lambda repeat=False, **changes: flops(
        cost_model.step_costs(config, counts, Config(plan=4, **changes), cost_model.A100, repeat)
    )
    forward, backward = tower(1)
    assert step() - step(freeze_vision=True) == 2 * forward + backward
    assert step() - step(kl_coef=0.0) > forward
    prompts = lambda copies: (
        cost_model.decoder(config, copies, 1824, 0, 0)[0]
        + 2 * cost_model.decoder(config, copies, 1824, 8, 256)[0]
        + cost_model.decoder(config, copies, 1824, 8, 256)[1]
        + cost_model.last_logits(config.text_config, copies)
    ).flops  # fmt: skip
    assert step(repeat=True) - step() == pytest.approx(7 * (3 * forward + backward) + prompts(8) - prompts(1), rel=1e-9)


def test_links_by_hand(seven):
    """4 GPUs send 3/4 of 2 bytes a weight in rollout, reference and forward, all but the root in backward, and 3/4 of
    4 bytes for gradients; 2 nodes of 8 send each shard's half twice."""
    config, counts = seven
    n, root = counts["all"], counts["root"]
    steps = cost_model.step_costs(config, counts, Config(plan=4), cost_model.A100)
    link = sum(cost.link for phases in steps for cost in phases.values())
    assert link == pytest.approx(0.75 * (2 * (3 * n + n - root) + 4 * n))
    assert cost_model.reduction(n, cost_model.A100).network == 0
    assert cost_model.reduction(n, cost_model.NODES).network == pytest.approx(2 * 0.5 * 4 * n / 8)


def test_links_as_fsdp_uses_them(small, monkeypatch):
    """What a rank of 4 gathers in bf16 and reduces in fp32, noted on its way into a group that does nothing."""
    counts = cost_model.parameter_counts(small)
    spec = replace(ModelSpec.of(small, [5], None), never_sampled=(1,))
    with torch.device("meta"):
        model = build(small)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
        policy = Policy(model, spec)
        shard(policy, mesh, torch.bfloat16)
        materialise(model, "cpu")
        moved = {"gather": 0, "reduce": 0}

        def note(name, collective):
            def noted(*given, **named):
                tensors = [t for t in (*given, *named.values()) if isinstance(t, torch.Tensor)]
                moved[name] += max(t.numel() * t.element_size() for t in tensors)  # the whole, not the shard
                return collective(*given, **named)

            return noted

        for what, names in (
            ("gather", ("all_gather_single", "all_gather_into_tensor")),
            ("reduce", ("reduce_scatter_single", "reduce_scatter_tensor")),
        ):
            name = next(name for name in names if hasattr(dist, name))
            monkeypatch.setattr(dist, name, note(what, getattr(dist, name)))
        at = torch.arange(6)
        pixels, grid = torch.randn(24, 1176), torch.tensor([[1, 4, 6]])
        row = (at[None], at.expand(3, 1, -1), at[-1:] + 1, at[:5], at[:5], [(6, ())])
        batch = MicroBatch(*row, placeholders=at, pixels=pixels, grids=grid)
        logprobs, _ = policy(batch)
        assert moved == {"gather": 2 * counts["all"], "reduce": 0}
        logprobs.sum().backward()
        assert moved == {"gather": 2 * (2 * counts["all"] - counts["root"]), "reduce": 4 * counts["all"]}
        with unsharded(policy):
            pass
        assert moved["gather"] == 2 * (3 * counts["all"] - counts["root"])
    finally:
        dist.destroy_process_group()


def test_optimizer_bytes_by_hand():
    """A shard's fp32 numbers: gradient read for the norm, read and written by the clip; parameter, gradient and two
    moments read, parameter and moments written."""
    config = cost_model.published_config(cost_model.MODELS["2B"])
    counts = cost_model.parameter_counts(config)
    steps = cost_model.step_costs(config, counts, Config(plan=4), cost_model.A100)
    assert steps[-1]["optimizer"].bytes == 4 * (1 + 2 + 4 + 3) * counts["all"] / 4


def test_bounds_by_hand():
    """A machine of 10 FLOP/s, 5 and 2 bytes/s: the slowest part takes the time, what overlaps does not add up."""
    machine = cost_model.Machine("", 1, 1, compute=10, memory=5, link=2)
    assert cost_model.bounded(Cost(flops=40, bytes=10, link=2), machine) == (4.0, "compute")
    assert cost_model.bounded(Cost(flops=40, bytes=30, kernels=10**9), machine) == (6.0, "memory")
    assert cost_model.bounded(Cost(flops=40, bytes=10), machine, expected=True) == (8.0, "compute")
    assert cost_model.bounded(Cost(flops=40, kernels=10**6), machine, expected=True)[1] == "launch"
    steps = [{"a": Cost(flops=40), "b": Cost(link=6)}, {"c": Cost(link=6)}]
    assert cost_model.step_seconds(steps, machine) == 4.0 + 3.0


def test_the_document_holds_what_the_script_prints():
    text = (ROOT / "docs/forecast.md").read_text()
    assert cost_model.report() in text, "put what `python bench/cost_model.py` prints into docs/forecast.md"
