"""Write `report.html` of a run: `python -m lit_rlhf.report FOLDER`."""

from __future__ import annotations

import argparse

from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail
from lit_rlhf.monitoring.page import write_report


def main() -> None:
    """Entry point of `python -m lit_rlhf.report`."""
    parser = argparse.ArgumentParser(prog="python -m lit_rlhf.report", description=__doc__)
    parser.add_argument("folder", nargs="+", help="of a run: where its metrics.csv lies")
    try:
        for folder in parser.parse_args().folder:
            print(write_report(folder))
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'the report'} cannot be used ({error.strerror or error})")


if __name__ == "__main__":
    main()
