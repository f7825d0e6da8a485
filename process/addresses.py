"""IP addresses of sockets; a dual-stack socket reports IPv4 addresses mapped into IPv6 (``::ffff:…``)."""

from __future__ import annotations

import ipaddress


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address, and unmap IPv4 from IPv6; ``None`` for other text."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(text: str) -> bool:
    address = address_of(text)
    return address is not None and address.is_loopback
