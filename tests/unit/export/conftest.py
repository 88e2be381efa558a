"""A base with a licence."""

from tests.served_artifact import base as base
