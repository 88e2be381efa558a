"""Whether the servers of a format load a file of it."""

from pathlib import Path

from qlora_kit.evaluation.servers.run import ServerCheck, try_servers
from qlora_kit.formats.registry import find_format


def check_servers(format_name: str, folder: Path, file: str = ".", *, timeout: float = 600.0) -> list[ServerCheck]:
    """Try every server that reads a format.

    Args:
        folder: the artifact's.
        file: the path inside it that a reader opens.
        timeout: seconds that one server may take.
    """
    written = find_format(format_name)
    return try_servers(
        written.checked_servers,
        folder,
        lambda server: written.server_problems(server, folder, file),
        needs_base=written.needs_base,
        timeout=timeout,
    )
