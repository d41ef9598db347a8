"""The command line: mminterleaved tell | write | draw | ask | caption | export | finetune | convert | info."""

from __future__ import annotations

import sys

from ..errors import MMInterleavedError, is_out_of_memory
from .commands import COMMANDS, print_status
from .parser import make_parser

MEMORY_HINT = (
    "on a card, a smaller --memory lets blocks take turns, and --kv-cache fp8 or a smaller --size takes less; a model "
    "of `convert --quantize q4_0` is the smallest"
)
MEMORY_HINTS = {
    "convert": "close other programs and give the same command again, which goes on",
    "info": "close other programs",
    "finetune": "a smaller --batch, --reconstruction 0 or --only llm takes less",
}


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
        if not is_out_of_memory(error):
            raise
        print_status(f"Error: out of memory; {MEMORY_HINTS.get(args.command, MEMORY_HINT)}.")
        return 2
    except KeyboardInterrupt:
        print_status("Stopped; what was finished is kept.")
        return 130
