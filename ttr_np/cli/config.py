"""Print versions, backends, threads and devices, as a bug report needs them."""

from __future__ import annotations

import argparse

import ttr_np


def declare(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    ttr_np.show_config()
