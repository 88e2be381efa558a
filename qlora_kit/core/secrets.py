"""Secrets of the surroundings, kept out of everything that is recorded or sent."""

import os
import re

MASK = "***"
SHORTEST_SECRET = 8  # characters; a shorter value, such as `true`, stands in a record for other reasons too
_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(\b[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)[A-Z0-9_]*=)(\"[^\"]*\"|'[^']*'|\S+)"
)
_IN_URL = re.compile(r"(://)[^/@\s]+@")


def masked(text: str) -> str:
    """The text without secrets: values of environment variables named so, `NAME_TOKEN=value`, and a URL's user."""
    for value in _secrets():
        text = text.replace(value, MASK)
    return _IN_URL.sub(rf"\1{MASK}@", _ASSIGNED.sub(rf"\1{MASK}", text))


def _secrets() -> list[str]:
    """Values of variables whose name says that they are secret, longest first."""
    named = (value for name, value in os.environ.items() if _NAME.search(name))
    return sorted({value for value in named if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)
