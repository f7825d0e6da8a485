"""Tests of adapters on live servers."""
