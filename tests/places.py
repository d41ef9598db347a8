"""Where the tests' files are."""

from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny"
