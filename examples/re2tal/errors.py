"""The one error of the example that a user is meant to read."""


class Re2TALError(Exception):
    """Something in a file, a configuration or a call is not as it must be; the message names it and the way out."""
