"""Qwen3-VL, dense: 2B, 4B, 8B, 32B.

Beside Qwen2.5-VL: patches of 16 x 16; DeepStack, features of several depths of the tower, of which each of the first
decoder layers adds one at the placeholders; norms on queries and keys; the three axes of a position interleaved within
a head (transformers does both). And a video is a run of placeholders for each time step, with its time as text.
"""

import re

import torch
import transformers

from grpo.families.base import Family, is_positive

START, VIDEO, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
WHOLE_VIDEO = re.compile(f"{re.escape(START + VIDEO + END)}|{re.escape(VIDEO)}")


class Qwen3VL(Family):
    classes = "Qwen3VL"
    no_mask = None
    mrope_section = [24, 20, 20]
    step_tokens = 10  # `<` three digits `.` digit ` seconds` `>`, start and end: up to 1,000 s
    tiny_text = {
        "head_dim": 16, "num_hidden_layers": 3,  # DeepStack adds to two; after the last it would not be read
        "rope_parameters": {
            "rope_type": "default", "mrope_interleaved": True, "rope_theta": 100.0, "mrope_section": [4, 2, 2],
        },
    }  # fmt: skip
    tiny_vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 16, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    tiny_corpus = " <0.2 seconds>"

    def mark_videos(self, text, times):
        """A placeholder between start and end marks for each pair of frames, after the mean of their times.

            in:  <|vision_start|><|video_pad|><|vision_end|>, of frames at 0, 0.5, 1 and 1.5 s
            out: <0.2 seconds><|vision_start|><|video_pad|><|vision_end|>
                 <1.2 seconds><|vision_start|><|video_pad|><|vision_end|>, as one line

        So do transformers 4.57 and vLLM. transformers 5 replaces the placeholder alone: it leaves the chat template's
        marks around the whole, a pair that the weights have never seen.
        """
        each = iter(times)

        def steps(_):
            seconds = next(each)
            pairs = zip(seconds[::2], seconds[1::2], strict=True)
            return "".join(f"<{(first + second) / 2:.1f} seconds>{START}{VIDEO}{END}" for first, second in pairs)

        return WHOLE_VIDEO.sub(steps, text)

    def span_grids(self, grid):
        return [(1, *grid[1:])] * grid[0]

    def vision_features(self, model, pixels, grids):
        """The features of DeepStack stand beside the tower's own, on the last axis: all of a token in one row."""
        out = model.model.visual(pixels.to(model.model.visual.dtype), grid_thw=grids, return_dict=True)
        return torch.cat((out.pooler_output, *out.deepstack_features), dim=-1)

    def feature_width(self, config):
        return config.text_config.hidden_size * (1 + len(config.vision_config.deepstack_visual_indexes))

    def decoder_inputs(self, embeds, placeholders, features):
        features, *deep = features.to(embeds.dtype).split(embeds.shape[-1], dim=-1)
        embeds, _ = super().decoder_inputs(embeds, placeholders, features)
        here = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        here[0, placeholders] = True
        return embeds, {"visual_pos_masks": here, "deepstack_visual_embeds": deep}

    def layer_rest(self, text):
        heads = text.num_attention_heads + text.num_key_value_heads
        return super().layer_rest(text) + 3 * heads * self.head_size(text)  # norms of queries and keys

    def tower_rest(self, vision):
        wide, tall = self.tower_sizes(vision)
        return 3 * wide + tall

    def head_rules(self, text):
        yield "text_config.head_dim", "an even number above 0", lambda size: is_positive(size) and size % 2 == 0

    def rules(self, config):
        yield from super().rules(config)
        text, vision = config.text_config, config.vision_config
        most, blocks = text.num_hidden_layers - 1, range(vision.depth)  # one after the last layer would not be read

        def are_blocks(indexes):
            return len(indexes) <= most and len(set(indexes)) == len(indexes) and all(n in blocks for n in indexes)

        indexes = "vision_config.deepstack_visual_indexes"
        yield indexes, f"at most {most} different blocks, from 0 to {blocks[-1]}", are_blocks
        square = lambda count: is_positive(count) and int(count**0.5) ** 2 == count
        yield "vision_config.num_position_embeddings", "the square of a whole number", square

    def tiny_processor(self, tokenizer, chat_template):
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # as the published processors say
        images = transformers.Qwen2VLImageProcessor(patch_size=16, **half)
        return transformers.Qwen3VLProcessor(images, tokenizer, transformers.Qwen3VLVideoProcessor(), chat_template)


FAMILY = Qwen3VL()
