"""What a user gets for a mistake or for one bad row: the command, and the line that comes. Never a traceback.

A row of MISTAKES is `name: (program, flags, code, words)`:

- program: "train", "eval", "scan" or "convert"; `main` of that script runs in this process.
- flags: a function of a `Bench` (below) that makes the input in a fresh folder and returns the flags, each a text or a
  path. They follow TINY[program], so they override it: a tiny checkpoint, a handful of the demo's videos, one step.
- code: the exit code. 2: stderr ends with the one line `PROGRAM: error: ...`. 0: the program goes on, and says so.
- words: texts that the line (code 2) or the whole output (code 0) holds: the flag, the file or the row, and the fix.

A row takes well under a second if the mistake is found before any weight loads. Mark others slow: SLOW holds names.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as eval_script
import train
import video.convert
import video.scan
from grpo.config import Config

PROGRAMS = {"train": train.main, "eval": eval_script.main, "scan": video.scan.main, "convert": video.convert.main}


class Bench(NamedTuple):
    """Where a mistake is made: a fresh `folder`, the demo set's files by name, a tiny checkpoint (do not change it)."""

    folder: Path
    data: dict[str, Path]
    model: Path

    def row(self, number=0, **changes):
        """A row of the demo's training set, its video's path absolute; a field changed to ... is left out."""
        row = json.loads(self.data["train"].read_text().splitlines()[number])
        row = {**row, "video": str(self.data["train"].parent / row["video"]), **changes}
        return {name: value for name, value in row.items() if value is not ...}

    def rows(self, *rows, name="rows.jsonl"):
        """The path of a data file; a row is a dict, or the text of a line."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return self.folder / name

    def checkpoint(self, damage=lambda folder: None, **changes):
        """A copy of the tiny checkpoint whose config.json has these fields changed, after damage(folder)."""
        copy = Path(shutil.copytree(self.model, self.folder / "model"))
        changed("config.json", **changes)(copy)
        damage(copy)
        return copy


def changed(name, part=None, **changes):
    """A function that changes fields of a JSON file of a folder, or of a `part` of it."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        (content[part] if part else content).update(changes)
        (folder / name).write_text(json.dumps(content))

    return change


def text(**changes):
    return changed("config.json", "text_config", **changes)


def vision(**changes):
    return changed("config.json", "vision_config", **changes)


def rope(**changes):
    """Fields of rope_parameters, changed in a table that is right."""
    return text(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3], **changes})


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


def weights(change):
    """change: of {name: tensor}, which it returns."""

    def save(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return save


def pipe(folder):
    """A named pipe in place of the weights: whoever opens it waits for ever."""
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def with_nan(tensors):
    tensors["model.norm.weight"][5] = float("nan")
    return tensors


ONE_FRAME = ("--nframes", "2", "--min_pixels", "784", "--max_pixels", "784")
TINY = {
    "train": lambda b: [
        "--preset", "demo", "--no-demo", "--model", b.model, "--output", b.folder / "run", "--data", b.data["train"],
        "--eval_data", b.data["val"], "--eval_samples", "2", "--eval_every", "0", "--no-controls", "--sft_data",
        b.data["warmup"], "--sft_steps", "0", "--steps", "1", "--prompts_per_step", "2", "--group_size", "2",
        "--max_new_tokens", "4", "--workers", "0", "--frame_cache", b.folder / "frames", *ONE_FRAME,
    ],
    "eval": lambda b: [
        "--ckpt", b.model, "--data", b.data["val"], "--samples", "2", "--output", b.folder / "eval",
        "--max_new_tokens", "4", "--workers", "0", "--device", "cpu", "--prompt_template", "{problem}", *ONE_FRAME,
    ],
    "scan": lambda b: ["--data", b.data["val"], "--output", b.folder / "bad.jsonl", "--workers", "0", *ONE_FRAME],
    "convert": lambda b: [],
}  # fmt: skip


def latin(b):
    """A data file whose second row is in Latin-1."""
    path = b.rows(b.row(), b.row())
    path.write_bytes(path.read_bytes()[:-3] + b'\xe9"}\n')
    return path


def reward(b, text):
    """The flags of a reward whose file holds `text`."""
    (b.folder / "mine.py").write_text(text)
    return ["--reward", "accuracy:1", "mine.py:f", "--reward_timeout", "1"]


def stopped_run(b, data):
    """A run folder as a stop after the warm-up leaves it; data: digests, or ... for a file that is damaged."""
    (b.folder / "run/warmup").mkdir(parents=True)
    (b.folder / "run/versions.json").write_text("{" if data is ... else json.dumps({"data": data}))
    return []


def settings(b, text):
    """A --config file."""
    (b.folder / "own.yaml").write_text(text)
    return b.folder / "own.yaml"


def with_settings(b, **settings):
    """A run.json of these settings in the run folder."""
    (b.folder / "run").mkdir()
    (b.folder / "run/run.json").write_text(json.dumps(settings))
    return []


MISTAKES = {
    "data that was changed since the run stopped": (
        "train", lambda b: stopped_run(b, {"train": "25 rows, digest 123"}), 2,
        ("whose data or model has changed since (train was 25 rows, digest 123, is 24 rows", "--resume anyway"),
    ),
    "a versions.json that is cut": (
        "train", lambda b: stopped_run(b, ...), 2, ("versions.json: is damaged; --resume anyway goes on without it",),
    ),
    "a versions.json without digests": (
        "train", lambda b: stopped_run(b, None), 2, ("versions.json: is damaged; --resume anyway goes on without it",),
    ),
    "a versions.json with a digest of something else": (
        "train", lambda b: stopped_run(b, {"other": "1 rows"}), 2, ("has changed since (other was 1 rows, is None)",),
    ),
    "settings that change which data is held out": (
        "train", lambda b: [*with_settings(b, eval_samples=3), *stopped_run(b, {"held out": "3 rows, digest 1"})], 2,
        ("holds a run with other settings (", "--eval_samples was 3, is "),
    ),
    "a data file that is not there": (
        "train", lambda b: ["--data", "gone.jsonl"], 2,
        ("--data gone.jsonl: no such file; a relative path starts at /",),
    ),
    "no data at all": (
        "train", lambda b: ["--data", *Config.data], 2, ("--data data/LLaVA-Video-", ": no such file; `hf download",),
    ),
    "a model folder that is not there": (
        "train", lambda b: ["--model", b.folder / "modle"], 2, ("modle: not on this machine; there is no such folder",),
    ),
    "held-out questions that are not there": (
        "train", lambda b: ["--eval_data", "gone.jsonl"], 2, ("--eval_data gone.jsonl: no such file",),
    ),
    "a number that is a word": ("train", lambda b: ["--steps", "ten"], 2, ("--steps: invalid int value: 'ten'",)),
    "a misspelt media field": (
        "train", lambda b: ["--data", b.rows(*[b.row(n, video=..., vidoe="a.mp4") for n in range(3)])], 2,
        ("--data", "rows.jsonl: no row has a video or image; its fields are", "vidoe", "video, videos, image or images",
         "--text_only"),
    ),
    "a misspelt media field of held-out questions": (
        "train", lambda b: ["--eval_data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2,
        ("--eval_data", "no row has a video", "vidoe"),
    ),
    "a misspelt media field of the supervised pass": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(video=..., completions=["x"]))], 2,
        ("--sft_data", "no row has a video"),
    ),
    "a misspelt media field in an evaluation": (
        "eval", lambda b: ["--data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2, ("no row has a video", "vidoe"),
    ),
    "a misspelt media field in a scan": (
        "scan", lambda b: ["--data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2, ("no row has a video", "vidoe"),
    ),
    "text alone that is meant": (
        "eval", lambda b: ["--text_only", "--data", b.rows(b.row(video=...))], 0,
        ("1 of 1 questions to answer have no video or image", "1 questions; 0 unreadable"),
    ),
    "a line that is no JSON": (
        "train", lambda b: ["--data", b.rows(b.row(), "{not json")], 2, ("rows.jsonl:2: is not JSON", "fix or delete"),
    ),
    "many bad rows": (
        "train", lambda b: ["--data", b.rows(*[b.row(solution="<answer>7</answer>")] * 12, b.row())], 2,
        ("12 of 13 rows cannot be used, the first 10: rows.jsonl:1: solution '7' has no option letter",
         "; rows.jsonl:10: "),
    ),
    "many answers that cannot be scored": (
        "eval", lambda b: ["--samples", "3", "--data", b.rows(*[b.row(problem_type="numerical", solution="x")] * 3)], 2,
        ("3 of 3 rows cannot be used: sample 'rows.jsonl:1'", "; sample 'rows.jsonl:3'"),
    ),
    "rows without completions": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(), b.row(1))], 2,
        ("2 of 2 rows cannot be used: rows.jsonl:1: --sft_data rows need `completions`",),
    ),
    "a completion of a million letters": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(completions=["red " * 250_000]))], 2,
        ("rows.jsonl:1: a completion of", "tokens is over --max_prompt_tokens 8192; shorten it"),
    ),
    "half an emoji in a question": (
        "train", lambda b: ["--data", b.rows(b.row(), b.row(problem="What? \ud83d\nA. x"))], 2,
        (r"rows.jsonl:2: holds half a character ('\ud83d')", "fix or delete it"),
    ),
    "half an emoji in an option": (
        "eval", lambda b: ["--data", b.rows(b.row(options=["A. \ud83d", "B. y"]))], 2, ("holds half a character",),
    ),
    "half an emoji in a completion": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(completions=["\ud83d"]))], 2,
        ("rows.jsonl:1: holds half a character",),
    ),
    "half an emoji in a field that nobody reads": (
        "eval", lambda b: ["--data", b.rows(b.row(note="\ud83d", category="\ud83d"))], 0, (r"\ud83d  ", "1 questions"),
    ),
    "a row nested 1,000 deep": (
        "train", lambda b: ["--data", b.rows('{"problem": ' + "[" * 1000 + "]" * 1000 + "}")], 2,
        ("rows.jsonl:1: is nested", "deep; fix or delete it"),
    ),
    "a row nested 100 deep": (
        "eval", lambda b: ["--data", b.rows(b.row(note=json.loads("[" * 100 + "]" * 100)))], 2,
        ("rows.jsonl:1: is nested more than 50 deep",),
    ),
    "an integer of 5,000 digits": (
        "train", lambda b: ["--data", b.rows('{"problem": ' + "7" * 5000 + "}")], 2,
        ("rows.jsonl:1: holds an integer of thousands of digits",),
    ),
    "more options than letters": (
        "eval", lambda b: ["--data", b.rows(b.row(options=[f"thing {n}" for n in range(40)]))], 2,
        ("rows.jsonl:1: has 40 options; there are letters for 26",),
    ),
    "a value of 1 MB": (
        "train", lambda b: ["--data", b.rows(b.row(solution=f"<answer>{'7' * 2**20}</answer>"))], 2,
        ("rows.jsonl:1: solution '7777", "has no option letter; write e.g. <answer>B</answer>"),
    ),
    "categories of every type": (
        "eval", lambda b: ["--samples", "6", "--data", b.rows(
            *[b.row(n, category=value) for n, value in enumerate((["a", "b"], 3, None, {"x": 1}, "word", True))])], 0,
        ("['a', 'b']", "\n3 ", "\nmultiple choice", "{'x': 1}", "\nword", "\nTrue", "6 questions; 0 unreadable"),
    ),
    "categories of every type, and rows without media, while training": (
        "train", lambda b: [
            "--data", b.rows(b.row(category=[]), b.row(1, category=3, video=...), b.row(2, video=[]))], 0,
        ("2 of 3 questions to train on have no video or image, the first rows.jsonl:2: they are asked as text alone",
         "data/val.jsonl, 1 steps", "evaluation:   0%", "step 1: held-out accuracy ",
         "of all 2 questions; 0 unreadable"),
    ),
    "a line that is not UTF-8": (
        "scan", lambda b: ["--data", latin(b)], 2, ("rows.jsonl:2: is not UTF-8 text", "save the file as UTF-8"),
    ),
    "file names that are not UTF-8, with an escape code and a line break": (
        "train", lambda b: ["--data", b.rows(b.row(video="caf\udce9 \x1b[31m\n.mp4"), b.row(), name="\udce9.jsonl")], 0,
        (r"skipped \udce9.jsonl:1: ", r"caf\udce9 \x1b[31m\n.mp4: no such file; --video_root says where to look"),
    ),
    "such a file name in an evaluation": (
        "eval", lambda b: ["--data", b.rows(b.row(video="caf\udce9.mp4"), b.row())], 0, ("1 unreadable",),
    ),
    "such a file name in a scan": (
        "scan", lambda b: ["--data", b.rows(b.row(video="caf\udce9.mp4"), b.row())], 0, ("1 bad files, in 1 rows",),
    ),
    "a line break in a flag": (
        "train", lambda b: ["--data", "a\nb\x1b[31m.jsonl"], 2, (r"--data a b\x1b[31m.jsonl: no such file",),
    ),
    "a weight that is too large": (
        "train", lambda b: ["--data", f"{b.data['train']}:1e9"], 2, (":1e+09: makes 2.4e+10 rows of 24; lower the",),
    ),
    "an endless cache": ("train", lambda b: ["--frame_cache_gb", "inf"], 2, ("--frame_cache_gb inf: must be finite",)),
    "a misspelt reward": (
        "train", lambda b: ["--reward", "acuracy:1"], 2, ("--reward acuracy:1: no such reward; did you mean accuracy?",)
    ),
    "a reward file that lacks a module": (
        "train", lambda b: reward(b, "import gone"), 2,
        ("--reward mine.py:f: ", "mine.py cannot be imported: ModuleNotFoundError: No module named 'gone'"),
    ),
    "a reward file that ends the program": (
        "train", lambda b: reward(b, "import os; os._exit(4)"), 2,
        ("--reward mine.py:f: ", "mine.py cannot be imported: its process ended with exit code 4"),
    ),
    "a reward that ends the program": (
        "train", lambda b: reward(b, "import os\ndef f(completion, sample): os._exit(3)"), 0,
        ("reward f failed in 2 of 2 groups, scored 0: its process ended with exit code 3",),
    ),
    "a reward that never lets go": (
        "train", lambda b: reward(b, "import re\ndef f(text, sample): return re.match('(a+)+$', 'a' * 40 + 'b')"), 0,
        ("reward f failed in 2 of 2 groups, scored 0: no result within 1 s",),
    ),
    "more frames than a video has": (
        "train", lambda b: ["--nframes", "64"], 2, ("every sample was skipped, for the reasons above",),
    ),
    "prompts that are all too long": (
        "train", lambda b: ["--max_prompt_tokens", "10"], 2,
        ("every sample was skipped, for the reasons above: nothing was trained; raise --max_prompt_tokens; lower ",),
    ),
    "a prompt that is too long": (
        "train", lambda b: [
            "--max_prompt_tokens", "400", "--data", b.rows(b.row(), b.row(1, problem="Why? " * 400 + "\nA. x"))], 0,
        ("skipped rows.jsonl:2: ", "tokens is over --max_prompt_tokens 400"),
    ),
    "a prompt that is too long in an evaluation": (
        "eval", lambda b: [
            "--max_prompt_tokens", "400", "--data", b.rows(b.row(), b.row(1, problem="Why? " * 400 + "\nA. x"))], 0,
        ("1 questions; 1 unreadable",),
    ),
    "a misspelt field of the question": (
        "train", lambda b: ["--data", b.rows(b.row(), b.row(1, problem=..., probelm="?"))], 2,
        ("rows.jsonl:2: has the fields", "of no known format (did you mean problem by probelm?)"),
    ),
    "a misspelt field of the answer": (
        "eval", lambda b: ["--data", b.rows(b.row(solution=..., soluton="B"))], 2,
        ("(did you mean solution by soluton?)",),
    ),
    "a misspelt flag": ("train", lambda b: ["--grup_size", "4"], 2, ("--grup_size 4 (did you mean --group_size?)",)),
    "a misspelt flag of an evaluation": ("eval", lambda b: ["--smaples", "4"], 2, ("(did you mean --samples?)",)),
    "a misspelt flag of a scan": (
        "scan", lambda b: ["--video_rot", "x"], 2, ("video.scan: error: unrecognized", "(did you mean --video_root?)"),
    ),
    "a misspelt flag of a conversion": (
        "convert", lambda b: ["a.csv", "b.jsonl", "--keep_mising"], 2, ("(did you mean --keep_missing?)",),
    ),
    "a flag of another trainer": ("train", lambda b: ["--lr", "1"], 2, ("--lr 1 (did you mean --learning_rate?)",)),
    "a flag of training in an evaluation": ("eval", lambda b: ["--lr", "1"], 2, ("--lr 1 (see --help)",)),
    "a misspelt setting in a file": (
        "train", lambda b: ["--config", settings(b, "lerning_rate: 1e-6")], 2,
        ("own.yaml: unknown setting lerning_rate (did you mean learning_rate?)",),
    ),
    "a file of settings that is not there": (
        "train", lambda b: ["--config", "gone.yaml"], 2, ("--config gone.yaml: No such file or directory; a relative",),
    ),
    "a setting that a file has twice": (
        "train", lambda b: ["--config", settings(b, "steps: 3\nsteps: 5")], 2, ("own.yaml: steps is given twice",),
    ),
    "settings that are nested 700 deep": (
        "train", lambda b: ["--config", settings(b, "[" * 700)], 2, ("own.yaml: is not YAML: maximum recursion",),
    ),
    "a feature cache that is a file, found before the model": (
        "train", lambda b: ["--freeze_vision", "--feature_cache", b.data["val"], "--model", b.folder / "gone"], 2,
        ("--feature_cache ", "val.jsonl: cannot be written to (File exists)"),
    ),
    "a folder in place of a file of settings": (
        "train", lambda b: ["--config", b.folder], 2, ("--config ", ": Is a directory"),
    ),
    "a video root that is not there": (
        "train", lambda b: ["--video_root", b.folder / "vidoes", "--data", b.rows(b.row(video="a.mp4"))], 2,
        ("every sample was skipped", "python -m video.scan --data ... lists all such files"),
    ),
    "a folder in place of data": ("train", lambda b: ["--data", b.folder], 2, ("--data ", ": no such file",)),
    "a checkpoint that is not there": (
        "eval", lambda b: ["--ckpt", b.folder / "chekpoint-9"], 2, ("--ckpt ", "chekpoint-9: "),
    ),
}  # fmt: skip

# Damaged models, for train and eval alike: {name: (damage to a folder, words of the line)}.
TEMPLATE, INDEX, CONFIG = "chat_template.jinja", "model.safetensors.index.json", "config.json"
MODELS = {
    "a config that is cut": (written(CONFIG, "{"), ("config.json is not JSON",)),
    "a config that is null": (written(CONFIG, "null"), ("its config.json cannot be used (TypeError",)),
    "heads 0": (text(num_attention_heads=0), ("text_config.num_attention_heads must be a number above 0, and is 0",)),
    "heads that are text": (text(num_attention_heads="4"), ("num_attention_heads", "got str", "config.json")),
    "heads that do not divide": (text(num_attention_heads=3), ("text_config.num_attention_heads must be a divisor",)),
    "3 heads of keys": (text(num_key_value_heads=3), ("text_config.num_key_value_heads must be a divisor",)),
    "no layers": (text(num_hidden_layers=0, layer_types=None), ("num_hidden_layers must be from 1 to 1000",)),
    "2,000 layers": (text(num_hidden_layers=2000, layer_types=None), ("num_hidden_layers must be from 1 to 1000",)),
    "layers of no type": (text(layer_types=["x", "y"]), ("layer_types", "config.json")),
    "a layer's type missing": (text(layer_types=["full_attention"]), ("`num_hidden_layers` (2)", "config.json")),
    "an unknown activation": (text(hidden_act="relu7"), ("text_config.hidden_act", "'relu7'")),
    "eps below 0": (text(rms_norm_eps=-1.0), ("text_config.rms_norm_eps must be a number above 0, and is -1.0",)),
    "dropout": (text(attention_dropout=0.1), ("text_config.attention_dropout must be 0, and is 0.1",)),
    "3 heads in the tower": (vision(num_heads=3), ("vision_config.num_heads must be a divisor of 32 / 4, and is 3",)),
    "no depth": (vision(depth=0), ("vision_config.depth must be from 1 to 1000",)),
    "patches of no size": (vision(patch_size=0), ("vision_config.patch_size must be a number above 0",)),
    "patches of another size": (vision(patch_size=16), ("vision_config.patch_size is 16", "14 in the processor")),
    "two rope sections": (rope(mrope_section=[2, 6]), ("three mrope_section that add up to 8",)),
    "rope sections too long": (rope(mrope_section=[2, 3, 4]), ("three mrope_section that add up to 8",)),
    "a rope section below 0": (rope(mrope_section=[-2, 5, 5]), ("three mrope_section that add up to 8",)),
    "a rope theta of 0": (rope(rope_theta=0), ("text_config.rope_parameters must be of a rope_theta above 0",)),
    "an unknown rope": (rope(rope_type="spiral"), ("text_config.rope_parameters must be of a type", "spiral")),
    "a placeholder beyond the vocabulary": (changed(CONFIG, video_token_id=10**6), ("video_token_id must be from 0",)),
    "a placeholder that is text": (changed(CONFIG, video_token_id="<v>"), ("video_token_id", "got str", "config.json")),
    "another token's placeholder": (changed(CONFIG, video_token_id=5), ("video_token_id is 5 in config.json",)),
    "a quantised config": (changed(CONFIG, quantization_config={"bits": 8}), ("quantization_config", "bf16")),
    "an EOS that is text": (
        changed("generation_config.json", eos_token_id="<|im_end|>"),
        ("generation_config.json", "eos_token_id '<|im_end|>' is no token id"),
    ),
    "an EOS beyond the vocabulary": (
        changed("generation_config.json", eos_token_id=[1, 10**6]), ("eos_token_id 1000000 is no token id",)
    ),
    "a tokenizer that is cut": (written("tokenizer.json", '{"a": '), ("tokenizer.json is not JSON",)),
    "an empty tokenizer": (written("tokenizer.json", "{}"), ("its processor cannot be used", "tokenizer")),
    "no chat template": (lambda folder: (folder / TEMPLATE).unlink(), ("does not have a chat template",)),
    "a chat template without video": (
        written(TEMPLATE, "{{ messages[0].content[2].text }}<|image_pad|>"),
        ("its chat template writes <|video_pad|> 0 times, and must do so once",),
    ),
    "a chat template without the question": (
        written(TEMPLATE, "<|image_pad|><|video_pad|>"), ("its chat template writes What is shown? 0 times",)
    ),
    "a chat template that the sandbox refuses": (
        written(TEMPLATE, "{{ ''.__class__.__mro__ }}"), ("its chat template fails", "__class__")
    ),
    "an index without a map": (written(INDEX, "{}"), (f"{INDEX} cannot be used (KeyError: 'weight_map')",)),
    "an index that is cut": (written(INDEX, '{"weight_map'), (f"{INDEX} is not JSON",)),
    "an index of numbers": (written(INDEX, '{"weight_map": {"a": 3}}'), (f"{INDEX} cannot be used (TypeError",)),
    "weights that are a pipe": (pipe, ("model.safetensors is not a regular file",)),
    "weights that are NaN": (weights(with_nan), ("model.safetensors: model.norm.weight holds NaN or infinity",)),
    "int8 weights": (
        weights(lambda w: w | {"lm_head.weight": w["lm_head.weight"].to(torch.int8)}),
        ("model.safetensors: lm_head.weight is stored as I8, quantised",),
    ),
    "fp8 weights": (
        weights(lambda w: w | {"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)}),
        ("model.safetensors: lm_head.weight is stored as F8_E4M3, quantised",),
    ),
    "a scale beside the weights": (
        weights(lambda w: w | {"lm_head.weight_scale_inv": torch.ones(1)}),
        ("hold 1 weights that its config.json has no place for, lm_head.weight_scale_inv among them",),
    ),
}  # fmt: skip
MISTAKES |= {
    f"{name}: {program}": (program, lambda b, flag=flag, damage=damage: [flag, b.checkpoint(damage)], 2, words)
    for name, (damage, words) in MODELS.items()
    for program, flag in (("train", "--model"), ("eval", "--ckpt"))
}
SLOW = {"a reward that never lets go", "a reward that ends the program"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MISTAKES]
)
def test_a_mistake_is_answered_in_words(name, world, checkpoints, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    program, flags, code, words = MISTAKES[name]
    bench = Bench(tmp_path, world[0], checkpoints["qwen2_vl"])
    try:
        ended = PROGRAMS[program]([str(flag) for flag in (*TINY[program](bench), *flags(bench))])
    except SystemExit as end:  # argparse
        ended = end.code
    output, error = capfd.readouterr()
    assert ended == code, error
    assert "Traceback" not in output + error
    told = output + error
    if code == 2:
        told = error.splitlines()[-1]
        assert "error: " in told and len(told) < 2000
    assert [text for text in words if text not in told] == [], told


@pytest.mark.parametrize("module, flags, words", [
    ("peft", lambda b: ["--lora_rank", "4"], "--lora_rank needs peft: pip install peft"),
    ("pyarrow", lambda b: ["--data", b.rows(name="rows.parquet")], "parquet files are read by pyarrow: pip install"),
    ("math_verify", lambda b: ["--data", b.rows(b.row(problem_type="math", solution="<answer>1</answer>"))],
     "rows of type 'math' are checked by math-verify: pip install"),
    ("wandb", lambda b: ["--tracker", "wandb"], "--tracker wandb needs the package wandb: pip install wandb"),
    ("swanlab", lambda b: ["--tracker", "swanlab"], "needs the package swanlab: pip install swanlab"),
])  # fmt: skip
def test_a_missing_package_is_one_line(module, flags, words, world, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails now, whether it is installed or not
    bench = Bench(tmp_path, world[0], checkpoints["qwen2_vl"])
    assert train.main([str(flag) for flag in (*TINY["train"](bench), *flags(bench))]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: error: ") and words in line
