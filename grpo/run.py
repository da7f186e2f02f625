"""What surrounds the loop: batches that arrive decoded, logs, evaluation, checkpoints."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from demo.build import build_demo
from evaluation.evaluate import Progress, kind_of, mean, predict, summarise
from grpo import distributed
from grpo.checkpoint import Saver, load_state, note_if_best
from grpo.config import Config, ConfigError
from grpo.data import digest, step_samples, steps_of
from grpo.inputs import clear_run, data_before, find_checkpoint, made_before, read_data
from grpo.metrics import RunLog, describe_run
from grpo.model import read_processor
from grpo.selfcheck import choose_fast_paths
from grpo.show import show_rollouts
from grpo.stops import RunError, Stopped, count_bad, memory_message, out_of_memory
from rewards.diagnostics import answer_stats
from video.dataset import DataError
from video.loader import PromptLoader
from video.pool import WorkersDoNotStart
from video.prompt import PromptEncoder, Skipped


class Data(NamedTuple):
    """Samples to train on, held out, and of the supervised pass, and the `digest` of each; those of other data that the
    run had before; the newest checkpoint, None where there is none."""

    train: list
    held_out: list
    warmup: list
    digests: dict
    digests_before: list
    checkpoint: Path | None


def prepare(config, processes):
    """What there is before any weight loads: the `Data`, with config.steps set. Raises ConfigError and DataError."""
    if config.demo and processes.is_main:
        build_demo(config)
    processes.barrier()
    say = print if processes.is_main else lambda line: None
    train, held_out, warmup = read_data(config, say)
    if config.steps is None:
        config.steps = steps_of(config.epochs, len(train), config.prompts_per_step)
    digests = {"train": digest(train), "held out": digest(held_out), "warm-up": digest(warmup)}
    checkpoint = find_checkpoint(config)  # first: other settings may make other data
    return Data(train, held_out, warmup, digests, data_before(config, digests, say), checkpoint)


@contextmanager
def opened(config, processes, signalled, began):
    """Yields the `Run`: data, processor, decoding workers and logs; closes them. Clears the folder of a run that is to
    start anew, once it is known that it can."""
    data = prepare(config, processes)
    state = load_state(data.checkpoint) if data.checkpoint else {"step": 0}
    processor = read_processor(config.model)
    saver = Saver(processes, processor, config)
    try:
        encoder = PromptEncoder(
            config.model, config.video_settings(), config.prompt_template, config.max_prompt_tokens, config.cache()
        )
    except ValueError as error:  # special tokens in --prompt_template
        raise ConfigError(str(error)) from error
    processes.barrier()  # until here, others may read what is removed now
    if processes.is_main and (Path(config.output) / "run.json").exists():
        clear_run(config.output, anew=config.resume == "no")
    processes.barrier()
    warmed = (Path(config.output) / "warmup").exists()
    log = RunLog(config.output, processes.is_main, partial(made_before, state["step"], config.steps, warmed))
    with closing(log), PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
        log.describe(config, {**describe_run(), "data": data.digests, "data_before": data.digests_before})
        if config.top_k or config.top_p < 1:
            log.say("--top_k or --top_p is on: sampling sees fewer tokens than the log-probabilities are over")
        began -= state.get("seconds", 0)
        run = Run(config, processes, processor, data, state, loader, log, saver, signalled, began)
        log.say(
            f"{config.model} on {processes.world} x {processes.device.type}: {len(data.train)} questions to train on, "
            f"{len(data.held_out)} held out, {config.steps} steps"
        )
        if data.checkpoint:
            done = f"{state['step']} of {config.steps} steps are done"
            log.say(f"goes on from {data.checkpoint}, {done}; --resume no, or another --output, starts anew")
        if config.prompts_per_step < processes.world:
            log.say(f"--prompts_per_step {config.prompts_per_step}: some of {processes.world} processes have none")
        try:
            yield run
        except Exception as error:
            run.saver.join()  # a run that fails keeps the checkpoint that is being written
            if out_of_memory(error):
                raise RunError(memory_message(run.prompts, config, error)) from error
            raise


@dataclass
class Run:
    """One run's surroundings. `state` is what resuming needs beside weights and moments; `signalled()` is the number of
    the signal that this process has got, 0 without one; `prompts` are those at work; `bad` counts the last steps whose
    update was left out; `checked` says whether fast paths have been chosen."""

    config: Config
    processes: distributed.Processes
    processor: object
    data: Data
    state: dict
    loader: PromptLoader
    log: RunLog
    saver: Saver
    signalled: Callable
    began: float  # when it would have, had it never stopped
    prompts: list = field(default_factory=list)
    bad: int = 0
    checked: bool = False

    def batches(self, samples, first, last, per_step, seed, flag="--data"):
        """Yields (prompts of this process, {"skipped", "seconds_waiting"}) for steps first to last - 1.

        Worker processes decode ahead. A sample that could not be read is named and counted, and its step is smaller.
        Raises Stopped, in all processes alike, before the first step that any of them was asked not to take, and
        DataError before the last step where no sample of all steps could be used. `flag` is where samples come from.
        """
        own = slice(self.processes.rank, None, self.processes.world)
        shares = (distinct_keys(step_samples(samples, step, per_step, seed))[own] for step in range(first, last))
        encoded, asked = self.loader.batches(shares), time.perf_counter()
        used = self.state.setdefault("used", {})
        for step, batch in enumerate(self.until_signalled(encoded), start=first):
            waited = time.perf_counter() - asked
            prompts = [p for p in batch if not isinstance(p, Skipped)]
            for p in batch:
                if isinstance(p, Skipped):
                    self.log.say(f"skipped {p.key}: {p.path}: {p.reason}", everywhere=True)
            stop = self.signalled() or self.saver.failed
            counts = {"used": len(prompts), "skipped": len(batch) - len(prompts), "stop": bool(stop)}
            sums = self.processes.sum(counts)
            if sums["stop"]:
                raise Stopped(step, max(self.processes.gather(self.signalled())))
            self.prompts = prompts
            used[flag] = used.get(flag, 0) + sums["used"]
            if step == last - 1 and not used[flag]:
                raise DataError(f"{flag}: every sample was skipped, for the reasons above: nothing was trained")
            yield prompts, {"skipped": int(sums["skipped"]), "seconds_waiting": waited}
            asked = time.perf_counter()

    def until_signalled(self, batches):
        """Yields the batches; an empty one, for all processes to stop at, where a signal has ended the workers too."""
        try:
            yield from batches
        except WorkersDoNotStart:
            if not self.signalled():
                raise
            yield []

    def choose_fast_paths(self, policy):
        """See `grpo.selfcheck`. The run's first policy decides for all of the run."""
        tokenizer, say = self.processor.tokenizer, self.log.say
        if not self.checked:
            choose_fast_paths(policy, self.loader, self.data.train, self.config, self.processes, tokenizer, say)
        self.checked = True

    def evaluate(self, policy, control=None):
        """`summarise`d accuracy on the held-out samples, greedy; {} where there are none."""
        config, self.prompts = self.config, []
        if not self.data.held_out:
            return {}
        with Progress(control or "evaluation", len(self.data.held_out), self.processes, leave=False) as progress:
            records = predict(
                policy, self.loader, self.data.held_out, self.processor.tokenizer, self.processes,
                config.max_new_tokens, config.eval_batch, control=control, report=progress,
            )  # fmt: skip
        return summarise(records, frozenset(map(kind_of, self.data.train)))

    def report(self, step, prompts, rollouts, metrics):
        """Logs a step. Raises RunError after config.max_bad_updates steps in a row whose update was left out."""
        failures = defaultdict(list)
        for name, message in [item for group in rollouts for item in group.errors.items()]:
            failures[name].append(message)
        for name, messages in failures.items():
            where = f"{len(messages)} of {len(rollouts)} groups"
            self.log.say(f"step {step}: reward {name} failed in {where}, scored 0: {messages[0]}", everywhere=True)
        metrics = metrics | describe_rollouts(prompts, rollouts, self.processes)
        if self.processes.is_main and self.config.show_every and step % self.config.show_every == 0:
            show_rollouts(self.log.board, step, prompts, rollouts, self.processor)
        self.log.step("train", step, metrics, shown=("reward", "accuracy", "kl", "length"))
        self.bad = count_bad(self.bad, metrics, self.config, step)

    def evaluate_and_save(self, done, policy, optimizer):
        """What is due after `done` steps. The last evaluation comes after the loop."""
        config, best = self.config, False
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            accuracy = self.evaluate(policy)
            self.log.evaluation(done, accuracy)
            best = note_if_best(self.state, done, accuracy)
        if best or done % config.save_every == 0 or done == config.steps:
            self.save(done, policy, optimizer)

    def save(self, step, policy, optimizer):
        """Begins to write a checkpoint of what there is after `step` steps."""
        self.state["seconds"] = time.time() - self.began
        self.saver.save(step, policy, optimizer, self.state)


def distinct_keys(samples):
    """The samples; one that comes again in a step gets a key, and with it random numbers, of its own."""
    seen, renamed = Counter(), []
    for sample in samples:
        seen[sample.key] += 1
        renamed.append(sample if seen[sample.key] == 1 else replace(sample, key=f"{sample.key}#{seen[sample.key]}"))
    return renamed


def describe_rollouts(prompts, rollouts, processes):
    """Means over the step's completions, in all processes: rewards and their parts, lengths, what was answered."""
    accuracies = [group.parts["accuracy"] for group in rollouts if "accuracy" in group.parts]
    columns = {
        "reward": [r for group in rollouts for r in group.rewards],
        "length": [n for group in rollouts for n in group.lengths],
        "cut_share": [not done for group in rollouts for done in group.finished],
        "reward_std": [torch.tensor(group.rewards).std().item() for group in rollouts],
        "rewards_failed": [group.failed for group in rollouts],
        "all_right_share": [min(a) == 1 for a in accuracies],
        "all_wrong_share": [max(a) == 0 for a in accuracies],
    }
    for group in rollouts:
        for name, part in group.parts.items():
            columns.setdefault(name, []).extend(part)
    texts = [text for group in rollouts for text in group.texts]
    samples = [p.sample for p, group in zip(prompts, rollouts) for _ in group.texts]
    merged, all_texts, all_samples = defaultdict(list), [], []
    for columns, texts, samples in processes.gather((columns, texts, samples)):
        for name, values in columns.items():
            merged[name] += values
        all_texts += texts
        all_samples += samples
    answers, count = answer_stats(all_texts, all_samples), max(len(all_texts), 1)
    return {
        **{name: mean(values) for name, values in merged.items() if values},  # what was not measured is left out, not 0
        **{f"{name}_share": answers[name] for name in ("no_answer", "several_answers")},
        **{f"letter_{letter}": number / count for letter, number in answers["letters"].items()},
    }
