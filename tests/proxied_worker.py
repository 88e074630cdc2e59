"""A worker whose links to other stages pass through proxies that can be told to misbehave (link_proxy.py)."""

from collections.abc import Sequence

from link_proxy import LinkProxy

from pomarium.worker.metal_worker import MetalWorker


class ProxiedWorker(MetalWorker):
    """Asked for with worker_cls="proxied_worker.ProxiedWorker".

    Attributes:
        proxies: one for each stage, by rank, through which this one reaches it.
    """

    def connect(self, addresses: Sequence[str]) -> None:
        self.proxies = [LinkProxy(address) for address in addresses]
        super().connect([proxy.address for proxy in self.proxies])

    def shutdown(self) -> None:
        super().shutdown()
        for proxy in self.proxies:
            proxy.close()
