"""Errors that a person can mend. Command lines print the message and exit with code 2."""


class InputError(ValueError):
    """Something the user gave cannot work; the message says what, where and the remedy."""


class CheckpointError(InputError):
    """A weight file that cannot be used; the message names the file, the key and the remedy."""
