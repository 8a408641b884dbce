"""
Trains a model by a recipe: a YAML file, or the name of a shipped one (340m-15b, 1.3b-100b, tiny, ...).

    python -m deltanet.train RECIPE [--FIELD VALUE ...]

Flags override the file; `--model.FIELD` sets a field of the model. The run's resolved recipe, its checkpoints and the
finished model appear in `output`; an interrupted run goes on from its last checkpoint when the same command is given
again, with the losses of an uninterrupted one. Several GPUs:

    accelerate launch --config_file CONFIGURATION --num_processes N -m deltanet.train RECIPE [--FIELD VALUE ...]

The batch and the order of the data do not depend on N, and a run may go on with another N.
"""

import argparse
import dataclasses
import sys
import textwrap
from pathlib import Path

from accelerate import PartialState

from .monitor import NotFinite
from .quiet import quiet
from .recipe import Recipe, load_recipe
from .run import train

CONFIGURATIONS = Path(__file__).parent / "accelerate"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deltanet.train",
        description=__doc__,
        epilog="\n".join(
            [
                textwrap.fill("FIELD: " + ", ".join(spec.name for spec in dataclasses.fields(Recipe)), 100),
                f"CONFIGURATION: ddp.yaml or fsdp2.yaml in {CONFIGURATIONS}",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE")
    arguments, rest = parser.parse_known_args()
    quiet()
    try:
        model = train(load_recipe(arguments.recipe, _flags(rest)))
    except NotFinite as error:
        print(error, file=sys.stderr)
        return 3
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    PartialState().print(f"The model is in {model}. Next: python -m deltanet.train.report {model}")
    return 0


def _flags(arguments: list[str]) -> dict[str, str]:
    """Pairs of `--field value` or `--field=value`."""
    flags, words = {}, iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else next(words, None)
        if not word.startswith("--") or value is None:
            raise ValueError(f"`{word}` is no flag with a value; allowed: --FIELD VALUE.")
        flags[name.replace("-", "_")] = value
    return flags


if __name__ == "__main__":
    sys.exit(main())
