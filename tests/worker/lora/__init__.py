"""Tests of the adapters on a rank."""
