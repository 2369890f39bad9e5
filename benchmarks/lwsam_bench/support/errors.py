"""Errors that are the user's to fix: a message and an exit code, never a traceback."""


class UserError(Exception):
    """What went wrong and what to do about it, as the user should read it."""
