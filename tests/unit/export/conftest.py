"""A base with a license."""

from tests.served_artifact import base as base
