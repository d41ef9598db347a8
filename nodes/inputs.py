"""Checks a node's inputs against its schema, because ComfyUI checks neither linked values nor NaN."""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real

import comfy_execution.caching
from comfy.cli_args import args as comfy_args
from comfy_api.latest import io

from ..comfy_mminterleaved.errors import SettingError

LOSES_OUTPUTS = "ComfyUI 0.3 loses what nodes pass on when it is started with --cache-none; start it without, or with --cache-lru 10."


def cache_loses_outputs() -> bool:
    """Whether this ComfyUI runs with a cache that forgets outputs still needed, and cannot hold nodes that expand."""
    return getattr(comfy_args, "cache_none", False) and hasattr(comfy_execution.caching, "DependencyAwareCache")


def check_value(spec, value, names_files: bool = False) -> None:
    """Raises SettingError for a value that the widget of an input could not hold.

    Args:
        spec: An input of an `io.Schema`.
        names_files: Whether lists are of files, which come and go: the node looks for them itself.
    """
    if isinstance(spec, io.Int.Input):
        low, high, step = spec.min, spec.max, spec.step or 1
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)  # numpy's are, too
        if not is_whole or not low <= value <= high or (value - low) % step:
            kind = "a whole number" if step == 1 else f"a multiple of {step}"
            raise SettingError(f"{spec.id} must be {kind} from {low} to {high}, not {_shortened(value)}.")
    elif isinstance(spec, io.Float.Input):
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not spec.min <= value <= spec.max:
            raise SettingError(
                f"{spec.id} must be a number from {spec.min:g} to {spec.max:g}, not {_shortened(value)}."
            )
    elif isinstance(spec, io.Boolean.Input):
        if type(value) is not bool:
            raise SettingError(f"{spec.id} must be true or false, not {_shortened(value)}.")
    elif isinstance(spec, io.Combo.Input) and value in spec.options:
        return
    elif isinstance(spec, (io.String.Input, io.Combo.Input)):
        if not isinstance(value, str):
            raise SettingError(f"{spec.id} must be text, not {_shortened(value)}.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SettingError(f"{spec.id} has half a character at place {error.start}; type it anew.") from None
        if isinstance(spec, io.Combo.Input) and not names_files:
            names = ", ".join(spec.options[:8]) + ("" if len(spec.options) <= 8 else " and the others of its list")
            raise SettingError(f"{spec.id} must be one of {names}, not {_shortened(value)}.")


def _shortened(value) -> str:
    if type(value) is int and abs(value) >= 10**30:
        return "one of over thirty digits"
    return f"{value!r:.60}"


def check_inputs(node):
    """A class decorator: `execute` looks at its inputs before anything else."""
    execute = node.execute.__func__
    schema = node.define_schema()
    specs, names_files = {spec.id: spec for spec in schema.inputs}, "validate_inputs" in node.__dict__

    @functools.wraps(execute)
    def checked(cls, *args, **inputs):
        is_lost = schema.enable_expand or any(inputs.get(s.id) is None for s in schema.inputs if not s.optional)
        if is_lost and cache_loses_outputs():
            raise SettingError(LOSES_OUTPUTS)
        for name, value in inputs.items():
            if name in specs and value is not None:
                for item in value if schema.is_input_list else [value]:
                    check_value(specs[name], item, names_files)
        return execute(cls, *args, **inputs)

    node.execute = classmethod(checked)
    return node
