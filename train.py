"""Trains Qwen2-VL, Qwen2.5-VL or Qwen3-VL on video questions with GRPO.

    python train.py --preset demo                                          a tiny model learns from mp4 files
    torchrun --nproc_per_node 4 train.py --data FILE --video_root FOLDER   Qwen2-VL-7B, as Open-R1-Video trains it

Departures from GRPO as published (DeepSeekMath, arXiv 2402.03300, algorithm 1): a group's prompt is computed once
instead of once per completion; and in the first update pass over a batch the policy's log-probabilities are the old
ones, for no weight has changed since sampling.
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports, as is the next: --help and a wrong flag answer at once
    from grpo.config import parse_or_exit

    parse_or_exit()

import json
import os
import sys
import time
from pathlib import Path

import torch

from demo.build import build_demo
from evaluation.plot import plot_run
from evaluation.report import summary_of, summary_table
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy, build_reference
from grpo.engine.checkpoint import load_training
from grpo.engine.evaluate import CONTROLS
from grpo.engine.feature_cache import keep_features
from grpo.engine.optimizer import make_optimizer, schedule
from grpo.engine.warmup import warm_up
from grpo.errors import Stopped
from grpo.rollout import resample, rollout
from grpo.run.folder import check_inputs, sole_use
from grpo.run.log import quiet_libraries
from grpo.run.plan import plan_text
from grpo.run.run import open_run
from grpo.run.stops import exit_code, listening
from grpo.update import add_advantages, add_reference, mini_batches, sync_reference, update
from rewards import parse_rewards
from rewards.judge import Judge
from video.files import write_text
from video.pool import WorkersDoNotStart


def grpo(run, policy, reference, moving, optimizer):
    """GRPO from the first step that is not done yet to the last; moving: the reference, if it moves."""
    config, first, rewards = run.config, run.state["step"], parse_rewards(run.config.reward, Judge.of(run.config))
    sample = lambda prompts, step: rollout(policy, prompts, run.processor.tokenizer, rewards, config, step)
    run.log.start("grpo", config.steps, first)
    for step, (prompts, metrics) in enumerate(run.grpo_batches(), start=first):
        began = time.perf_counter()
        groups = sample(prompts, step)
        if config.dynamic_sampling:
            groups, drawn = resample(groups, lambda count: sample(run.draw(count, metrics), step), config)
            metrics["prompts_drawn"] = drawn
            run.begin_draws(step + 1, run.state["position"] + drawn)
            if step + 1 == config.steps:
                run.check_used("--data")
        metrics["seconds_sampling"] = time.perf_counter() - began

        steps = mini_batches(groups, policy, config)
        batches = [batch for own in steps for batch in own]
        if reference is not None:
            add_reference(reference, batches, config.temperature)
        add_advantages(batches, config)
        metrics["learning_rate"] = schedule(optimizer, step, config)
        metrics |= update(policy, optimizer, steps, config, seed=f"{config.seed}/{step}")
        if moving is not None and (step + 1) % config.ref_sync_steps == 0:
            sync_reference(moving, policy, config.ref_mixup_alpha)
        metrics["seconds"] = time.perf_counter() - began + metrics["seconds_waiting"]

        run.report(step, groups, metrics)
        run.evaluate_and_save(step + 1, policy, optimizer, moving)
    run.log.stop()


def train(config, signalled):
    """A whole run: supervised warm-up if asked for, GRPO, evaluation before and after. Returns the summary.

    Once signalled() is the number of a signal, it saves a checkpoint at the next step and raises Stopped.
    """
    began = time.time()
    device, mesh = distributed.start(config.device, config.shard_size, config.sequence_parallel)
    if config.threads:
        torch.set_num_threads(config.threads)
    check_inputs(config)
    with sole_use(config.output):
        if config.demo and distributed.is_main():
            build_demo(config)
        distributed.barrier()
        with open_run(config, device, mesh, signalled, began) as run:
            evaluations = train_and_evaluate(run)
    summary = summary_of(*evaluations, time.time() - run.began)
    if distributed.is_main():
        folder = Path(config.output)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if table := summary_table(summary):
            print(f"\nheld-out accuracy of {summary['questions']} questions\n{table}")
        print(f"{summary['seconds']:.0f} s; curve: {plot_run(folder)}; events: tensorboard --logdir {folder}")
    distributed.stop()
    return summary


def train_and_evaluate(run):
    """Trains; returns evaluations before and after training, and {control: evaluation}."""
    # 1) Policy, reference and optimizer, new or as the newest checkpoint has them
    config = run.config
    start = supervised(run) if config.sft_steps else config.model
    policy = build_policy(start, config, run.processor, run.device, run.mesh, adapters=config.lora_rank > 0)
    run.choose_fast_paths(policy)
    if config.feature_cache:
        keep_features(policy, config.feature_cache, config.feature_cache_gb)
    reference = build_reference(start, policy, config, run.processor, run.device, run.mesh)
    moving = reference if config.ref_sync_steps else None
    optimizer = make_optimizer(policy, config)
    if run.checkpoint:
        load_training(run.checkpoint, policy, optimizer, moving)
    else:
        run.state["before"] = run.evaluate(policy)
        run.log.evaluation(0, run.state["before"], run.evaluate_gaps(policy, 0))

    # 2) GRPO; a run that is asked to stop saves first
    try:
        grpo(run, policy, reference, moving, optimizer)
    except Stopped as stop:
        run.saver.wait()
        if stop.step not in (run.state["step"], run.saver.step):
            run.save(stop.step, policy, optimizer, moving)
            run.saver.wait()
        raise

    # 3) Evaluation after training, also with changed videos
    after = run.evaluate(policy)
    made = run.evaluate_gaps(policy, config.steps)
    run.log.evaluation(config.steps, after, made)
    if config.lora_merge:
        run.saver.save_weights(Path(config.output) / "merged", policy)
    asked = CONTROLS if config.controls and run.held_out else ()
    controls = {control: made.get(control) or run.evaluate(policy, control) for control in asked}
    run.saver.wait()
    return run.state["before"], after, controls


def supervised(run):
    """The folder of the weights that the supervised pass ends with; the pass is made once."""
    folder = Path(run.config.output) / "warmup"
    if not distributed.gather(folder.exists())[0]:
        policy = build_policy(run.config.model, run.config, run.processor, run.device, run.mesh)
        run.choose_fast_paths(policy)
        try:
            warm_up(policy, run.warmup_batches(), run.processor.tokenizer, run.config, run.log)
        except Stopped as stop:
            raise Stopped(0, stop.number) from None  # nothing of the pass is kept
        run.prompts = []  # what runs out of memory from here on is not these
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
            except WorkersDoNotStart:  # the signal may have reached the workers too
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
