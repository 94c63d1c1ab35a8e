"""Print the shell commands of a Markdown file that are marked to be run by CI.

A fenced `sh` block directly after the line `<!-- ci:run -->` is marked.

    python scripts/readme_commands.py README.md | bash -euo pipefail
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_BLOCK = re.compile(r"<!-- ci:run -->\n```sh\n(.*?)```", re.DOTALL)


def commands(markdown: str) -> str:
    """The marked blocks, one after the other.

    Raises:
        ValueError: none is marked; a README without commands would pass unnoticed.
    """
    blocks = _BLOCK.findall(markdown)
    if not blocks:
        raise ValueError("no block is marked with <!-- ci:run -->")
    return "".join(blocks)


if __name__ == "__main__":
    print(commands(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
