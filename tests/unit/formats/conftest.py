"""A base with a license, a finished run of it, and facts about an artifact made from both."""

from tests.served_artifact import base as base
from tests.served_artifact import facts as facts
from tests.served_artifact import run as run
