"""The error that a user can correct."""


class RunError(Exception):
    """Says what a user can correct: commands print its message alone, without a traceback."""

    def __init__(self, message: str) -> None:
        # A process that loads images puts its traceback before the message.
        is_wrapped = message.startswith("Caught ")
        super().__init__(message.rpartition("RunError: ")[2].strip() if is_wrapped else message)
