"""A GPU for machines without one: tests set its figures and read the calls it got."""

from foam_lightning.memory.device import DeviceCosts, Gpu, GpuUsage


class FakeGpu(Gpu):
    """A card of 24 GB, 500 MB of which are the context of this process.

    Attributes:
        growth: Bytes by which the context grows when a run begins.
    """

    def __init__(self, name: str = "Fake 24") -> None:
        super().__init__()
        self.total = 24_000_000_000
        self.free = 23_500_000_000
        self.taken = GpuUsage(0, 0, 0)
        self.costs = DeviceCosts(context=500_000_000, workspace=17_000_000)
        self.growth = 0
        self.asked: list[str] = []
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def outside(self) -> int:
        """The bytes in use, none of which are those of torch's allocator."""
        return self.total - self.free

    def limit(self, fraction: float) -> None:
        self.asked.append(f"limit {fraction:.6g}")

    def usage(self) -> GpuUsage:
        return self.taken

    def reset_peaks(self) -> None:
        self.asked.append("forget peaks")
        self.free -= self.growth

    def measure(self) -> DeviceCosts:
        self.asked.append("measure")
        return self.costs
