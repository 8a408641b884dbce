"""
Renders `eval/RESULTS.md`: the prose is the page's own, what stands between two markers comes from the JSON files.

    python -m deltanet.eval.claims.results [--check]

A block begins with `<!-- NAME -->` and ends with `<!-- end of NAME -->`; the names are those of `SECTIONS`. Plots are drawn
anew beside the JSON; `--check` writes nothing and only says whether the page is up to date.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import language_page, language_plots, recall, speed_page, state_tracking
from .markdown import PAGE, image, not_run
from .synthetic import Results

RESULTS = PAGE.parent / "results"
BENCHMARKS = PAGE.parents[1] / "benchmarks" / "results"


def synthetic(claim: str, make: Callable[[Results], str]) -> Callable[[Path], str]:
    """`make` of the results of `deltanet.eval.claims.CLAIM`, and its plot."""

    def section(folder: Path) -> str:
        path = folder / f"synthetic_{claim}.json"
        results = Results.read(path)
        if not results.runs:
            return not_run(f"python -m deltanet.eval.claims.{claim}")
        return f"{make(results).strip()}\n\n{image(path.with_suffix('.png'), claim.replace('_', ' '))}"

    return section


SECTIONS: dict[str, tuple[Callable[[Path], str], Path]] = {
    "synthetic recall": (synthetic("recall", recall.section), RESULTS),
    "state tracking": (synthetic("state_tracking", state_tracking.section), RESULTS),
    "language settings": (language_page.settings, RESULTS),
    "language modelling": (language_page.modelling, RESULTS),
    "recall": (language_page.recall, RESULTS),
    "length": (language_page.length, RESULTS),
    "generation": (language_page.generation, RESULTS),
    "chunked over recurrent": (speed_page.chunked_over_recurrent, BENCHMARKS),
    "training throughput": (speed_page.training_throughput, BENCHMARKS),
    "reading": (speed_page.reading, BENCHMARKS),
    "context": (speed_page.context, BENCHMARKS),
}
"""By the name of the markers: what makes the Markdown, and the folder of the results that it reads."""

_BLOCK = re.compile(r"<!-- (?P<name>[a-z0-9 ]+) -->\n(?:.*?\n)??<!-- end of (?P=name) -->", re.DOTALL)


def render(text: str) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: the blocks of the page are not those of `SECTIONS`, each once.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(SECTIONS):
        raise ValueError(f"The page has the blocks {names}; allowed: {list(SECTIONS)}, each once.")

    def block(match: re.Match) -> str:
        make, folder = SECTIONS[match["name"]]
        return f"<!-- {match['name']} -->\n{make(folder).strip()}\n<!-- end of {match['name']} -->"

    return _BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m deltanet.eval.claims.results", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        language_plots.draw(RESULTS)
    text = PAGE.read_text(encoding="utf-8")
    new = render(text)
    if new != text and arguments.check:
        print(f"{PAGE} is not up to date: python -m deltanet.eval.claims.results", file=sys.stderr)
        return 1
    if new != text:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
