"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in config, data or environment that the user can correct.

    The message is one line: it names the offending value and the fix. The command line prints it without a stack trace
    and exits with status 2. Anything else that escapes is a bug of ours and keeps its trace.
    """
