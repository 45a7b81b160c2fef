"""README.md is nbs/index.ipynb without its code; links that leave nbs/ are made relative to the project."""
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme() -> str:
    "The text of README.md."
    exporter = MarkdownExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    text, _ = exporter.from_notebook_node(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    lines = [line.rstrip() for line in text.replace("](../", "](").strip().splitlines()]
    kept = [line for i, line in enumerate(lines) if line or i == 0 or lines[i - 1]]
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    sys.stdout.write(readme())
