"""What surrounds the loop of a run: batches that arrive decoded, log, evaluation, checkpoints."""

import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from grpo import sequence
from grpo.config import Config
from grpo.engine.checkpoint import Saver, load_state, note_if_best
from grpo.engine.distributed import barrier, data_rank, data_size, gather, is_main, reduce_sum, world_size
from grpo.engine.evaluate import GAPS, EvalSettings, category_of, predict, show_progress, summarise
from grpo.engine.fast_paths import choose_fast_paths
from grpo.engine.model_files import find_model, model_identity, read_config, read_processor
from grpo.errors import ConfigError, RunError, Stopped
from grpo.families import load_family
from grpo.run.data import digest, draw_samples, read_questions, steps_of
from grpo.run.folder import clear_run, data_before, find_checkpoint, made_before
from grpo.run.log import RunLog, describe_groups, describe_run, describe_usage
from grpo.run.stops import count_bad, memory_message, out_of_memory
from grpo.sampler import SamplingSettings
from rewards.judge import Judge
from video.cache import FrameCache
from video.formats import DataError
from video.loader import ADVICE, PromptLoader
from video.pool import WorkersDoNotStart
from video.prompt import WHOLE_PROMPT, PromptEncoder, Skipped
from video.settings import VideoSettings, parse_forms


def make_encoder(config, template=None, path=None):
    """The `PromptEncoder` of a run; template and path stand in for config.prompt_template and config.model. Of ranks
    that share their prompts each reads its share of the frames; all of them if T-GRPO is to shuffle them.

    Raises ConfigError if the template holds special tokens.
    """
    cache = FrameCache(config.frame_cache, config.frame_cache_gb) if config.frame_cache else None
    template, path = template or config.prompt_template, path or config.model
    settings, family = VideoSettings.of(config), load_family(read_config(path).model_type)
    share = WHOLE_PROMPT if config.temporal_bonus else (sequence.rank(), config.sequence_parallel)
    try:
        forms = parse_forms(config.answer_form)
        return PromptEncoder(path, settings, template, config.max_prompt_tokens, cache, forms, family, share)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def own_share():
    """The slice of a draw that is this rank's."""
    return slice(data_rank(), None, data_size())


@contextmanager
def open_run(config, device, mesh, signalled, began):
    """Yields the `Run`: data, processor, decoding workers and log; closes them. Sets config.steps.

    A run that is to start anew clears its folder, once all that it needs is known to be there. Raises ConfigError and
    DataError before any weight loads.
    """
    # 1) Read what the run needs, and its state if it goes on
    say = print if is_main() else lambda line: None
    train, held_out, warmup = read_questions(config, say)
    if config.steps is None:
        config.steps = steps_of(config.epochs, len(train), config.prompts_per_step)
    digests = {"train": digest(train), "held out": digest(held_out), "warm-up": digest(warmup)}
    digests["model"] = model_identity(find_model(config.model))
    checkpoint = find_checkpoint(config)  # before its data is compared: other settings may make other data
    before = data_before(config, digests, say)
    state = load_state(checkpoint) if checkpoint else {"step": 0}
    processor, encoder = read_processor(config.model), make_encoder(config)
    saver = Saver(device, processor, config)

    # 2) Clear the folder
    barrier()  # until here, other ranks may read what rank 0 removes now
    if is_main() and (Path(config.output) / "run.json").exists():
        clear_run(config.output, anew=config.resume == "no")
    barrier()
    warmed = (Path(config.output) / "warmup").exists()

    # 3) Start the log and the workers
    log = RunLog(config.output, partial(made_before, state["step"], config.steps, warmed))
    with closing(log), PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
        log.describe(config, {**describe_run(), "data": digests, "data_before": before})
        if held_out:
            note_questions(state, digests["held out"], log)
        began -= state.get("seconds", 0)
        run = Run(
            config=config, device=device, mesh=mesh, processor=processor, train=train, held_out=held_out, warmup=warmup,
            checkpoint=checkpoint, state=state, loader=loader, log=log, saver=saver, signalled=signalled, began=began,
        )  # fmt: skip
        run.introduce()
        try:
            yield run
        except Exception as error:
            saver.join()  # a run that fails keeps the checkpoint that is being written
            if out_of_memory(error):
                raise RunError(memory_message(run.prompts, config, error)) from error
            raise


def note_questions(state, held_out, log):
    """Drops the accuracies of the state of a run that has evaluated other questions than those of the digest
    `held_out`, with a word; notes the last evaluation of a run that was at its end, and now goes on, if it is the best.
    """
    if state.setdefault("held_out", held_out) != held_out:
        state.update(held_out=held_out, before={}, best={})
        log.say(f"evaluates other questions from step {state['step']} on: accuracies before it do not compare")
    elif accuracy := gather(log.accuracies.get(state["step"]))[0]:
        note_if_best(state, state["step"], {"trained": accuracy})


@dataclass
class Run:
    """One run's surroundings."""

    config: Config
    device: torch.device
    mesh: object  # None on one CPU process
    processor: object
    train: list  # the samples to train on
    held_out: list  # the samples to evaluate on
    warmup: list  # the samples of the supervised pass
    checkpoint: Path | None  # the newest, which the run goes on from
    state: dict  # what resuming needs beside weights and moments
    loader: PromptLoader
    log: RunLog
    saver: Saver
    signalled: Callable  # () -> number of the signal that this process got, 0 without one
    began: float  # when it would have begun, had it never stopped
    prompts: list = field(default_factory=list)  # those at work
    bad: int = 0  # steps in a row whose update was skipped
    checked: bool = False  # whether fast paths have been chosen
    skipped: Skipped | None = None  # the last sample of this rank that could not be read
    drawn: int = 0  # prompts that the step has drawn, with dynamic sampling
    ahead: Callable | None = None  # waits for the first prompts of the next step, with dynamic sampling

    def introduce(self):
        """Says what the run is about to do."""
        config, say = self.config, self.log.say
        if config.top_k or config.top_p < 1:
            say("--top_k or --top_p is on: sampling sees fewer tokens than the log-probabilities are over")
        shared = f", {sequence.size()} to a prompt" if sequence.size() > 1 else ""
        source = f" of {config.eval_data}" if config.eval_data and self.held_out else ""
        say(
            f"{config.model} on {world_size()} x {self.device.type}{shared}: {len(self.train)} questions to train on, "
            f"{len(self.held_out)} held out{source}, {config.steps} steps"
        )
        if self.checkpoint:
            done = f"{self.state['step']} of {config.steps} steps are done"
            say(f"goes on from {self.checkpoint}, {done}; --resume no, or another --output, starts anew")
        if config.prompts_per_step < data_size():
            say(f"--prompts_per_step {config.prompts_per_step}: some of {world_size()} processes have none")

    def grpo_batches(self):
        """The batches of the GRPO steps that are not done yet."""
        config, steps = self.config, range(self.state["step"], self.config.steps)
        if config.dynamic_sampling:
            self.begin_draws(self.state["step"], self.state.get("position", 0))
            return self.batches(iter(lambda: self.ahead(), None), steps, "--data")
        draws = (
            draw_samples(self.train, s * config.prompts_per_step, config.prompts_per_step, config.seed) for s in steps
        )
        return self.batches(self.loader.batches(draw[own_share()] for draw in draws), steps, "--data")

    def warmup_batches(self):
        """The batches of the supervised pass."""
        count, steps, seed = self.config.sft_prompts_per_step, range(self.config.sft_steps), self.config.seed + 1
        draws = (draw_samples(self.warmup, step * count, count, seed) for step in steps)
        return self.batches(self.loader.batches(draw[own_share()] for draw in draws), steps, "--sft_data")

    def batches(self, encoded, steps, flag):
        """Yields (prompts of this rank, {"skipped", "seconds_waiting"}) for each of a range of steps.

        encoded: an iterator of batches, which worker processes decode ahead; `flag` is where their samples come from.
        A sample that could not be read is named and counted, and its step is smaller. Raises Stopped on all ranks
        before the first step that any of them was asked not to take, and DataError before the last step if no sample
        of all steps could be used.
        """
        used, asked = self.state.setdefault("used", {}), time.perf_counter()
        for step, batch in zip(steps, self.until_signalled(encoded)):
            waited = time.perf_counter() - asked
            batch = sequence.agreed(batch)
            prompts = self.readable(batch)
            stop = any(sequence.gather_items(bool(self.signalled() or self.saver.error)))
            sums = reduce_sum({"used": len(prompts), "skipped": len(batch) - len(prompts), "stop": stop})
            if sums["stop"]:
                raise Stopped(step, max(gather(self.signalled())))
            self.prompts = prompts
            used[flag] = used.get(flag, 0) + sums["used"]
            if step == steps[-1] and not (flag == "--data" and self.config.dynamic_sampling):
                self.check_used(flag)
            yield prompts, {"skipped": int(sums["skipped"]), "seconds_waiting": waited}
            asked = time.perf_counter()

    def check_used(self, flag):
        """Raises DataError if no sample of all steps could be used."""
        if not self.state["used"][flag]:
            advice = ADVICE.get(self.skipped.reason_type) if self.skipped else None
            reason = f"{flag}: every sample was skipped, for the reasons above: nothing was trained"
            raise DataError("; ".join(filter(None, (reason, advice))))

    def readable(self, batch):
        """The prompts of a batch; names the samples that could not be read, once for a sequence group."""
        for p in batch:
            if isinstance(p, Skipped):
                self.skipped = p
                self.log.say(f"skipped {p.key}: {p.path}: {p.reason}", everywhere=sequence.rank() == 0)
        return [p for p in batch if not isinstance(p, Skipped)]

    def begin_draws(self, step, position):
        """With dynamic sampling: `step` draws from `position` of the data. Its first prompts are decoded from now on,
        while the update of the step before runs."""
        self.state["position"], self.drawn = position, 0
        if step < self.config.steps:
            self.ahead = self.submit(self.config.prompts_per_step)

    def submit(self, count):
        """A function that waits for this rank's share of the next `count` prompts of the step."""
        position, first = self.state["position"], self.drawn
        self.drawn += count
        draw = draw_samples(self.train, position, self.drawn, self.config.seed)[first:]
        return self.loader.submit(draw[own_share()])

    def draw(self, count, metrics):
        """This rank's prompts among the next `count` of the step, beyond those that it began with. Adds the samples
        that could not be read to metrics["skipped"]."""
        batch = sequence.agreed(self.submit(count)())
        prompts = self.readable(batch)
        self.prompts = self.prompts + prompts
        sums = reduce_sum({"used": len(prompts), "skipped": len(batch) - len(prompts)})
        self.state["used"]["--data"] += sums["used"]
        metrics["skipped"] += int(sums["skipped"])
        return prompts

    def until_signalled(self, batches):
        """Yields the batches; an empty one, for all ranks to stop at, if a signal has ended the workers too."""
        try:
            yield from batches
        except WorkersDoNotStart:
            if not self.signalled():
                raise
            yield []

    def choose_fast_paths(self, policy):
        """See `grpo.engine.fast_paths`. The run's first policy decides for the whole run."""
        if not self.checked:
            tokenizer = self.processor.tokenizer
            choose_fast_paths(policy, self.loader, self.train, self.config, tokenizer, self.log.say)
        self.checked = True

    def evaluate(self, policy, control=None):
        """`summarise`d accuracy on the held-out questions, greedy; {} if there are none."""
        config, held_out, tokenizer, self.prompts = self.config, self.held_out, self.processor.tokenizer, []
        if not held_out:
            return {}
        greedy = SamplingSettings(temperature=0.0, max_new_tokens=config.max_new_tokens)
        settings = EvalSettings(greedy, config.eval_batch, control, Judge.of(config))
        with show_progress(control or "evaluation", len(held_out), leave=False) as report:
            records = predict(policy, self.loader, held_out, tokenizer, settings, report=report)
        return summarise(records, frozenset(map(category_of, self.train)))

    def evaluate_gaps(self, policy, done):
        """{control of GAPS: its evaluation} if --gap_every asks for them after `done` steps, else {}: beside the first
        and the last evaluation, and beside every so many of those between."""
        config = self.config
        number = done // config.eval_every if 0 < done < config.steps else 0
        if not config.gap_every or number % config.gap_every:
            return {}
        return {control: self.evaluate(policy, control) for control in GAPS.values()}

    def report(self, step, groups, metrics):
        """Logs a step. Raises RunError after config.max_bad_updates steps in a row whose update was skipped."""
        config = self.config
        self.log.show_failures(step, groups)
        metrics = metrics | describe_groups(groups) | describe_usage(groups, metrics["seconds"], self.device)
        if config.show_every and step % config.show_every == 0:
            self.log.show_groups(step, groups, self.processor)
        if config.rollouts_every and step % config.rollouts_every == 0:
            self.log.write_rollouts(step, groups)
        shown = ("reward", "accuracy", "kl", "length", "tokens_per_second", "peak_memory_gib")
        self.log.step("train", step, metrics, shown)
        self.bad = count_bad(self.bad, metrics, config, step)

    def evaluate_and_save(self, done, policy, optimizer, moving=None):
        """Does what is due after `done` steps. The last evaluation comes after the loop."""
        config, best = self.config, False
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            accuracy = self.evaluate(policy)
            self.log.evaluation(done, accuracy, self.evaluate_gaps(policy, done))
            best = note_if_best(self.state, done, accuracy)
        if best or done % config.save_every == 0 or done == config.steps:
            self.save(done, policy, optimizer, moving)

    def save(self, step, policy, optimizer, moving=None):
        """Begins to write a checkpoint of what there is after `step` steps; moving: the reference, if it moves."""
        self.state["seconds"] = time.time() - self.began
        self.saver.save(step, policy, optimizer, self.state, moving)
