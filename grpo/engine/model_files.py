"""The files of a model beside its weights: finds the folder, and reads and checks config.json, processor and EOS ids.

transformers checks few of the values that it reads. So a value that cannot work is found here, and ends in one line
that names the file, the field and the fix, before any weight is read.
"""

import hashlib
import json
from contextlib import contextmanager
from functools import reduce
from operator import attrgetter
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from grpo.errors import ModelError
from grpo.families import family_names, load_family
from video.prompt import load_processor

# What is downloaded of a hub name: enough for `read_config`, for `read_processor`, and for `load_weights`.
CONFIGS = ("*config.json",)
TEXTS = ("*.json", "*.jinja", "*.txt")
EVERYTHING = (*TEXTS, "*.safetensors")
TAIL = 2**20  # bytes read at each end of a file of weights


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
        raise ModelError(f"{flag} {path}: has no config.json; give a model's folder, such as RUN/checkpoint-200")
    return folder


def model_identity(folder: Path) -> str:
    """The folder's name and a digest of its weights, e.g. "checkpoint-400@0f3c5a9d2b41".

    The digest is of the config, and of the size and both ends (TAIL bytes) of each file of weights: 15 GB need not be
    read.
    """
    total, folder = hashlib.sha256(), Path(folder)
    weights = {*folder.glob("*.safetensors")} - {folder / "optimizer.safetensors"}
    for path in sorted(weights | {folder / "config.json"}):
        size = path.stat().st_size
        total.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            total.update(file.read(TAIL))
            file.seek(max(0, size - TAIL))
            total.update(file.read())
    return f"{folder.name}@{total.hexdigest()[:12]}"


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
        name = json.loads((folder / "config.json").read_bytes())["model_type"]
        if name not in family_names():
            raise ModelError(f"{flag} {path}: family {name!r}; supported are {', '.join(family_names())}")
        family = load_family(name)
        config = family.model_class.config_class.from_pretrained(folder)
        for fields, must, is_right in family.rules(config):
            for field in fields.split():
                value = reduce(lambda part, name: getattr(part, name, None), field.split("."), config)
                if not is_right(value):
                    shown = repr(value)[:100]
                    raise ModelError(f"{flag} {path}: {field} must be {must}, and is {shown} in its config.json")
    return config


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
