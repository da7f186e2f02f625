"""Everything between a data file and the tensors of a prompt: rows, frames, prompts and worker processes.

Nothing here imports the training loop or torch.distributed. Shape letters: P prompt tokens, T frames.
"""
