"""Forwards: which calls may merge, how they are collated, and the stages around the component's call."""
