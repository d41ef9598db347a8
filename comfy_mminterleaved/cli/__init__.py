"""The command line: mminterleaved tell | write | draw | ask | caption | convert | info."""

from __future__ import annotations

import sys

from ..errors import MMInterleavedError
from .commands import COMMANDS, print_status
from .parser import make_parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can fix, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not hold every character of a story
            stream.reconfigure(errors="replace")
    args = make_parser(COMMANDS).parse_args(argv)
    try:
        return args.run(args)
    except MMInterleavedError as error:
        print_status(f"Error: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print_status(
            "Error: out of memory; give --memory a smaller size, so that blocks take turns, --kv-cache fp8, a smaller "
            "--size, or a model of `convert --quantize q4_0`."
        )
        return 2
    except KeyboardInterrupt:
        print_status("Stopped; what was finished is kept.")
        return 130


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    import torch

    is_on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return is_on_cpu or isinstance(error, torch.OutOfMemoryError)
