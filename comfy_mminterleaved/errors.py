"""Errors that a user can fix. Every message is one sentence that names the value and what to do."""


class MMInterleavedError(Exception):
    """Base of all errors that a user's input can cause."""


class ImageError(MMInterleavedError, ValueError):
    """An image that cannot be read or used."""


class StoryError(MMInterleavedError, ValueError):
    """A story or story file that is invalid, or lacks something that a call needs."""


class StoryTooLongError(StoryError):
    """A story that does not fit the LLM's context or a table of relative positions."""


class SettingError(MMInterleavedError, ValueError):
    """A setting outside its range."""


class CheckpointError(MMInterleavedError, ValueError):
    """A checkpoint with missing, unexpected, wrongly shaped or unsafe content."""


class OutputError(MMInterleavedError, OSError):
    """A place that cannot be written to."""


class ServerError(MMInterleavedError, ConnectionError):
    """A server that does not answer, or answers with what cannot be used."""


class DeviceError(MMInterleavedError, RuntimeError):
    """A card that cannot be used any more in this process."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch says that the card, or the computer, has no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
