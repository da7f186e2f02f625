"""GRPO for video question answering: the loop's parts, one idea a file."""
