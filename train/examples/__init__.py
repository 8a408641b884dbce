"""Short programs to copy from: python -m deltanet.train.examples.NAME."""
