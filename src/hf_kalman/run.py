"""`python -m hf_kalman.run COMMAND ...`: a command-line program that knows the architectures of this package.

    python -m hf_kalman.run lm_eval --model hf --model_args pretrained=FOLDER --tasks lambada_openai
    python -m hf_kalman.run trl sft --model_name_or_path FOLDER ...
    python -m hf_kalman.run train.py ...

COMMAND is a Python file, an installed program or a module. It runs in this process, after the registration; programs
that start further processes (`accelerate launch`) need `import hf_kalman` in what they start.
"""

import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int | str | None:
    """Run a program with its own arguments; what it returns is the exit status.

    Raises:
        SystemExit: no or an unknown command; the program's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    command = arguments[0]
    sys.argv = list(arguments)
    if Path(command).suffix == ".py" and Path(command).is_file():
        sys.path.insert(0, str(Path(command).resolve().parent))
        runpy.run_path(command, run_name="__main__")
        return None
    programs = list(entry_points(group="console_scripts", name=command))
    if programs:
        return programs[0].load()()
    named = all(part.isidentifier() for part in command.split("."))
    if named and find_spec(command.partition(".")[0]) is not None:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
        return None
    sys.exit(f"hf_kalman.run: {command!r} is neither a Python file nor an installed program or module.")


if __name__ == "__main__":
    sys.exit(main())
