"""Peak memory of each process that scores a packed row of 20,000 tokens, 1, 2 and 4 of them sharing it (Linux only).

    python bench/sequence_memory.py

A row of one video of 300 time steps and 8 completions of 100 tokens, of a random Qwen2-VL of 2 layers of width 256
(4 heads, 2 of them for keys and values) and a tower of one block, in fp32, activations recomputed. The peak is that of
the resident set over forward and backward, patches included, less what the process holds after a short row: imports,
weights and what libraries set aside.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_prompt, random_completions
from transformers import AutoProcessor

from demo.tiny import build_tiny_model
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy

TEXT = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        }  # fmt: skip
COMPLETIONS = [100] * 8


def resident(name):
    """VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def score(policy, tokenizer, steps):
    """Forward and backward of a row; returns its tokens."""
    prompt = make_prompt(tokenizer, [("video", (steps, 16, 16))])  # 64 tokens a time step
    batch = pack([prompt], [random_completions(tokenizer, COMPLETIONS)], policy.spec)
    del prompt  # the loader's, not the model's
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    logprobs, _ = policy(batch, entropy=False)
    logprobs.sum().backward()
    return batch.input_ids.shape[1]


def measure(folder, count, steps):
    """Prints {"tokens", "peak" in MiB} of this rank."""
    device, mesh = distributed.start("cpu", sequence_parallel=count)
    processor = AutoProcessor.from_pretrained(folder)
    policy = build_policy(folder, parse_config(["--preset", "demo", "--activation_checkpointing", "full"]), processor,
                          device, mesh)  # fmt: skip
    score(policy, processor.tokenizer, 4)
    before = resident("VmRSS")
    tokens = score(policy, processor.tokenizer, steps)
    found = distributed.gather(resident("VmHWM") - before)
    if distributed.is_main():
        print(json.dumps({"tokens": tokens, "peaks": found}))
    distributed.stop()


def peaks_of(folder, count, steps):
    """What `measure` prints on rank 0 of `count` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    own = [__file__, "--rank_of", str(count), "--model", folder, "--steps", str(steps)]
    command = [sys.executable, *(torchrun if count > 1 else []), *own]
    # malloc maps each block of 64 KiB or more by itself: what is freed is no longer resident, as fragments would be.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="time steps of the video, of 64 tokens each")
    parser.add_argument("--rank_of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        return measure(given.model, given.rank_of, given.steps)
    print("| processes | tokens | peak of each, MiB | of one alone |\n|---:|---:|---:|---:|")
    alone = None
    with TemporaryDirectory() as folder:
        build_tiny_model(folder, text=TEXT)
        for count in (1, 2, 4):
            found = peaks_of(folder, count, given.steps)
            peaks, alone = found["peaks"], alone or found["peaks"][0]
            shown = ", ".join(f"{peak:.0f}" for peak in peaks)
            print(f"| {count} | {found['tokens']} | {shown} | {max(peaks) / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
