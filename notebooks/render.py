"""Run the notebooks and keep the figures that their cells name: `python notebooks/render.py [NAME ...]`.

A cell with `"figure": "comparison"` in its metadata leaves `docs/comparison.png`.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.notebooks.executing import NOTEBOOKS, execute, figures  # noqa: E402


def main() -> None:
    for path in NOTEBOOKS:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                for name, picture in figures(execute(path, folder)).items():
                    target = ROOT / "docs" / f"{name}.png"
                    target.write_bytes(picture)
                    print(target)


if __name__ == "__main__":
    main()
