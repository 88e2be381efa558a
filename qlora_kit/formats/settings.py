"""Fields of a target as a manifest holds them."""

SMALL_GROUP = 32


def whole(value: object) -> int:
    """A whole number; 0 for what is none."""
    return value if isinstance(value, int) else 0


def is_coarse(group_size: int) -> bool:
    """Whether smaller groups are left to try."""
    return group_size < 0 or group_size > SMALL_GROUP
