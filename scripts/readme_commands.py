"""Print the shell commands of a Markdown file that are marked to be run by CI.

A fenced `sh` block directly under the line `<!-- ci:run -->` is marked.

    python scripts/readme_commands.py README.md > commands.sh
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MARK = "<!-- ci:run -->"
_BLOCK = re.compile(rf"^{re.escape(MARK)}\n```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(markdown: str) -> str:
    """The marked blocks, one after the other.

    Raises:
        ValueError: no block is marked, or a mark has no block under it; either way commands
            would go unchecked and nobody would notice.
    """
    blocks = _BLOCK.findall(markdown)
    if not blocks:
        raise ValueError(f"no block is marked with {MARK}")
    marks = markdown.count(MARK)
    if len(blocks) != marks:
        raise ValueError(f"{marks} marks {MARK} but {len(blocks)} sh blocks directly under one")
    return "".join(blocks)


if __name__ == "__main__":
    print(commands(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
