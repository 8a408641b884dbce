"""A corpus of English prose and documentation, rebuilt from the packages of two public registries."""
