"""What every process of a server needs: its start from a launcher, its log, the addresses it talks to."""
