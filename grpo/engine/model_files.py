"""The files of a model beside its weights: finds the folder, and reads and checks config.json, processor and EOS ids.

transformers checks few of the values that it reads. So a value that cannot work is found here, and ends in one line
that names the file, the field and the fix, before any weight is read.
"""

import json
from contextlib import contextmanager
from functools import reduce
from operator import attrgetter
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo.errors import ModelError
from video.prompt import load_processor

FAMILIES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}

# What is downloaded of a hub name: enough for `read_config`, for `read_processor`, and for `load_weights`.
CONFIGS = ("*config.json",)
TEXTS = ("*.json", "*.jinja", "*.txt")
EVERYTHING = (*TEXTS, "*.safetensors")

SIZES = (
    "text_config.hidden_size text_config.intermediate_size text_config.vocab_size text_config.num_attention_heads "
    "text_config.num_key_value_heads text_config.rms_norm_eps vision_config.num_heads vision_config.in_channels "
    "vision_config.patch_size vision_config.spatial_merge_size vision_config.temporal_patch_size"
)
TOKENS = "image_token_id video_token_id vision_start_token_id vision_end_token_id"


def find_model(path: str | Path, flag: str = "--model", files: tuple[str, ...] = EVERYTHING) -> Path:
    """The folder of a model: `path` itself, or the download of a hub name, of which only `files` are fetched.

    Raises ModelError, which names `flag`, if there is no such model or the folder holds none.
    """
    folder, parent = Path(path), Path(path).parent
    if not folder.exists() and (parent.is_dir() or str(path).count("/") > 1):  # no hub name, which is OWNER/NAME
        there = ", ".join(sorted(file.parent.name for file in parent.glob("*/config.json"))) or "no model"
        raise ModelError(f"{flag} {path}: no such folder; {parent} has {there}")
    if not folder.exists():
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=files))
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{flag} {path}: no such folder, and the hub does not give it ({reason}); give a folder with "
                "config.json and safetensors, or try `python train.py --preset demo`"
            ) from error
    for file in folder.glob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):  # opening a named pipe would wait for ever
            raise ModelError(f"{flag} {path}: {file.name} is not a regular file")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{flag} {path}: holds adapters alone; give RUN/merged, which --lora_merge writes")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{flag} {path}: has no config.json; give a model's folder, such as RUN/checkpoint-400")
    return folder


@contextmanager
def reading(flag: str, folder: str | Path, name: str, fix: str = "compare it with the original model's"):
    """Turns any exception of its block into one ModelError: "FLAG FOLDER: its NAME cannot be used (reason); FIX".

    A damaged file ends in a KeyError, a ZeroDivisionError or any other error of transformers. The reason is the first
    .json file of the folder that does not parse, if there is one.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for file in sorted(Path(folder).glob("*.json"), reverse=True):
            try:
                json.loads(file.read_bytes())
            except (OSError, ValueError):
                reason = f"{file.name} is not JSON"
        raise ModelError(f"{flag} {folder}: its {name} cannot be used ({reason[:300]}); {fix}") from error


def read_config(path: str | Path, flag: str = "--model") -> PreTrainedConfig:
    """The transformers config of a model; needs only its config.json.

    Raises ModelError for a model that cannot be built from it, or that is not supported.
    """
    folder = find_model(path, flag, CONFIGS)
    with reading(flag, folder, "config.json"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ModelError(f"{flag} {path}: family {config.model_type!r}; supported are {', '.join(FAMILIES)}")
        for fields, must, is_right in _rules(config):
            for field in fields.split():
                value = reduce(lambda part, name: getattr(part, name, None), field.split("."), config)
                if not is_right(value):
                    shown = repr(value)[:100]
                    raise ModelError(f"{flag} {path}: {field} must be {must}, and is {shown} in its config.json")
    return config


def _rules(config):
    """Yields (fields of config.json, what each must be, whether a value is). A rule may rely on those before it."""
    positive = lambda value: type(value) in (int, float) and value > 0
    yield SIZES, "a number above 0", positive
    # More layers are a slip, and would be built for hours.
    yield "text_config.num_hidden_layers vision_config.depth", "from 1 to 1000", lambda n: 1 <= n <= 1000
    text, vision = config.text_config, config.vision_config
    size, heads, width = text.hidden_size, text.num_attention_heads, getattr(vision, "embed_dim", vision.hidden_size)
    yield "text_config.num_attention_heads", "a divisor of hidden_size / 2", lambda n: size % (2 * n) == 0
    yield "text_config.num_key_value_heads", "a divisor of num_attention_heads", lambda n: heads % n == 0
    yield "vision_config.num_heads", f"a divisor of {width} / 4", lambda n: width % (4 * n) == 0
    acts = "text_config.hidden_act vision_config.hidden_act"
    yield acts, "an activation that transformers has", lambda name: name in ACT2FN
    rope, types, half = "text_config.rope_parameters", ("default", *ROPE_INIT_FUNCTIONS), size // heads // 2

    def has_sections(value):
        sections = value.get("mrope_section", [16, 24, 24])  # the models' default
        whole = isinstance(sections, list) and all(type(n) is int and n >= 0 for n in sections)
        return whole and len(sections) == 3 and sum(sections) == half

    yield rope, "of a type that transformers has", lambda value: value.get("rope_type") in types
    yield rope, "of a rope_theta above 0", lambda value: positive(value.get("rope_theta"))
    yield rope, f"of three mrope_section that add up to {half}", has_sections
    yield TOKENS, f"from 0 to {text.vocab_size - 1}", lambda token: 0 <= token < text.vocab_size
    # What follows could be built, but not trained: with dropout, say, the scorer would disagree with the sampler.
    yield "text_config.attention_dropout", "0", lambda share: share == 0
    yield "text_config.use_sliding_window", "false", lambda _: "sliding_attention" not in text.layer_types
    quantised = "quantization_config text_config.quantization_config"
    yield quantised, "absent (take the model in bf16, not a quantised one)", lambda value: value is None


def read_processor(path: str | Path, flag: str = "--model") -> ProcessorMixin:
    """The processor of a model, whose ids and patches are those of its config.json. Raises ModelError."""
    config, folder = read_config(path, flag), find_model(path, flag, TEXTS)
    with reading(flag, folder, "processor", "copy tokenizer and processor files from the original model"):
        processor = load_processor(folder)
        ids, cut = processor.tokenizer.get_vocab(), processor.video_processor
        for field, value in (
            ("image_token_id", ids.get(processor.image_token)),
            ("video_token_id", ids.get(processor.video_token)),
            ("vision_config.patch_size", cut.patch_size),
            ("vision_config.temporal_patch_size", cut.temporal_patch_size),
            ("vision_config.spatial_merge_size", cut.merge_size),
        ):
            if attrgetter(field)(config) != value:
                raise ValueError(f"{field} is {attrgetter(field)(config)} in config.json, and {value} in the processor")
        most = config.text_config.vocab_size - 1
        if max(ids.values()) > most:
            raise ValueError(f"it has a token {max(ids.values())}, config.json's vocab_size allows {most}")
    return processor


def read_generation_config(path: str | Path, config: PreTrainedConfig) -> GenerationConfig:
    """generation_config.json; without it, what config.json says. Raises ModelError for an EOS id that is no token."""
    folder = find_model(path, files=TEXTS)
    with reading("--model", folder, "generation_config.json"):
        stored = (folder / "generation_config.json").exists()
        generation = GenerationConfig.from_pretrained(folder) if stored else GenerationConfig.from_model_config(config)
        for token in eos_ids(generation):
            if type(token) is not int or not 0 <= token < config.text_config.vocab_size:
                raise ValueError(f"eos_token_id {token!r} is no token id")
    return generation


def eos_ids(generation: GenerationConfig) -> list[int]:
    """The EOS ids of a generation_config, in which they are null, a number or a list."""
    listed = generation.eos_token_id
    return [] if listed is None else listed if isinstance(listed, list) else [listed]
