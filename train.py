"""Trains Qwen2-VL or Qwen2.5-VL on video questions with GRPO.

    python train.py --preset demo                                          a tiny model learns from mp4 files
    torchrun --nproc_per_node 4 train.py --data FILE --video_root FOLDER   Qwen2-VL-7B, as Open-R1-Video trains it

Departures from GRPO as published (DeepSeekMath, arXiv 2402.03300, algorithm 1): a group's prompt is computed once
instead of once per completion; and in the first update pass over a batch the policy's log-probabilities are the old
ones, for no weight has changed since sampling.
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports

import json
import os
import sys
import time
from pathlib import Path

import torch

from evaluation.evaluate import CONTROLS
from evaluation.plot import plot_run
from evaluation.report import summary_of, summary_table
from grpo import distributed, update
from grpo.build import build_policy, build_reference
from grpo.checkpoint import load_training
from grpo.config import parse_config
from grpo.inputs import check_inputs, sole_use
from grpo.metrics import quiet_libraries
from grpo.plan import plan_text
from grpo.rollout import rollout
from grpo.run import opened
from grpo.stops import Stopped, exit_code, listening
from grpo.warmup import warm_up
from rewards import parse_rewards
from video.files import write_text
from video.pool import WorkersDoNotStart


def grpo(run, policy, reference, optimizer):
    """GRPO from the first step that is not done yet to the last."""
    config, first = run.config, run.state["step"]
    rewards = parse_rewards(config.reward)
    batches = run.batches(run.data.train, first, config.steps, config.prompts_per_step, config.seed)
    run.log.start("grpo", config.steps, first)
    for step, (prompts, metrics) in enumerate(batches, start=first):
        began = time.perf_counter()
        rollouts = rollout(policy, prompts, run.processor.tokenizer, rewards, config, step)
        metrics["seconds_sampling"] = time.perf_counter() - began

        chunks = update.make_chunks(prompts, rollouts, config, policy, run.processes)
        if reference is not None:
            update.add_reference(reference, chunks, config.temperature)
        metrics["learning_rate"] = update.schedule(optimizer, step, config)
        metrics |= update.update(policy, optimizer, chunks, config, run.processes)
        metrics["seconds"] = time.perf_counter() - began + metrics["seconds_waiting"]

        run.report(step, prompts, rollouts, metrics)
        run.evaluate_and_save(step + 1, policy, optimizer)
    run.log.stop()


def train(config, signalled):
    """A whole run: supervised warm-up where asked for, GRPO, evaluation before and after. Returns the summary.

    Once signalled() is the number of a signal, it saves a checkpoint at the next step and raises Stopped.
    """
    began, folder = time.time(), Path(config.output)
    processes = distributed.start(config.device, config.shard_size)
    if config.threads:
        torch.set_num_threads(config.threads)
    check_inputs(config)
    with sole_use(config.output, processes), opened(config, processes, signalled, began) as run:
        start = supervised(run) if config.sft_steps else config.model
        policy = build_policy(start, config, run.processor, processes, adapters=config.lora_rank > 0)
        run.choose_fast_paths(policy)
        reference = build_reference(start, policy, config, run.processor, processes)
        optimizer = update.make_optimizer(policy, config)
        if run.data.checkpoint:
            load_training(run.data.checkpoint, policy, optimizer, processes)
        else:
            run.state["before"] = run.evaluate(policy)
            run.log.evaluation(0, run.state["before"])
        try:
            grpo(run, policy, reference, optimizer)
        except Stopped as stop:
            run.saver.wait()
            if stop.step not in (run.state["step"], run.saver.step):
                run.save(stop.step, policy, optimizer)
                run.saver.wait()
            raise
        after = run.evaluate(policy)
        run.log.evaluation(config.steps, after)
        if config.lora_merge:
            run.saver.save_weights(folder / "merged", policy)
        asked = CONTROLS if config.controls and run.data.held_out else ()
        controls = {control: run.evaluate(policy, control) for control in asked}
        run.saver.wait()

    summary = summary_of(run.state["before"], after, controls, time.time() - run.began)
    if processes.is_main:
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if table := summary_table(summary):
            print(f"\nheld-out accuracy of {summary['questions']} questions\n{table}")
        print(f"{summary['seconds']:.0f} s; curve: {plot_run(folder)}; events: tensorboard --logdir {folder}")
    distributed.stop()
    return summary


def supervised(run):
    """The folder of the weights that a supervised pass ends with; it is made once."""
    folder = Path(run.config.output) / "warmup"
    if not run.processes.gather(folder.exists())[0]:
        policy = build_policy(run.config.model, run.config, run.processor, run.processes)
        run.choose_fast_paths(policy)
        try:
            warm_up(policy, run)
        except Stopped as stop:
            raise Stopped(0, stop.number) from None  # nothing of it is kept
        run.saver.save_weights(folder, policy)
    return folder


def main(arguments=None):
    quiet_libraries()
    try:
        config = parse_config(arguments)
        if config.plan:
            print(plan_text(config))
            return 0
        with listening() as signalled:
            try:
                train(config, signalled)
            except WorkersDoNotStart:  # the signal may have reached them too
                if not signalled():
                    raise
                print("train.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
                return 128 + signalled()
    except Stopped as stop:
        distributed.stop()
        if not int(os.environ.get("RANK", 0)):
            command = "the same command" + " without --resume no" * (config.resume == "no")
            print(f"train.py: {stop}; {command} goes on from there", file=sys.stderr)
        return 128 + stop.number  # as a shell has it for a signal: `train.py && eval.py` must not go on
    except KeyboardInterrupt:
        print("train.py: ended at once, without saving", file=sys.stderr)
        return 130
    except Exception as error:
        return exit_code("train.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
