"""What a user's mistake must lead to: one line that says what is wrong."""

from collections.abc import Callable

import pytest

from flowcache.errors import UserError


def refuses(act: Callable[[], object], *parts: str) -> None:
    """Require one line of error that holds all the parts."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
