"""Silences notices of libraries that a user of the kit can do nothing about."""

import contextlib
import io
import logging
from collections.abc import Iterator

# bitsandbytes asks for a kernel that lives on a hub; torchao tries builds for other GPUs, and torch deprecates what
# torchao calls.
NOISY_LOGGERS = ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree", "tokenicer", "httpx")


def quiet_loggers() -> None:
    """Raise the level of noisy loggers to errors; called once, before the libraries are imported."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def no_banners() -> Iterator[None]:
    """Leave out what libraries print while the block runs, as a banner where peft imports a library."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
