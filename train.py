"""Trains Qwen2-VL or Qwen2.5-VL on video questions with GRPO.

    python train.py --preset demo                                          a tiny model learns from mp4 files, on a laptop
    torchrun --nproc_per_node 4 train.py --data FILE --video_root FOLDER   Qwen2-VL-7B, as Open-R1-Video trains it

Departures from GRPO as published (DeepSeekMath, arXiv 2402.03300, algorithm 1): a group's prompt is computed once
instead of once per completion; and in the first update pass over a batch the policy's log-probabilities are the old
ones, for no weight has changed since sampling.
"""

import json
import os
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from evaluation.evaluate import CONTROLS, kind_of
from evaluation.report import show_rollouts, summary_of, summary_table
from grpo import distributed, update
from grpo.checkpoint import CheckpointError, is_best, load_state, load_training, save_checkpoint, save_weights
from grpo.config import ConfigError, parse_config
from grpo.data import steps_of
from grpo.demo import build_demo
from grpo.metrics import RunLog, describe_run, quiet_transformers
from grpo.model import ModelError, read_processor
from grpo.plan import plan_text
from grpo.plot import plot_run
from grpo.rollout import rollout
from grpo.run import (
    Run,
    build_policy,
    build_reference,
    check_inputs,
    clear_run,
    describe_rollouts,
    find_checkpoint,
    made_before,
    read_data,
)
from grpo.stops import RunError, Stopped, count_bad, explain_memory, listening, lost_process
from grpo.warmup import warm_up
from rewards import parse_rewards
from video.dataset import DataError
from video.loader import PromptLoader
from video.prompt import PromptEncoder


@explain_memory
def grpo(run, policy, reference, optimizer, samples, held_out, first, state):
    """GRPO from step `first` to the last; `state` goes into every checkpoint."""
    config, processes, log = run.config, run.processes, run.log
    rewards = parse_rewards(config.reward)
    batches = run.batches(samples, first, config.steps, config.prompts_per_step, config.seed)
    bad = 0
    log.start("grpo", config.steps, first)
    for step, (prompts, metrics) in enumerate(batches, start=first):
        clock = time.perf_counter()
        rollouts = rollout(policy, prompts, run.tokenizer, rewards, config, step)
        metrics["seconds_sampling"] = time.perf_counter() - clock

        for group in rollouts:
            for name, message in group.errors.items():
                log.say(f"step {step}: reward {name} failed, scored 0: {message}", everywhere=True)
        chunks = update.make_chunks(prompts, rollouts, config, policy, processes)
        if config.freeze_vision:
            update.add_features(policy, chunks)
        if reference is not None:
            update.add_reference(reference, chunks, config.temperature)
        metrics["learning_rate"] = update.learning_rate(
            step, config.steps, config.learning_rate, config.lr_schedule, config.lr_warmup_steps
        )
        update.set_learning_rate(optimizer, metrics["learning_rate"])
        metrics |= update.update(policy, optimizer, chunks, config, processes)
        metrics |= describe_rollouts(prompts, rollouts, processes)
        metrics["seconds"] = time.perf_counter() - clock + metrics["seconds_waiting"]
        if processes.is_main and config.show_every and step % config.show_every == 0:
            show_rollouts(log.board, step, prompts, rollouts, run.processor)
        log.step("train", step, metrics, shown=("reward", "accuracy", "kl", "length"))

        bad = count_bad(bad, metrics, config, step)

        done, best = step + 1, False
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            accuracy = run.evaluate(policy, held_out)
            log.evaluation(done, accuracy)
            best = is_best(state, done, accuracy)
        if best or done % config.save_every == 0 or done == config.steps:
            save_checkpoint(config.output, done, policy, optimizer, run.processor, config, state, processes)
    log.stop()


def train(config, stop_asked):
    """A whole run: supervised warm-up where asked for, GRPO, evaluation before and after. Returns the summary.

    Once stop_asked(), it saves a checkpoint at the next step and raises Stopped.
    """
    began, folder = time.time(), Path(config.output)
    check_inputs(config)
    processes = distributed.start(config.device, config.shard_size)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.demo and processes.is_main:
        build_demo(config)
    processes.barrier()
    samples, held_out, sft = read_data(config, print if processes.is_main else lambda line: None)
    if config.steps is None:
        config.steps = steps_of(config.epochs, len(samples), config.prompts_per_step)
    if config.resume == "no" and processes.is_main:
        clear_run(folder)
    processes.barrier()
    checkpoint = find_checkpoint(config)
    state = load_state(checkpoint) if checkpoint else {"step": 0}
    warmed = folder / "warmup"
    needs_warmup = config.sft_steps and not warmed.exists()
    start = warmed if config.sft_steps else config.model
    processor = read_processor(config.model)
    try:
        encoder = PromptEncoder(
            config.model, config.video_settings(), config.prompt_template, config.max_prompt_tokens, config.cache()
        )
    except ValueError as error:  # special tokens in --prompt_template
        raise ConfigError(str(error)) from error
    log = RunLog(folder, processes.is_main, partial(made_before, state["step"], config.steps, warmed.exists()))
    log.describe(config, describe_run())
    if config.top_k or config.top_p < 1:
        log.say("--top_k or --top_p is on: completions are sampled from fewer tokens than their log-probabilities are over")

    with closing(log), PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
        kinds = frozenset(kind_of(sample) for sample in samples)
        run = Run(config, processes, processor, loader, log, kinds, stop_asked)
        if needs_warmup:
            policy = build_policy(config.model, config, processor, processes)
            warm_up(policy, run, sft)
            save_weights(warmed, policy, processor, config, processes)
            del policy  # read again below: what a resumed run starts from
        policy = build_policy(start, config, processor, processes, adapters=config.lora_rank > 0)
        reference = build_reference(start, policy, config, processor, processes)
        optimizer = update.make_optimizer(policy, config)
        if checkpoint:
            load_training(checkpoint, policy, optimizer, processes)
        else:
            state["before"] = run.evaluate(policy, held_out)
            log.evaluation(0, state["before"])
        try:
            grpo(run, policy, reference, optimizer, samples, held_out, state["step"], state)
        except Stopped as stop:
            if stop.step > state["step"] and not (folder / f"checkpoint-{stop.step}").exists():
                save_checkpoint(folder, stop.step, policy, optimizer, processor, config, state, processes)
            raise
        after = run.evaluate(policy, held_out)
        log.evaluation(config.steps, after)
        if config.lora_merge:
            save_weights(folder / "merged", policy, processor, config, processes)
        asked = CONTROLS if config.controls and held_out else ()
        controls = {control: run.evaluate(policy, held_out, control) for control in asked}

    summary = summary_of(state["before"], after, controls, time.time() - began)
    if processes.is_main:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"\nheld-out accuracy of {summary['questions']} questions\n{summary_table(summary)}")
        print(f"{summary['seconds']:.0f} s; curve: {plot_run(folder)}; events: tensorboard --logdir {folder}")
    distributed.stop()
    return summary


def main(arguments=None):
    quiet_transformers()
    try:
        config = parse_config(arguments)
        if config.plan:
            print(plan_text(config))
            return 0
        with listening() as stop_asked:
            train(config, stop_asked)
    except Stopped as stop:
        distributed.stop()
        if not int(os.environ.get("RANK", 0)):
            print(f"train.py: {stop}; the same command goes on from there", file=sys.stderr)
    except (CheckpointError, ConfigError, DataError, FloatingPointError, ModelError, RunError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"train.py: error: another process is gone, see its message: {reason}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
