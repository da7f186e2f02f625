"""Builds a tiny Qwen2-VL or Qwen2.5-VL checkpoint folder from a config and random weights: for the demo and the tests.

The folder has the same files as a real checkpoint (config, safetensors, tokenizer, processor, chat template), so that
everything downstream loads it with `from_pretrained`, as it would the real weights.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from grpo.engine.model import FAMILIES, save_model

END, PAD = "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Qwen2-VL's template in the form that this project uses it: content is text or a list of video, image and text items.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHAT_WORDS = "system\nYou are a helpful assistant. user\n assistant\n"
CORPUS = CHAT_WORDS + (
    "Which direction does the shape move? What colour is the shape? "
    "What shape is it? Options: A. left B. right C. up D. down red green blue yellow square circle triangle cross "
    "I see left . I see red . Answer with the letter of the option. Think first."
)


def build_tokenizer(corpus=CORPUS, vocabulary=448):
    """Returns a byte-level BPE tokenizer with Qwen2-VL's special tokens; the four tags are single, visible tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [corpus] * 3,
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(VISION) - len(TAGS) - 3,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION]})
    tokenizer.add_tokens(list(TAGS))
    return tokenizer


def build_tiny_model(
    folder, family="qwen2_vl", seed=0, corpus=CORPUS, text=None, vision=None, tie=False, patch_std=None
):
    """Writes a checkpoint of random weights to `folder` and returns the folder.

    text, vision: overrides of the configs' fields. patch_std: standard deviation of the patch projection, where it is
    to differ from the rest: its inputs are raw pixels, of larger norm than hidden states.
    """
    tokenizer = build_tokenizer(corpus)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    text_config = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "use_sliding_window": False, "tie_word_embeddings": tie,
    } | (text or {})  # fmt: skip
    vision_config = {"depth": 1, "num_heads": 4, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
                     "initializer_range": 0.15}  # fmt: skip
    if family == "qwen2_vl":
        vision_config |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": text_config["hidden_size"]}
    else:
        vision_config |= {"hidden_size": 32, "intermediate_size": 64, "depth": 2,
                          "out_hidden_size": text_config["hidden_size"], "fullatt_block_indexes": [1],
                          "window_size": 56, "tokens_per_second": 2}  # fmt: skip
    config = FAMILIES[family].config_class(
        text_config=text_config, vision_config=vision_config | (vision or {}), tie_word_embeddings=tie,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family](config)
        if patch_std is not None:
            torch.nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=patch_std)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    processor = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[family](
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    save_model(model, processor, folder)
    return Path(folder)
