"""Put what `make demo` shows into the README: the table of its report, and a plot.

make readme
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "output" / "report"
PLOT = "detail1_before_after.png"
BLOCK = re.compile(r"(<!-- the report's table: make readme -->\n```\n).*?(```\n)", re.DOTALL)


def main() -> None:
    """Replace the table between its marks, and the picture."""
    readme = ROOT / "README.md"
    table = (REPORT / "main_table.txt").read_text(encoding="utf-8").strip()
    text, count = BLOCK.subn(lambda found: found[1] + table + "\n" + found[2], readme.read_text(encoding="utf-8"))
    if count != 1:
        sys.exit("README.md: expected one block behind '<!-- the report's table: make readme -->'")
    readme.write_text(text, encoding="utf-8")
    shutil.copyfile(REPORT / "figures" / PLOT, ROOT / "docs" / "demo_before_after.png")


if __name__ == "__main__":
    main()
