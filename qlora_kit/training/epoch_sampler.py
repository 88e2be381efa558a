"""In which order a trainer reads its items."""

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from qlora_kit.data.order import SamplerOrder


class EpochSampler(Sampler[int]):
    """The items of an epoch in the kit's order, the same on every process.

    The epoch is asked for rather than told: accelerate 1.15 cannot tell a sampler its epoch where it skips batches for
    one of several processes (`skip_first_batches`), and a resumed run would read the rows of another epoch.
    """

    def __init__(self, order: SamplerOrder, items: int, epoch: Callable[[], int]) -> None:
        self.order = order
        self.items = items
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())

    def __len__(self) -> int:
        return self.items
