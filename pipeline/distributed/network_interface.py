"""Choose the network interface through which Gloo connects ranks on different nodes.

By default, Gloo uses the IP address to which the host's name resolves. On Debian and Ubuntu, this is 127.0.1.1, which
other nodes cannot reach. Runs with NCCL also use Gloo, for example to save checkpoints.
"""

import ipaddress
import logging
import socket
from contextlib import suppress

import psutil
from torch._C._distributed_c10d import Store

from pipeline.distributed.environment import master_address, set_gloo_interface

log = logging.getLogger(__name__)


def choose_gloo_interface(store: Store, rank: int, size: int) -> None:
    """Make Gloo use the network interface that leads to the other nodes, unless ``GLOO_SOCKET_IFNAME`` is set.

    Every rank must call this before it creates a process group.

    Args:
        store: the key-value store that the ranks share.
    """
    own = own_address_towards(*master_address())
    other_node = _find_other_node(store, rank, size, own)
    if not other_node:
        return
    if _is_loopback(own):  # the store is on this node
        own = own_address_towards(other_node, port=1)
    if (interface := interface_of(own)) and set_gloo_interface(interface):
        log.info("network   gloo uses %s (%s), which leads to the other nodes", interface, own)


def own_address_towards(host: str, port: int) -> str:
    """Return the IP address from which this host sends to another host, or "" if there is no route."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing, because this is UDP
                own: str = probe.getsockname()[0]
                return own
    return ""


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with this IP address, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            return str(name)
    return None


def _find_other_node(store: Store, rank: int, size: int, own: str) -> str:
    """Return an address that other nodes can reach, or "" if there are no other nodes or no such address."""
    store.set(f"address_{rank}", own)
    if rank == 0:
        addresses = [address.decode() for address in store.multi_get([f"address_{other}" for other in range(size)])]
        reachable = [address for address in addresses if not _is_loopback(address)]
        store.set("other_node", reachable[0] if reachable and len(set(addresses)) > 1 else "")
    found: str = store.get("other_node").decode()
    return found


def _is_loopback(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback
