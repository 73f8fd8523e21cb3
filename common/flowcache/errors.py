"""The one exception type for mistakes that a user can mend."""


class UserError(ValueError):
    """A wrong value given by the user: shown as one line, exit code 2, no traceback.

    The message says what is wrong, the rule, the value found, and what to do.
    """
