"""The configuration: one dataclass that is the command line, the presets' target and what is saved with a run."""

import argparse
import dataclasses
import json
import math
import operator
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from grpo.errors import ConfigError
from grpo.families import family_names
from rewards import parse_rewards
from rewards.judge import Judge
from video.files import write_text
from video.formats import printable
from video.settings import TEMPLATE, VideoSettings, parse_forms
from video.terminal import OneLineParser, meant


def flag(default, sentence, **limits):
    """A field whose help is `sentence`. limits: ge, le, gt (as in the module operator), choices; and `section`, the
    heading of --help that begins with this field."""
    return field(default=default, metadata={"help": sentence, **limits})


@dataclass
class Config:
    preset: str = flag("open-r1-video", "Published settings that other flags override.", section="what is trained")
    config: str | None = flag(
        None, "Settings from a file, which flags override: the run.json of any run, or YAML such as `group_size: 8`."
    )  # fmt: skip
    model: str = flag("Qwen/Qwen2-VL-7B-Instruct", "Folder or hub name of a Qwen2-VL, 2.5-VL or 3-VL checkpoint.")
    data: tuple = flag(
        ("data/LLaVA-Video-large-swift-origin.jsonl",),
        "Training questions, of any known format: files as FILE or FILE:WEIGHT (how often its rows come in an epoch).",
    )
    video_root: str | None = flag(None, "Folder that video paths are under (default: the data file's folder).")
    eval_data: str | None = flag(None, "Held-out questions (default: --eval_samples rows held out of --data).")
    eval_samples: int = flag(100, "How many questions to evaluate on; 0 turns evaluation off.", ge=0)
    text_only: bool = flag(False, "Allow data files in which no row has a video or image.")
    output: str = flag("runs/qwen2-vl-7b", "Run folder: configuration, metrics, curve, checkpoints.")
    resume: str = flag(
        "auto", "Go on from the run folder's newest checkpoint, even if data or model have changed since (anyway), or "
        "start anew (no).", choices=("auto", "anyway", "no"),
    )  # fmt: skip
    demo: bool = flag(False, "Build the demo's tiny model and videos, in runs/demo (runs/demo-seed-N for other seeds).")
    family: str = flag("qwen2_vl", "Family of the demo's tiny model.", choices=family_names())
    seed: int = flag(42, "Seed of data order and sampling.", ge=0, le=2**32)

    prompts_per_step: int = flag(4, "Prompts of one step, over all processes.", ge=1, section="sampling")
    group_size: int = flag(8, "Completions sampled for each prompt (G).", ge=2)
    max_new_tokens: int = flag(256, "Longest completion, in tokens.", ge=1)
    max_prompt_tokens: int = flag(8192, "Longer prompts are skipped and counted, never cut.", ge=1)
    temperature: float = flag(1.0, "Sampling temperature, also of the log-probabilities.", gt=0.0)
    top_k: int = flag(0, "Sample among the k likeliest tokens; 0 is off.", ge=0)
    top_p: float = flag(1.0, "Sample among the likeliest tokens of this probability; 1 is off.", gt=0.0, le=1.0)

    reward: tuple = flag(("accuracy:1",), "Rewards as name:weight, or file.py:function:weight.", section="rewards")
    reward_timeout: float = flag(30.0, "Seconds that your own reward functions, and a judge, have for a step.", gt=0.0)
    judge_url: str | None = flag(None, "Server, with OpenAI's API, whose model scores free text in place of ROUGE.")
    judge_model: str | None = flag(None, "Name of that model; its key is the environment variable JUDGE_API_KEY.")
    judge_prompt: str | None = flag(None, "File with what it is asked: docs/rewards.md.")
    judge_cache: str | None = flag(None, "Folder that keeps its replies, for any number of processes and runs.")
    judge_concurrency: int = flag(256, "Most requests to it at once, of each process.", ge=1)
    temporal_bonus: float = flag(
        0.0, "Reward of a right answer if shuffled frames do no better (T-GRPO, which has 0.3). Each video then gets "
        "half as many completions more, on shuffled frames; 0 is off.", ge=0.0,
    )  # fmt: skip
    temporal_threshold: float = flag(
        0.8, "The bonus is given if the accuracy is at least this share of the accuracy on shuffled frames.", ge=0.0
    )
    advantage: str = flag(
        "group", "What a reward is compared with: docs/algorithms.md.",
        choices=("group", "none", "rloo", "batch", "reinforce_baseline"),
    )  # fmt: skip
    dynamic_filter: bool = flag(False, "Leave out groups whose completions are all equally accurate (DAPO).")
    dynamic_sampling: int = flag(
        0, "Draw new prompts in place of such groups, at most this many times --prompts_per_step; 0 is off.", ge=0
    )  # fmt: skip
    mask_truncated: bool = flag(False, "Leave completions that --max_new_tokens truncated out of the loss (DAPO).")

    loss: str = flag(
        "ppo", "What is maximised: docs/algorithms.md.", section="loss",
        choices=("ppo", "gspo", "gspo_token", "cispo", "cispo_sequence", "sapo", "sapo_sequence"),
    )  # fmt: skip
    clip_eps_low: float = flag(0.2, "Lower clip of the ratio.", gt=0.0, le=1.0)
    clip_eps_high: float = flag(0.2, "Upper clip of the ratio.", gt=0.0)
    dual_clip: float | None = flag(None, "Bound of the loss of negative advantages, as a ratio (dual clip).", gt=1.0)
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.", ge=0.0)
    kl_coef: float = flag(0.1, "Weight of the KL to the frozen reference; 0 loads no reference.", ge=0.0)
    kl_estimator: str = flag("k3", "How the KL of a token is estimated.", choices=("k1", "k2", "k3"))
    kl_in: str = flag(
        "loss", "Where the KL is: a term of the loss, or taken from the reward.", choices=("loss", "reward")
    )
    kl_correction: bool = flag(False, "Weight the KL of each token by its importance ratio (TRL's default).")
    ref_sync_steps: int = flag(0, "Move the reference towards the policy every so many steps (TR-DPO); 0: never.", ge=0)
    ref_mixup_alpha: float = flag(0.6, "The policy's share of the moved reference.", gt=0.0, le=1.0)
    loss_normaliser: str = flag(
        "token", "What a token's loss is divided by: all tokens, its sequence, or a constant.",
        choices=("token", "sequence", "constant"),
    )  # fmt: skip
    tis_cap: float | None = flag(None, "Cap of truncated importance sampling against the sampler.", gt=0.0)
    tis_mode: str = flag(
        "token_truncate", "Whose ratio is capped, and what happens above the cap.",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )  # fmt: skip
    mini_batch_size: int = flag(0, "Prompts of one optimizer step, over all processes; 0: all of the step's.", ge=0)
    ppo_epochs: int = flag(1, "Passes over the mini-batches of a step (mu).", ge=1)

    epochs: float = flag(1.0, "Passes over the training questions; --steps overrides.", gt=0.0, section="optimiser")
    steps: int | None = flag(None, "GRPO steps.", ge=0)
    learning_rate: float = flag(1e-6, "Peak learning rate of AdamW.", gt=0.0)
    lr_schedule: str = flag("linear", "Decay after warm-up.", choices=("linear", "cosine", "constant"))
    lr_warmup_steps: int = flag(0, "Steps of linear warm-up.", ge=0)
    weight_decay: float = flag(0.0, "Weight decay of AdamW, on all but norms and biases.", ge=0.0)
    adam_beta2: float = flag(0.999, "Second beta of AdamW.", gt=0.0, le=0.9999999)
    grad_clip: float = flag(1.0, "Largest norm of the gradient.", gt=0.0)
    max_bad_updates: int = flag(10, "Stop after so many steps in a row whose gradient was not finite.", ge=1)

    sft_data: str | None = flag(None, "Questions with `completions` for a supervised pass first.", section="warm-up")
    sft_steps: int = flag(0, "Most steps of that pass.", ge=0)
    sft_prompts_per_step: int = flag(32, "Prompts of one supervised step, over all processes.", ge=1)
    sft_until: float = flag(1.0, "Stop it at this mean probability of the predictable target tokens.", gt=0.0, le=1.0)
    sft_learning_rate: float = flag(1e-5, "Peak learning rate of that pass.", gt=0.0)

    fps: float = flag(2.0, "Frames taken for each second of video.", gt=0.0, section="video")
    nframes: int | None = flag(None, "Frames taken of each video, whatever its length (overrides --fps).", ge=2)
    min_frames: int = flag(4, "Fewest frames.", ge=2)
    max_frames: int = flag(16, "Most frames, spread evenly.", ge=2)
    min_pixels: int = flag(128 * 28 * 28, "Fewest pixels of a frame after resizing.", ge=1)
    max_pixels: int = flag(196 * 28 * 28, "Most pixels of a frame after resizing.", ge=1)
    total_pixels: int | None = flag(None, "Bound on frames x pixels / 2 of one video.", ge=1)
    image_min_pixels: int = flag(4 * 28 * 28, "Fewest pixels of an image after resizing.", ge=1)
    image_max_pixels: int = flag(1280 * 28 * 28, "Most pixels of an image after resizing.", ge=1)
    prompt_template: str = flag(
        TEMPLATE, "What is asked; {problem} is replaced by the question, {answer_form} by the form of its answer."
    )
    answer_form: tuple = flag(
        (), 'That form for a type of problem, as TYPE=WORDS: "temporal grounding=two times in seconds".'
    )
    workers: int = flag(2, "Processes that decode videos ahead, for each trainer; 0 decodes in the trainer.", ge=0)
    decode_timeout: float = flag(60.0, "Seconds after which a video counts as unreadable.", gt=0.0)

    skip_list: str | None = flag(None, "List of bad files that python -m video.scan wrote; their rows are left out.")
    frame_cache: str | None = flag(None, "Folder that keeps decoded frames, for any number of processes and runs.")
    frame_cache_gb: float = flag(20.0, "Largest size of that folder, in GB.", gt=0.0)
    feature_cache: str | None = flag(None, "Folder that keeps what a frozen vision tower makes of videos and images.")
    feature_cache_gb: float = flag(20.0, "Largest size of that folder, in GB.", gt=0.0)

    device: str = flag("auto", "Where to run.", choices=("auto", "cuda", "cpu"), section="memory and speed")
    threads: int = flag(0, "CPU threads of each process; 0 leaves torch's choice.", ge=0, le=1024)
    shard_size: int = flag(0, "Processes that share one copy of the weights; 0: those of a node.", ge=0)
    sequence_parallel: int = flag(1, "Processes that share each prompt: its tokens, frames and completions.", ge=1)
    prompts_per_forward: int = flag(1, "Prompts packed into one forward and backward.", ge=1)
    prompts_per_rollout: int = flag(1, "Prompts whose completions are decoded together.", ge=1)
    activation_checkpointing: str = flag(
        "full", "What backward recomputes: all activations, all but products and attention, or nothing. The less it "
        "recomputes, the faster it is, and the more memory it takes: see --plan.",
        choices=("full", "selective", "none"),
    )  # fmt: skip
    compile: bool = flag(False, "Compile the decoder's norms and MLPs (the first steps then take minutes).")
    decode_graph: bool = flag(True, "Decode by CUDA graphs on a GPU, if they prove right and faster at the start.")
    plan: int = flag(0, "Print the memory that a run on so many GPUs takes, and end; 0: train.", ge=0)
    gpu_memory: float = flag(80.0, "GiB of one GPU, for --plan.", gt=0.0)
    lora_rank: int = flag(0, "Train adapters of this rank on the decoder, the weights frozen; 0: all weights.", ge=0)
    lora_alpha: float = flag(32.0, "Adapters are scaled by alpha / rank.", gt=0.0)
    lora_merge: bool = flag(False, "Also save the weights with the adapters merged in, at the end.")
    freeze_vision: bool = flag(False, "Do not train the vision tower; its features are then computed once a step.")

    eval_every: int = flag(0, "Evaluate every so many steps; 0: only before and after.", ge=0, section="output")
    eval_batch: int = flag(4, "Prompts decoded together in evaluation.", ge=1)
    gap_every: int = flag(
        0, "Every so many evaluations, ask also without the video and with shuffled frames, and log how much accuracy "
        "that costs (docs/metrics.md); 0: never.", ge=0,
    )  # fmt: skip
    controls: bool = flag(False, "Close with accuracy on shuffled, reversed and blank videos, and with no video.")
    tracker: str = flag(
        "none", "Also send the metrics to wandb or swanlab, if it is installed: docs/running.md.",
        choices=("none", "wandb", "swanlab"),
    )  # fmt: skip
    show_every: int = flag(50, "Show two prompts' frames and completions in TensorBoard so often; 0: never.", ge=0)
    rollouts_every: int = flag(
        10, "Write the completions of every so many steps, with rewards and advantages, to rollouts.jsonl; 0: never.",
        ge=0,
    )  # fmt: skip
    save_every: int = flag(100, "Save a checkpoint every so many steps; the last is always saved.", ge=1)
    keep_checkpoints: int = flag(2, "How many of the latest checkpoints to keep, beside the best.", ge=1)


# What a step logs beside its rewards, and how its other metrics begin.
METRICS = frozenset(
    "skipped seconds_waiting seconds_sampling seconds learning_rate loss entropy clip_low_frac clip_high_frac "
    "sampler_logprob_diff kl grad_norm updates_skipped reward length truncated_frac reward_std rewards_failed "
    "frac_groups_all_correct frac_groups_all_wrong no_answer_frac several_answers_frac shuffled_accuracy "
    "temporal_bonus prompts_drawn tokens_per_second peak_memory_gib phase step".split()
)
METRICS_OF_KINDS = ("letter_", "accuracy_", "pass@")

# Flags of earlier versions, as run.json files have them.
RENAMED = {
    "clip_low": "clip_eps_low",
    "clip_high": "clip_eps_high",
    "filter_groups": "dynamic_filter",
    "gradient_checkpointing": "activation_checkpointing",
    "importance_cap": "tis_cap",
    "scale_advantages": "advantage",
    "updates_per_batch": "ppo_epochs",
}
# Presets of earlier versions, likewise.
RENAMED_PRESETS = {"qwen2-vl-7b": "open-r1-video"}


def as_setting(value):
    """A value of a JSON or YAML file as Config holds it: lists are tuples."""
    return tuple(value) if isinstance(value, list) else value


with open(Path(__file__).with_name("presets.yaml"), encoding="utf-8") as file:
    PRESETS = {
        preset: {name: as_setting(value) for name, value in values.items()}
        for preset, values in yaml.safe_load(file).items()
    }


def preset_values(preset, seed, family):
    """{flag: value} of a preset. Each seed of the demo has a folder of its own, so that no demo touches the videos of
    another: runs/demo for the default seed, else runs/demo-seed-N. In it each family has its own start model and run:
    start and run for the default family, else start-FAMILY and run-FAMILY."""
    values = checked_settings(PRESETS[preset], f"grpo/presets.yaml, {preset}")
    if preset != "demo":
        return values
    if family != Config.family:
        values = values | {name: f"{values[name]}-{family}" for name in ("model", "output")}
    if seed == Config.seed:
        return values
    move = lambda path: path.replace("runs/demo/", f"runs/demo-seed-{seed}/") if isinstance(path, str) else path
    return {n: tuple(map(move, v)) if isinstance(v, tuple) else move(v) for n, v in values.items()}


def overlay(values, given):
    """The settings `values` with those given in their place. What is given also counts more than an earlier value that
    would hide it: --fps than --nframes, --epochs than --steps, --no-dynamic_filter than --dynamic_sampling."""
    hidden = {
        "nframes": given.keys() & {"fps", "min_frames", "max_frames"},
        "steps": "epochs" in given,
        "dynamic_sampling": given.get("dynamic_filter") is False,
    }
    return {name: value for name, value in values.items() if not hidden.get(name)} | given


OF_A_COMMAND = ("config", "plan", "resume")  # not settings of a run, though its run.json has them
# On if the other is, also in a run.json. (Adapters are the decoder's.)
IMPLIED = {"freeze_vision": "lora_rank", "dynamic_filter": "dynamic_sampling"}
IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}


def read_settings(path):
    """{setting: value} of a --config file: the run.json of a run, or YAML. Raises ConfigError, which names the file and
    the setting."""
    is_json = path.endswith(".json")
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = json.loads(text) if is_json else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; a relative path starts at {Path.cwd()}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: is not {'JSON' if is_json else 'YAML'}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: must hold settings, such as `group_size: 8`")
    if is_json:
        unset = {*OF_A_COMMAND, *(name for name, other in IMPLIED.items() if settings.get(other))}
        settings = {name: value for name, value in renamed(settings).items() if name not in unset}
    else:
        names = [name.value for name, _ in yaml.compose(text).value]
        if twice := [name for name in settings if names.count(name) > 1]:
            raise ConfigError(f"--config {path}: {twice[0]} is given twice; remove one")
    return checked_settings(settings, f"--config {path}")


def checked_settings(settings, source):
    """`settings` as the fields of Config have them. Raises ConfigError, which names the source and the setting."""
    fields = {item.name: item for item in dataclasses.fields(Config)}
    for name in settings:
        if name not in fields:
            close = [flag[2:] for flag in meant(f"--{name}", [f"--{known}" for known in fields], SYNONYMS)]
            hint = f"did you mean {' '.join(close)}?" if close else "see --help"
            raise ConfigError(f"{source}: unknown setting {name} ({hint})")
        if name in OF_A_COMMAND:
            raise ConfigError(f"{source}: {name} is not a setting of a run; give it as --{name}")
    try:
        return {name: typed(fields[name], value) for name, value in settings.items()}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def typed(item, value):
    """A value of a file as the field of Config has it: YAML's text 1e-6 is a number, and one text a list of one. Raises
    ConfigError."""
    kind = type_of(item)
    if value is None and kind is not item.type:  # the field may be None
        return None
    values = value if kind is tuple and isinstance(value, list | tuple) else [value]
    try:
        if not all(isinstance(part, bool if kind is bool else str | int | float) for part in values):
            raise ValueError
        made = tuple(map(str, values)) if kind is tuple else value if kind is bool else kind(str(value))
    except ValueError:
        raise ConfigError(f"{item.name} must be {IN_WORDS[kind]}, and is {value!r:.100}") from None
    if (choices := choices_of(item)) and made not in choices:
        raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, and is {made}")
    return made


def type_of(item):
    """The type of a field of Config, None aside."""
    return next(t for t in (*typing.get_args(item.type), item.type) if t is not type(None))


def choices_of(item):
    """The values that a field of Config can have; None if they are no short list."""
    return tuple(PRESETS) if item.name == "preset" else item.metadata.get("choices")


def renamed(saved):
    """The settings of a run.json of an earlier version, under their names of today."""
    settings = {RENAMED.get(name, name): value for name, value in saved.items()}
    if (preset := str(settings.get("preset"))) in RENAMED_PRESETS:
        settings["preset"] = RENAMED_PRESETS[preset]
    return settings


def demo_makes(seed, family):
    """The paths of the model and the data that --demo makes. What other paths hold is the user's."""
    own = preset_values("demo", seed, family)
    return {own["model"], *own["data"], own["eval_data"], own["sft_data"]}


# What other trainers, and earlier versions, call these flags.
SYNONYMS = {
    **{f"--{old}": [f"--{new}"] for old, new in RENAMED.items()},
    "--lr": ["--learning_rate"],
    "--beta": ["--kl_coef"],
    "--num_generations": ["--group_size"],
    "--max_completion_length": ["--max_new_tokens"],
    "--max_prompt_length": ["--max_prompt_tokens"],
    "--epsilon": ["--clip_eps_low", "--clip_eps_high"],
    "--num_train_epochs": ["--epochs"],
    "--max_steps": ["--steps"],
    "--output_dir": ["--output"],
}


def parse_config(arguments=None):
    """Returns the checked Config of a command line: defaults, then the preset, then --config, then the flags given.

    An unknown flag, a value of the wrong type or none of a flag's choices exits with code 2; a wrong value raises
    ConfigError.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--config", nargs="?")
    asked = first.parse_known_args(arguments)[0]
    own = read_settings(asked.config) if asked.config else {}
    preset = asked.preset if asked.preset in PRESETS else own.get("preset", Config.preset)
    source = f"--preset {preset}" + (f" and --config {asked.config}" if asked.config else "")
    parser = OneLineParser(
        description="Trains Qwen2-VL, Qwen2.5-VL or Qwen3-VL on video questions with GRPO.",
        usage="%(prog)s [--FLAG VALUE ...]", formatter_class=argparse.HelpFormatter, allow_abbrev=False,
        epilog=f"In brackets: the values of {source}.", synonyms=SYNONYMS,
    )  # fmt: skip
    for item in dataclasses.fields(Config):
        if "section" in item.metadata:
            section = parser.add_argument_group(item.metadata["section"])
        add_flag(section, item, {**PRESETS[preset], **own, "preset": preset}.get(item.name, item.default))
    given = {name: as_setting(value) for name, value in vars(parser.parse_args(arguments)).items()}
    values = preset_values(preset, *({**vars(Config()), **own, **given}[name] for name in ("seed", "family")))
    base, values = Config(**values), overlay(values, own)
    config = Config(**overlay(values, {**given, "preset": preset}))
    check(config)
    changed = {name: value for name, value in own.items() if value != getattr(base, name)}
    check_combinations(Config(**values), changed)  # by itself: a flag may override a part of the file
    check_combinations(config, given)
    for name, other in IMPLIED.items():
        setattr(config, name, getattr(config, name) or getattr(config, other) > 0)
    # A flag that trains the tower, or adapters, counts more than what a file has for the other case
    config.feature_cache = config.feature_cache if config.freeze_vision else None
    config.ref_sync_steps = 0 if config.lora_rank else config.ref_sync_steps
    return config


def parse_or_exit(parse=parse_config):
    """Ends this process, as `parse_config` would, if its command line cannot be used."""
    try:
        parse()
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None


def as_typed(value):
    """A setting as a user would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(value) if isinstance(value, tuple) else "not set" if value is None else str(value)


def add_flag(parser, item, default):
    """Adds the flag of a field of Config to a parser or a group of one; its help ends with `default` as it is typed."""
    limits, name = item.metadata, item.name
    value_type = type_of(item)
    text = limits["help"] if default in (None, ()) else f"{limits['help']} [{as_typed(default)}]"
    options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%"), "dest": name}
    if value_type is bool:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **options)
    elif value_type is tuple:
        parser.add_argument(f"--{name}", nargs="+", **options)
    else:
        parser.add_argument(f"--{name}", type=value_type, choices=choices_of(item), **options)


def check(config):
    """Raises ConfigError for the first setting out of its range, naming its flag."""
    for item in dataclasses.fields(config):
        value, limits = getattr(config, item.name), item.metadata
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{item.name} {value}: must be finite")
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most")):
            if name in limits and not getattr(operator, name)(value, limits[name]):
                raise ConfigError(f"--{item.name} {value}: must be {words} {limits[name]}")
    if not config.output:
        raise ConfigError("--output: is empty; name a folder")
    if "{problem}" not in config.prompt_template:
        raise ConfigError("--prompt_template must hold {problem}, where the question goes")
    if config.sft_steps and not config.sft_data:
        raise ConfigError("--sft_steps needs --sft_data, whose rows have `completions`")
    if (size := config.mini_batch_size) > config.prompts_per_step:
        raise ConfigError(f"--mini_batch_size {size}: is above --prompts_per_step {config.prompts_per_step}; lower it")
    for name in ("dynamic_filter", "dynamic_sampling", "temporal_bonus"):
        if getattr(config, name) and not any(spec.split(":")[0] == "accuracy" for spec in config.reward):
            raise ConfigError(f"--{name} looks at the accuracy; add accuracy:1 to --reward")
    try:
        VideoSettings.of(config)
        parse_forms(config.answer_form)
        rewards = parse_rewards(config.reward, Judge.of(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for reward in rewards:
        if reward.user and (reward.name in METRICS or reward.name.startswith(METRICS_OF_KINDS)):
            raise ConfigError(f"--reward {reward.name}: a metric has this name; give your function another")


def check_combinations(config, given):
    """Raises ConfigError, naming both flags, for settings that mean nothing together. given: the user's own flags; a
    default or a value of the preset never contradicts them, as nobody could leave it out."""
    clipped, kl, in_loss = config.loss in ("ppo", "gspo", "gspo_token"), config.kl_coef, config.kl_in == "loss"
    sigmoid = f"--loss {config.loss} has a sigmoid in place of the clip; leave it out"
    rules = [
        ("dual_clip", not clipped, f"bounds the clip of ppo, gspo and gspo_token; --loss {config.loss} has none"),
        ("clip_eps_low", config.loss.startswith("sapo"), sigmoid),
        ("clip_eps_high", config.loss.startswith("sapo"), sigmoid),
        ("dynamic_sampling", given.get("dynamic_filter") is False, "replaces what --no-dynamic_filter keeps; drop one"),
        *((name, not kl, "there is no KL with --kl_coef 0; set --kl_coef or leave it out")
          for name in ("kl_estimator", "kl_in", "kl_correction", "ref_sync_steps")),
        ("kl_in", not in_loss and config.kl_estimator != "k1",
         f"--kl_estimator {config.kl_estimator} hardly pulls as a reward; set --kl_estimator k1"),
        ("kl_correction", not in_loss, "is about the gradient of the KL; --kl_in reward has none; leave it out"),
        ("kl_estimator", kl and in_loss and config.kl_estimator == "k1" and not config.kl_correction,
         "its mean gradient with --kl_in loss is 0; set k2, k3 or --kl_correction"),
        ("kl_in", kl and in_loss and config.kl_estimator == "k1" and not config.kl_correction,
         "the mean gradient of --kl_estimator k1 is then 0; set k2, k3 or --kl_correction"),
        ("kl_estimator", kl and not in_loss and config.kl_estimator != "k1",
         "hardly pulls with --kl_in reward; set k1, or --kl_in loss"),
        ("lora_rank", given.get("freeze_vision") is False, "trains the decoder alone; leave out --no-freeze_vision"),
        ("ref_sync_steps", config.lora_rank > 0, "with --lora_rank the reference is the model without adapters"),
        ("ref_mixup_alpha", not config.ref_sync_steps, "does nothing without --ref_sync_steps"),
        ("tis_mode", config.tis_cap is None, "weighs nothing without --tis_cap"),
        ("feature_cache", not (config.freeze_vision or config.lora_rank),
         "the vision tower is trained, so that its features change; add --freeze_vision or leave it out"),
        ("gap_every", not config.eval_samples, "asks held-out questions; --eval_samples 0 holds none out"),
        *((f"judge_{name}", not config.judge_url, "does nothing without --judge_url")
          for name in ("model", "prompt", "cache", "concurrency")),
        *((f"{name}_gb", not getattr(config, name), f"does nothing without --{name}")
          for name in ("frame_cache", "feature_cache")),
        ("lora_alpha", not config.lora_rank, "does nothing without --lora_rank"),
        ("temporal_threshold", not config.temporal_bonus, "does nothing without --temporal_bonus"),
        ("family", not config.demo or config.model not in demo_makes(config.seed, config.family),
         "is of the model that --demo makes; any other --model has its family in config.json; leave it out"),
        ("answer_form", "{answer_form}" not in config.prompt_template, "does nothing without {answer_form} in "
         "--prompt_template"),
    ]  # fmt: skip
    for name, wrong, reason in rules:
        if wrong and given.get(name):
            raise ConfigError(f"--{name} {as_typed(given[name])}: {reason}")


def save_config(config, path):
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path):
    """The Config that `save_config` wrote. Raises ConfigError if the file is not one."""
    try:
        saved = json.loads(Path(path).read_text())
        return Config(**{name: as_setting(value) for name, value in renamed(saved).items()})
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a configuration of this project ({error})") from error
