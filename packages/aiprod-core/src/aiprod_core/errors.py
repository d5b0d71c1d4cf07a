"""Errors that a person can mend. Command lines print the message and exit with code 2."""


class InputError(ValueError):
    """Something the user gave cannot work; the message says what, where and the remedy."""


class CheckpointError(InputError):
    """A weight file that cannot be used; the message names the file, the key and the remedy."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, PyTorch's on a GPU or on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
