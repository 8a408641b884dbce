"""Keeps the libraries' hints out of a newcomer's terminal."""

import logging
import warnings

from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Show errors only, of Transformers and of whatever logs or warns."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
