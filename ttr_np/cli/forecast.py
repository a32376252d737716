"""Placeholder."""
def declare(p): pass
def run(a): pass
