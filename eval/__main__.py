"""`python -m deltanet.eval`."""

import sys

try:
    import lm_eval  # noqa: F401
except ImportError:
    sys.exit("deltanet.eval needs lm-eval: pip install 'deltanet[eval]'")

from .cli import main
from .errors import EvaluationError

if __name__ == "__main__":
    try:
        main()
    except EvaluationError as error:
        sys.exit(f"error: {error}")
