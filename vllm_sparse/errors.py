"""Errors a user can cause, and the exit codes they map to.

Every message says what was found, what is allowed and what to do. The command line catches
:class:`UserError` once, prints the message as one paragraph and exits with ``exit_code``.
"""


class UserError(Exception):
    """Bad input or a machine that cannot do what was asked; the message is for the user."""

    exit_code = 2


class FormatError(UserError):
    """A checkpoint, config or file does not say what its format requires."""


class UnsupportedError(UserError):
    """The input is well-formed, but this project cannot do what it asks for."""


class NumericsError(UserError):
    """Values are wrong: NaN or Inf where numbers are needed, or a mask that is not 2:4."""


class CheckFailedError(UserError):
    """The command ran to its end and the check it was asked for failed."""

    exit_code = 1
