"""What a user can get wrong: errors whose message is one line that names the thing and the cure."""


class MoescopeError(Exception):
    """Base of every error meant for the user; the workflow prints its message alone, without a traceback."""
