"""Training: the shipped text, tokenizers, datasets and the runs that use them."""
