"""The one exception that is for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in the input: one line that names the thing and the remedy.

    Commands print it without a traceback and end with exit code 2.
    """
