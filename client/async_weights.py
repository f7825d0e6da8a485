"""The weights of a server for asyncio. The work is blocking, of the disk, of digests and of a trainer's ranks, so it is
done in threads; a call that is cancelled ends there, as it would have."""
