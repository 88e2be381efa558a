"""A finished run of the base, and facts about an artifact made from both."""

from tests.served_artifact import facts as facts
from tests.served_artifact import run as run
