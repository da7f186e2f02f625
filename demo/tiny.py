"""Builds a tiny checkpoint folder of any family from a config and random weights: for the demo and the tests.

The folder has the same files as a real checkpoint (config, safetensors, tokenizer, processor, chat template). So the
code that loads real weights with `from_pretrained` loads it as well.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo.engine.model import save_model
from grpo.families import load_family

END, PAD = "<|im_end|>", "<|endoftext|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VOCABULARY = 448

# The part of Qwen2-VL's template that this project uses: content is text, or a list of video, image and text items.
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

# Small enough to train on one CPU core. At this size the usual initializer_range of 0.02 does not train.
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
}  # fmt: skip
VISION = {"num_heads": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "initializer_range": 0.15}
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip


def build_tokenizer(corpus: str = CORPUS) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with Qwen2-VL's special tokens; each of the four tags is one visible token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(VISION_TOKENS) - len(TAGS) - 3,  # 3: END, PAD and <|im_start|>
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([corpus] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION_TOKENS]})
    tokenizer.add_tokens(list(TAGS))
    return tokenizer


def build_tiny_model(
    folder: str | Path,
    family: str = "qwen2_vl",
    seed: int = 0,
    corpus: str = CORPUS,
    text: dict | None = None,
    vision: dict | None = None,
    tie: bool = False,
) -> Path:
    """Writes a checkpoint of random weights to `folder` and returns the folder.

    corpus: what the tokenizer is trained on. text, vision: overrides of the configs' fields. tie: lm_head shares the
    embedding's weight. `vision` may also have patch_std, the standard deviation of the patch projection's weights:
    raw pixels have a larger norm than hidden states, so the projection may need smaller weights than the rest.
    """
    family, vision = load_family(family), dict(vision or {})
    tokenizer = build_tokenizer(corpus + family.tiny_corpus)
    patch_std = vision.pop("patch_std", None)
    text = TEXT | family.tiny_text | {"vocab_size": len(tokenizer), "tie_word_embeddings": tie} | (text or {})
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = family.model_class.config_class(
        text_config=text,
        vision_config=VISION | family.tiny_sizes(text["hidden_size"]) | vision,
        tie_word_embeddings=tie,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKEN_IDS.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model_class(config)
        if patch_std is not None:
            torch.nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=patch_std)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    save_model(model, family.tiny_processor(tokenizer, CHAT_TEMPLATE), folder)
    return Path(folder)
