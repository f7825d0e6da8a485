"""IP addresses as clients and servers meet them: on a socket for both families, IPv4 comes as IPv6 (``::ffff:…``)."""

from __future__ import annotations

import ipaddress


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``text`` is, IPv4 also where it is mapped into IPv6; ``None`` for anything else."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(text: str) -> bool:
    """Whether ``text`` is an address of this machine that no other one can reach."""
    address = address_of(text)
    return address is not None and address.is_loopback
