"""Write a trained model as one folder that anybody can load: python -m stu.export RUN FOLDER. See --help."""

import argparse
import sys
from collections.abc import Sequence

from stu.errors import OptionError

EXAMPLES = """\
RUN is a run directory (its best weights), a checkpoint, or a folder with exactly one run. FOLDER gets
model.safetensors, config.json and README.md. `stu.load(FOLDER)` and `python -m stu.predict FOLDER` use it without data/
and without the run, and it may come from strangers: nothing in it is executed.

  python -m stu.export runs/digits/stu/name exported"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder; return the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stu.export", epilog=EXAMPLES, formatter_class=form, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="what was trained")
    parser.add_argument("folder", metavar="FOLDER", help="where it is written")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model that is there")
    options = parser.parse_args(arguments)
    try:
        from stu.saved.loading import load  # takes seconds

        load(options.run).save(options.folder, overwrite=options.overwrite)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
