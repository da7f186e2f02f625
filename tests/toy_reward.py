def vowels(completion, sample):
    """The share of vowels: a reward that tells even random completions apart."""
    return sum(letter in "aeiou" for letter in completion) / (1 + len(completion))
