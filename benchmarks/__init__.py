"""Benchmarks: run by hand, printed with versions and hardware, never asserted in tests."""
