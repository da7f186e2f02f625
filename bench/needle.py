"""A needle: which colour has one frame of 512? A tiny model learns to find it by GRPO, two processes to a prompt.

    python bench/needle.py --folder runs/needle               makes clips and a model, trains, states accuracies
    python bench/needle.py --folder runs/needle --frames 64   shorter clips

A clip is grey, another grey in each frame, but for one frame of one of four colours, anywhere. A time step has two
frames and is one token. The supervised warm-up teaches the form of an answer and what the colours are called, on clips
of which a 32nd to a half is coloured, 16 frames of 512 or more. Of the clips that GRPO trains on half have 2 to 15
coloured frames, some of which the model finds from the start. The held-out ones have one.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from demo.synthetic import COLOURS, FPS, LETTERS, SIDE, write_video
from demo.tiny import CHAT_WORDS, build_tiny_model

ASKED = "What colour is shown?"
PARTS = {"train": 256, "val": 200, "warmup": 256}  # clips


def make_row(folder, part, frames, index):
    """Writes a clip; returns its row. Colours and letters take turns."""
    rng = np.random.default_rng([list(PARTS).index(part), index])
    colour, place = list(COLOURS)[index % 4], index // 4 % 4
    length = 1
    if part == "warmup":
        length = int(frames / 2 ** rng.uniform(1, 5))
    elif part == "train" and index // 16 % 2:
        length = int(2 ** rng.uniform(1, 4))
    video = rng.integers(100, 156, size=(frames, 1, 1, 1), dtype=np.uint8).repeat(SIDE, 1).repeat(SIDE, 2).repeat(3, 3)
    first = int(rng.integers(0, frames - length + 1))
    video[first : first + length] = COLOURS[colour]
    path = f"videos/{part}_{index:04d}.mp4"
    write_video(folder / path, video, FPS)

    names = [str(name) for name in rng.permutation([name for name in COLOURS if name != colour])]
    names.insert(place, colour)
    options, answer = [f"{letter}. {name}" for letter, name in zip(LETTERS, names)], LETTERS[place]
    target = f"<think> {colour} {answer}</think><answer>{answer}</answer>"
    return {
        "video": path, "problem": "\n".join((ASKED, *options)), "solution": f"<answer>{answer}</answer>",
        "options": options, "problem_type": "multiple choice", "category": "needle",
        **({"completions": [target]} if part == "warmup" else {}),
    }  # fmt: skip


def make_inputs(folder, frames):
    """Writes NAME.jsonl of each part with its clips, and the folder `start` of a tiny model of random weights."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    texts = set()
    with ThreadPoolExecutor() as pool:
        for part, count in PARTS.items():
            rows = list(pool.map(partial(make_row, folder, part, frames), range(count)))
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            texts |= {text for row in rows for text in (row["problem"], *row.get("completions", ()))}
    build_tiny_model(folder / "start", corpus=" ".join((CHAT_WORDS, *sorted(texts))), vision={"patch_std": 0.03})


def command(folder, frames, shared, more):
    """train.py on `shared` processes that share each prompt."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(shared)]
    return [
        sys.executable, *torchrun, str(ROOT / "train.py"), "--preset", "demo", "--no-demo",
        "--sequence_parallel", str(shared), "--model", str(folder / "start"), "--output", str(folder / "run"),
        *(word for flag, part in (("data", "train"), ("eval_data", "val"), ("sft_data", "warmup"))
          for word in (f"--{flag}", str(folder / f"{part}.jsonl"))),
        "--frame_cache", str(folder / "frames"), "--nframes", str(frames), "--eval_samples", str(PARTS["val"]),
        "--no-controls", "--eval_every", "0", "--save_every", "1000", "--show_every", "0", "--resume", "no",
        "--sft_steps", "700", "--sft_prompts_per_step", "8", "--sft_until", "0.95", "--steps", "100",
        "--prompts_per_step", "16", "--group_size", "8", "--kl_coef", "0.05",
        "--ppo_epochs", "1", "--learning_rate", "0.0008", "--lr_schedule", "linear",
        "--prompts_per_forward", "16", "--prompts_per_rollout", "16", "--eval_batch", "32",
        *more,
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where all of it is kept")
    parser.add_argument("--frames", type=int, default=512, help="of a clip")
    parser.add_argument("--shared", type=int, default=2, help="processes to a prompt")
    given, more = parser.parse_known_args()  # further flags are train.py's
    began, folder = time.perf_counter(), given.folder / f"{given.frames}_frames"
    if not (folder / "start").exists():
        make_inputs(folder, given.frames)
    print(f"clips of {given.frames} frames and a model: {time.perf_counter() - began:.0f} s", flush=True)
    subprocess.run(command(folder, given.frames, given.shared, more), check=True)


if __name__ == "__main__":
    main()
