"""Makes the pictures of the terminal and of the reports in the README: `python docs/pictures.py`; it takes Chromium.

terminal.png         `python -m lit_rlhf.train algo=dapo` on a terminal of 112 columns
report_healthy.png   the beginning of that run's report.html
report_whole.png     all of it
report_sick.png      the report of `algo=grpo` with a hundred times its learning rate
report_dark.png      the same, dark and 500 pixels wide
"""

from __future__ import annotations

import argparse
import html
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

HERE = Path(__file__).resolve().parent
TRAIN = "python -m lit_rlhf.train algo="
HEALTHY = f"{TRAIN}dapo"
SICK = f"{TRAIN}grpo algo.lr=2e-2 trainer.max_epochs=60"
REPORTS = {  # picture -> run, width and height in pixels, dark
    "report_healthy": ("healthy", 1280, 1400, False),
    "report_whole": ("healthy", 1280, 3310, False),
    "report_sick": ("sick", 1280, 1400, False),
    "report_dark": ("sick", 500, 1600, True),
}
COLUMNS, ROWS = 112, 40
PAGE = """<meta charset="utf-8"><body style="margin:0;background:#1e1e24;color:#e4e4e8;padding:14px 18px;
font:15px/1.45 'DejaVu Sans Mono',monospace;white-space:pre">{}</body>"""


def on_terminal(command: str, folder: Path) -> str:
    """What a terminal shows when the command has ended."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    arguments = [sys.executable, *command.split()[1:]]
    process = subprocess.Popen(arguments, stdin=slave, stdout=slave, stderr=slave, cwd=folder)
    os.close(slave)
    received = b""
    while chunk := _read(master):
        received += chunk
    if process.wait():
        raise SystemExit(received.decode())
    lines = received.decode().replace("\r\n", "\n").split("\n")
    return f"$ {command}\n" + "\n".join(line.rsplit("\r", 1)[-1].rstrip() for line in lines)  # \r begins a line anew


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""


def photograph(page: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The beginning of a page as Chromium shows it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += ["--blink-settings=preferredColorScheme=0", "--force-dark-mode"] if dark else []
        size = [f"--window-size={width},{height}", f"--screenshot={picture}"]
        subprocess.run([chromium, *flags, *size, page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    """Two runs, three pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs go and, if they are there, are found")
    folder = (parser.parse_args().folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in (("healthy", HEALTHY), ("sick", SICK)):
        run, said = folder / name, folder / f"{name}.txt"
        if not said.is_file():
            run.mkdir(exist_ok=True)
            said.write_text(on_terminal(command, run))
    for picture, (name, *look) in REPORTS.items():
        photograph(next((folder / name).rglob("report.html")), HERE / f"{picture}.png", *look)
    text = (folder / "healthy.txt").read_text().replace(f"{folder}/healthy/", "")
    page = folder / "terminal.html"
    page.write_text(PAGE.format(html.escape(text.strip())))
    photograph(page, HERE / "terminal.png", 1100, 36 + 22 * len(text.strip().splitlines()))


if __name__ == "__main__":
    main()
