"""The error of a request that cannot be evaluated."""


class EvaluationError(ValueError):
    """A task, data set, tokenizer or size that cannot work; the message says which and what would."""
