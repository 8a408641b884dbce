"""Keeps the libraries' hints out of a newcomer's terminal."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Show errors only, of Transformers and of whatever logs or warns."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


@contextlib.contextmanager
def quiet_children() -> Iterator[None]:
    """What this process prints to `sys.stderr` still appears, what its child processes print there does not."""
    sys.stderr.flush()
    terminal, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        with open(terminal, "w", closefd=False, errors="replace") as own, contextlib.redirect_stderr(own):
            os.dup2(nothing, 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nothing)
