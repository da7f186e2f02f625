"""Times one GRPO step of this project against two others that do the same work, on one CPU thread.

    pip install -r bench/requirements.txt
    python bench/step.py --model small --images 16 --group 8 --completion 64 --rounds 3 --output docs/bench_step
    python bench/step.py --sweep tokens           writes NAME.json, and NAME.md with the table that it prints

ours: `generate`, `mini_batches`, `add_reference`, `add_advantages`, `update`, as train.py calls them.
trl:  TRL's `GRPOTrainer`, its own loop and defaults; vision and prompt are repeated for each of the G completions.
once: plain transformers with the easy fix: `generate(num_return_sequences=G)`, and a batch of G copies for reference
      and policy, whose vision features are computed once for each model and shared; same loss, same checkpointing.

Each recomputes its activations. `ours:selective`, `ours:none`, `trl:none` and `once:none` recompute less: `--only
ours,ours:none,trl,trl:none`. Ratios are to the first of ours. The least FLOPs are those with all recomputed.

The same work: a random Qwen2-VL in fp32 with SDPA, one prompt, N images of 224x224 (64 visual tokens each, the vision
work of a video of 2N frames: TRL trains on images only), G completions of exactly C tokens (EOS and vision ids
suppressed), beta 0.04 with a reference model, temperature 1, one pass, activations recomputed, AdamW, the same reward.

Set in TRL because the work must be equal: batch = G (one forward and one generation, no accumulation), bf16 off,
beta, C, the suppressed ids. Nothing is logged or saved. All else is its default. A step begins with the images as
files (ours, once) or as decoded pictures (trl, whose data loader reads them before the clock starts).

Each runs in a process of its own, in turn, one step each a round, beside a fixed matrix product (`calibration`). The
first step is not timed: its FLOPs are counted. Times are of the process's CPU clock, which stands still while others
have the processor; `wall clock` is the whole step by the wall. Phases exclude each other: vision is every pass of a
tower but what backward recomputes; prefill ends with the first pass of the language model and decode has the rest of
sampling; optimizer includes the gradient's norm and its clipping; other is processor, rewards, batches. Peak memory is
the process's resident set over all its steps (Linux only), less what it held with both models loaded and no optimizer.
"""

import argparse
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.nn.attention.bias import CausalBias
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, GenerationConfig, Qwen2VLForConditionalGeneration

from demo.tiny import build_tiny_model
from grpo import update
from grpo.advantage import group_advantages
from grpo.config import parse_config
from grpo.engine.build import build_policy, build_reference
from grpo.engine.optimizer import make_optimizer, set_learning_rate
from grpo.loss import policy_loss
from grpo.policy import LOGITS_PER_CHUNK
from grpo.sampler import SamplingSettings, generate
from video.dataset import Sample
from video.prompt import PromptEncoder
from video.settings import VideoSettings
from video.terminal import OneLineParser

NAMES = ("ours", "trl", "once")
LIGHTER = ("ours:selective", "ours:none", "trl:none", "once:none")  # which recompute less
PHASES = ("vision", "prefill", "decode", "reference", "policy", "backward", "optimizer", "other")
MODELS = {
    "tiny": {},
    "small": {
        "text": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
                 "num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.02,
                 "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e6,
                                     "mrope_section": [8, 12, 12]}},
        "vision": {"depth": 8, "embed_dim": 320, "num_heads": 8, "mlp_ratio": 4, "initializer_range": 0.02},
    },
}  # fmt: skip
SWEEPS = {
    "tokens": [{"images": n} for n in (4, 8, 16, 32, 64)],
    "group": [{"group": n} for n in (2, 4, 8, 16, 32)],
    "completion": [{"completion": n} for n in (16, 64, 256)],
}
SIDE, VISUAL_TOKENS, BETA = 224, 64, 0.04  # of an image: pixels, tokens
QUESTION = "Which direction does the shape move?"


@dataclass(frozen=True)
class Case:
    """One point of comparison: N images, G completions of C tokens, so many timed rounds."""

    model: str = "small"
    images: int = 16
    group: int = 8
    completion: int = 64
    rounds: int = 3


# What the arithmetic needs at least


def minimum_flops(config, prompt, frames, group, completion, as_counted=False):
    """{phase: FLOPs} that one step of a Qwen2-VL needs, a product of (a, b) and (b, c) being 2abc; elementwise work and
    the optimizer are left out.

    prompt: P tokens; frames: patches of each frame or image; group, completion: G and C. The language model takes P
    and then G·(C - 1) tokens in sampling and P + G·C tokens in reference and policy; lm_head takes what a token is
    predicted from; the tower runs once for sampling, reference and policy. Backward is twice forward, and once more
    what checkpointing recomputes: each block but its last product, whose value no gradient needs, and lm_head where its
    logits come in several chunks.
    as_counted: attention as `FlopCounterMode` counts it: the whole square where half is masked (but for decoding, where
    there is no mask), and five products in backward, which recomputes the scores, where the mathematics has four.
    """
    text, vision = config.text_config, config.vision_config
    hidden, layers = text.hidden_size, text.num_hidden_layers
    kv = hidden * text.num_key_value_heads // text.num_attention_heads
    down = 2 * layers * hidden * text.intermediate_size
    token = 2 * layers * hidden * (2 * hidden + 2 * kv) + 3 * down
    pair, head = 4 * layers * hidden, 2 * hidden * text.vocab_size

    def causal(n):
        return n * n if as_counted else n * (n + 1) / 2

    def backward(forward, attention, recomputed):
        return 2 * forward + (2.5 if as_counted else 2) * attention + recomputed

    width, patches, depth = vision.embed_dim, sum(frames), vision.depth
    merged, fan = patches / vision.spatial_merge_size**2, width * vision.spatial_merge_size**2
    embed = 2 * patches * width * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merge = 2 * merged * fan * (fan + vision.hidden_size)
    shrink = 2 * depth * patches * width * int(width * vision.mlp_ratio)
    blocks = 2 * depth * patches * 4 * width**2 + 2 * shrink
    look = 4 * depth * width * sum(n * n for n in frames)
    tower = embed + blocks + look + merge

    own = group * completion
    tokens, scored = (prompt + own) * token, own * head
    attention = pair * (causal(prompt) + group * (completion * prompt + causal(completion)))
    decoded = pair * group * ((completion - 1) * prompt + completion * (completion - 1) / 2)
    packed = tokens + attention + scored
    recomputed = packed - (prompt + own) * down - (scored if own * text.vocab_size <= LOGITS_PER_CHUNK else 0)
    return {
        "vision": 3 * tower,
        "prefill": prompt * token + pair * causal(prompt),
        "decode": head + group * (completion - 1) * (token + head) + decoded,
        "reference": packed,
        "policy": packed,
        "backward": backward(tokens + scored, attention, recomputed)
        + backward(blocks + merge, look, blocks + look - shrink)
        + embed,  # pixels need no gradient
    }


def unseen_bias(cls, *_):
    """`CausalBias.__new__` behind the counter's back: where a dispatch mode sees it, this subclass cannot be made."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


def attention_flops(query, key, value, *_, **__):
    """Shapes (B, H, L, D), (B, K, S, D), (B, K, S, D) of SDPA's CPU kernel -> FLOPs of its two products."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


def attention_backward_flops(gradient, query, key, value, *_, **__):
    """Five products: the scores again, and the gradients of value, weights, query and key."""
    return attention_flops(query, key, value) * 5 // 2


# SDPA's kernels on a CPU, for which not every torch that is supported has formulas (or any for grouped heads).
KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class Meter:
    """Charges CPU seconds of this process, and FLOPs while `counting`, to the phase at work."""

    def __init__(self):
        self.counter, self.phase = None, "other"
        self.begin()

    def begin(self, counting=False):
        self.seconds, self.flops = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)
        self.phase, self.counted = "other", 0
        if counting:
            self.counter = FlopCounterMode(display=False, custom_mapping=KERNELS)
            self.counter.__enter__()
            CausalBias.__new__ = unseen_bias
        self.began, self.since = time.perf_counter(), time.process_time()

    def end(self):
        """Returns ({phase: CPU seconds}, {phase: FLOPs}, seconds by the wall clock) since `begin`."""
        self.to("other")
        wall = time.perf_counter() - self.began
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counter = None
            del CausalBias.__new__
        return self.seconds, self.flops, wall

    def to(self, phase):
        """Goes on to `phase`; returns the one before."""
        now, before = time.process_time(), self.phase
        self.seconds[before] += now - self.since
        if self.counter is not None:
            total = self.counter.get_total_flops()
            self.flops[before] += total - self.counted
            self.counted = total
        self.phase, self.since = phase, time.process_time()
        return before

    def wrap(self, function, phase, then=None):
        """`function`, run in `phase`; after it comes `then`, or what was before."""

        def wrapped(*args, **kwargs):
            before = self.to(phase)
            result = function(*args, **kwargs)
            self.to(then or before)
            return result

        return wrapped

    def watch(self, module, phase):
        """Charges the module's forwards to `phase`."""
        stack = []

        def leave(*_):
            self.to(stack.pop())

        module.register_forward_pre_hook(lambda *_: stack.append(self.to(phase)))
        module.register_forward_hook(leave)

    def watch_model(self, model):
        """Tower, and the first pass of the language model in sampling, at whose end prefill is over."""
        self.watch(model.model.visual, "vision")

        def prefilled(*_):
            if self.phase == "prefill":
                self.to("decode")

        model.model.language_model.register_forward_hook(prefilled)

    def watch_training(self):
        """Backward wherever it is called; from its end to the optimizer's is `optimizer`."""

        def leave(*_):
            self.to("other")

        torch.Tensor.backward = self.wrap(torch.Tensor.backward, "backward", then="optimizer")
        register_optimizer_step_post_hook(leave)


# The three


def reward(tokens):
    """A number in [0, 1) that depends on every token, so that advantages are not zero."""
    return hashlib.sha256(repr(list(tokens)).encode()).digest()[0] / 256


def image_files(folder):
    return sorted(map(str, Path(folder).glob("*.png")))


def suppressed(processor):
    """Ids that nobody may sample: those that end a completion, and those that stand for vision."""
    tokenizer = processor.tokenizer
    vision = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(ids | {tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in vision})


def ours(case, folder, meter, ready, checkpointing="full"):
    """Returns the step as a function; calls `ready` once both models are loaded."""
    config = parse_config([
        "--model", str(folder), "--prompt_template", "{problem}", "--device", "cpu", "--prompts_per_step", "1",
        "--group_size", str(case.group), "--max_new_tokens", str(case.completion), "--kl_coef", str(BETA),
        "--loss_normaliser", "token", "--activation_checkpointing", checkpointing,
    ])  # fmt: skip
    device, processor = torch.device("cpu"), AutoProcessor.from_pretrained(folder)
    policy = build_policy(str(folder), config, processor, device)
    reference = build_reference(str(folder), policy, config, processor, device)
    for model in (policy, reference):
        model.never_sampled = torch.tensor(suppressed(processor))
        meter.watch_model(model.model)
    ready(policy, reference)
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, config.learning_rate)
    encoder = PromptEncoder(str(folder), VideoSettings.of(config), config.prompt_template)
    row = Sample(key="bench", problem=QUESTION, answer="A", images=tuple(image_files(folder)))
    settings, tokenizer = SamplingSettings(max_new_tokens=case.completion), processor.tokenizer
    draw = meter.wrap(generate, "prefill")
    score = meter.wrap(update.add_reference, "reference")
    train = meter.wrap(update.update, "policy")

    def step(number=0):
        prompt = encoder(row)
        [group] = draw(policy, [prompt], case.group, settings, [number], tokenizer)
        group.rewards = [reward(t.tolist()) for t in group.tokens]
        [batches] = update.mini_batches([group], policy, config)
        score(reference, batches, config.temperature)
        update.add_advantages(batches, config)
        train(policy, optimizer, [batches], config, seed=number)
        return {"prompt_tokens": len(prompt.input_ids), "completion_tokens": sum(group.lengths)}

    return step


def once(case, folder, meter, ready, checkpointing="full"):
    """As `ours`."""
    processor = AutoProcessor.from_pretrained(folder)
    policy, reference = (
        Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        for _ in range(2)
    )
    reference.requires_grad_(False).eval()
    if checkpointing == "full":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (policy, reference):
        meter.watch_model(model)
    ready(policy, reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.completion,
        num_return_sequences=case.group, suppress_tokens=suppressed(processor),
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    files = image_files(folder)
    content = [{"type": "image"}] * len(files) + [{"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": content}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    generate = meter.wrap(torch.no_grad()(policy.generate), "prefill")

    def logprobs(model, inputs, rows):
        grids = inputs["image_grid_thw"]
        features = model.get_image_features(inputs["pixel_values"], grids, return_dict=True)
        features.pooler_output = tuple(features.pooler_output) * case.group
        token_types = F.pad(inputs["mm_token_type_ids"], (0, case.completion)).repeat(case.group, 1)
        logits = model(
            input_ids=rows, attention_mask=torch.ones_like(rows), mm_encoder_outputs={"image": features},
            image_grid_thw=grids.repeat(case.group, 1), mm_token_type_ids=token_types,
            use_cache=False, logits_to_keep=case.completion + 1,
        ).logits[:, :-1]  # fmt: skip
        return logits.log_softmax(-1).gather(-1, rows[:, -case.completion :, None]).flatten()

    score = meter.wrap(torch.no_grad()(logprobs), "reference")

    def learn(inputs, rows, advantages, reference_logprobs):
        own = logprobs(policy, inputs, rows)
        weights = torch.full_like(own, 1 / len(own))
        loss, _ = policy_loss(own, own.detach(), advantages, weights, 0.2, 0.2, reference_logprobs, BETA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    train = meter.wrap(learn, "policy")

    def step(number=0):
        inputs = processor(text=[text], images=[Image.open(file) for file in files], return_tensors="pt")
        policy.eval()  # as TRL does: in training mode, checkpointing would turn the cache of keys and values off
        rows = generate(**inputs, generation_config=settings)
        policy.train()
        completions = rows[:, -case.completion :]
        advantages = group_advantages([reward(row) for row in completions.tolist()])
        scored = score(reference, inputs, rows)
        train(inputs, rows, advantages.repeat_interleave(case.completion), scored)
        return {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": completions.numel()}

    return step


def run_trl(case, folder, meter, turns, checkpointing="full"):
    """All of the steps in `GRPOTrainer.train`, each between the `begin` and `end` of `turns`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths = []

    def score(completion_ids, **_):
        lengths[:] = map(len, completion_ids)
        return [reward(row) for row in completion_ids]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            enabled = any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())
            assert enabled == (checkpointing == "full")
            turns.begin()

        def on_step_end(self, *_, **__):
            turns.end({"prompt_tokens": trainer.prompt_tokens, "completion_tokens": sum(lengths)})

    processor = AutoProcessor.from_pretrained(folder)
    row = {"prompt": [{"role": "user", "content": QUESTION}], "images": [Image.open(f) for f in image_files(folder)]}
    trainer = GRPOTrainer(
        model=str(folder), reward_funcs=score, train_dataset=Dataset.from_list([row]), processing_class=processor,
        callbacks=[Turns()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"), max_steps=1 + case.rounds, beta=BETA, bf16=False, use_cpu=True,
            per_device_train_batch_size=case.group, num_generations=case.group, max_completion_length=case.completion,
            generation_kwargs={"suppress_tokens": suppressed(processor)},
            model_init_kwargs={"attn_implementation": "sdpa"},
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=checkpointing == "full",
        ),
    )  # fmt: skip
    policy, reference, compute_loss = trainer.model, trainer.ref_model, trainer._compute_loss
    assert policy.dtype == reference.dtype == torch.float32

    def counted_loss(model, inputs):
        trainer.prompt_tokens = inputs["prompt_ids"].shape[1]
        return compute_loss(model, inputs)

    for model in (policy, reference):
        meter.watch_model(model)
    meter.watch(reference, "reference")
    policy.generate = meter.wrap(policy.generate, "prefill")
    trainer._compute_loss = meter.wrap(counted_loss, "policy")
    turns.ready(policy, reference)
    trainer.train()


# A process of its own for each


def memory(name):
    """VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) / 1024


def best_seconds(function, *arguments):
    """Of five calls."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - began)
    return min(times)


def calibrate():
    """Seconds of one 1024³ product in fp32: how fast the machine is just now."""
    matrix = torch.ones(1024, 1024)
    return best_seconds(torch.mm, matrix, matrix)


def machine_limits():
    """What one thread reaches here: GFLOP/s of a 1024³ product and of 8 rows by 512 MiB of weights, which no cache
    holds, and GB/s of adding those weights up."""
    torch.set_num_threads(1)
    rows, weights = torch.ones(8, 512), torch.ones(2**18, 512)
    product, narrow, read = calibrate(), best_seconds(F.linear, rows, weights), best_seconds(torch.sum, weights)
    return {
        "product_gflops": 2 * 1024**3 / product / 1e9,
        "eight_rows_gflops": 2 * len(rows) * weights.numel() / narrow / 1e9,
        "memory_gb_per_s": weights.nbytes / read / 1e9,
    }


class Turns:
    """A worker's side: waits for its turn, measures one step, reports it as a line of JSON."""

    def __init__(self, meter, replies):
        self.meter, self.replies, self.number = meter, replies, 0

    def say(self, value):
        print(json.dumps(value), file=self.replies, flush=True)

    def ready(self, *models):
        """The models are loaded: what the process holds now is not the step's. A weight that is read is resident."""
        for model in models:
            sum(float(p.sum()) for p in model.parameters())
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        self.before = memory("VmRSS")
        self.say({"rss_before": self.before})

    def begin(self):
        if not sys.stdin.readline():
            raise SystemExit("bench/step.py: the process that gives the turns is gone")
        self.calibration = calibrate()
        self.meter.begin(counting=self.number == 0)

    def end(self, sizes):
        seconds, flops, wall = self.meter.end()
        seconds |= {"whole": sum(seconds.values()), "wall clock": wall}
        counted = {"flops": flops} if self.number == 0 else {}
        self.say({"seconds": seconds, "calibration": self.calibration, "peak": memory("VmHWM"), **sizes, **counted})
        self.number += 1


def work(name, case, folder):
    """The life of a worker process. Only its reports go to stdout."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    meter = Meter()
    meter.watch_training()
    turns = Turns(meter, replies)
    name, _, checkpointing = name.partition(":")
    checkpointing = checkpointing or "full"
    if name == "trl":
        run_trl(case, folder, meter, turns, checkpointing)
        return
    step = {"ours": ours, "once": once}[name](case, folder, meter, turns.ready, checkpointing)
    for number in range(1 + case.rounds):
        turns.begin()
        turns.end(step(number))


def make_inputs(folder, case):
    """The model's folder, with the case's images beside it."""
    build_tiny_model(folder, **MODELS[case.model])
    noise = np.random.default_rng(0).integers(0, 256, (case.images, SIDE, SIDE, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(Path(folder) / f"{number:03d}.png")


def ask(worker, name, log):
    """The next report of a worker. Exits with its last words where it has ended."""
    line = worker.stdout.readline()
    if not line:
        log.seek(0)
        raise SystemExit(f"bench/step.py: {name} ended early (code {worker.wait()}):\n{log.read()[-3000:]}")
    return json.loads(line)


def measure(case, names):
    """One case: {"case", "minimum", "minimum_as_counted", name: {"steps", "flops", "rss_before", "peak"}}."""
    found = {"case": asdict(case)}
    with TemporaryDirectory() as root, ExitStack() as stack:
        folder = Path(root) / "model"
        make_inputs(folder, case)
        config = transformers.AutoConfig.from_pretrained(folder)
        workers = {}
        for name in names:
            log = stack.enter_context(open(Path(root) / f"{name}.log", "w+"))
            command = [sys.executable, __file__, "--work", name, "--only", name, "--folder", str(folder)]
            command += ["--case", json.dumps(asdict(case))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            workers[name] = (worker, name, log)
            found[name] = {"steps": [], **ask(*workers[name])}
        for _ in range(1 + case.rounds):
            for name, (worker, *_) in workers.items():
                print("step", file=worker.stdin, flush=True)
                report = ask(*workers[name])
                if "flops" in report:
                    found[name] |= {key: report[key] for key in ("flops", "prompt_tokens", "completion_tokens")}
                else:
                    found[name]["steps"].append({key: report[key] for key in ("seconds", "calibration")})
                found[name]["peak"] = report["peak"]
    sizes = {(found[name]["prompt_tokens"], found[name]["completion_tokens"]) for name in names}
    if len(sizes) != 1 or sizes.pop()[1] != case.group * case.completion:
        raise SystemExit(f"bench/step.py: prompts or completions differ in length, so the work does: {found}")
    frames = [VISUAL_TOKENS * config.vision_config.spatial_merge_size**2] * case.images
    shape = (config, found[names[0]]["prompt_tokens"], frames, case.group, case.completion)
    found["minimum"], found["minimum_as_counted"] = minimum_flops(*shape), minimum_flops(*shape, as_counted=True)
    return found


# Tables


def least(found, name, phase):
    return min(step["seconds"][phase] for step in found[name]["steps"])


def first_of_ours(names):
    return next((name for name in names if name.startswith("ours")), None)


def ratios(found, name, phase, mine):
    """Per-round times of `name` over those of `mine`; None where `mine` has none of that phase."""
    others, own = ([step["seconds"][phase] for step in found[which]["steps"]] for which in (name, mine))
    return [a / b for a, b in zip(others, own)] if all(own) else None


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})" if values else "–"


def slower(found, others, mine):
    """Phases in which `mine` takes longer than another, in least seconds, by more than 1% of its step."""
    margin = 0.01 * least(found, mine, "whole")
    return [
        f"{phase}: {own:.3f} s, {name} {other:.3f} s"
        for phase in (*PHASES, "whole")
        for name in others
        if (own := least(found, mine, phase)) > (other := least(found, name, phase)) + margin
    ]


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def case_table(found, names):
    """Phases of one case: least seconds, medians and spreads of per-round ratios, memory, FLOPs."""
    mine = first_of_ours(names)
    others = [name for name in names if mine and name != mine]
    lines = [row("", *(f"{name}, s" for name in names), *(f"{name} / {mine}" for name in others)),
             row(*["---"] * (1 + len(names) + len(others)))]  # fmt: skip
    for phase in (*PHASES, "whole", "wall clock"):
        seconds = [f"{least(found, name, phase):.3f}" for name in names]
        lines.append(row(phase, *seconds, *(spread(ratios(found, name, phase, mine)) for name in others)))
    alike = sum(found["minimum_as_counted"].values())
    for label, value in (
        ("step's memory, MiB", lambda it: it["peak"] - it["rss_before"]),
        ("whole peak, MiB", lambda it: it["peak"]),
        ("GFLOP counted", lambda it: sum(it["flops"].values()) / 1e9),
        ("of the least, counted alike", lambda it: sum(it["flops"].values()) / alike),
    ):
        values = {name: value(found[name]) for name in names}
        digits = 2 if label.startswith("of") else 0 if "MiB" in label else 1
        cells = [f"{values[name] / values[mine]:.2f}" for name in others]
        lines.append(row(label, *(f"{v:.{digits}f}" for v in values.values()), *cells))
    return lines


def size(found):
    case = found["case"]
    return f"{case['images'] * VISUAL_TOKENS} visual tokens, G {case['group']}, C {case['completion']}"


def sweep_table(points, names):
    """A line for each point: least seconds of a whole step, median ratios, memory."""
    mine = first_of_ours(names)
    others = [name for name in names if mine and name != mine]
    head = [f"{name}, s" for name in names] + [f"{name} / {mine}" for name in others]
    head += [f"{name}, MiB" for name in names]
    lines = [row("", *head), row(*["---"] * (1 + len(head)))]
    for found in points:
        seconds = [f"{least(found, name, 'whole'):.2f}" for name in names]
        held = [f"{found[name]['peak'] - found[name]['rss_before']:.0f}" for name in names]
        factors = [spread(ratios(found, name, "whole", mine)) for name in others]
        lines.append(row(size(found), *seconds, *factors, *held))
    return lines


def slope(points, name):
    """Seconds of a further completion: the least-squares slope of a whole step's time over G."""
    groups = [found["case"]["group"] for found in points]
    return statistics.linear_regression(groups, [least(found, name, "whole") for found in points]).slope


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def describe(names):
    """{"date", "cpu", "threads", "limits", "versions"}."""
    from importlib.metadata import version

    packages = ["torch", "transformers", *(["trl", "accelerate"] if {"trl", "trl:none"} & {*names} else [])]
    return {"date": datetime.date.today().isoformat(), "cpu": cpu_model(), "threads": 1, "limits": machine_limits(),
            "versions": {name: version(name) for name in packages}}  # fmt: skip


def markdown(report):
    """The report as Markdown: for a sweep a line for each point, for a case its phases."""
    names, points = report["names"], report["points"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    case = points[0]["case"]
    times = [step["calibration"] for found in points for name in names for step in found[name]["steps"]]
    about = (
        f"{report['date']}, {report['cpu']}, {report['threads']} thread, CPU time, fp32; {versions}. Model "
        f"`{case['model']}`, rounds: {case['rounds']}. Least seconds, then median (least..most) of per-round ratios. "
        f"Calibration: a 1024³ product took {min(times) * 1e3:.1f}..{max(times) * 1e3:.1f} ms."
    )
    lines = [about, ""]
    lines += sweep_table(points, names) + [""] if report["sweep"] else []
    for found in points:
        lines += [f"**{size(found)}** (P {found[names[0]]['prompt_tokens']})", "", *case_table(found, names), ""]
    if report["sweep"] == "group":
        each = ", ".join(f"{name} {slope(points, name):.3f} s" for name in names)
        lines += [f"A further completion: {each}.", ""]
    if mine := first_of_ours(names):
        others = [name for name in names if not name.startswith("ours")]
        behind = [f"- {size(found)}: {line}" for found in points for line in slower(found, others, mine)]
        lines += ["Where ours is slower, by more than 1% of its step:", "", *behind, ""] if behind else []
    return "\n".join(lines)


def parse(arguments=None):
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="small", help="Which random Qwen2-VL [small].")
    parser.add_argument("--images", type=int, default=16, help="Images of 64 visual tokens each (N) [16].")
    parser.add_argument("--group", type=int, default=8, help="Completions (G) [8].")
    parser.add_argument("--completion", type=int, default=64, help="Tokens of each (C) [64].")
    parser.add_argument("--rounds", type=int, default=3, help="Timed steps of each, in turn [3].")
    parser.add_argument("--only", default=",".join(NAMES), help="Which to run, with commas [ours,trl,once].")
    parser.add_argument("--sweep", choices=SWEEPS, help="Vary images, G or C; tokens ends at 2048 on small.")
    parser.add_argument("--output", default="runs/bench_step", help="Written as .json and .md [runs/bench_step].")
    for hidden in ("--work", "--folder", "--case"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.names = given.only.split(",")
    if unknown := set(given.names) - {*NAMES, *LIGHTER}:
        parser.error(f"--only {', '.join(unknown)}: is none of {', '.join((*NAMES, *LIGHTER))}")
    if any(name.startswith("trl") for name in given.names) and find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -r bench/requirements.txt, or leave it out: --only ours,once")
    for name in ("images", "group", "completion", "rounds"):
        if getattr(given, name) < (2 if name == "group" else 1):
            parser.error(f"--{name} {getattr(given, name)}: too few")
    return given


def main():
    given = parse()
    if given.work:
        return work(given.work, Case(**json.loads(given.case)), Path(given.folder))
    case = Case(given.model, given.images, given.group, given.completion, given.rounds)
    cases = [replace(case, **point) for point in SWEEPS.get(given.sweep, [{}])]
    if given.sweep == "tokens" and given.model == "small":
        cases = [case for case in cases if case.images <= 32]
    report = {**describe(given.names), "sweep": given.sweep, "names": given.names, "points": []}
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        report["points"].append(measure(case, given.names))
        print("\n".join([size(report["points"][-1]), *case_table(report["points"][-1], given.names), ""]), flush=True)
        path.with_name(path.name + ".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text(markdown(report) + "\n")
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
